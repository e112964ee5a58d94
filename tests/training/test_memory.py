"""The estimate of a phase's memory: the right size, and moved by what moves the need."""

from __future__ import annotations

from typing import Any

import pytest

from stages.config.shard import AugmentConfig
from stages.config.train import TrainConfig, jobs
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.training.memory import estimate_memory

SPEC = DatasetSpec(
    size=(256, 256),
    roles={"source": RoleSpec(kind="rgb", encoding="raw"), "target": RoleSpec(kind="rgb", encoding="raw")},
    splits={},
)


def needed(
    *,
    workers: int = 1,
    at_once: int | None = None,
    index: int = 0,
    spec: DatasetSpec = SPEC,
    **changes: Any,
) -> int:
    config = TrainConfig.model_validate({"model": {"kind": "pix2pix"}, **changes})
    job = jobs(config, AugmentConfig())[index]
    return estimate_memory(job, spec, workers=workers, at_once=at_once)


def phase(batch: int) -> list[dict[str, Any]]:
    return [{"name": "whole", "kind": "whole", "epochs": 1, "batch": batch}]


def test_weights_gradients_and_moments_are_four_times_the_parameters() -> None:
    """54.4 M and 2.8 M parameters of pix2pix: 0.92 GB, and something for one image's activations."""
    assert 0.92e9 < needed() < 1.6e9


def test_more_images_a_worker_need_more() -> None:
    assert needed(phases=phase(8)) > needed(phases=phase(1))
    assert needed(phases=phase(8), workers=8) == needed(phases=phase(1))
    assert needed(phases=phase(8), at_once=1) == needed(phases=phase(1))


def test_an_average_needs_a_copy_of_the_weights() -> None:
    assert needed(ema=0.999) - needed() == pytest.approx(1.2 * 4 * 54_413_955, rel=0.01)


def test_a_local_phase_needs_less_than_a_joint_one() -> None:
    model = {"kind": "pix2pixhd", "blocks": 2, "width": 8}
    local, joint = (needed(model=model, index=index) for index in (1, 2))
    assert local < joint
