"""MLflow is completed from the workspace: by the process that was cut off, or by the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from stages import storage
from stages.base import Point
from stages.config.tracking import TrackingConfig
from stages.errors import UserError
from stages.inference.model_source import tracking_server
from stages.tracking import sender
from stages.tracking.run import Run, catch_up, open_parent
from stages.training import curves

PICTURE = np.zeros((4, 6, 3), np.uint8)


def write_curves(uri: str, steps: int) -> None:
    """Curves as a phase or its checkpoint has them: a loss, its layers, the machine's load."""
    names = ("generator/gan", "generator/feature_matching/layer0", "system/cpu")
    points = [Point(s, 4 * s, 0, name, 1 / s, 1000 + s) for s in range(1, steps + 1) for name in names]
    storage.write_parquet(uri, curves.to_table(points))


def stored(run: Run) -> Any:
    return sender.connect(run.uri).get_run(run.run_id())


def steps(run: Run, name: str) -> list[int]:
    return [metric.step for metric in sender.connect(run.uri).get_metric_history(run.run_id(), name)]


def live(first: int, last: int) -> list[Point]:
    return [Point(s, 4 * s, 0, "generator/gan", 1 / s, 1000 + s) for s in range(first, last + 1)]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_parent(TrackingConfig(), "pipeline", None, str(tmp_path_factory.mktemp("workspace")))


def test_curves_that_never_came_are_completed_at_the_end_each_value_once(parent: Run, tmp_path: Path) -> None:
    write_curves(f"{tmp_path}/metrics.parquet", 9)
    with parent.child("train-global") as child:
        child.curves(str(tmp_path))
        child.points(live(1, 4))
        assert child.flush()
    assert steps(child, "generator/gan") == list(range(1, 10))
    assert steps(child, "images") == list(range(1, 10))
    assert stored(child).data.metrics.keys() == {"generator/gan", "system/cpu", "images", "epoch"}
    assert stored(child).info.status == "FINISHED"


def test_a_phase_that_fails_has_the_curves_of_its_newest_checkpoint(parent: Run, tmp_path: Path) -> None:
    for step in (8, 16):
        write_curves(f"{tmp_path}/checkpoints/step-{step:08d}/curves.parquet", step)
    child = parent.child("train-global")
    child.curves(str(tmp_path))
    with pytest.raises(ValueError, match="lost"), child:
        raise ValueError("lost")
    assert steps(child, "generator/gan") == list(range(1, 17))
    assert stored(child).info.status == "FAILED"


