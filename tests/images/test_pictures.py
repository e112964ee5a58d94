"""Pictures for people."""

from __future__ import annotations

import numpy as np
from PIL import Image

from stages.images import colour, geometry, kinds, pictures

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def test_a_picture_of_lab_needs_both_parts():
    rgb = np.full((4, 4, 3), (200, 80, 40), np.uint8)
    level, ab = colour.lab_channels(rgb, "lab_l"), colour.lab_channels(rgb, "lab_ab")
    assert np.allclose(kinds.normalise(level, "lab_l"), colour.rgb_to_lab(rgb)[..., :1] / 50 - 1, atol=0.005)
    assert np.abs(pictures.picture(ab, "lab_ab", lightness=level).astype(int) - rgb).max() <= 4


def test_the_perceptual_hash_survives_a_resize_and_differs_between_images():
    smooth = np.asarray(Image.fromarray(noise(8, 8)).resize((128, 128), Image.Resampling.BICUBIC))
    other = np.asarray(Image.fromarray(noise(8, 8)).resize((128, 128), Image.Resampling.BICUBIC))
    ours = pictures.perceptual_hash(smooth)
    assert (ours ^ pictures.perceptual_hash(geometry.resize(smooth, (96, 96), "rgb"))).bit_count() <= 3
    assert (ours ^ pictures.perceptual_hash(other)).bit_count() > 10
    assert pictures.perceptual_hash(np.full((9, 9, 3), 7, np.uint8)) == 0
