"""What shards store, and our PNG files read by Pillow."""

from __future__ import annotations

import io
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from stages.base import Encoding, Kind
from stages.images import decode, encode, kinds
from stages.images.kinds import ImageRejected

RNG = np.random.default_rng(0)
KINDS: tuple[Kind, ...] = get_args(Kind)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", get_args(Encoding))
def test_what_is_stored_comes_back(kind: Kind, encoding: Encoding):
    channels = kinds.CHANNELS.get(kind, 5)
    if kind == "channels":
        array = RNG.random((10, 12, 5)).astype("<f4")
    else:
        array = RNG.integers(0, np.iinfo(kinds.dtype(kind)).max, (10, 12, channels)).astype(kinds.dtype(kind))
    kept = encode.stored_encoding(kind, encoding)
    data = encode.encode_image(array, kept, quality=95)
    back = encode.decode_stored(data, kind=kind, encoding=kept, channels=channels, size=(12, 10))
    assert back.dtype == array.dtype
    if kept in ("jpeg", "webp"):
        assert kind in kinds.PHOTOS
        assert back.shape == array.shape
    else:
        assert np.array_equal(back, array)


def test_a_stored_image_of_another_size_is_refused():
    for encoding in ("raw", "png"):
        data = encode.encode_image(noise(10, 12), encoding)
        with pytest.raises(ImageRejected):
            encode.decode_stored(data, kind="rgb", encoding=encoding, channels=3, size=(11, 10))


# -- PNG ---------------------------------------------------------------------


def read(data: bytes) -> Image.Image:
    """Read by Pillow, every checksum verified."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.verify()
    decode._verify_png(data)
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (33, 50), (256, 300)])
@pytest.mark.parametrize("what", ["noise", "flat", "smooth"])
def test_what_is_written_is_read(channels: int, mode: str, size: tuple[int, int], what: str):
    array = {
        "noise": RNG.integers(0, 256, (*size, channels), np.uint8),
        "flat": np.full((*size, channels), 255, np.uint8),
        "smooth": np.indices(size).sum(0).astype(np.uint8)[:, :, None].repeat(channels, 2),
    }[what]
    image = read(encode.encode_png(array))
    assert image.mode == mode
    assert np.array_equal(np.asarray(image).reshape(array.shape), array)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_keep_their_depth(order: str):
    array = RNG.integers(0, 65536, (31, 17, 1)).astype(order)
    image = read(encode.encode_png(array))
    assert image.mode == "I;16"
    assert np.array_equal(np.asarray(image), array[:, :, 0])


def test_views_are_written_as_they_look():
    planar = np.moveaxis(RNG.integers(0, 256, (3, 20, 30), np.uint8), 0, 2)
    planar.setflags(write=False)
    for view in (planar, planar[::-1], planar[3:9, 4:20], planar[:, ::-2]):
        assert np.array_equal(np.asarray(read(encode.encode_png(view))), view)


def test_a_palette_is_kept():
    ids = RNG.integers(0, 3, (9, 11, 1), np.uint8)
    colors = np.array([[0, 0, 0], [255, 10, 0], [0, 0, 255]], np.uint8)
    image = read(encode.encode_png(ids, colors.tobytes()))
    assert image.mode == "P"
    assert np.array_equal(np.asarray(image), ids[:, :, 0])
    assert np.array_equal(np.asarray(image.convert("RGB")), colors[ids[:, :, 0]])


def test_areas_of_one_value_take_few_bytes():
    """Whatever filter is the better one: blocks of ids, and a photo's gradients."""
    ids = RNG.integers(0, 20, (8, 16, 1), np.uint8).repeat(32, 0).repeat(32, 1)
    slope = (np.indices((256, 512)).sum(0) // 3).astype(np.uint8)[:, :, None]
    for array in (ids, slope):
        assert len(encode.encode_png(array)) < array.size / 40
