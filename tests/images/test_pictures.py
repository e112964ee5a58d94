"""Pictures for people."""

from __future__ import annotations

import numpy as np

from stages.images import colour, kinds, pictures

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def test_a_picture_of_lab_needs_both_parts():
    rgb = np.full((4, 4, 3), (200, 80, 40), np.uint8)
    level, ab = colour.lab_channels(rgb, "lab_l"), colour.lab_channels(rgb, "lab_ab")
    assert np.allclose(kinds.normalise(level, "lab_l"), colour.rgb_to_lab(rgb)[..., :1] / 50 - 1, atol=0.005)
    assert np.abs(pictures.picture(ab, "lab_ab", lightness=level).astype(int) - rgb).max() <= 4
