"""Process settings are applied where the platform knows them, and harmless elsewhere."""

from __future__ import annotations

import sys

import pytest
import torch

from stages import heap
from stages.models import process


def test_bf16_is_chosen_where_there_are_matrix_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, precision in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert process.best_precision("cpu") == precision


def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    process.tune_process("cpu")
    assert not heap.keep_freed_memory()
