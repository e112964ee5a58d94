"""Crop and mirror."""

from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from stages.images.augment import Draw, apply, centre, draw

sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(st.integers(), st.integers(0, 1000), st.text(), sizes, st.data())
def test_a_draw_depends_on_its_arguments_alone_and_stays_inside(seed, epoch, key, load, data):
    crop = data.draw(st.none() | st.tuples(st.integers(1, load[0]), st.integers(1, load[1])))
    drawn = draw(seed, epoch, key, load, crop)
    assert drawn == draw(seed, epoch, key, load, crop)
    width, height = crop or load
    assert 0 <= drawn.x <= load[0] - width
    assert 0 <= drawn.y <= load[1] - height
    array = np.zeros((load[1], load[0], 1), np.uint8)
    assert apply(array, drawn, load, crop).shape == (height, width, 1)


def test_draws_are_spread_evenly_over_places_and_sides():
    draws = [draw(0, 0, str(n), (286, 286), (256, 256)) for n in range(4000)]
    counts = np.bincount([d.x for d in draws], minlength=31)
    assert len(counts) == 31
    assert counts.min() > 80
    assert abs(np.mean([d.flip for d in draws]) - 0.5) < 0.03
    assert abs(np.corrcoef([d.x for d in draws], [d.y for d in draws])[0, 1]) < 0.06


def test_every_epoch_key_and_seed_has_its_own_draw():
    base = {draw(0, 0, str(n), (1000, 1000), (8, 8)) for n in range(50)}
    assert base.isdisjoint(draw(0, 1, str(n), (1000, 1000), (8, 8)) for n in range(50))
    assert base.isdisjoint(draw(1, 0, str(n), (1000, 1000), (8, 8)) for n in range(50))


def test_without_crop_and_mirror_nothing_changes():
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(apply(array, draw(0, 0, "a", (4, 2), None, mirror=False), (4, 2)), array)
    assert np.array_equal(apply(array, Draw(0, 0, flip=True), (4, 2)), array[:, ::-1])
    assert centre((10, 8), (4, 4)) == Draw(3, 2, flip=False)
