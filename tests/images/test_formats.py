"""Every depth, polarity and transparency of PNG and TIFF, read as its standard says."""

from __future__ import annotations

import io
import itertools
import logging
import struct
import time
import tracemalloc
import zlib
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from stages.images import decode, encode, kinds
from stages.images.kinds import ImageRejected
from stages.models.architecture import Picture
from tests.images.test_decode import chunk, file_of

RNG = np.random.default_rng(0)
LUMA = np.array([0.299, 0.587, 0.114])


def tiff(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **options)
    return out.getvalue()


def rejected(data: bytes, how: Any) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        decode.decode_image(data, how)
    return caught.value


def table() -> list[Any]:
    """(format, bits, colours, photometric, alpha): all that the writers can combine."""
    grey = [("TIFF", b, 1, p, "none") for b in (1, 2, 4, 8, 12, 16) for p in ("minisblack", "miniswhite")]
    deep = itertools.product(["TIFF"], (8, 16), (1, 3), ["light"], ("straight", "premultiplied"))
    plain = [("TIFF", bits, 3, "rgb", "none") for bits in (8, 16)]
    png = itertools.product(["PNG"], (8, 16), (1, 3), ["light"], ("none", "straight"))
    return [*grey, *deep, *plain, *png]


@pytest.mark.parametrize("kind", ["rgb", "grey", "grey16", "channels", "labels"])
@pytest.mark.parametrize(("file", "bits", "colours", "photometric", "alpha"), table())
def test_a_file_is_read_as_its_standard_says(file, bits, colours, photometric, alpha, kind):
    top, has_alpha = 2**bits - 1, alpha != "none"
    values = RNG.integers(0, top + 1, (18, 32, colours + has_alpha)).astype(
        np.uint8 if bits <= 8 else np.uint16
    )
    if alpha == "premultiplied":
        values[..., :-1] = values[..., :-1].astype(int) * values[..., -1:] // top
    if file == "PNG":
        data = encode.encode_png(values)
    else:
        names = {"straight": ["unassalpha"], "premultiplied": ["assocalpha"], "none": []}
        options: dict[str, Any] = {"photometric": "rgb" if colours == 3 else "minisblack"}
        if not has_alpha:
            options["photometric"] = photometric
        whole = values[..., 0] if values.shape[2] == 1 else values
        if bits == 1:
            whole = whole.astype(bool)
        packed = bits if bits in (2, 4, 12) else None
        data = tiff(
            whole, extrasamples=names[alpha], bitspersample=packed,
            planarconfig="contig" if values.shape[2] > 1 else None, metadata=None, **options,
        )  # fmt: skip
    unit = values / top
    if photometric == "miniswhite":
        unit = 1 - unit
    if kind == "labels":
        if values.shape[2] > 1 or bits > 8:
            assert rejected(data, kind).reason in ("wrong_kind", "label_range")
        else:
            assert np.array_equal(decode.decode_image(data, kind), values)
        return
    got = decode.decode_image(data, kind)
    assert got.dtype == kinds.dtype(kind)
    if kind == "channels":
        assert np.allclose(got, unit * 2 - 1, atol=1e-6)
        return
    if has_alpha:
        opacity = unit[..., -1:]
        unit = unit[..., :-1] * (opacity if alpha == "straight" else 1) + 1 - opacity
    if kind in ("grey", "grey16") and colours == 3:
        unit = (unit @ LUMA)[..., None]
    expected = np.broadcast_to(unit, (*unit.shape[:2], kinds.CHANNELS[kind])) * np.iinfo(got.dtype).max
    # 8-bit images are converted by Pillow, which rounds at each of its steps
    levels = (2.5 if has_alpha or colours == 3 else 0.51) * (257 if kind == "grey16" and bits <= 8 else 1)
    assert np.abs(got - expected).max() <= levels


# -- ranges -------------------------------------------------------------------


def test_a_range_says_which_values_are_black_and_white():
    twelve = (np.arange(256, dtype=np.uint16) * 16).reshape(16, 16)
    for data in (file_of(Image.fromarray(twelve)), tiff(twelve)):
        assert decode.decode_image(data, "rgb").max() == 16  # its whole format: nearly black
        got = decode.decode_image(data, Picture(kind="rgb", range=(0, 4080)))
        assert np.array_equal(got[..., 0], np.arange(256).reshape(16, 16))
        deep = decode.decode_image(data, Picture(kind="grey16", range=(0, 4080)))
        assert (deep.min(), deep.max()) == (0, 65535)
        spread = decode.decode_image(data, Picture(kind="grey", range="percentile"))
        assert (spread.min(), spread.max()) == (0, 255)


