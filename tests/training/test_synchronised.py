"""Batch norm over the pairs of all workers: two real processes train as one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing

from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.training import checkpoints
from stages.training.checkpoints import Checkpoint
from stages.training.gradients import Messages, failing_together
from stages.training.loop import Worker
from tests.support.shards import make_shards
from tests.support.undisturbed import train_here, undisturbed

MODEL = {
    "kind": "pix2pix",
    "levels": 4,
    "width": 4,
    "dropout": "none",
    "discriminator_width": 4,
    "discriminator_layers": 1,
}


def config(**changes: Any) -> TrainConfig:
    phase = {"name": "whole", "kind": "whole", "epochs": 2, "decay_epochs": 1, "batch": 4}
    values = {"model": MODEL, "phases": [phase], "log_every": 1, "precision": "float32", **changes}
    return TrainConfig.model_validate(values)


def job(**changes: Any) -> PhaseJob:
    return jobs(config(**changes), AugmentConfig())[0]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_workers_with_synchronised_batch_norm_train_as_one(tmp_path: Path) -> None:
    """Six steps; the last of an epoch has two pairs, both of one worker. Without, the losses are others."""
    make_shards(tmp_path / "shards", {"train": [6, 4]})
    shards = str(tmp_path / "shards")
    alone = undisturbed(job(), shards, tmp_path / "one")
    together = undisturbed(job(synchronised_norms=True), shards, tmp_path / "two", workers=2)
    apart = undisturbed(job(), shards, tmp_path / "apart", workers=2)
    assert {step for step, _ in alone} == set(range(1, 7))
    for name in ("generator/l1", "generator/gan", "discriminator/real"):
        for step in range(1, 7):
            assert together[step, name] == pytest.approx(alone[step, name], rel=2e-3), (step, name)
    name = "gradient_norm/generator"
    assert together[2, name] == pytest.approx(alone[2, name], rel=2e-3)
    assert apart[2, name] != pytest.approx(alone[2, name], rel=2e-3)


LIMIT, SLOW = 3, 4  # seconds: of a collective, and of the store that one worker waits for


def train_slowly(rank: int, folder: str, job: str) -> None:
    """One of two workers of a phase; reading checkpoints takes long on both, drawing samples on the first."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    begin = Messages.__init__

    def with_limit(self: Messages, workers: int, device: torch.device, _: float) -> None:
        begin(self, workers, device, LIMIT)

    def slowly(folder: str, **named: Any) -> Checkpoint | None:
        time.sleep(SLOW)
        return load_newest(folder, **named)

    def load_slowly(place: str, *, job: str) -> Checkpoint:
        time.sleep(SLOW)
        return load(place, job=job)

    def draw_slowly(*_: object) -> tuple[None, dict[str, float]]:
        time.sleep(SLOW)
        return None, {}

    load, load_newest = checkpoints.load, checkpoints.load_newest
    Messages.__init__, checkpoints.load_newest, checkpoints.load = with_limit, slowly, load_slowly
    phase, worker = PhaseJob.model_validate_json(job), Worker(rank=rank, world=2)
    train_here(phase, f"{folder}/shards", f"{folder}/out", worker, preview=draw_slowly)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_wait_for_a_slow_store_and_slow_samples_longer_than_for_a_step(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [6, 4]})
    phase = {"name": "whole", "kind": "whole", "epochs": 1, "batch": 4}
    text = job(phases=[phase]).model_dump_json()
    for _ in range(2):  # the second finds a checkpoint, which each worker reads
        torch.multiprocessing.spawn(train_slowly, (str(tmp_path), text), nprocs=2)
        (tmp_path / "meet").unlink(missing_ok=True)
        assert (tmp_path / "out" / "model" / "model.json").exists()


def wait_alone(rank: int, folder: str) -> None:
    """One of two workers, of which one does not come to a message."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    messages = Messages(2, torch.device("cpu"), LIMIT)
    messages.meet()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            messages.any(False)
    messages.meet()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_message_that_a_worker_does_not_send_has_the_limit_of_a_step(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(wait_alone, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def fail() -> None:
    raise ValueError("no such weights")


def fail_alone(rank: int, folder: str) -> None:
    """One of two workers fails, while the other waits for it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    messages = Messages(2, torch.device("cpu"), LIMIT)
    expected = ValueError if rank == 1 else RuntimeError
    with pytest.raises(expected, match="no such weights"), failing_together():
        messages.meet() if rank == 0 else fail()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_failure_of_a_worker_ends_the_wait_of_the_others(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(fail_alone, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_workers_penalise_the_discriminator_as_one_does(tmp_path: Path) -> None:
    """The penalty is the norm of a gradient; its own gradient goes through both workers' statistics."""
    make_shards(tmp_path / "shards", {"train": [6, 4]})
    shards, changes = str(tmp_path / "shards"), {"synchronised_norms": True, "losses": {"r1": 100.0}}
    alone = undisturbed(job(**changes), shards, tmp_path / "one")
    together = undisturbed(job(**changes), shards, tmp_path / "two", workers=2)
    for step in range(1, 7):
        for name in ("discriminator/r1", "gradient_norm/discriminator"):
            assert together[step, name] == pytest.approx(alone[step, name], rel=2e-3), (step, name)


def test_turns_and_synchronised_norms_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"micro_batch: .*train\.synchronised_norms"):
        config(synchronised_norms=True).check_resources(Resources(micro_batch=1))
