"""The whole pipeline as a process: to the end, again, and stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from pipeline import run as command, sample
from stages.shards import dataset

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 40

TINY: dict[str, Any] = {
    "pair": {"split": {"val": 0.1, "test": 0.3, "seed": 0}, "pairs_per_shard": 8},
    "shard": {"size": [64, 32], "row_group_rows": 4},
    "train": {
        "model": {
            "kind": "pix2pixhd",
            "width": 4,
            "enhancers": 1,
            "downsamplings": 2,
            "blocks": 1,
            "enhancer_blocks": 1,
            "discriminator_width": 4,
            "discriminators": 2,
        },
        "phases": [
            {
                "name": "global",
                "kind": "global",
                "enhancers": 0,
                "discriminators": 1,
                "epochs": 3,
                "batch": 2,
            },
            {"name": "local", "kind": "local", "enhancers": 1, "discriminators": 2, "epochs": 1, "batch": 2},
        ],
    },
}
SHORT = [phase | {"epochs": 1, "batch": 8} for phase in TINY["train"]["phases"]]
STEPS = [
    "ingest",
    "pair",
    "shard",
    "train-global",
    "train-local",
    "infer",
    "evaluate",
    "report",
    "register",
]


class Place:
    """A folder to run the pipeline in, as a user would: data, a config, a workspace."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        self.workspace = folder / "workspace"
        self.output = ""  # of the fixture's run
        self.ray = Path(tempfile.mkdtemp(prefix="pl-"))  # Unix sockets want short paths
        weakref.finalize(self, shutil.rmtree, self.ray, ignore_errors=True)
        locations = [
            {"uri": str(data / layer), "role": role, "pattern": "{key}.png"}
            for layer, role in {"label": "source", "photo": "target", "instance": "instance"}.items()
        ]
        values = {"extends": str(ROOT / "pipeline.yaml"), "workspace": str(self.workspace), **TINY}
        self.config, self.log = folder / "tiny.yaml", folder / "run.log"
        self.config.write_text(yaml.safe_dump(values | {"ingest": {"locations": locations}}))

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """The run as a process of its own; its output goes to `log`."""
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.run", "-c", str(self.config), *words],
                cwd=ROOT,
                env=os.environ | {"RAY_TMPDIR": str(self.ray)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *words: str, expect: int = 0) -> str:
        """Run to the end in a process of its own; returns its output."""
        process = self.start(*words)
        try:
            process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        output = self.log.read_text()
        assert process.returncode == expect, output
        return output

    def stop_when(self, sent: signal.Signals, condition: Callable[[], bool], *words: str) -> int:
        """Start the run, and signal the driver as soon as the condition holds; its exit code."""
        process = self.start(*words)
        deadline = time.monotonic() + 600
        while not condition():
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the moment to stop never came"
            time.sleep(0.05)
        process.send_signal(sent)
        return process.wait(timeout=400)

    def step(self, name: str) -> Path:
        """The one folder of a step."""
        (folder,) = self.workspace.glob(f"{name}-" + "?" * 12)
        return folder

    def marker(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.step(name) / "_SUCCESS.json").read_text())
        return value

    def done(self, name: str) -> bool:
        return any(self.workspace.glob(f"{name}-*/_SUCCESS.json"))

    def weights(self, phase: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.step(phase) / "model").glob("*.safetensors")}

    def images(self) -> dict[str, bytes]:
        folder = self.step("infer") / "images"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    sample.write(str(folder), pairs=PAIRS, width=64, height=32, seed=0)
    (folder / "photo" / "scene_00003.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Place:
    """An undisturbed run."""
    place = Place(tmp_path_factory.mktemp("whole"), data)
    place.output = place.run(*LIMIT)
    return place


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command in this process, for runs that start no cluster: exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def run(place: Place, *words: str) -> tuple[int, str, str]:
        code = command.main(["-c", str(place.config), *words])
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


LIMIT = ("--set", "shard.max_reject_fraction=0.1")


def test_the_run_prints_its_results_its_report_and_how_to_open_mlflow(whole: Place) -> None:
    output = whole.output
    assert str(whole.step("report") / "report.html") in output
    assert "mlflow ui" in output or "mlflow server" in output
    results = {line.split()[0]: line for line in output.splitlines() if line.startswith(tuple(STEPS))}
    assert list(results) == STEPS
    assert f"l1 {whole.marker('evaluate')['metrics']['l1']:.4g}" in results["evaluate"]


def test_every_line_of_the_console_is_expected_and_none_is_printed_twice(whole: Place) -> None:
    step = f"({'|'.join(STEPS)})"
    ours = re.compile(
        rf"\d\d:\d\d:\d\d  {step} +[^ ].*"  # the log
        rf"|step +time +results|{step} +\d+ (s|min) .*"  # the table of results
        r"|(scores|report|runs) +[^ ].*"  # where to look
        # Ray's C++ about a pool of Ray Data, which keeps those arguments alive. RAY_BACKEND_LOG_LEVEL
        # would hide it with all other errors, and prints a line of its own.
        r"|\[.*core_worker.cc:\d+: Actor .*'MapWorker.* has constructor arguments in the object store .*"
    )
    lines = [line for line in whole.output.splitlines() if line]
    assert [line for line in lines if not ours.fullmatch(line)] == []
    without_time = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines]
    assert len(set(without_time)) == len(lines)


