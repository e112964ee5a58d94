"""Small inputs and commands that once failed, each with what is to become of it. The inputs are outside the
repository: `README.md` beside them says what each is.

A case is a folder with a config `c.yaml`, in which HERE is the folder's path. The stages run in this process.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
import yaml
from PIL import Image

from pipeline import cli, config as configuration, infer as infer_command, run as command
from pipeline.dag import steps
from pipeline.runner import execute, plan, select
from pipeline.session import run_view
from stages import infer
from stages.base import Resources, Role
from stages.config.infer import InferConfig
from stages.errors import PixloomError, StageError, UserError
from stages.images import geometry
from stages.inference import outputs
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample
from stages.tracking.run import Run
from tests.support.here import tasks_here, workers_here
from tests.support.models import make_model

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT.parent / "shared" / "cases"


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the inputs: results are written beside them."""
    if not CASES.is_dir():
        pytest.skip(f"NOT RUN: needs the inputs in {CASES}, which are not there")
    return Path(shutil.copytree(CASES, tmp_path_factory.mktemp("cases") / "cases"))


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's log would stay on a stream of its test."""
    monkeypatch.setattr(cli, "log_to_stdout", lambda: None)


def config_file(cases: Path, name: str) -> Path:
    path = cases / name / "here.yaml"
    path.write_text((cases / name / "c.yaml").read_text().replace("HERE", str(cases / name)))
    return path


class Shards:
    """The finished shards of a case."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.spec: DatasetSpec = dataset.load(folder)

    @property
    def pairs(self) -> int:
        return sum(self.spec.rows(split) for split in self.spec.splits)

    @cached_property
    def samples(self) -> list[Sample]:
        splits = self.spec.splits
        return [s for split in splits for s in dataset.read_split(self.folder, self.spec, split)]

    def values(self, role: Role) -> np.ndarray:
        """The role's images in the order of their keys."""
        return np.stack([s.images[role] for s in sorted(self.samples, key=lambda s: s.key)])


def shards(path: Path, *settings: str) -> Shards:
    """Run ingest, pair and shard of a case."""
    config = configuration.load(str(path), list(settings), None)
    chosen = select(plan(steps(config), config.workspace), only=None, until="shard")
    with tasks_here():
        execute(chosen, config.resources, parent=Run(), view=run_view(config, chosen, ""))
    return Shards(chosen[-1].folder)


# -- cases that are read -------------------------------------------------------------------------------------

READ = {
    "base": 12, "e17": 10, "e20": 13, "e30": 12, "e53": 10, "s01": 10, "s01b": 10, "s02": 10, "s03": 10,
    "s03b": 10, "s04": 10, "s05": 10, "s07": 14, "s08": 10, "s08b": 10, "t02": 10, "t04": 10, "t05": 10,
    "t12": 10, "t15": 10,
}  # fmt: skip
"""Cases of which every pair is read, and how many there are."""

WARNED = {
    "e17": ["images .* of 32x64 are stretched to 64x64"],
    "s03b": ["source: values .* little contrast; shard.range"],
    "s04": ["source: values 0 to 16 of 0 to 255", "target: values 0 to 16 of 0 to 255"],
    "e53": ["source: values 5 to 4085 of 0 to 65535", "target: values"],
}
"""What is said of them, besides."""

IDS_0_TO_3 = {"s01", "s01b", "e30"}


