"""Sources source from targets."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from stages.config.pair import Derivation
from stages.images import colour, geometry, kinds
from stages.images.derive import derive

RNG = np.random.default_rng(1)
PHOTO = geometry.resize(RNG.integers(0, 256, (8, 8, 3), np.uint8), (96, 64), "rgb")


@pytest.mark.parametrize("recipe", get_args(Derivation))
@pytest.mark.parametrize("kind", ["rgb", "grey", "lab_l"])
def test_every_recipe_makes_a_source_of_the_kind_asked_for(recipe, kind):
    before = PHOTO.copy()
    source = derive(PHOTO, recipe, key="a", kind=kind)
    assert source.shape == (64, 96, kinds.CHANNELS[kind])
    assert source.dtype == np.uint8
    assert np.array_equal(source, derive(PHOTO, recipe, key="a", kind=kind))
    assert np.array_equal(PHOTO, before)


def test_holes_depend_on_the_key_and_leave_the_rest_alone():
    one, other = (derive(PHOTO, "inpaint", key=key, kind="rgb") for key in ("a", "b"))
    assert not np.array_equal(one, other)
    changed = (one != PHOTO).any(axis=2)
    assert changed.any()
    assert (one[changed] == 255).all()


def test_lightness_is_the_l_of_lab():
    source = derive(PHOTO, "lab_lightness", key="a", kind="lab_l")
    assert np.allclose(source[..., 0] / 2.55, colour.rgb_to_lab(PHOTO)[..., 0], atol=0.25)


def test_edges_are_thin_lines_where_the_image_changes():
    step = np.zeros((40, 40, 3), np.uint8)
    step[:, 20:] = 200
    source = derive(step, "edges", key="a", kind="grey")[:, :, 0]
    assert set(np.unique(source)) == {0, 255}
    columns = np.flatnonzero((source == 0).any(axis=0))
    assert 1 <= len(columns) <= 2
    assert abs(columns.mean() - 19.5) <= 1


def test_downscaling_loses_detail_and_keeps_the_mean():
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    source = derive(noise, "downscale", key="a", kind="rgb")
    assert source.std() < noise.std() / 2
    assert abs(float(source.mean()) - float(noise.mean())) < 3
