"""Tracking: what MLflow holds afterwards, on a real SQLite store; a server that goes away and comes back."""

from __future__ import annotations

import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.engine import make_url

from stages.base import Point
from stages.config.tracking import TrackingConfig, sqlite_file, sqlite_uri
from stages.errors import UserError
from stages.tracking import run as tracking, sender
from stages.tracking.run import Run, open_parent
from stages.tracking.sender import ALIVE_TAG, KEY_TAG, PROCESS_TAG


def point(name: str, value: float, step: int) -> Point:
    return Point(step, 4 * step, 0, name, value, 1000 + step)


def test_settings_become_dotted_names_and_fit_the_server() -> None:
    phases = [{"name": "global", "epochs": 1}, {"name": "joint", "epochs": 2}]
    flat = tracking.flatten(
        {"model": {"kind": "pix2pix", "size": [1, 2]}, "text": "x" * 9000, "phases": phases}
    )
    assert flat["phases.1.epochs"] == "2"
    assert flat["model.kind"] == "pix2pix"
    assert flat["model.size"] == "[1, 2]"
    assert len(flat["text"]) == 6000
    assert tracking.flatten({"uri": "https://me:geheim@host/x"})["uri"] == "https://host/x"


def test_a_restarted_curve_goes_on_after_the_last_recorded_step() -> None:
    rows = [point("loss", 0.5, step) for step in (0, 1, 2, 3, 4, 3, 4, 5)] + [point("rate", 1.0, 0)]
    last = {"loss": 2}
    fresh = [(row.name, row.step) for row in sender.take_fresh(rows, last)]
    assert fresh == [("loss", 3), ("loss", 4), ("loss", 5), ("rate", 0)]
    assert last == {"loss": 5, "rate": 0}


def test_a_page_shows_images_and_epochs_of_curves_but_no_layers() -> None:
    names = ["generator/feature_matching/layer0", "generator/feature_matching/scale0"]
    rows = sender.shown([point(name, 0.5, step) for step in (1, 2) for name in names])
    assert {row.name for row in rows} == {names[1], "images", "epoch"}
    assert [(row.step, row.value) for row in rows if row.name == "images"] == [(1, 4), (2, 8)]


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_a_plain_folder_is_refused_as_tracking_uri(uri: str) -> None:
    with pytest.raises(ValueError, match="sqlite"):
        TrackingConfig(uri=uri)


def test_a_run_without_a_sender_records_nothing_and_is_its_own_child() -> None:
    with Run() as run:
        run.metrics({"a": 1.0})
        assert run.child("x") is run


def test_tracking_switched_off_gives_a_null_run(tmp_path: Path) -> None:
    assert open_parent(TrackingConfig(enabled=False), "r", None, str(tmp_path)) == Run()


def test_a_database_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking"):
        open_parent(TrackingConfig(uri="nothing://user:secret@host/db"), "r", None, str(tmp_path))
    with pytest.raises(UserError, match=r"tracking.uri: cannot use sqlite:////proc/ws/.*No such file"):
        open_parent(TrackingConfig(), "r", None, "/proc/ws")


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", ".."])
def test_files_of_an_experiment_of_any_name_stay_in_the_workspace(tmp_path: Path, name: str) -> None:
    config = TrackingConfig(experiment=name, model="m")
    with open_parent(config, "r", None, str(tmp_path / "ws")) as run:
        run.artifact("a.txt", b"x")
    (file,) = tmp_path.rglob("a.txt")
    assert file.is_relative_to(tmp_path / "ws" / "mlflow" / "artifacts")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def parent(workspace: str) -> Run:
    return open_parent(TrackingConfig(), "pipeline", {"commit": "abc"}, workspace)


def stored(run: Run) -> Any:
    assert run.flush()
    return sender.connect(run.uri).get_run(run.run_id())


def test_a_stage_leaves_its_params_metrics_pictures_and_files_in_mlflow(parent: Run) -> None:
    with parent.child("train-global", {"phase": "global"}) as child:
        child.params({"model": {"width": 8}})
        child.metrics({"l1": 0.25}, step=3)
        child.points([point("g", 1.0 / (step + 1), step) for step in range(1500)])
        child.image(np.zeros((4, 6, 3), np.uint8), "samples", 1)
        child.artifact("tables/config.json", b"{}")
        child.dataset(
            "shards", uri="s3://bucket/shards", digest="d" * 50, context="training", counts={"num_train": 3}
        )
    run = stored(child)
    client = sender.connect(child.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.width": "8"}
    assert run.data.metrics["l1"] == 0.25
    assert len(client.get_metric_history(run.info.run_id, "g")) == 1500
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id()
    assert run.data.tags["phase"] == "global"
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"images", "tables"}
    assert run.inputs.dataset_inputs[0].dataset.name == "shards"
    assert run.inputs.dataset_inputs[0].dataset.profile == '{"num_train": 3}'


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_is_the_runs_status(parent: Run, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), parent.child("stage") as child:
        raise error
    assert stored(child).info.status == status