@pytest.mark.parametrize("name", READ)
def test_a_case_is_read_whole(name: str, cases: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = shards(config_file(cases, name))
    assert made.pairs == READ[name]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    said = [text for text in warned if "suspects.csv" not in text]  # of ten pairs of noise it is a guess
    assert len(said) == len(WARNED.get(name, []))
    for text, wanted in zip(said, WARNED.get(name, []), strict=True):
        assert re.search(wanted, text)
    if name in IDS_0_TO_3:
        assert np.unique(made.values("source")).tolist() == [0, 1, 2, 3]


def test_sixteen_bits_keep_their_depth_and_their_polarity(cases: Path) -> None:
    deep = shards(config_file(cases, "e53")).values("source")
    assert deep.dtype == np.uint16
    assert all(len(np.unique(image)) > 100 for image in deep)  # 16 levels without their low byte
    inverted = shards(config_file(cases, "s05")).values("source")
    assert abs(inverted[0].mean() - 28826) < 1  # as Pillow inverts it with 8 bits; 36708 if it is not


def test_a_range_shows_twelve_bits_as_256_levels(cases: Path) -> None:
    made = shards(config_file(cases, "s04"), "shard.range=[0, 4080]")
    assert np.ptp(made.values("source")) == 255


def test_bands_and_pages_of_satellite_tiffs_are_as_an_independent_reader_has_them(cases: Path) -> None:
    first = tifffile.imread(sorted((cases / "s03" / "d" / "A").iterdir())[0])
    made = shards(config_file(cases, "s03")).values("source")
    assert made.shape[1:] == (64, 64, 4)
    assert np.allclose(made[0], first / 127.5 - 1, atol=1e-6)
    whole = tifffile.imread(sorted((cases / "s02" / "d" / "A").iterdir())[0], key=0)
    small = geometry.resize(whole, (64, 64), "rgb")
    assert np.array_equal(shards(config_file(cases, "s02")).values("source")[0], small)


def test_a_missing_split_is_known_before_training(cases: Path) -> None:
    made = shards(config_file(cases, "e20"))
    assert made.spec.scored_split(None, "infer.split") == "val"
    with pytest.raises(UserError, match=r"infer.split: .* the split 'test'"):
        infer.check(InferConfig(split="test"), made.folder)


def test_masks_and_colours_have_a_palette(cases: Path) -> None:
    masks = shards(config_file(cases, "e52"), "shard.palette={source: [0, 255]}")
    assert np.unique(masks.values("source")).tolist() == [0, 1]
    picture = np.asarray(Image.open(sorted((cases / "s06" / "d" / "A").iterdir())[0]).convert("RGB"))
    colours = np.unique(picture.reshape(-1, 3), axis=0).tolist()
    made = shards(config_file(cases, "s06"), f"shard.palette={yaml.safe_dump({'source': colours})}")
    assert made.pairs == 10


# -- cases that are refused ----------------------------------------------------------------------------------

REFUSED = {
    "e07": (UserError, "tracking: MLflow cannot register a model as 'team/street'"),
    "e50": (UserError, "shard: kinds.target: networks generate colours, not labels: .*kind rgb"),
    "e52": (StageError, r"label_range 10; '0' \(source\): id 255, classes are 0..1; .*shard.palette lists"),
    "e63": (UserError, "workspace: .* is in ingest.locations.0.uri .*results would be read as images"),
    "s06": (StageError, r"wrong_kind 10; '0' \(source\): ids need one channel .*shard.palette reads"),
    "t11": (StageError, "several images of one role have one key: give a table a `key` column"),
    "t16": (UserError, "pairs.jsonl: line 1: not a JSON object but a list; write one object a line"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_is_refused_in_one_line_that_says_what_to_do(name: str, cases: Path) -> None:
    kind, message = REFUSED[name]
    with pytest.raises(PixloomError, match=message) as caught:
        shards(config_file(cases, name))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_every_case_has_its_outcome(cases: Path) -> None:
    folders = {path.parent.name for path in cases.glob("*/c.yaml")}
    assert folders == READ.keys() | REFUSED.keys()


# -- inference -----------------------------------------------------------------------------------------------


def test_every_picture_of_a_folder_becomes_an_image(cases: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", source="rgb")
    config = InferConfig(input=str(cases / "e10" / "in"))
    resources = Resources(infer_actors=1, io_threads=2, threads_per_worker=1, gpu=False)
    out = str(tmp_path / "out")
    with workers_here(infer), pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "uses_gpu", lambda _: False)
        outcome = infer.run(config, resources, output=out, track=Run(), model=str(model))
    rows = [row for uri in outputs.parts(out) for row in pq.read_table(uri).to_pylist()]
    assert sorted(Path(row["source"]).name for row in rows) == sorted(
        path.name for path in (cases / "e10" / "in").iterdir()
    )
    assert outcome.counts["images"] == 8, rows


@pytest.mark.long
@pytest.mark.slow
def test_a_trained_model_takes_the_maps_it_was_trained_on_wherever_it_runs(
    cases: Path, tmp_path: Path
) -> None:
    place, file = cases / "e30", config_file(cases, "e30")
    run("pipeline.run", "-c", str(file))
    for maps in ("A", "A0", "A3"):
        words = ("--model", "models:/pixloom@champion", "--input", str(place / "d" / maps))
        tracking = f"tracking.uri=sqlite:///{place}/ws/mlflow/mlflow.db"
        run("pipeline.infer", *words, "--output", str(tmp_path / maps), "--set", tracking)
    images = {
        maps: [np.asarray(Image.open(path)) for path in sorted((tmp_path / maps / "images").rglob("*.png"))]
        for maps in ("A", "A0", "A3")
    }
    assert len(images["A"]) == 12
    for void, mapped in zip(images["A"], images["A0"], strict=True):
        assert np.array_equal(void, mapped)  # 255 is class 0, as in training
    mlflow.set_tracking_uri(f"sqlite:///{place}/ws/mlflow/mlflow.db")
    served = mlflow.pyfunc.load_model("models:/pixloom@champion")
    for maps in ("A", "A0"):
        data = pd.DataFrame({"image": [(place / "d" / maps / "0.png").read_bytes()]})
        answer = served.predict(data)
        picture = np.asarray(Image.open(io.BytesIO(answer.image[0])))
        assert np.array_equal(picture, images[maps][0])


@pytest.mark.long
@pytest.mark.slow
def test_a_data_set_of_train_and_val_is_trained_generated_and_registered(cases: Path) -> None:
    output = run("pipeline.run", "-c", str(config_file(cases, "e20")))
    assert "generates the val split: 3 pairs" in output
    assert re.search(r"^register ", output, re.MULTILINE)


def run(module: str, *words: str) -> str:
    """A command in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- commands ------------------------------------------------------------------------------------------------
# e42 is in tests/pipeline/test_planning.py, e61 in tests/pipeline/test_cli.py, e41 in
# tests/inference/test_outputs.py.


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a command in this process exits with 2."""

    def line(*words: str, main: Callable[[list[str]], int] = command.main) -> str:
        assert main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return line


def test_commands_that_cannot_work_say_so_in_a_line(
    cases: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("-c", str(config_file(cases, "base")), "--plan")
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refused(*base, "--set", f"workspace={tmp_path / 'file'}")  # e23
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    assert "NO_SUCH_VARIABLE" in refused(*base, "--set", "workspace=$NO_SUCH_VARIABLE/ws")  # cfg_env
    assert "quote" in refused(*base, "--set", "ingest.locations.0.pattern={key}.png")  # e74
    assert "--until evalute: no such stage; there are ingest, pair" in refused(*base, "--until", "evalute")
    file = tmp_path / "braces.yaml"
    file.write_text("ingest: {locations: [{uri: d, role: source, pattern: {key}.png}]}\n")
    assert "quote" in refused("-c", str(file), "--plan")


def test_a_workspace_with_a_variable_is_expanded(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    loaded = configuration.load(str(config_file(cases, "base")), ["workspace=$HOME/ws"], None)
    assert loaded.workspace == "/home/somebody/ws"


def test_the_command_as_a_file_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "pipeline/run.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert done.stderr == "start it as a module, from the repository's folder: python -m pipeline.run\n"


def test_one_image_is_an_input(cases: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", source="rgb")
    options = infer_command.parser().parse_args(
        ["--model", str(model), "--input", str(cases / "e10" / "in" / "1.png"), "--output", "o"]
    )
    work = infer.prepare(
        infer_command.settings(options).infer, output=str(tmp_path / "out"), tracking_uri=None
    )
    assert work.rows == 1


def test_archives_of_windows_and_with_absolute_names_are_read(cases: Path, tmp_path: Path) -> None:
    folder = cases / "base"
    absolute = tmp_path / "absolute.tar"
    with tarfile.open(absolute, "w") as tar:
        for path in sorted((folder / "d").rglob("*.png")):
            info = tar.gettarinfo(path)
            info.name = f"/data/{path.relative_to(folder / 'd')}"
            with path.open("rb") as data:
                tar.addfile(info, data)
    names = zipfile.ZipFile(cases / "e71" / "win.zip").namelist()
    inside = names[0].replace("\\", "/").rpartition("/")[0].rpartition("/")[0]
    for protocol, archive, top in (("zip", cases / "e71" / "win.zip", inside), ("tar", absolute, "data")):
        locations = [
            {"uri": f"{protocol}://{top}/{name}::{archive}", "role": role}
            for name, role in (("A", "source"), ("B", "target"))
        ]
        settings = (f"ingest.locations={locations}", f"workspace={tmp_path / protocol}")
        assert shards(config_file(cases, "base"), *settings).pairs == 12
