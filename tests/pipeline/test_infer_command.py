"""`python -m pipeline.infer`: the command line, and a kill in the middle of the work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.infer import main, parser, settings
from stages.errors import UserError
from stages.images import encode
from stages.inference import outputs
from tests.support.models import make_model, scene


def options(*words: str) -> Any:
    return parser().parse_args(["--model", "m", "--input", "in", "--output", "out", *words])


def test_settings_are_the_stages_and_the_clusters() -> None:
    given = settings(options("--set", "format=webp", "--set", "resources.infer_actors=3", "--overwrite"))
    assert given.infer.format == "webp"
    assert given.infer.overwrite
    assert given.resources.infer_actors == 3


@pytest.mark.parametrize(
    ("word", "named"), [("format=gif", "format"), ("colour=1", "colour"), ("quality=0", "quality")]
)
def test_a_wrong_setting_is_named_in_one_line(word: str, named: str) -> None:
    with pytest.raises(UserError, match=f"--set {named}"):
        settings(options("--set", word))


def test_a_model_that_is_not_there_ends_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        str(tmp_path / "no"),
        "--input",
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    assert "there is no model.json" in capsys.readouterr().err


@pytest.mark.parametrize(("read", "output"), [("in", "in/out"), ("in/images", "in"), ("in/samples/1", "in")])
@pytest.mark.parametrize("overwrite", [True, False])
def test_images_are_never_generated_over_those_that_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], read: str, output: str, overwrite: bool
) -> None:
    image = tmp_path / read / "1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(content := encode.encode_image(scene(1, 96, 64)["source"], "png"))
    (tmp_path / "in" / outputs.MANIFEST).write_text("{}")
    words = ["--model", str(make_model(tmp_path / "model")), "--input", str(image.parent)]
    words += ["--output", str(tmp_path / output), *["--overwrite"] * overwrite]
    assert main(words) == 2
    assert "would be in one folder" in capsys.readouterr().err
    assert image.read_bytes() == content


@pytest.mark.slow
def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(132):
        (folder / f"{index:03d}.png").write_bytes(encode.encode_image(scene(index, 96, 64)["source"], "png"))
    make_model(tmp_path / "model", dropout=True)
    out = tmp_path / "out"
    words = ["--model", str(tmp_path / "model"), "--input", str(folder), "--output", str(out)]
    words += ["--set", "resources.infer_actors=1", "--set", "resources.threads_per_worker=1"]
    command = [sys.executable, "-m", "pipeline.infer", *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while not list((out / "images").glob("*.png")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {
        unit: Path(outputs.part_uri(str(out), unit)).stat().st_mtime_ns
        for unit in outputs.finished_units(str(out))
    }
    assert len(finished) < 3
    subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    rows = [row for uri in outputs.parts(str(out)) for row in pq.read_table(uri).to_pylist()]
    assert sorted(row["key"] for row in rows) == [f"{index:03d}" for index in range(132)]
    assert all(zlib.crc32((out / row["output"]).read_bytes()) == row["crc"] for row in rows)
    there = {path.name for path in (out / "images").iterdir() if not path.name.startswith(".")}
    assert there == {f"{index:03d}.png" for index in range(132)}
    for unit, written in finished.items():
        assert Path(outputs.part_uri(str(out), unit)).stat().st_mtime_ns == written
    clusters = ray.is_initialized()
    assert main(words) == 0
    assert "images 132, errors 0" in capsys.readouterr().out
    assert ray.is_initialized() == clusters  # none is started for work that is done
