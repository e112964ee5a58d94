"""CIE Lab and palettes."""

from __future__ import annotations

import numpy as np
from skimage import color

from stages.images import colour, decode, encode

RNG = np.random.default_rng(0)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def test_lab_agrees_with_scikit_image_and_comes_back():
    rgb = noise(16, 16)
    lab = colour.rgb_to_lab(rgb)
    assert np.allclose(lab, color.rgb2lab(rgb), atol=0.05)
    assert np.array_equal(colour.lab_to_rgb(lab), rgb)


def test_label_colours_are_distinct_and_the_same_every_time():
    for classes in (12, 35, 151, 256):
        colours = {tuple(c) for c in colour.palette(classes)}
        assert len(colours) >= (29 if classes == 35 else classes - 2)
    ids = np.array([[0, 34], [200, 1]], np.uint8)
    assert colour.colorize(ids, 35).shape == (2, 2, 3)  # an id outside is drawn, not a crash


def test_a_label_picture_becomes_the_ids_of_its_nearest_colours():
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    picture = np.array([[[20, 5, 9], [230, 10, 30], [40, 0, 200]]], np.uint8)
    ids = colour.nearest_class(picture, colors)
    assert ids.tolist() == [[0, 1, 2]]
    data = encode.encode_png(ids[:, :, None], colors.tobytes())
    assert decode.decode_image(data, "labels")[:, :, 0].tolist() == [[0, 1, 2]]
    assert (decode.decode_image(data, "rgb") == colors[None]).all()