def test_every_step_leaves_its_marker_and_the_counts_agree(whole: Place) -> None:
    assert all(whole.done(name) for name in STEPS)
    spec = dataset.load(str(whole.step("shard")))
    rows = {split: spec.rows(split) for split in spec.splits}
    assert sum(rows.values()) == PAIRS - 1  # one photo is torn: its pair is in quarantine
    assert len(whole.images()) == rows["test"]
    metrics = pq.read_table(whole.step("evaluate") / "metrics.parquet")
    assert metrics.num_rows == rows["test"]


def test_the_torn_photo_is_in_quarantine_with_its_reason(whole: Place) -> None:
    tables = [pq.read_table(path) for path in whole.step("shard").glob("quarantine-*.parquet")]
    rejected = [row for table in tables for row in table.to_pylist()]
    assert [row["key"] for row in rejected] == ["scene_00003"]
    assert rejected[0]["reason"]
    assert rejected[0]["reason"] in (whole.step("report") / "report.html").read_text()


def test_mlflow_holds_one_parent_and_a_finished_child_for_each_step(whole: Place) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{whole.workspace}/mlflow/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "street-sample"]
    runs = client.search_runs([experiment.experiment_id])
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(children) == set(STEPS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == len(STEPS) + 1
    phase = children["train-global"]
    history = client.get_metric_history(phase.info.run_id, "generator/gan")
    assert [m.step for m in history] == sorted({m.step for m in history})  # no step twice
    assert client.list_artifacts(phase.info.run_id)  # sample pictures


def test_again_nothing_reruns_and_no_ray_starts(
    whole: Place, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    clusters = ray.is_initialized()
    code, output, _ = run_here(whole, *LIMIT)
    assert code == 0
    assert "nothing to do" in output
    assert ray.is_initialized() == clusters


def test_another_model_name_registers_the_model_again_and_nothing_else_runs(
    whole: Place, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    clusters = ray.is_initialized()
    code, output, _ = run_here(whole, *LIMIT, "--set", "tracking.model=other")
    assert code == 0
    assert "models:/other/1; now champion" in output
    assert "nothing to do" in run_here(whole, *LIMIT, "--set", "tracking.model=other")[1]
    assert ray.is_initialized() == clusters


def test_plan_names_what_a_change_would_rerun(
    whole: Place, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    def planned(setting: str) -> dict[str, str]:
        code, output, _ = run_here(whole, *LIMIT, "--plan", "--set", setting)
        assert code == 0
        return {line.split()[0]: line for line in output.partition("\n\n")[0].splitlines()}

    rows = planned("train.phases.1.epochs=2")
    assert " done " in rows["train-global"]
    assert " to do " in rows["train-local"]
    assert "phase.epochs" in rows["train-local"]
    assert "after train-local" in rows["infer"]
    rows = planned("tracking.model=third")
    assert [name for name in STEPS if " to do " in rows[name]] == ["register"]
    rows = planned("resources.io_threads=3")
    assert all(" done " in rows[name] for name in STEPS)


def test_stopped_in_shard_killed_in_train_and_in_infer_and_resumed_comes_to_the_same_end(
    whole: Place, data: Path, tmp_path: Path
) -> None:
    place = Place(tmp_path, data)

    assert (
        place.stop_when(signal.SIGINT, lambda: any(place.workspace.glob("shard-*/_parts/*.json")), *LIMIT)
        == 130
    )
    assert "the same command continues" in place.log.read_text()
    assert place.done("ingest")
    place.stop_when(
        signal.SIGKILL, lambda: any(place.workspace.glob("train-global-*/**/*.safetensors")), *LIMIT
    )
    assert place.done("shard")
    assert not place.done("train-global")
    place.stop_when(signal.SIGKILL, lambda: any(place.workspace.glob("infer-*/images/**/*.png")), *LIMIT)
    assert not place.done("infer")
    place.run(*LIMIT)

    assert all(place.done(name) for name in STEPS)
    assert place.marker("shard")["counts"] == whole.marker("shard")["counts"]
    assert place.weights("train-global") == whole.weights("train-global")
    assert place.images() == whole.images()
    assert place.marker("evaluate")["metrics"] == whole.marker("evaluate")["metrics"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--set", "train.sed=1"], ["tiny.yaml", "train.sed"]),
        (["--set", "ingest.locations.0.uri=/nowhere/at/all"], ["ingest.locations.0.uri", "/nowhere/at/all"]),
        (["--only", "infer"], ["--only infer"]),
        (["--set", "shard.size=[60, 32]"], ["shard.size"]),
    ],
)
def test_a_users_mistake_exits_with_2_and_one_line(
    data: Path,
    tmp_path: Path,
    words: list[str],
    names: list[str],
    run_here: Callable[..., tuple[int, str, str]],
) -> None:
    code, output, message = run_here(Place(tmp_path, data), *words)
    assert (code, output) == (2, "")
    assert len(message.strip().splitlines()) == 1, message
    for name in names:
        assert name in message


def test_the_command_itself_exits_with_2(data: Path, tmp_path: Path) -> None:
    output = Place(tmp_path, data).run("--set", "train.sed=1", expect=2)
    assert len(output.strip().splitlines()) == 1, output


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_ten_runs_leave_no_process_and_no_session_behind(tmp_path: Path, data: Path) -> None:
    place = Place(tmp_path, data)
    for seed in range(10):
        place.run(*LIMIT, "--set", f"train.phases={json.dumps(SHORT)}", "--set", f"train.seed={seed}")
        assert [process for process in psutil.process_iter() if of_cluster(process, place.ray)] == []
        assert list(place.ray.glob("ray/session_2*")) == []


def of_cluster(process: psutil.Process, folder: Path) -> bool:
    """Whether the process was started with this folder for Ray's files."""
    try:
        return process.environ().get("RAY_TMPDIR") == str(folder)
    except psutil.Error:
        return False
