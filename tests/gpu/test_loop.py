"""A phase on a GPU: checkpoints hold the state of their step, and training resumes from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pyarrow", reason="NOT RUN: checkpoints have a Parquet file")

from stages.config.train import PhaseJob
from stages.models.fast.process import tune_process
from stages.models.gan import state_of
from stages.training import checkpoints
from stages.training.graph import CudaGraphs
from stages.training.loop import Ending, Loop, Task, Worker, train_phase
from stages.training.news import Channel
from tests.training.test_loop import (
    BATCH,
    PHASES,
    Rows,
    assert_equal,
    losses,
    nothing,
    phase_jobs,
    task,
    weights,
)

pytestmark = pytest.mark.gpu

PIX2PIX = {
    "model": {
        "kind": "pix2pix",
        "levels": 3,
        "width": 4,
        "discriminator_layers": 1,
        "discriminator_width": 4,
    },
    "phases": [{"name": "whole", "kind": "whole", "epochs": 3, "decay_epochs": 1, "batch": BATCH}],
}
CHANGES: list[dict[str, Any]] = [PIX2PIX, {}, {"precision": "bf16"}]
IDS = ["pix2pix", "pix2pixhd", "pix2pixhd-bf16"]


def job(**changes: Any) -> PhaseJob:
    return phase_jobs(log_every=2, **changes)[0]


def train(one: Task, device: torch.device, *, cut: int | None = None) -> Ending:
    tune_process(device)
    worker = Worker(device=device)
    return train_phase(one, worker, Rows(16, cut=cut), Channel(lambda _: None), nothing)


@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_killed_and_resumed_ends_near_an_uninterrupted_run(
    device: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Near: kernels that add in any order differ in the last bits; the same images are seen."""
    whole, parts = task(tmp_path / "whole", job(**changes)), task(tmp_path / "parts", job(**changes))
    uninterrupted = train(whole, device)
    with pytest.raises(KeyboardInterrupt):
        train(parts, device, cut=5)
    resumed = train(parts, device)
    assert resumed.position == uninterrupted.position
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [row[:4] for row in got] == [row[:4] for row in expected]
    for one, other in zip(got, expected, strict=True):
        assert one[4] == pytest.approx(other[4], rel=0.1, abs=0.02), one


@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_deterministic_training_resumes_to_the_last_bit(
    device: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, parts = (task(tmp_path / name, job(deterministic=True, **changes)) for name in ("whole", "parts"))
    train(whole, device)
    with pytest.raises(KeyboardInterrupt):
        train(parts, device, cut=5)
    train(parts, device)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_a_checkpoint_holds_its_step_although_training_goes_on(
    device: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The state is copied while the GPU is still busy, and later steps write over it."""
    tune_process(device)
    one = task(tmp_path, job(**changes), keep_checkpoints=99)
    loop = Loop(one, Worker(device=device), Channel(lambda _: None), nothing, lambda: False, dict)
    states: dict[int, dict[str, torch.Tensor]] = {}
    for epoch in range(2):
        for batch in Rows(16).epoch(epoch):
            loop.step(batch)
            weights = {name: value.cpu().clone() for name, value in loop.gan.generator.state_dict().items()}
            states[loop.position.steps] = weights
    loop.writer.finish()
    for name in checkpoints.names(str(tmp_path / "checkpoints")):
        saved = checkpoints.load(str(tmp_path / "checkpoints" / name), job="name")
        for key, value in states[saved.position.steps].items():
            assert saved.state["generator"][key].equal(value), (name, key)


def test_a_step_and_the_copy_of_its_state_never_wait_for_the_device(
    device: torch.device, tmp_path: Path
) -> None:
    """Losses of a window are read when the next one closes. Before a checkpoint, weights are verified."""
    tune_process(device)
    one = task(tmp_path, job(**PIX2PIX), checkpoint_images=None)
    loop = Loop(one, Worker(device=device), Channel(lambda _: None), nothing, lambda: False, dict)
    first, *rest = itertools.chain(Rows(16).epoch(0), Rows(16).epoch(1))
    loop.step(first)
    *rest, _, last = (batch.each(torch.Tensor.pin_memory) for batch in rest)
    for batch in (*rest, last):
        ends_epoch = loop.position.step == 2
        torch.cuda.set_sync_debug_mode("default" if ends_epoch else "error")
        loop.step(batch)
    torch.cuda.set_sync_debug_mode("error")
    checkpoints.copied(state_of(loop.gan))
    torch.cuda.set_sync_debug_mode("default")
    assert len(loop.curves.named("generator/l1")) == 2


def test_resumed_moments_have_the_layout_of_their_weights(device: torch.device, tmp_path: Path) -> None:
    """Fused Adam pairs elements by address."""
    one = task(tmp_path, job(phases=[{**PHASES[0], "epochs": 1, "decay_epochs": 0}, *PHASES[1:]]))
    train(one, device)
    loop = Loop(one, Worker(device=device), Channel(lambda _: None), nothing, lambda: False, dict)
    state = loop.gan.generator_optimizer.state
    assert state
    for parameter, moments in state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
        assert moments["exp_avg"].device == parameter.device


@pytest.mark.parametrize("changes", CHANGES, ids=IDS)
def test_a_recorded_step_gives_the_numbers_of_steps_that_run(
    cuda: torch.device, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To rounding, without `train.deterministic`."""
    tune_process(cuda)
    for name, record in (("eager", None), ("graphed", CudaGraphs())):
        one = task(tmp_path / name, job(**changes))
        train_phase(one, Worker(device=cuda), Rows(16), Channel(lambda _: None), nothing, record=record)
    expected, got = losses(tmp_path / "eager"), losses(tmp_path / "graphed")
    assert [row[:4] for row in got] == [row[:4] for row in expected]
    for one_row, other in zip(got, expected, strict=True):
        assert one_row[4] == pytest.approx(other[4], rel=0.1, abs=0.02), one_row
