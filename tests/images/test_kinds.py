"""Values as networks see them, and back."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from stages.base import Kind
from stages.images import kinds

RNG = np.random.default_rng(0)
KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in kinds.IDS])
def test_values_come_back_from_what_the_networks_see(kind: Kind):
    if kind == "channels":
        array = RNG.random((4, 4, 5)).astype("<f4")
    else:
        top = np.iinfo(kinds.dtype(kind)).max
        array = RNG.integers(0, top + 1, (64, 64, kinds.CHANNELS[kind])).astype(kinds.dtype(kind))
    seen = kinds.normalise(array, kind)
    assert np.abs(seen).max() <= 1.17  # ab reaches beyond 110 in theory, not in sRGB
    assert np.array_equal(kinds.restore(seen, kind), array)
