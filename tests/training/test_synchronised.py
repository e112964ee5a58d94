"""Batch norm over the pairs of all workers: two real processes train as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.base import Resources
from stages.config.shard import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
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


def test_turns_and_synchronised_norms_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"micro_batch: .*train\.synchronised_norms"):
        config(synchronised_norms=True).check_resources(Resources(micro_batch=1))
