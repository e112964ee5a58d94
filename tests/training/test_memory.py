"""The estimate of a phase's memory: near what a real process takes, and moved by what moves the need."""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stages.config.shard import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.models.fast.process import tune_process
from stages.models.files.saved import Preprocessing
from stages.models.step import Batch
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.training import loop, phases
from stages.training.memory import estimate_memory

SPEC = DatasetSpec(
    size=(256, 256),
    roles={"source": RoleSpec(kind="rgb", encoding="raw"), "target": RoleSpec(kind="rgb", encoding="raw")},
    splits={},
)


def needed(
    *,
    workers: int = 1,
    micro_batch: int | None = None,
    index: int = 0,
    spec: DatasetSpec = SPEC,
    **changes: Any,
) -> int:
    return estimate_memory(job(index, **changes), spec, workers=workers, micro_batch=micro_batch)


def job(index: int = 0, **changes: Any) -> PhaseJob:
    config = TrainConfig.model_validate({"model": {"kind": "pix2pix"}, **changes})
    return jobs(config, AugmentConfig())[index]


def phase(batch: int) -> list[dict[str, Any]]:
    return [{"name": "whole", "kind": "whole", "epochs": 1, "batch": batch}]


def measured(text: str) -> int:
    """Bytes by which this process grows at most while it does three steps of a phase."""
    torch.set_num_threads(1)
    tune_process("cpu")
    job = PhaseJob.model_validate_json(text)
    task = loop.Task(
        job=job,
        name="",
        inputs=phases.input_spec(SPEC),
        preprocessing=Preprocessing(),
        rows=1,
        output="",
        before="",
    )
    before = psutil.Process().memory_info().rss
    gan = loop.build(task, torch.device("cpu"))
    images = torch.zeros(job.phase.batch, 3, *SPEC.size, dtype=torch.uint8)
    for _ in range(3):
        loop.step(gan, Batch(source=images, target=images), weights=job.losses)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024 - before


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"kind": "pix2pix", "width": 32}, "phases": phase(4)},
        {
            "model": {"kind": "pix2pixhd", "enhancers": 0, "width": 16, "blocks": 4, "discriminators": 2},
            "phases": [{"name": "global", "kind": "global", "epochs": 1, "batch": 2}],
        },
    ],
    ids=["pix2pix", "pix2pixhd"],
)
def test_a_real_process_takes_what_was_estimated(settings: dict[str, Any]) -> None:
    """Within -10 % and +35 %: the estimate holds a fifth of slack. Measured when written: +22 % and +9 %."""
    one = job(precision="float32", **settings)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        taken = pool.submit(measured, one.model_dump_json()).result(timeout=120)
    assert 0.9 * taken < estimate_memory(one, SPEC) < 1.35 * taken


def test_weights_gradients_and_moments_are_four_times_the_parameters() -> None:
    """54.4 M and 2.8 M parameters of pix2pix, four bytes each, and a fifth of slack; then activations."""
    states = 1.2 * 4 * 4 * (54_413_955 + 2_768_705)
    assert states < needed() < 1.4 * states


def test_more_images_a_worker_need_more() -> None:
    assert needed(phases=phase(8)) > needed(phases=phase(1))
    assert needed(phases=phase(8), workers=8) == needed(phases=phase(1))
    assert needed(phases=phase(8), micro_batch=1) == needed(phases=phase(1))


def test_an_average_needs_a_copy_of_the_weights() -> None:
    assert needed(ema=0.999) - needed() == pytest.approx(1.2 * 4 * 54_413_955, rel=0.01)


def test_a_local_phase_needs_less_than_a_joint_one() -> None:
    model = {"kind": "pix2pixhd", "blocks": 2, "width": 8}
    local, joint = (needed(model=model, index=index) for index in (1, 2))
    assert local < joint
