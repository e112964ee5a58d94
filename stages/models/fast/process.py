"""Settings of a process that runs a network, applied at its start: they change speed and no result."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from stages.models.fast.heap import keep_freed_memory, return_freed_memory

PRETEND = "PIXLOOM_BF16"

GPU_ENVIRONMENT = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # against fragmentation
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one of the two with which cuBLAS is deterministic
}
"""Read when CUDA starts in a process."""

SWITCH_SECONDS = 0.0005
"""Seconds that a thread that decodes or sends may hold the interpreter while the network's thread waits to
start its next operator: Python's default of 5 ms is as long as many operators."""


def tune_process(device: torch.device | str, *, save_memory: bool = False) -> None:
    """Tune this process for a network on `device`. `save_memory`: on a CPU, less memory and more time."""
    sys.setswitchinterval(SWITCH_SECONDS)
    if torch.device(device).type == "cuda":
        os.environ.update(gpu_environment())
        set_tf32(True)
        torch.backends.cudnn.benchmark = True  # shapes never change within a phase
    elif save_memory:
        return_freed_memory(1 << 20)
    else:
        keep_freed_memory()


def gpu_environment() -> dict[str, str]:
    """The variables of a process that computes on a GPU; the user's own come first."""
    return {name: os.environ.get(name, value) for name, value in GPU_ENVIRONMENT.items()}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """If `wanted`, operators give the same bits each time: slower kernels, none chosen by timing.

    What cannot raises RuntimeError.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def set_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions of a GPU may be TF32.

    These settings also set `torch.backends.*.fp32_precision`. That alone makes torch.compile of torch 2.13
    raise, which still reads the older ones (pytorch#196728).
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def best_precision(device: torch.device | str) -> Literal["float32", "bf16"]:
    """bf16 on GPUs and on CPUs with AMX; else float32: without AMX, Intel's bf16 has half its rate.

    `PIXLOOM_BF16` = 1 or 0 pretends that this processor has or lacks them, for tests.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_matrix_units = torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bf16" if {"0": False, "1": True}.get(os.environ.get(PRETEND, ""), has_matrix_units) else "float32"
