"""Halves, resizing, reduction."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from stages.base import Kind
from stages.images import geometry, kinds
from stages.images.kinds import ImageRejected

RNG = np.random.default_rng(0)
KINDS: tuple[Kind, ...] = get_args(Kind)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def test_halves_are_of_one_size_even_when_the_width_is_odd():
    array = noise(6, 9)
    left, right = geometry.crop_half(array, "left"), geometry.crop_half(array, "right")
    assert left.shape == right.shape == (6, 4, 3)
    assert np.array_equal(right, array[:, 5:])
    assert geometry.crop_half(array, "top").shape == (3, 9, 3)
    with pytest.raises(ImageRejected):
        geometry.crop_half(noise(4, 1), "left")


def test_ids_are_never_mixed_by_resizing():
    ids = RNG.choice(np.array([0, 7, 200], np.uint8), (33, 47, 1))
    for size in ((64, 64), (10, 90), (16, 16)):
        assert set(np.unique(geometry.resize(ids, size, "labels"))) <= {0, 7, 200}
    assert set(np.unique(geometry.shrink(ids, 2, "labels"))) <= {0, 7, 200}


def test_nearest_agrees_with_pillow():
    ids = noise(37, 53, 1)
    for size in ((20, 20), (100, 90), (53, 37)):
        theirs = np.asarray(Image.fromarray(ids[:, :, 0]).resize(size, Image.Resampling.NEAREST))
        assert np.array_equal(geometry.resize(ids, size, "labels")[:, :, 0], theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_resizes_and_shrinks_in_its_own_type(kind: Kind):
    channels = kinds.CHANNELS.get(kind, 5)
    array = kinds.restore(RNG.random((16, 24, channels), np.float32), kind) if kind not in kinds.IDS else None
    if array is None:
        array = RNG.integers(0, 200, (16, 24, channels)).astype(kinds.dtype(kind))
    for out, shape in (
        (geometry.resize(array, (12, 10), kind), (10, 12)),
        (geometry.shrink(array, 2, kind), (8, 12)),
    ):
        assert out.shape == (*shape, channels)
        assert out.dtype == kinds.dtype(kind)


def test_shrinking_averages_photos():
    array = np.zeros((2, 2, 3), np.uint8)
    array[0, 0] = 200
    assert geometry.shrink(array, 2, "rgb")[0, 0, 0] == 50
