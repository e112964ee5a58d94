"""Process settings are applied where the platform has them, and harmless elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from stages.models.fast import heap, process


@pytest.fixture(autouse=True)
def _switch_interval_is_restored() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_bf16_is_chosen_where_there_are_matrix_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, precision in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert process.best_precision("cpu") == precision


def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    process.tune_process("cpu")
    assert not heap.keep_freed_memory()


@pytest.mark.parametrize("save_memory", [False, True])
def test_the_networks_thread_does_not_wait_long_for_the_interpreter(save_memory: bool) -> None:
    process.tune_process("cpu", save_memory=save_memory)
    assert sys.getswitchinterval() == pytest.approx(process.SWITCH_SECONDS)
