"""The tutorial to the letter: all commands of its page in one shell, with a real store and a real cluster."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3, free_ports

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorial.md"
BROUGHT = ("cluster", "pipeline", "recipes", "stages", "pyproject.toml", ".rayignore", ".gitignore")


def commands() -> str:
    """The page's commands in order, each block announced."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 8
    return "".join(f"echo '== block {number}'\n{block}" for number, block in enumerate(blocks, 1))


def test_what_looks_like_a_command_is_in_a_block_that_is_run() -> None:
    prose = re.sub(r"^```bash\n.*?^```$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert "```" not in prose
    assert not re.search(r"^    \S|python -m|submit\.sh", prose, re.MULTILINE)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for a cluster's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="tu", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.mark.long
def test_the_tutorial_leads_from_pairs_to_painted_images(
    s3_store: SeaweedS3, s3_bucket: str, folder: Path
) -> None:
    here = folder / "pixloom"
    here.mkdir()
    for name in BROUGHT:
        there = ROOT / name
        copy = shutil.copytree if there.is_dir() else shutil.copy
        copy(there, here / name)
    # Other ports and another folder than a user's own cluster has, and little memory; nothing else differs.
    (port,) = free_ports(1)
    text = commands().replace("5000", str(port))
    text = text.replace("cluster/local.py", f"cluster/local.py --folder {folder / 'c'}")
    text = text.replace("start --workers 1", "start --workers 1 --cpus-per-node 3 --object-store-memory 150 "
                        "--port 0 --dashboard-port 0")  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": s3_store.url,
        "BUCKET": s3_bucket,
        # Ray's workers are at niceness 15 by default: beside other busy processes they hardly run.
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    shell = subprocess.Popen(
        ["bash", "-eu", "-o", "pipefail", "-c", text],
        cwd=here,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        messages, _ = shell.communicate(timeout=840)
    finally:
        _end(shell, folder, environment)
    assert shell.returncode == 0, messages
    planned, trained, again, compared, painted = (
        messages.split(f"== block {number}\n")[1].split("== block")[0] for number in (3, 4, 5, 6, 7)
    )
    assert re.search(r"^train-whole +\S+ +to do", planned, re.MULTILINE)
    assert re.search(r"pair +done in .*: pairs 40", planned)
    for done in (trained, again):
        assert re.search(r"shard +done before", done)
        assert re.search(r"train-whole +done in", done)
        assert "report.html" in done
    scores = re.findall(
        r"pipeline\.run -c street\.yaml.* (0\.\d+) +(\d+\.\d+) +(0\.\d+)$", compared, re.MULTILINE
    )
    assert len(scores) == 2
    assert "images 5" in painted
    listed = s3_store.client().ls(f"{s3_bucket}/painted/images")
    assert sorted(Path(name).name for name in listed) == [f"scene_{number:05d}.png" for number in range(5)]


def _end(shell: subprocess.Popen[str], folder: Path, environment: dict[str, str]) -> None:
    """Whatever a failed page left running: its shell's jobs and its cluster."""
    stop = [sys.executable, "cluster/local.py", "--folder", str(folder / "c"), "stop"]
    subprocess.run(stop, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    with contextlib.suppress(ProcessLookupError):  # its jobs outlive a shell that failed
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()