def test_a_range_takes_floats_and_each_channel_has_its_percentiles():
    height = np.linspace(-100, 300, 1024, dtype=np.float32).reshape(32, 32)
    assert "shard.range" in rejected(tiff(height), "grey").detail
    got = decode.decode_image(tiff(height), Picture(kind="grey16", range=(-100, 300)))
    assert (got.min(), got.max()) == (0, 65535)
    bands = tiff(np.stack([height, height * 1000]), photometric="minisblack", planarconfig="separate")
    got = decode.decode_image(bands, Picture(kind="channels", channel_count=2, range="percentile"))
    assert np.allclose(got[..., 0], got[..., 1], atol=1e-5)
    assert (got.min(), got.max()) == (-1, 1)


def test_colour_of_16_bits_keeps_its_low_byte():
    deep = RNG.integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    how = Picture(kind="rgb", range=(0, 4095))
    for data in (encode.encode_png(deep), tiff(deep, photometric="rgb")):
        assert np.abs(decode.decode_image(data, how) - deep / 4095 * 255).max() <= 0.51


# -- satellites and laboratories ----------------------------------------------

BANDS = RNG.integers(0, 4096, (5, 48, 80)).astype(np.uint16)


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": (32, 32)},
        {"planarconfig": "contig", "tile": (16, 48)},
        {"planarconfig": "contig", "bigtiff": True, "byteorder": ">"},
        {"planarconfig": "contig", "rowsperstrip": 5},
        *({"planarconfig": "contig", "compression": c} for c in ("lzw", "zstd", "lzma", "packbits")),
        {"planarconfig": "separate", "compression": "deflate", "predictor": True, "tile": (32, 32)},
    ],
    ids=str,
)
def test_bands_are_read_in_every_layout(options: dict[str, Any]):
    array = np.moveaxis(BANDS, 0, 2) if options["planarconfig"] == "contig" else BANDS
    data = tiff(array, photometric="minisblack", **options)
    got = decode.decode_image(data, Picture(kind="channels", channel_count=5, range=(0, 4095)))
    assert np.allclose(got, np.moveaxis(BANDS, 0, 2) / 4095 * 2 - 1, atol=1e-6)
    assert "use kind channels" in rejected(data, "rgb").detail


@pytest.mark.parametrize("byteorder", "<>")
def test_colours_of_a_bigtiff_are_read_in_both_orders(byteorder: str):
    photo = RNG.integers(0, 256, (48, 80, 3), np.uint8)
    data = tiff(photo, photometric="rgb", bigtiff=True, byteorder=byteorder)
    assert np.array_equal(decode.decode_image(data, "rgb"), photo)


def test_overviews_and_masks_are_no_pages():
    out = io.BytesIO()
    photo = RNG.integers(0, 256, (64, 96, 3), np.uint8)
    with tifffile.TiffWriter(out) as file:
        file.write(photo, photometric="rgb", tile=(32, 32))
        file.write(photo[::2, ::2], photometric="rgb", subfiletype=1)
        file.write(photo[..., 0] > 9, photometric="mask", subfiletype=4)
    assert np.array_equal(decode.decode_image(out.getvalue(), "rgb"), photo)
    assert "2 pages" in rejected(tiff(np.stack([photo, photo]), photometric="rgb"), "rgb").detail


def test_a_range_far_from_zero_keeps_its_values():
    rise = np.linspace(0, 1, 1024).reshape(32, 32)
    for values, low in ((1e9 + rise, 1e9), ((2**40 + 1000 * rise).astype(np.uint64), 2**40)):
        how = Picture(kind="grey16", range=(low, low + (1 if values.dtype.kind == "f" else 1000)))
        assert np.abs(decode.decode_image(tiff(values), how)[..., 0] - rise * 65535).max() < 100
    vast = decode.decode_image(tiff(rise * 1e300), Picture(kind="grey16", range="percentile"))
    assert (vast.min(), vast.max()) == (0, 65535)


