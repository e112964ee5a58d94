"""Settings of a process that runs a network."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from stages.models.fast import process


def test_bf16_is_chosen_where_there_are_matrix_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(process.PRETEND, raising=False)
    for amx, precision in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda amx=amx: {"amx_bf16": amx})
        assert process.best_precision("cpu") == precision
    for pretended, precision in (("1", "bf16"), ("0", "float32")):
        monkeypatch.setenv(process.PRETEND, pretended)
        assert process.best_precision("cpu") == precision


@pytest.mark.parametrize("save_memory", [False, True])
def test_the_networks_thread_does_not_wait_long_for_the_interpreter(save_memory: bool) -> None:
    before = sys.getswitchinterval()
    try:
        process.tune_process("cpu", save_memory=save_memory)
        assert sys.getswitchinterval() == pytest.approx(process.SWITCH_SECONDS)
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_new_readers_and_for_those_of_the_compiler(allowed: bool) -> None:
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        process.set_tf32(allowed)
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")  # or it raises
        assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def test_a_gpus_allocator_is_told_to_expand_its_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    matmul, switching = torch.get_float32_matmul_precision(), sys.getswitchinterval()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # what it was is put back afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        process.tune_process("cuda")
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
        process.tune_process("cuda")
        assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.set_float32_matmul_precision(matmul)
        sys.setswitchinterval(switching)


def test_deterministic_operators_are_asked_for_inside_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for wanted in (False, True):
        with process.deterministic(wanted):
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert torch.backends.cudnn.benchmark != wanted
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
