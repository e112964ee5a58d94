"""Batch norm over the pairs of all workers: two real processes train as one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing

from stages import train
from stages.base import Resources
from stages.config.shard import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.shards import dataset
from stages.shards.feed import Feed
from stages.training import checkpoints
from stages.training.checkpoints import Checkpoint
from stages.training.loop import Task, Worker, train_phase
from stages.training.news import Channel, Mailbox
from tests.support.shards import make_shards
from tests.support.undisturbed import undisturbed

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


def train_slowly(rank: int, folder: str, job: str) -> None:
    """One of two workers of a phase; the one that leads reads its checkpoints and draws samples slowly."""
    limit = 3
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def load_slowly(*arguments: Any, **named: Any) -> Checkpoint | None:
        time.sleep(limit + 2)
        return load_newest(*arguments, **named)

    def draw_slowly(*_: object) -> tuple[None, dict[str, float]]:
        time.sleep(limit + 2)
        return None, {}

    load_newest = checkpoints.load_newest
    checkpoints.load_newest = load_slowly
    resources = Resources.model_construct(
        **{**dict(Resources(checkpoint_seconds=0)), "collective_timeout_s": limit}
    )
    spec = dataset.load(f"{folder}/shards")
    phase = PhaseJob.model_validate_json(job)
    task = Task(
        job=phase,
        name="slow",
        inputs=spec.inputs(),
        preprocessing=train.preprocessing(phase, spec),
        rows=spec.rows("train"),
        output=f"{folder}/out",
        before="",
        resources=resources,
    )
    worker = Worker(rank=rank, world=2)
    with Feed(f"{folder}/shards", spec, batch=4, rank=rank, world=2, epochs=2) as feed:
        train_phase(task, worker, feed, Channel(Mailbox().post), draw_slowly)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_wait_for_a_slow_store_and_slow_samples_beyond_the_limit_of_a_step(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [6, 4]})
    torch.multiprocessing.spawn(train_slowly, (str(tmp_path), job().model_dump_json()), nprocs=2)
    assert (tmp_path / "out" / "model" / "model.json").exists()


def test_turns_and_synchronised_norms_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"micro_batch: .*train\.synchronised_norms"):
        config(synchronised_norms=True).check_resources(Resources(micro_batch=1))