def test_a_volume_in_one_page_is_refused():
    volume = tiff(np.zeros((16, 32, 32), np.uint8), volumetric=True, photometric="minisblack")
    assert rejected(volume, "grey").reason == "unreadable"


def test_bands_after_the_colours_have_none():
    four = RNG.integers(0, 256, (8, 9, 4), np.uint8)
    data = tiff(four, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode.decode_image(data, "rgb"), four[..., :3])
    assert np.allclose(decode.decode_image(data, "channels"), four / 127.5 - 1, atol=1e-6)


def test_what_has_no_value_is_black_and_counted():
    values = np.full((6, 7), 0.5, np.float32)
    values[0, :3] = np.nan
    values[1, 0] = -9999
    data = tiff(values, extratags=[(42113, "s", 0, "-9999", True)])
    decoded = decode.decode_counted(data, Picture(kind="channels", range=(0, 1)))
    assert decoded.missing == 4
    assert decoded.array[0, :3, 0].tolist() == [-1, -1, -1]
    assert abs(decoded.array[5, 5, 0]) < 1e-6
    assert "4 pixels have no value" in rejected(data, "channels").detail
    three = np.array([[[255, 255, 255], [255, 10, 20], [1, 2, 3]]], np.uint8)
    black = [[0, 0, 0], [255, 10, 20], [1, 2, 3]]  # a red of 255 alone is a colour
    for depth in (three, three.astype(np.uint16) * 257):
        marked = tiff(depth, photometric="rgb", extratags=[(42113, "s", 0, str(depth.max()), True)])
        decoded = decode.decode_counted(marked, "rgb")
        assert (decoded.missing, decoded.array[0].tolist()) == (1, black)
    bytes_ = np.full((4, 4), 9, np.uint8)
    assert decode.decode_counted(tiff(bytes_, extratags=[(42113, "s", 0, "9", True)]), "grey").missing == 16
    assert (
        decode.decode_counted(tiff(bytes_, extratags=[(42113, "s", 0, "-9999", True)]), "grey").missing == 0
    )


def test_the_orientation_of_a_tiff_is_applied():
    values = RNG.integers(0, 60000, (4, 6)).astype(np.uint16)
    for orientation in range(1, 9):
        data = tiff(values, extratags=[(274, "H", 1, orientation, True)])
        image = Image.fromarray(values.astype(np.int32))
        image.getexif()[274] = orientation
        expected = np.asarray(decode.ImageOps.exif_transpose(image))
        assert np.array_equal(decode.decode_image(data, "grey16")[..., 0], expected), orientation


def test_what_is_not_read_is_said():
    data = tiff(RNG.integers(0, 4096, (32, 32)).astype(np.uint16), compression="jpeg2000")
    assert "compression JPEG2000 is not read" in rejected(data, "grey16").detail
    assert rejected(tiff(np.zeros((8, 8), np.complex64)), "channels").reason == "unreadable"


# -- hostile TIFFs ------------------------------------------------------------


