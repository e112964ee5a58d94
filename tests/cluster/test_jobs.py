"""Jobs on a real cluster of two nodes, with dashboard and token: followed, failed, stopped and resumed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import yaml

from cluster import local
from pipeline import sample
from tests.cluster.test_monitoring import queried
from tests.support.nodes import ROOT, Followed, until

pytestmark = pytest.mark.long

EPOCHS = 30
MODEL = {
    "kind": "pix2pixhd",
    "width": 4,
    "enhancers": 0,
    "downsamplings": 1,
    "blocks": 1,
    "discriminator_width": 4,
    "discriminators": 1,
}
PHASE = {"name": "global", "kind": "global", "enhancers": 0, "discriminators": 1, "batch": 2}


class Cluster:
    """What a user has at hand: the commands in cluster/, and the shell that `local.py env` prepares."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.followed: list[Followed] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        for name in ("RAY_ADDRESS", "RAY_TRAIN_METRICS_ENABLED"):  # a user has neither
            self.environment.pop(name, None)
        # Ray's workers are at niceness 15 by default: beside other busy processes they hardly run.
        self.environment["RAY_worker_niceness"] = "0"

    def local(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "cluster/local.py", "--folder", str(self.folder), *words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def login(self) -> None:
        for line in self.local("env").splitlines():
            name, _, value = line.removeprefix("export ").partition("=")
            self.environment[name] = value

    def get(self, path: str, token: str | None) -> tuple[int, Any]:
        """Ask the dashboard, as a browser or `curl` would."""
        address = self.environment["RAY_API_SERVER_ADDRESS"].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            answer = connection.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if answer.status == 200 else text

    def job(self, submission_id: str) -> dict[str, Any]:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        status, info = self.get(f"/api/jobs/{submission_id}", token)
        assert status == 200, info
        found: dict[str, Any] = info
        return found

    def submit(self, *words: str) -> Followed:
        followed = Followed(["bash", "cluster/submit.sh", *words], self.environment)
        self.followed.append(followed)
        return followed


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="pj", dir="/tmp"))
    there = Cluster(folder)
    try:
        started = there.local(
            *("start", "--workers", "1", "--cpus-per-node", "3", "--object-store-memory", "150"),
            *("--port", "0", "--dashboard-port", "0"),
        )
        assert "head" in started
        assert "worker-1" in started
        there.login()
        yield there
    finally:
        with contextlib.suppress(AssertionError):
            there.local("stop")
        for followed in there.followed:
            followed.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run on sample data; its paths are absolute, so it means the same wherever a job runs."""
    folder = tmp_path_factory.mktemp("job")
    sample.write(str(folder / "sample"), pairs=16, width=64, height=32, seed=0)
    values = {
        "extends": str(ROOT / "pipeline.yaml"),
        "workspace": str(folder / "workspace"),
        "ingest": {
            "locations": [
                {"uri": str(folder / "sample" / layer), "role": role, "pattern": "{key}.png"}
                for layer, role in {"label": "source", "photo": "target", "instance": "instance"}.items()
            ]
        },
        "pair": {"split": {"val": 0.1, "test": 0.2, "seed": 0}, "pairs_per_shard": 8},
        "shard": {"size": [64, 32]},
        "train": {"model": MODEL, "phases": [PHASE | {"epochs": EPOCHS}]},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_nobody_gets_in_without_the_token(cluster: Cluster) -> None:
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0
    assert cluster.get("/api/jobs/", None)[0] == 401
    assert cluster.get("/api/jobs/", "another")[0] == 403
    assert cluster.get("/api/jobs/", token.read_text())[0] == 200


def test_the_cluster_has_the_nodes_it_was_asked_for(cluster: Cluster) -> None:
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    _, answer = cluster.get("/nodes?view=summary", token)
    nodes = [node["raylet"] for node in answer["data"]["summary"]]
    assert [node["state"] for node in nodes] == ["ALIVE", "ALIVE"]
    assert [node["resourcesTotal"]["CPU"] for node in nodes] == [3, 3]


def test_a_mistake_in_the_config_fails_the_job_with_code_2_and_its_line(
    cluster: Cluster, config: Path
) -> None:
    messages = cluster.submit("--here", "--id", "mistake", "-c", str(config), "--set", "train.sede=1").end(2)
    line = f"{config}: train.sede: there is no such key"
    assert line in messages
    info = cluster.job("mistake")
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", 2)
    assert line in info["message"]


def test_results_are_not_left_in_the_uploaded_folder(cluster: Cluster, config: Path) -> None:
    messages = cluster.submit("--id", "lost", "-c", str(config), "--set", "workspace=workspace").end(2)
    assert "is in the job's uploaded folder, which Ray deletes; name a bucket" in messages
    assert cluster.job("lost")["status"] == "FAILED"


def test_a_stopped_run_is_taken_up_by_the_next_job(cluster: Cluster, config: Path) -> None:
    workspace = config.parent / "workspace"
    first = cluster.submit("--id", "first", "-c", str(config))  # the folder travels with the job
    first.until("train-global  starts")
    until(lambda: any(workspace.glob("train-global-*/*")), first, what="nothing written")
    subprocess.run(
        ["ray", "job", "stop", "first"], env=cluster.environment, check=True, capture_output=True, timeout=300
    )
    messages = first.end(130)
    assert "stopped; what was done is kept" in messages
    assert cluster.job("first")["status"] == "STOPPED"
    assert not any(workspace.glob("train-*/_SUCCESS.json"))
    assert {status for _, status in runs(workspace)} <= {"FINISHED", "KILLED"}

    with exported(cluster) as names:
        second = cluster.submit("--here", "--id", "second", "-c", str(config))
        messages = second.end(0)
    # Here no machine has a GPU, nothing is rejected, spilled or lost.
    assert {name for name in queried() - names if "gpu" not in name and "gram" not in name} <= {
        "ray_data_spilled_bytes",
        "ray_pixloom_pairs_rejected_total",
        "ray_pixloom_train_restarts_total",
    }
    info = cluster.job("second")
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0)
    for step in ("ingest", "pair", "shard"):
        assert f"{step:<13} done before" in messages
    assert "unfinished, continues" in messages
    (report,) = workspace.glob("report-*/report.html")
    assert str(report) in messages
    assert dict(runs(workspace))["train-global"] == "FINISHED"


def test_a_shell_that_knows_the_cluster_joins_it_without_a_job(cluster: Cluster, config: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", "-c", str(config)]
    done = subprocess.run(
        [*command, "--until", "pair", "--set", "pair.split.seed=1"],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"joined the Ray cluster at {cluster.environment['RAY_ADDRESS']}" in done.stdout


def test_stopping_ends_everything_the_cluster_started(cluster: Cluster) -> None:
    """Last in this file: the cluster is gone after it."""
    known = local.load(cluster.folder)
    assert known is not None
    leaders = [psutil.Process(node.pid) for node in known.nodes]
    family = [process for leader in leaders for process in [leader, *leader.children(recursive=True)]]
    assert len(family) > 2 * len(leaders)
    cluster.local("stop")
    assert [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert local.load(cluster.folder) is None


@contextlib.contextmanager
def exported(cluster: Cluster) -> Iterator[set[str]]:
    """The metrics that the nodes export while a `with` block runs, gathered as Prometheus does."""
    names: set[str] = set()
    over = threading.Event()

    def gather() -> None:
        while not over.wait(1):
            for path in cluster.folder.glob("*/prom_metrics_service_discovery.json"):
                for target in {target for one in json.loads(path.read_text()) for target in one["targets"]}:
                    with contextlib.suppress(OSError):
                        page = urlopen(f"http://{target}/metrics", timeout=30).read().decode()
                        names.update(re.findall(r"(?m)^ray_\w+", page))

    thread = threading.Thread(target=gather)
    thread.start()
    try:
        yield names
    finally:
        over.set()
        thread.join()


def runs(workspace: Path) -> list[tuple[str, str]]:
    """Name and status of every MLflow run, oldest first."""
    with contextlib.closing(sqlite3.connect(workspace / "mlflow" / "mlflow.db")) as database:
        return list(database.execute("SELECT name, status FROM runs ORDER BY start_time"))