def test_a_run_that_two_processes_write_to_repeats_no_step(parent: Run) -> None:
    rows = [point("loss", float(step), step) for step in range(6)]
    first = parent.child("train")
    first.points(rows[:4])
    assert first.flush()
    again = pickle.loads(pickle.dumps(first))  # noqa: S301 - with a sender of its own
    again.points(rows[2:])
    history = sender.connect(again.uri).get_metric_history(stored(again).info.run_id, "loss")
    assert sorted(m.step for m in history) == [0, 1, 2, 3, 4, 5]


def test_a_param_keeps_its_first_value_when_a_run_is_taken_up_again(parent: Run) -> None:
    child = parent.child("train")
    child.params({"seed": 1})
    child.params({"seed": 2, "fresh": 3})
    assert stored(child).data.params == {"seed": "1", "fresh": "3"}


def test_a_value_the_server_refuses_is_dropped_and_said(
    parent: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "GIVE_UP_S", 0.0)
    child = parent.child("train")
    child.artifact("../outside", b"")
    child.metrics({"class: road*": 2.0})
    assert stored(child).data.metrics == {"class_ road_": 2.0}
    assert "refused artifact" in caplog.text


def test_runs_of_a_killed_process_are_closed_by_the_next(parent: Run, workspace: str) -> None:
    child = parent.child("train")
    client = sender.connect(parent.uri)
    assert child.run_id()
    client.set_tag(child.run_id(), PROCESS_TAG, f"{socket.gethostname()} 999999999 1")
    open_parent(TrackingConfig(), "again", None, workspace)
    assert client.get_run(child.run_id()).info.status == "KILLED"
    assert client.get_run(parent.run_id()).info.status == "RUNNING"