def ifd(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def grey16_ifd(width: int, height: int, *more: tuple[int, int, int, int], following: int = 0) -> bytes:
    tags = {
        256: (256, 4, 1, width),
        257: (257, 4, 1, height),
        258: (258, 3, 1, 16),
        259: (259, 3, 1, 1),
        262: (262, 3, 1, 1),
        273: (273, 4, 1, 8),
        277: (277, 3, 1, 1),
        279: (279, 4, 1, 2 * width * height % 2**32),
    }
    tags |= {entry[0]: entry for entry in more}
    return ifd([tags[code] for code in sorted(tags)], following)


def test_hostile_tiffs_are_rejected_in_little_memory_and_time():
    small, head = grey16_ifd(4, 4), b"II*\0" + struct.pack("<I", 8)
    size = len(small)
    looping = b"".join(grey16_ifd(4, 4, following=8 + size * ((n + 1) % 150)) for n in range(150))
    tiles = [(tag, 4, 1, 2**30) for tag in (322, 323, 324, 325)]
    bomb = tiff(np.zeros((4000, 4000), np.uint16), compression="deflate")
    whole = tiff(BANDS, photometric="minisblack", planarconfig="separate")
    hostile = {
        "itself": (head + grey16_ifd(4, 4, following=8), "unreadable"),
        "loop": (head + looping, "unreadable"),
        "huge": (head + grey16_ifd(2**31 - 1, 2**31 - 1), "too_large"),
        "large": (head + grey16_ifd(9000, 9900), "truncated"),
        "tile": (head + grey16_ifd(64, 64, *tiles), "too_large"),
        "bands": (head + grey16_ifd(4, 4, (277, 3, 1, 65535)), "unreadable truncated"),
        "strips": (head + grey16_ifd(4, 4, (278, 4, 1, 1)), "truncated"),
        "behind": (head + grey16_ifd(4, 4, (273, 4, 1, 2**31)), "truncated"),
        "tags": (head + struct.pack("<H", 65535), "unreadable"),
        "cut": (whole[: len(whole) // 2], "truncated unreadable"),
        "empty": (head + ifd([]), "unreadable not_an_image truncated"),
        "depth": (head + grey16_ifd(4, 4, (32997, 4, 1, 2**31)), "unreadable truncated"),
        "bomb": (bomb, "too_large"),
    }  # fmt: skip
    tracemalloc.start()
    before = time.monotonic()
    for name, (data, reasons) in hostile.items():
        with pytest.raises(ImageRejected) as caught:
            decode.decode_image(
                data, "grey16", max_pixels=10_000_000 if name == "bomb" else decode.MAX_PIXELS
            )
        assert caught.value.reason in reasons.split(), (name, caught.value)
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()
    assert time.monotonic() - before < 20


def test_a_strip_is_unpacked_to_its_size_and_no_further():
    packed = imagecodecs.zlib_encode(bytes(200 << 20))
    tags = [(259, 3, 1, 8), (279, 4, 1, len(packed))]
    body = grey16_ifd(64, 64, *tags, (273, 4, 1, 0))
    data = b"II*\0" + struct.pack("<I", 8) + grey16_ifd(64, 64, *tags, (273, 4, 1, 8 + len(body))) + packed
    tracemalloc.start()
    assert rejected(data, "grey16").reason == "unreadable"
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


# -- colour profiles ----------------------------------------------------------


def adobe_to_srgb(image: np.ndarray) -> np.ndarray:
    """Adobe RGB (1998) to sRGB by the formulas of both standards, clipped."""
    to_xyz = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
    to_srgb = np.array(
        [[3.24096, -1.53738, -0.49861], [-0.96924, 1.87597, 0.04156], [0.05563, -0.20398, 1.05697]]
    )
    linear = np.clip((image / 255) ** (563 / 256) @ (to_srgb @ to_xyz).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def test_colours_of_a_wide_gamut_are_converted_as_an_independent_computation_does():
    adobe = imagecodecs.cms_profile("adobergb")
    patches = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    expected = adobe_to_srgb(patches)
    assert np.abs(expected - patches).max() > 30
    for format_ in ("PNG", "TIFF", "WEBP"):
        lossless = {"lossless": True} if format_ == "WEBP" else {}
        data = file_of(Image.fromarray(patches), format_, icc_profile=adobe, **lossless)
        assert np.abs(decode.decode_image(data, "rgb") - expected).max() <= 2, format_
        assert np.abs(decode.decode_image(data, "grey")[..., 0] - expected @ LUMA).max() <= 2
        assert np.array_equal(decode.decode_image(data, Picture(kind="rgb", range=(0, 255))), patches)
    deep = tiff(patches.astype(np.uint16) * 257, photometric="rgb", iccprofile=adobe)
    assert np.abs(decode.decode_image(deep, "rgb") - expected).max() <= 2


def test_srgb_and_damaged_profiles_change_nothing():
    photo = RNG.integers(0, 256, (16, 16, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = imagecodecs.cms_profile("gray", gamma=2.2)
    for profile in (srgb, b"no profile", srgb[:200], grey):
        data = file_of(Image.fromarray(photo), "PNG", icc_profile=profile)
        assert np.array_equal(decode.decode_image(data, "rgb"), photo)


# -- palettes -----------------------------------------------------------------


def labels(**options: Any) -> Picture:
    return Picture(kind="labels", classes=3, **options)


def test_label_maps_are_read_from_colours():
    ids = RNG.integers(0, 3, (8, 9), np.uint8)
    colours = np.array([[0, 0, 0], [220, 20, 60], [0, 0, 142]], np.uint8)
    how = labels(palette=tuple(map(tuple, colours.tolist())))
    indexed = Image.fromarray(colours[ids]).convert("P", palette=Image.Palette.ADAPTIVE)
    for data in (file_of(colours[ids]), file_of(indexed), file_of(colours[ids], "TIFF")):
        assert np.array_equal(decode.decode_image(data, how)[..., 0], ids)
    blocks = np.kron(ids, np.ones((16, 16), np.uint8))
    jpeg = file_of(colours[blocks], "JPEG", quality=95)
    assert np.array_equal(decode.decode_image(jpeg, how)[..., 0], blocks)
    stranger = colours[ids]
    stranger[0, 0] = (1, 2, 3)
    assert rejected(file_of(stranger), how).detail == "the colour [1, 2, 3] is not in the palette of 3"


def test_masks_and_equal_channels_are_read_from_greys():
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    how = labels(palette=(0, 255))
    for data in (
        file_of(mask[..., None]),
        file_of(np.stack([mask] * 3, 2)),
        file_of(Image.fromarray(mask > 0)),
    ):
        assert decode.decode_image(data, how)[..., 0].tolist() == [[0, 1], [1, 0]]


def test_ids_of_a_grey_map_are_as_written():
    pgm = b"P5 4 1 3\n\0\1\2\3"
    assert decode.decode_image(pgm, "labels")[0, :, 0].tolist() == [0, 1, 2, 3]
    assert decode.decode_image(pgm, "grey")[0, :, 0].tolist() == [0, 85, 170, 255]
    assert decode.decode_image(tiff(np.array([[7, 300]], np.int16)), "instances")[0, :, 0].tolist() == [
        7,
        300,
    ]


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 12, 16])
def test_ids_of_a_reversible_jpeg_2000_are_as_written(bits: int):
    ids = (np.arange(1 << 10).reshape(32, 32) % (1 << bits)).astype(np.uint16 if bits > 8 else np.uint8)
    for codec in ("jp2", "j2k"):
        data = imagecodecs.jpeg2k_encode(ids, bitspersample=bits, reversible=True, level=0, codecformat=codec)
        assert np.array_equal(decode.decode_image(data, "instances")[..., 0], ids)


def test_white_of_a_jpeg_2000_of_few_bits_is_white():
    data = imagecodecs.jpeg2k_encode(
        np.full((8, 8), 15, np.uint8), bitspersample=4, reversible=True, level=0, codecformat="jp2"
    )
    assert decode.decode_image(data, "grey").min() == 255


def jpeg2000(values: np.ndarray, bits: int) -> bytes:
    return imagecodecs.jpeg2k_encode(values, bitspersample=bits, reversible=True, level=0, codecformat="jp2")


@pytest.mark.parametrize("bits", [4, 9, 10, 12, 16])
def test_colours_of_a_deep_jpeg_2000_keep_their_white_and_their_range(bits: int):
    """Pillow makes white of more than 8 bits black, and 240 of white of 4 bits."""
    top = 2**bits - 1
    values = RNG.integers(0, top + 1, (32, 48, 3)).astype(np.uint8 if bits <= 8 else np.uint16)
    values[0, 0] = top
    data = jpeg2000(values, bits)
    assert np.abs(decode.decode_image(data, "rgb") - values / top * 255).max() <= 0.51
    got = decode.decode_image(data, Picture(kind="rgb", range=(0, top // 3)))
    assert np.abs(got - np.clip(values / (top // 3), 0, 1) * 255).max() <= 0.51
    got = decode.decode_image(data, Picture(kind="channels", channel_count=3))
    assert np.allclose(got, values / top * 2 - 1, atol=1e-6)


def test_a_jpeg_2000_of_values_with_a_sign_keeps_them():
    values = RNG.integers(-1000, 1000, (32, 48)).astype(np.int16)
    data = jpeg2000(values, 16)
    got = decode.decode_image(data, Picture(kind="grey", range=(-1000, 1000)))
    assert np.abs(got[..., 0] - (values + 1000) / 2000 * 255).max() <= 0.51
    assert rejected(data, "instances").reason == "instance_range"


def test_a_jpeg_2000_whose_headers_differ_is_rejected():
    data = jpeg2000(np.zeros((32, 48), np.uint16), 12)
    wide = data.replace(struct.pack(">II", 48, 32), struct.pack(">II", 60000, 60000))
    assert wide != data
    assert rejected(wide, "grey16").detail == "its two headers differ in size"


def test_an_avif_of_ten_bits_keeps_them():
    values = RNG.integers(0, 1024, (32, 48, 3)).astype(np.uint16)
    data = imagecodecs.avif_encode(values, bitspersample=10, level=100)
    got = decode.decode_image(data, Picture(kind="rgb", range=(0, 255)))
    assert np.abs(got.astype(int) - np.clip(values, 0, 255)).max() <= 1


def test_a_lossy_file_cannot_hold_ids_whatever_contains_it():
    ids = RNG.integers(0, 3, (32, 32), np.uint8)
    jpeg2000 = file_of(Image.fromarray(ids), "JPEG2000", irreversible=True, quality_layers=[2])
    for data in (jpeg2000, file_of(Image.fromarray(ids), "TIFF", compression="jpeg")):
        found = rejected(data, labels())
        assert (found.reason, "is lossy" in found.detail) == ("wrong_kind", True)


def png_of(bits: int, row: bytes, width: int, *chunks: bytes) -> bytes:
    """A grey PNG of one row."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def test_a_range_is_of_the_values_in_the_file():
    for pgm in (b"P5 3 1 100\n\0\x19\x64", b"P5 3 1 1000\n\0\0\0\x19\0\x64"):
        got = decode.decode_image(pgm, Picture(kind="grey", range=(0, 50)))
        assert got[0, :, 0].tolist() == [0, 128, 255]
    deep = RNG.integers(0, 4096, (2, 5, 3))
    binary = deep.astype(">u2").tobytes()
    plain = b" # a comment\n".join(str(value).encode() for value in deep.ravel())
    for top in (4095, 65535):
        for data in (b"P6 5 2 %d\n" % top + binary, b"P3 5 2 %d\n" % top + plain):
            got = decode.decode_image(data, Picture(kind="rgb", range=(0, 4095)))
            assert np.abs(got - deep / 4095 * 255).max() <= 0.51
            assert rejected(data[:-5], "rgb").reason == "truncated"
    nibbles = png_of(4, bytes([0x07, 0xF0]), 4)
    assert decode.decode_image(nibbles, Picture(kind="grey", range=(0, 7)))[0, :, 0].tolist() == [
        0,
        255,
        255,
        0,
    ]


def test_a_transparent_value_is_white_in_light_and_itself_in_ids():
    clear = chunk(b"tRNS", struct.pack(">H", 7))
    nibbles = png_of(4, bytes([0x07, 0xF0]), 4, clear)
    assert decode.decode_image(nibbles, "grey")[0, :, 0].tolist() == [0, 255, 255, 0]
    assert decode.decode_image(nibbles, "labels")[0, :, 0].tolist() == [0, 7, 15, 0]
    deep = png_of(16, struct.pack(">3H", 0, 7, 1000), 3, clear)
    assert decode.decode_image(deep, "instances")[0, :, 0].tolist() == [0, 7, 1000]
    assert decode.decode_image(deep, "grey16")[0, :, 0].tolist() == [0, 65535, 1000]
    assert decode.decode_image(deep, "channels").shape == (1, 3, 1)


def test_transparency_is_kept_where_a_profile_is_converted():
    adobe = imagecodecs.cms_profile("adobergb")
    image = Image.fromarray(np.array([[[9, 9, 9], [200, 60, 30]]], np.uint8))
    got = decode.decode_image(file_of(image, icc_profile=adobe, transparency=(9, 9, 9)), "rgb")
    plain = decode.decode_image(file_of(image, icc_profile=adobe), "rgb")
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[0, 1].tolist() == plain[0, 1].tolist() != [200, 60, 30]


def test_a_tile_that_is_a_bomb_is_rejected_where_pillow_reads_too():
    data = bytearray(tiff(np.zeros((16, 16), np.uint8), tile=(16, 16), compression="deflate"))
    for tag in (322, 323):  # the tile's width and length
        at = next(n for n in range(len(data)) if data[n : n + 2] == struct.pack("<H", tag))
        data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, 64_000)
    found = rejected(bytes(data), "rgb")
    assert (found.reason, "a tile of" in found.detail) == ("too_large", True)


def test_nothing_is_logged_for_a_damaged_tiff(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        rejected(b"II*\0" + struct.pack("<I", 8) + grey16_ifd(4, 4, (273, 4, 0, 0)), "grey16")
    assert not [r for r in caplog.records if r.name == "tifffile" and r.levelno < logging.CRITICAL]
