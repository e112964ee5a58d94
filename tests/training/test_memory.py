"""The estimate of a phase's memory: near what a real process takes, and moved by what moves the need."""

from __future__ import annotations

import multiprocessing
import re
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.models.fast.process import tune_process
from stages.models.step import Batch
from stages.shards.dataset import DatasetSpec, RoleSpec
from stages.training import loop
from stages.training.memory import SLACK, estimate_memory, out_of_memory, shortage

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
    resources = Resources(micro_batch=micro_batch)
    return estimate_memory(job(index, **changes), spec, resources, workers=workers)


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
    before = psutil.Process().memory_info().rss
    gan = loop.build(job, SPEC.inputs(), torch.device("cpu"), "float32")
    images = torch.zeros(job.phase.batch, 3, *SPEC.size, dtype=torch.uint8)
    for _ in range(3):
        loop.update(gan, Batch(source=images, target=images), weights=job.losses)
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
        taken = pool.submit(measured, one.model_dump_json()).result()
    assert 0.9 * taken < estimate_memory(one, SPEC, Resources()) < 1.35 * taken


class PeakOfMeta(TorchDispatchMode):
    """The most bytes that tensors on the meta device would take at once, from the first one made here."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_ = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._fused_adam_.tensor_lr:  # it makes no tensor, and the meta device lacks it
            return None
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.bytes_ += storage.nbytes()
        self.peak = max(self.peak, self.bytes_)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, block: int, size: int) -> None:
        self._seen.discard(block)
        self.bytes_ -= size


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_estimate_is_near_the_peak_of_a_steps_tensors(checkpointing: bool) -> None:
    """Counted without slack, on the meta device. When written: 1.23 of the peak; with checkpointing, 1.19."""
    one = job(
        precision="float32",
        model={"kind": "pix2pixhd", "enhancers": 0, "width": 16, "blocks": 4, "discriminators": 2},
        phases=[{"name": "global", "kind": "global", "epochs": 1, "batch": 2}],
    )
    meta = torch.device("meta")
    images = torch.empty(2, 3, *SPEC.size, dtype=torch.uint8, device=meta)
    with PeakOfMeta() as peak:
        gan = loop.build(one, SPEC.inputs(), meta, "float32", checkpointing=checkpointing)
        for _ in range(2):
            loop.update(gan, Batch(source=images, target=images), weights=one.losses)
    estimate = estimate_memory(one, SPEC, Resources(checkpointing=checkpointing)) / SLACK
    assert 1 < estimate / peak.peak < 1.3


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


@pytest.mark.parametrize(
    "text",
    [
        "DefaultCPUAllocator: can't allocate memory: 9 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
        "Task was killed due to the node running low on memory.",
    ],
)
def test_every_form_of_a_lack_of_memory_says_what_to_lower(text: str) -> None:
    hd = job(model={"kind": "pix2pixhd"}, precision="float32")
    assert out_of_memory(RuntimeError(text), hd) == (
        f"out of memory ({text}); lower shard.size or augment.crop or train.model.width, "
        "or set resources.checkpointing: true, or set train.precision: bf16"
    )
    several = job(phases=phase(8))
    assert "lower resources.micro_batch or" in out_of_memory(RuntimeError(text), several)


def test_only_a_lack_of_memory_is_one() -> None:
    assert "out of memory (OutOfMemoryError); lower" in out_of_memory(torch.OutOfMemoryError(), job())
    assert "out of memory" in out_of_memory(MemoryError("Unable to allocate 9 GiB"), job())
    assert out_of_memory(RuntimeError("something else"), job()) == ""
    assert out_of_memory(RuntimeError(), job()) == ""


def test_a_gpu_needs_a_context_and_bf16_copies_of_the_weights() -> None:
    weights = 54_413_955 + 2_768_705
    on_gpu = estimate_memory(job(precision="bf16"), SPEC, Resources(), gpu=True)
    assert on_gpu - needed(precision="bf16") == pytest.approx(1.6e9 + 1.2 * 2 * weights, rel=0.01)
    assert estimate_memory(job(), SPEC, Resources(), gpu=True) == on_gpu


def test_a_step_that_exceeds_the_gpu_is_warned_of() -> None:
    assert shortage(8 << 30, 8 << 30, job()) == ""
    assert shortage(90_000_000_000, 80_000_000_000, job()) == (
        "a step of 'whole' is expected to need 90.0 GB, the GPU has 80.0 GB; if memory does not suffice, "
        "lower shard.size or augment.crop or train.model.width"
    )
