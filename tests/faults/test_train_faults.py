"""What may happen to a cluster that trains, done to real processes: the losses are the undisturbed ones.

Two workers on two nodes of this machine unless a test says otherwise. `docs/reliability.md` has the table.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.train import job_name
from stages.training import checkpoints
from tests.support.nodes import Nodes, autoscaling, cluster, until
from tests.support.shards import make_shards
from tests.support.undisturbed import Losses, images, losses, undisturbed

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

ROWS, BATCH, EPOCHS = 22, 4, 25
STEPS = EPOCHS * 6  # the last of an epoch has 2 pairs
TWO = Resources(
    train_workers=2,
    threads_per_worker=1,
    checkpoint_images=44,
    checkpoint_seconds=0,
    collective_timeout_s=30,
)
ONE = TWO.model_copy(update={"train_workers": 1})


def phase_job(**changes: Any) -> PhaseJob:
    model = {
        "kind": "pix2pixhd",
        "width": 8,
        "enhancers": 0,
        "downsamplings": 2,
        "blocks": 2,
        "discriminator_width": 8,
        "discriminator_layers": 2,
        "discriminators": 1,
    }
    phase = {"name": "global", "kind": "global", "epochs": EPOCHS, "decay_epochs": 10, "batch": BATCH}
    values = {"model": model, "phases": [{**phase, **changes}], "log_every": 1, "precision": "float32"}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())[0]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [14, 8], "val": [2]}, size=(64, 64))
    return str(folder)


@pytest.fixture(scope="module")
def expected(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """The losses of two workers that nothing disturbs."""
    found = undisturbed(phase_job(), shards, tmp_path_factory.mktemp("two"), workers=2)
    assert len({step for step, _ in found}) == STEPS
    return found


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Nodes]:
    with cluster(2, 1) as nodes:
        yield nodes


@pytest.fixture
def nodes(two_nodes: Nodes) -> Nodes:
    """The cluster of this file; what a test before killed of it is replaced."""
    while len(two_nodes.alive) < 2:
        two_nodes.start(cpus=1)
    return two_nodes


def worker_of(nodes: Nodes, index: int) -> Any:
    """A training worker on a node, once there is one."""
    until(lambda: bool(nodes.alive[index].workers()), nodes.alive[index], what="no worker on the node")
    return nodes.alive[index].workers()[0]


def test_a_killed_worker(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), TWO)
    driver.until_step(20)
    worker_of(nodes, 1).kill()
    text = driver.end()
    assert losses(tmp_path / "o") == expected
    assert "was lost (" in text
    assert "resumed from its checkpoint" in text


def test_a_worker_that_hangs_is_started_again(
    nodes: Nodes, shards: str, expected: Losses, tmp_path: Path
) -> None:
    """SIGSTOP: the process is there and does nothing, which the other notices by waiting for it."""
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), TWO)
    driver.until_step(20)
    hung = worker_of(nodes, 1)
    hung.suspend()
    text = driver.end()
    assert losses(tmp_path / "o") == expected
    assert "restarting the group from its last checkpoint" in text
    assert not hung.is_running()


def test_a_lone_worker_that_hangs_is_started_again(nodes: Nodes, shards: str, tmp_path: Path) -> None:
    alone = undisturbed(phase_job(), shards, tmp_path / "one")
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), ONE)
    driver.until_step(20)
    working = [worker for node in nodes.alive for worker in node.workers()]
    working[0].suspend()
    text = driver.end()
    assert losses(tmp_path / "o") == alone
    assert "restarting the group from its last checkpoint" in text


def test_no_more_than_max_failures(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    """The second killed worker of a run that allows one fails it; the same command goes on."""
    once = TWO.model_copy(update={"max_failures": 1})
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), once)
    driver.until_step(20)
    worker_of(nodes, 1).kill()
    driver.until("resumed from its checkpoint")
    driver.until_step(driver.steps() + 11)
    worker_of(nodes, 0).kill()
    text = driver.end(expect=1)
    assert "(after 1 restarts)" in text.splitlines()[-1]
    nodes.train(phase_job(), shards, str(tmp_path / "o"), once).end()
    assert losses(tmp_path / "o") == expected


def test_a_killed_node(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    """The head has room for both workers: the world stays two, and the losses the same."""
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), TWO)
    driver.until_step(20)
    worker_of(nodes, 1)
    nodes.alive[1].kill()
    text = driver.end()
    assert losses(tmp_path / "o") == expected
    assert "restarting the group from its last checkpoint" in text


def test_a_node_that_is_to_be_taken_away(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    """A notice (as of a spot machine): a checkpoint is made before the node goes."""
    rarely = TWO.model_copy(update={"checkpoint_images": None})
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), rarely)
    driver.until_step(12)
    worker_of(nodes, 1)
    leaving = next(n for n in nodes.listed() if n != nodes.head_id)
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address]
    words = [
        *("--node-id", leaving, "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "a test", "--deadline-remaining-seconds", "15"),
    ]
    subprocess.run([*command, *words], env=nodes.environment, check=True, timeout=100)
    driver.until("a machine will be taken away soon; saving a checkpoint now")
    driver.until_step(driver.steps() + 1)
    nodes.alive[1].kill()
    text = driver.end()
    assert "resumed from its checkpoint" in text
    assert losses(tmp_path / "o") == expected


def test_a_driver_told_to_stop(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    """SIGTERM, as of `ray job stop`: the checkpoint is of the step in hand, though none was due."""
    rarely = TWO.model_copy(update={"checkpoint_images": None})
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), rarely)
    driver.until_step(12)
    driver.kill(signal.SIGTERM)
    text = driver.end(expect=130)
    assert "stopping: the workers save a checkpoint first" in text
    assert "stopped; a checkpoint holds all" in text
    again = nodes.train(phase_job(), shards, str(tmp_path / "o"), rarely).end()
    assert "resumed from its checkpoint" in again
    assert losses(tmp_path / "o") == expected


def test_a_killed_driver(nodes: Nodes, shards: str, expected: Losses, tmp_path: Path) -> None:
    driver = nodes.train(phase_job(), shards, str(tmp_path / "o"), TWO)
    driver.until_step(20)
    driver.kill()
    assert not (tmp_path / "o" / "model").exists()
    nodes.train(phase_job(), shards, str(tmp_path / "o"), TWO).end()
    assert losses(tmp_path / "o") == expected


def test_too_little_memory_says_what_to_lower(nodes: Nodes, shards: str, tmp_path: Path) -> None:
    huge = {
        "kind": "pix2pixhd",
        "enhancers": 0,
        "width": 65536,
        "downsamplings": 2,
        "blocks": 1,
        "discriminators": 1,
    }
    phase = {"name": "global", "kind": "global", "epochs": 1, "batch": BATCH}
    job = jobs(TrainConfig.model_validate({"model": huge, "phases": [phase]}), AugmentConfig())[0]
    text = nodes.train(job, shards, str(tmp_path / "o"), ONE).end(expect=1)
    assert "out of memory" in text.splitlines()[-1]
    assert "lower resources.micro_batch or train.model.width" in text.splitlines()[-1]


def test_a_killed_head(shards: str, expected: Losses, tmp_path: Path) -> None:
    """The cluster is lost with it; a new one and the same command go on."""
    with cluster(2, 1) as first:
        driver = first.train(phase_job(), shards, str(tmp_path / "o"), TWO)
        driver.until_step(20)
        first.alive[0].kill()
        driver.process.wait(timeout=120)
        assert driver.process.returncode != 0
    with cluster(2) as second:
        second.train(phase_job(), shards, str(tmp_path / "o"), TWO).end()
    assert losses(tmp_path / "o") == expected


def test_workers_come_and_go(shards: str, tmp_path: Path) -> None:
    """From one to three: what is there at the start, one more when a node joins, fewer when it dies."""
    job = phase_job(epochs=90)
    elastic = TWO.model_copy(update={"train_workers": 3, "train_workers_min": 1})
    with cluster(2) as nodes:
        driver = nodes.train(job, shards, str(tmp_path / "o"), elastic)
        driver.until_step(12)
        assert len(nodes.alive[0].workers()) == 2
        nodes.start(cpus=1)
        driver.until("resumed from its checkpoint with 3 workers")
        worker_of(nodes, 1)
        before = driver.steps()
        driver.until_step(before + 12)
        nodes.alive[1].kill()
        text = driver.end()
    assert text.count("resumed from its checkpoint") >= 2
    assert images(tmp_path / "o") == 90 * ROWS
    assert {step for step, _ in losses(tmp_path / "o")} == set(range(1, 90 * 6 + 1))


def test_an_autoscaler_brings_the_machine_that_a_worker_lacks(shards: str, tmp_path: Path) -> None:
    """Ray's own autoscaler, its machines processes here: training asks for two workers, begins with one.

    It is stopped once both have done some steps; every step before and after is in the curves.
    """
    job = phase_job(epochs=2000)
    elastic = TWO.model_copy(update={"train_workers_min": 1})
    output = f"{tmp_path}/o"
    with autoscaling(most=1) as nodes:
        driver = nodes.train(job, shards, output, elastic)
        driver.until("resumed from its checkpoint with 2 workers")
        driver.until_step(driver.steps() + 24)
        assert len(nodes.listed()) == 2
        assert len(nodes.alive) == 1, "the test started the head alone"
        driver.kill(signal.SIGTERM)
        text = driver.end(expect=130)
    assert "stopped; a checkpoint holds all" in text
    newest = checkpoints.load_newest(f"{output}/checkpoints", job=job_name(job, shards, ""))
    assert newest is not None
    seen = set(newest.curves.filter(pc.equal(newest.curves["name"], "generator/gan"))["step"].to_pylist())
    assert seen == set(range(1, newest.position.steps + 1))