def test_runs_of_a_silent_process_of_another_machine_are_closed_also_while_the_next_runs(
    workspace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod that starts again has another name, at once: the first one's last sign of life is fresh then."""
    monkeypatch.setattr(sender, "ALIVE_S", 0.1)
    monkeypatch.setattr(sender, "LINGER_S", 0.0)
    config = TrackingConfig(experiment="pods")
    first = open_parent(config, "first", None, workspace)
    lost, living, older = (first.child(name) for name in ("lost", "living", "older"))
    for run, pod in ((lost, "pod-1"), (living, "pod-2"), (older, "pod-3")):
        run.tags({PROCESS_TAG: f"{pod} 7 1"})
    assert first.flush()
    client = sender.connect(first.uri)
    client.delete_tag(older.run_id(), ALIVE_TAG)  # of a program that gives no sign of life

    def status(run: Run) -> str:
        return str(client.get_run(run.run_id()).info.status)

    again = open_parent(config, "again", None, workspace)
    assert {status(run) for run in (lost, living, older)} == {"RUNNING"}
    client.set_tag(lost.run_id(), ALIVE_TAG, "1000")
    until = time.monotonic() + 20
    while status(lost) != "KILLED" and time.monotonic() < until:
        time.sleep(0.05)
    assert [status(run) for run in (lost, living, older, again)] == ["KILLED", *["RUNNING"] * 3]
    for run in (living, older, again, first):
        run.end()
    assert first.flush()
    assert again.flush()
    assert float(client.get_run(again.run_id()).data.tags[ALIVE_TAG]) > 1000 * (time.time() - 60)


class Gate:
    """A tracking client that can be cut off, in front of the real one."""

    def __init__(self, client: Any) -> None:
        self.client, self.open = client, True

    def __getattr__(self, name: str) -> Any:
        if not self.open:
            raise ConnectionError("no route")
        return getattr(self.client, name)


@pytest.fixture
def gate(parent: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(sender, "RETRY_S", (0.05,))
    assert parent.flush()
    client = parent.sender.client
    parent.sender.client = gate = Gate(client)
    yield gate
    gate.open = True
    assert parent.flush()
    parent.sender.client = client


def unsent(run: Run) -> list[Path]:
    """The documents of what MLflow has not taken."""
    return list(Path(run.sender.unsent).rglob("*.json"))


def test_an_outage_delays_nothing_and_loses_nothing(
    parent: Run, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open = False
    child = parent.child("train")
    child.points([point("loss", 1.0, step) for step in range(3)])
    assert not child.flush(wait=0.3)
    child.points([point("loss", 1.0, step) for step in range(3, 6)])
    assert not child.flush(wait=0.3)
    assert unsent(parent)
    gate.open = True
    history = sender.connect(child.uri).get_metric_history(stored(child).info.run_id, "loss")
    assert sorted(m.step for m in history) == list(range(6))
    assert not unsent(parent)
    assert caplog.text.count("does not answer") == 1
    assert caplog.text.count("answers again") == 1


def test_what_a_process_could_not_send_the_next_one_sends(parent: Run, gate: Gate, workspace: str) -> None:
    gate.open = False
    child = parent.child("train")
    child.metrics({"loss": 2.0}, step=1)
    assert not child.flush(wait=0.3)
    open_parent(TrackingConfig(), "next", None, workspace).flush()  # with a sender of its own
    runs = sender.connect(parent.uri).search_runs(
        [parent.sender.experiment], filter_string=f"tags.`{KEY_TAG}` = '{child.key}'"
    )
    assert [run.data.metrics for run in runs] == [{"loss": 2.0}]


def test_a_stage_that_ends_in_an_outage_waits_for_no_timeout(parent: Run, gate: Gate) -> None:
    gate.open = False
    for _ in range(2):  # the server is away, and is known to be
        started = time.monotonic()
        with parent.child("pair") as child:
            child.metrics({"pairs": 1.0})
        assert time.monotonic() - started < 10.0
    gate.open = True
    assert parent.flush()
    assert stored(child).info.status == "FINISHED"


def test_the_page_of_a_local_run_is_one_command_away(tmp_path: Path) -> None:
    command = TrackingConfig().page_command(str(tmp_path))
    assert command == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert TrackingConfig(uri="http://host:5000").page_command(str(tmp_path)) == "http://host:5000"


@pytest.mark.parametrize("uri", ["https://me:pa@ss@host/x@y", "postgresql://me:pass@host:5432/runs"])
def test_no_password_is_printed(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    shown = TrackingConfig().page_command(str(tmp_path))
    assert "pa" not in shown
    assert shown.endswith(("https://host/x@y", "postgresql://host:5432/runs"))


def test_the_command_can_be_pasted_whatever_the_workspace_is_called(tmp_path: Path) -> None:
    workspace = tmp_path / "50 'ü'#&;$x"
    with open_parent(TrackingConfig(), "pasted", {}, str(workspace)) as parent:
        run_id = parent.run_id()
    assert (workspace / "mlflow/mlflow.db").exists()
    assert list(tmp_path.iterdir()) == [workspace]
    *command, uri = shlex.split(TrackingConfig().page_command(str(workspace)))
    assert command == ["mlflow", "ui", "--backend-store-uri"]
    run = sender.connect(uri).get_run(run_id)
    assert run.info.run_name == "pasted"
    odd = Path("/a%20b/c?d/mlflow.db")
    assert sqlite_file(sqlite_uri(odd)) == Path(make_url(sqlite_uri(odd)).database or "") == odd


class Dead(BaseHTTPRequestHandler):
    """A server that is there but broken."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


BESIDE = """
import sys, pathlib, mlflow.tracking
from stages.config.tracking import TrackingConfig
from stages.tracking.run import open_parent
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
with open_parent(TrackingConfig(), "beside", {}, sys.argv[1]) as parent:
    assert parent.run_id()
"""


def test_a_workspace_that_was_moved_says_where_its_runs_put_their_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = tmp_path / "old", tmp_path / "new #1"
    for folder in (old, old, new):
        open_parent(TrackingConfig(), "r", None, str(folder)).artifact("a.txt", b"a")
        assert ("was moved" in caplog.text) == (folder == new)
        if folder == old:
            (old / "mlflow" / "artifacts" / "pixloom").mkdir(parents=True, exist_ok=True)
            shutil.copytree(old, new, dirs_exist_ok=True)
    assert f"go to {old}/mlflow/artifacts/pixloom" in caplog.text


def test_two_runs_may_begin_in_a_new_workspace_at_the_same_time(tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", BESIDE, str(tmp_path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for one in runs:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in runs:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    errors = [one.communicate()[1] for one in runs]
    assert [one.returncode for one in runs] == [0, 0], errors


def test_a_broken_server_is_named_at_the_start(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dead)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="tracking"):
            open_parent(TrackingConfig(uri=uri), "r", None, str(tmp_path))
    finally:
        server.shutdown()
        server.server_close()