def test_curves_of_a_phase_that_resumes_come_first_and_a_few_at_a_time(parent: Run, tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):  # the newest is that of the larger number
        write_curves(f"{tmp_path}/checkpoints/step-{step:08d}/curves.parquet", step // 25_000_000)
    child = parent.child("train-global")
    child.curves(str(tmp_path))
    child.points(live(5, 6))
    assert child.flush()
    assert steps(child, "generator/gan") == list(range(1, 7))
    assert stored(child).info.status == "RUNNING"
    write_curves(f"{tmp_path}/checkpoints/step-200000000/curves.parquet", 9)  # of another command's phase
    child.points(live(7, 7))
    child.curves(str(tmp_path))  # the workers start again, from there
    child.points(live(10, 12))
    assert child.flush()
    assert steps(child, "generator/gan") == list(range(1, 13))
    write_curves(f"{tmp_path}/metrics.parquet", 40_000)
    tracemalloc.start()
    assert sum(map(len, sender.stored_points(str(tmp_path)))) == 120_000
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_curves_are_looked_for_again_where_checkpoints_go_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = iter([["step-00000002"], ["step-00000004"], ["step-00000004"]])
    monkeypatch.setattr(storage, "list_folders", lambda _: next(listed))
    assert [*sender.stored_points(str(tmp_path))] == []  # neither has any
    listed = iter([["step-00000002"], ["step-00000004"]])
    write_curves(f"{tmp_path}/checkpoints/step-00000004/curves.parquet", 4)
    assert {point.step for point in next(sender.stored_points(str(tmp_path)))} == {1, 2, 3, 4}


def test_memory_is_bounded_and_the_rest_of_a_curve_comes_at_the_end(
    parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MOST_ROWS", 5)
    monkeypatch.setattr(sender, "LINGER_S", 60.0)
    write_curves(f"{tmp_path}/metrics.parquet", 30)
    child = parent.child("train-global")
    child.curves(str(tmp_path))
    for step in range(1, 30):
        child.points(live(step, step))
    child.end()
    assert child.flush()
    assert steps(child, "generator/gan") == list(range(1, 31))


def test_curves_that_cannot_be_read_hold_up_nothing(
    parent: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.parquet").write_bytes(b"torn")
    with parent.child("train-global") as child:
        child.curves(str(tmp_path))
    assert stored(child).info.status == "FINISHED"
    assert "unreadable curves" in caplog.text


def test_curves_wait_for_a_store_that_is_away(
    parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uri: str) -> Any:
        raise UserError(f"{uri}: cannot reach the store")

    write_curves(f"{tmp_path}/metrics.parquet", 9)
    child = parent.child("train-global")
    child.curves(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(sender, "local_file", away)
        child.end()
        assert not child.flush(wait=1.5)
        assert stored(child).info.status == "RUNNING"
    assert child.flush(wait=20.0)
    assert steps(child, "generator/gan") == list(range(1, 10))
    assert stored(child).info.status == "FINISHED"


def test_a_phase_has_one_model_with_the_values_of_its_step_and_its_data_set(
    parent: Run, tmp_path: Path
) -> None:
    chosen = {"global": 6, "local": 9, "joint": 4}
    for phase in ("global", "local", "joint", "local"):  # one is done again
        folder = str(tmp_path / phase)
        write_curves(f"{folder}/metrics.parquet", 9)
        with parent.child(f"train-{phase}", {"pixloom.phase": phase}) as child:
            child.params({"width": 8})
            child.curves(folder)
            child.dataset("shards", uri="s3://b/s", digest="d", context="training", counts={})
            child.model(f"train-{phase}", folder=folder, step=chosen[phase])
        assert steps(child, "generator/gan") == list(range(1, 10))
        (output,) = stored(child).outputs.model_outputs
        assert output.step == chosen[phase]
    with tracking_server(parent.uri):
        ranked = mlflow.search_logged_models(
            experiment_ids=[parent.sender.experiment],
            filter_string="tags.`pixloom.phase` != '' AND params.width = '8'",
            datasets=[{"dataset_name": "shards", "dataset_digest": "d"}],
            order_by=[{"field_name": "metrics.generator/gan", "ascending": True}],
            output_format="list",
        )
    assert [model.name for model in ranked] == ["train-local", "train-global", "train-joint"]
    assert {model.source_run_id for model in ranked} == {parent.run_id()}
    for model in ranked:
        assert model.status == "READY"
        loss = next(metric for metric in model.metrics if metric.key == "generator/gan")
        assert loss.step == chosen[model.tags["pixloom.phase"]]
        assert loss.value == 1 / loss.step
        assert (loss.dataset_name, loss.dataset_digest) == ("shards", "d")


class Interrupted:
    """A tracking client that is cut off in the first request with curves."""

    def __init__(self, client: Any) -> None:
        self.client, self.interrupted = client, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def log_batch(self, run_id: str, metrics: Any = (), **more: Any) -> None:
        if metrics and not self.interrupted:
            self.interrupted = True
            raise ConnectionError("no route")
        self.client.log_batch(run_id, metrics=metrics, **more)


def test_values_of_curves_in_a_request_that_failed_are_sent_again(
    parent: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_S", (0.05,))
    assert parent.flush()
    client = Interrupted(parent.sender.client)
    monkeypatch.setattr(parent.sender, "client", client)
    write_curves(f"{tmp_path}/metrics.parquet", 9)
    child = parent.child("train-global")
    child.curves(str(tmp_path))
    child.points(live(1, 9))
    child.end()
    assert child.flush(wait=20.0)
    assert client.interrupted
    assert steps(child, "generator/gan") == list(range(1, 10))


class Broken:
    """A tracking client whose artifact store is away."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        if name == "log_artifact":
            raise ConnectionError("no artifact store")
        return getattr(self.client, name)


def test_without_its_artifact_store_a_server_still_gets_everything_else(
    parent: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "RETRY_S", (0.05,))
    assert parent.flush()
    client = parent.sender.client
    parent.sender.client = Broken(client)
    first, second = parent.child("one"), parent.child("two")
    first.image(PICTURE, "samples", 1)
    first.end()
    second.metrics({"l1": 0.5})
    second.end()
    assert not second.flush(wait=1.0)
    assert stored(second).data.metrics == {"l1": 0.5}
    assert {stored(run).info.status for run in (first, second)} == {"FINISHED"}
    assert list(Path(parent.sender.unsent).rglob("facts.json"))
    parent.sender.client = client
    assert second.flush()
    pictures = client.list_artifacts(first.run_id(), "images")
    assert len(pictures) == 2  # the picture and its preview
    assert not list(Path(parent.sender.unsent).rglob("*"))


KILLED = """
import os, signal, sys
import numpy as np
from stages.base import Point
from stages.tracking.run import TrackingConfig, open_parent

class Away:
    def __getattr__(self, name):
        raise ConnectionError("no route")

workspace, folder, database = sys.argv[1:]
parent = open_parent(TrackingConfig(uri=database), "killed", None, workspace)
known, new = parent.child("known"), parent.child("new")
known.curves(folder)
known.points([Point(step, 4 * step, 0, "generator/gan", 1 / step, 1000 + step) for step in (1, 2)])
done = parent.child("done")
assert parent.flush()
parent.sender.client = Away()
known.points([Point(3, 12, 0, "generator/gan", 1 / 3, 1003)])
known.image(np.zeros((4, 6, 3), np.uint8), "samples", 3)
done.metrics({"pairs": 7.0})
done.artifact("pairs.txt", b"seven")
done.end()
late = parent.child("late")
late.params({"size": 64})
late.dataset("shards", uri="s3://b/s", digest="d", context="training", counts={"num_train": 3})
assert not parent.flush(wait=0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("place", ["workspace", "moved"])
def test_what_a_killed_process_could_not_send_the_next_command_completes(tmp_path: Path, place: str) -> None:
    """Runs that it ended are as it ended them; the others are KILLED, with all that was recorded."""
    workspace, folder = str(tmp_path / "workspace"), str(tmp_path / "workspace/train-global-0123456789ab")
    database = TrackingConfig(uri=f"sqlite:///{tmp_path}/runs.db")
    write_curves(f"{folder}/checkpoints/step-00000005/curves.parquet", 5)
    words = [sys.executable, "-c", KILLED, workspace, folder, str(database.uri)]
    process = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    Path(workspace).rename(tmp_path / place)
    workspace = str(tmp_path / place)
    assert catch_up(database, workspace)
    assert catch_up(TrackingConfig(uri="http://127.0.0.1:9"), workspace)  # nothing to do: it asks no server
    client = sender.connect(database.place(workspace))
    (experiment,) = [e for e in client.search_experiments() if e.name == "pixloom"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    status = {name: run.info.status for name, run in runs.items()}
    killed = dict.fromkeys(("killed", "known", "new", "late"), "KILLED")
    assert status == killed | {"done": "FINISHED"}
    history = client.get_metric_history(runs["known"].info.run_id, "generator/gan")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5]
    assert len(client.list_artifacts(runs["known"].info.run_id, "images")) == 2
    assert runs["done"].data.metrics == {"pairs": 7.0}
    assert [file.path for file in client.list_artifacts(runs["done"].info.run_id)] == ["pairs.txt"]
    assert runs["late"].data.params == {"size": "64"}
    assert runs["late"].inputs.dataset_inputs[0].dataset.profile == '{"num_train": 3}'
    assert not list(Path(workspace, sender.UNSENT).rglob("*.json"))


def test_a_document_that_its_process_removes_meanwhile_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / sender.UNSENT / "gone").mkdir(parents=True)
    assert open_parent(TrackingConfig(), "r", None, str(tmp_path)).run_id()
