"""Where a run may write its results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from pipeline import config as configuration
from pipeline.cluster import check_folders, result_folders
from stages.errors import UserError
from stages.storage.local import alone
from tests.support import nodes

YAML = str(Path(__file__).resolve().parents[2] / "pipeline.yaml")


def test_the_folders_of_this_machine_are_named_by_their_key(tmp_path: Path) -> None:
    config = configuration.load(YAML, [f"workspace={tmp_path}"])
    assert result_folders(config) == {
        "workspace": str(tmp_path),
        "tracking.uri": str(tmp_path / "mlflow" / "mlflow.db"),
    }


def test_stores_and_servers_are_no_folders_of_this_machine() -> None:
    words = ["workspace=memory://pixloom", "tracking.uri=http://mlflow:5000"]
    assert result_folders(configuration.load(YAML, words)) == {}


def test_results_in_a_jobs_uploaded_folder_are_refused() -> None:
    uploaded = "/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/workspace"
    with pytest.raises(UserError, match=r"run.yaml: workspace: .* name a bucket"):
        check_folders({"workspace": uploaded}, "run.yaml")
    check_folders({"workspace": "/data/workspace"}, "run.yaml")


def test_a_folder_is_left_only_with_something_in_it(tmp_path: Path) -> None:
    with alone(str(tmp_path / "new" / "failed")):
        pass
    with alone(str(tmp_path / "new" / "done")):
        (tmp_path / "new" / "done" / "x").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["done"]


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ws"
    file.touch()
    with pytest.raises(UserError, match=rf"^run.yaml: workspace: {file} is a file; name a folder$"):
        check_folders({"workspace": str(file)}, "run.yaml")


OWN_CLUSTER = """
import os, signal, sys
import psutil, ray
from pipeline.cluster import cluster
from stages.base import Resources

@ray.remote
class Worker:
    def pid(self):
        return os.getpid()
    def hang(self):
        os.kill(os.getpid(), signal.SIGSTOP)

with cluster(Resources(), {}, {}):
    workers = [Worker.remote() for _ in range(2)]
    pids = ray.get([worker.pid.remote() for worker in workers])
    print(*pids, *(p.pid for p in psutil.Process().children(recursive=True)))
    workers[0].hang.remote()
    while psutil.Process(pids[0]).status() != psutil.STATUS_STOPPED:
        pass
assert not psutil.Process().children(recursive=True)
"""


@pytest.mark.ray
def test_nothing_of_an_own_cluster_is_left_not_even_a_worker_that_hangs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="pc", dir="/tmp") as folder:  # short: sockets' names are limited
        done = subprocess.run(
            [sys.executable, "-c", OWN_CLUSTER],
            env=environment | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not list(Path(folder).glob("ray/session_2*"))
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) > 4
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


HELD = """
import os, sys
from pipeline.cluster import cluster
from stages.base import Resources

with cluster(Resources(), {}, {}):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.ray
def test_the_session_of_a_killed_run_is_deleted_by_the_next_and_that_of_a_living_one_kept() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="pc", dir="/tmp") as folder:

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-c", HELD],
                env=environment | {"RAY_TMPDIR": folder},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

        def sessions() -> set[Path]:
            return set(Path(folder).glob("ray/session_2*"))

        (Path(folder) / "ray" / "session_2020-of_another_program").mkdir(parents=True)
        others = sessions()
        with start() as living, start() as killed:
            assert living.stdout
            assert killed.stdout
            living.stdout.readline()
            killed.stdout.readline()
            assert len(sessions() - others) == 2
            (own,) = (one for one in sessions() if one.name.endswith(f"_{killed.pid}"))
            killed.kill()
            killed.wait()
            assert own in sessions()
            with start() as third:
                assert third.stdout
                third.stdout.readline()
                assert own not in sessions()
                assert len(sessions() - others) == 2
                third.communicate()
            assert any(one.name.endswith(f"_{living.pid}") for one in sessions())
            living.communicate()
            assert (living.returncode, third.returncode) == (0, 0)
        assert sessions() == others


STARTS = """
import sys
from pipeline import cli
from pipeline.cluster import cluster
from stages.base import Resources

def work():
    cli.log_to_stdout()
    with cluster(Resources(), {}, {}):
        print("started")

sys.exit(cli.exit_code(work))
"""


def test_a_ray_that_does_not_start_is_tried_again_and_then_named(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", STARTS],
        env={**os.environ, "RAY_TMPDIR": str(tmp_path / ("folder" * 20))},
        cwd=Path(YAML).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    reason = "Ray did not start on this machine: OSError: "  # a path too long for a socket
    assert process.returncode == 1
    assert re.search(rf"{reason}.*; trying once more\n", process.stdout)
    assert process.stderr.splitlines()[-1].startswith(reason)


STOPPED = """
import os, signal, sys
from pipeline import cli
from pipeline.cluster import cluster
from stages.base import Resources

def work():
    try:
        with cluster(Resources(), {}, {}):
            if sys.argv[1] == "inside":
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("in order")

sys.exit(cli.exit_code(work))
"""


@pytest.mark.parametrize(("place", "said"), [("inside", "in order\n"), ("after", "")])
def test_sigterm_stops_a_command_inside_a_cluster_and_after_it(place: str, said: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", STOPPED, place],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        cwd=Path(YAML).parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (process.returncode, process.stdout) == (130, said), process.stderr
    assert process.stderr.startswith("stopped; ")


JOINS = """
import ray
from pipeline.cluster import cluster
from stages.base import Resources

@ray.remote
def answer():
    return 42

with cluster(Resources(), {}, {}):
    print(ray.get(answer.remote()))
"""


@pytest.mark.ray
def test_a_node_that_could_not_write_a_log_takes_the_next_start() -> None:
    """Ray itself refuses the environment of a failed start for ten minutes."""
    with nodes.cluster(1) as ray_nodes:
        environment = ray_nodes.environment | {"RAY_ADDRESS": ray_nodes.address}

        def start() -> subprocess.CompletedProcess[str]:
            words = [sys.executable, "-c", JOINS]
            return subprocess.run(
                words, env=environment, capture_output=True, text=True, check=False, timeout=90
            )

        logs = (ray_nodes.folder / "0" / "session_latest").resolve() / "logs"
        (logs / "runtime_env_setup-01000000.log").mkdir()  # where the first job's log would be
        failed = start()
        assert "Failed to set up runtime environment" in failed.stderr
        done = start()
        assert done.stdout.strip() == "42", done.stderr
