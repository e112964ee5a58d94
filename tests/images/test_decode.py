"""Decoding files that nobody has checked."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageCms

from stages.base import Kind
from stages.images import decode, encode, kinds
from stages.images.kinds import ImageRejected
from stages.models.architecture import Picture

RNG = np.random.default_rng(0)
KINDS: tuple[Kind, ...] = get_args(Kind)


def noise(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def file_of(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:  # noqa: A002
    out = io.BytesIO()
    (encode.to_pillow(image) if isinstance(image, np.ndarray) else image).save(out, format, **options)
    return out.getvalue()


def reason(data: bytes, kind: Kind | Picture = "rgb", **options: Any) -> str:
    with pytest.raises(ImageRejected) as caught:
        decode.decode_counted(data, kind, **options)
    return caught.value.reason


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# -- what is read -------------------------------------------------------------


def test_lossless_colours_are_read_as_they_are():
    array = noise()
    for format_ in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(decode.decode_image(file_of(array, format_), "rgb"), array)


def test_an_orientation_in_exif_is_applied():
    array = noise(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    got = decode.decode_image(file_of(Image.fromarray(array), "PNG", exif=exif), "rgb")
    assert np.array_equal(got, np.rot90(array, k=-1))


def test_transparency_is_laid_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    got = decode.decode_image(file_of(Image.fromarray(rgba)), "rgb")
    assert tuple(got[0, 0]) == (10, 20, 30)
    assert tuple(got[1, 1]) == (255, 255, 255)


def test_palette_and_cmyk_become_colours():
    array = np.zeros((6, 6, 3), np.uint8)
    array[:3] = (255, 0, 0)
    palette = Image.fromarray(array).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decode.decode_image(file_of(palette), "rgb"), array)
    cmyk = decode.decode_image(file_of(Image.fromarray(array).convert("CMYK"), "JPEG", quality=95), "rgb")
    assert cmyk.shape == (6, 6, 3)
    assert int(cmyk[0, 0, 0]) > 200 > int(cmyk[5, 5, 0])


def test_a_wrong_extension_does_not_matter_since_content_decides():
    array = noise()
    assert np.array_equal(decode.decode_image(file_of(array, "BMP"), "rgb"), array)


def test_sixteen_bit_grey_keeps_its_depth_as_grey16_and_is_scaled_as_rgb():
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    data = file_of(Image.fromarray(deep))
    assert np.array_equal(decode.decode_image(data, "grey16")[:, :, 0], deep)
    assert decode.decode_image(data, "rgb").max() == 254
    assert decode.decode_image(data, "grey").dtype == np.uint8


def test_grey16_of_an_eight_bit_image_spans_the_range():
    assert decode.decode_image(file_of(np.full((4, 4, 1), 255, np.uint8)), "grey16").max() == 65535


def test_labels_of_a_palette_image_are_its_indices():
    ids = RNG.integers(0, 5, (8, 8), np.uint8)
    image = Image.fromarray(ids).convert("P")
    image.putpalette([9, 8, 7] * 256)
    assert np.array_equal(decode.decode_image(file_of(image), "labels")[:, :, 0], ids)


def test_a_label_map_in_a_lossy_webp_is_refused_with_the_reason():
    colours = ((0, 0, 0), (220, 20, 60), (0, 0, 142))
    image = Image.fromarray(np.array(colours, np.uint8)[RNG.integers(0, 3, (16, 16))])
    how = Picture(kind="labels", classes=3, palette=colours)
    with pytest.raises(kinds.ImageRejected, match=r"label_range: .* lossy WebP .* PNG"):
        decode.decode_image(file_of(image, "WEBP"), how)
    assert decode.decode_image(file_of(image, "WEBP", lossless=True), how).max() == 2


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000"])
def test_newer_formats_are_read(format: str):  # noqa: A002
    image = np.full((24, 32, 3), (200, 40, 90), np.uint8)
    got = decode.decode_image(
        file_of(image, format, quality=100) if format == "AVIF" else file_of(image, format), "rgb"
    )
    assert np.abs(got.astype(int) - image).max() <= 3


def test_heic_is_refused_by_name():
    with pytest.raises(ImageRejected, match="HEIC is not read"):
        decode.decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "rgb")


@pytest.mark.parametrize("bits", [2, 4])
def test_ids_of_grey_images_with_few_bits_are_as_written(bits: int):
    ids = np.arange(4, dtype=np.uint8).reshape(1, 4)
    row = np.packbits(np.unpackbits(ids, axis=0)[8 - bits :].T.reshape(-1)).tobytes()
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    png += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    for kind in ("labels", "instances"):
        assert decode.decode_image(png, kind)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert decode.decode_image(png, "grey")[0, -1, 0] == 3 * (255 // (2**bits - 1))  # amounts span the range


@pytest.mark.parametrize("bits", [8, 16])
def test_where_white_is_zero_light_is_large(bits: int):
    top = 2**bits - 1
    stored = np.array([[0, top // 3, top]], np.uint8 if bits == 8 else np.uint16)
    fields = [(256, 3, 3), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 0), (273, 4, 0), (277, 3, 1)]
    fields += [(278, 3, 1), (279, 4, stored.nbytes)]
    start = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, kind, 1, start if tag == 273 else value) for tag, kind, value in fields
    )
    tiff = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + struct.pack("<I", 0) + stored.tobytes()
    assert decode.decode_image(tiff, "grey")[0, :, 0].tolist() == [255, 170, 0]
    expected = [65535, 65535 - (top // 3) * (257 if bits == 8 else 1), 0]
    assert decode.decode_image(tiff, "grey16")[0, :, 0].tolist() == expected


def test_instances_are_sixteen_bit():
    ids = np.array([[0, 26001], [65535, 7]], np.uint16)
    got = decode.decode_image(file_of(Image.fromarray(ids)), "instances")
    assert got.dtype == np.uint16
    assert np.array_equal(got[:, :, 0], ids)


def test_pages_of_a_tiff_are_channels():
    pages = [RNG.integers(0, 256, (5, 7), np.uint8) for _ in range(6)]
    out = io.BytesIO()
    first, *rest = (Image.fromarray(p) for p in pages)
    first.save(out, "TIFF", save_all=True, append_images=rest)
    got = decode.decode_image(out.getvalue(), Picture(kind="channels", channel_count=6))
    assert got.shape == (5, 7, 6)
    assert np.allclose(got, np.stack(pages, 2) / 127.5 - 1, atol=1e-6)
    assert reason(out.getvalue(), Picture(kind="channels", channel_count=5)) == "wrong_kind"


@pytest.mark.parametrize("shape", [(5, 7, 4), (4, 5, 7)])
def test_npy_is_read_with_channels_first_or_last(shape: tuple[int, ...]):
    array = RNG.random(shape, np.float32) * 2 - 1
    out = io.BytesIO()
    np.save(out, array)
    got = decode.decode_image(out.getvalue(), Picture(kind="channels", channel_count=4))
    assert np.array_equal(got, array if shape[2] == 4 else np.moveaxis(array, 0, 2))


def test_npy_never_unpickles():
    out = io.BytesIO()
    np.save(out, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert reason(out.getvalue(), "channels") == "wrong_kind"


def test_npy_that_promises_more_than_it_holds_is_truncated():
    out = io.BytesIO()
    np.save(out, np.zeros((100, 100, 3), np.uint8))
    assert reason(out.getvalue()[:-1], "channels") == "truncated"
    lie = out.getvalue().replace(b"(100, 100, 3)", b"(9999, 999, 3)"[:13].ljust(13))
    assert reason(lie, "channels") in {"truncated", "unreadable", "wrong_kind"}


def test_floats_outside_the_range_or_not_finite_are_rejected():
    for value in (1.5, np.nan, np.inf):
        out = io.BytesIO()
        np.save(out, np.full((4, 4, 2), value, np.float32))
        assert reason(out.getvalue(), "channels") == "value_range"


# -- what is refused ----------------------------------------------------------


def test_every_refusal_has_its_reason():
    array = noise()
    png, jpeg = file_of(array), file_of(array, "JPEG")
    frames = [Image.fromarray(noise()) for _ in range(3)]
    gif = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    webp = file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert reason(b"") == "empty"
    assert reason(b"<html>404</html>") == "not_an_image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "not_an_image"  # no external program is started
    assert reason(png[: len(png) // 2]) == "truncated"
    assert reason(jpeg[: len(jpeg) // 2]) == "truncated"
    with pytest.raises(ImageRejected, match=r"^too_large: Image size .* exceeds limit of \d+ pixels$"):
        decode.decode_image(png_header(30000, 30000), "rgb")
    assert reason(png, max_pixels=599) == "too_large"
    assert reason(gif) == "animated"
    assert reason(webp) == "animated"
    assert reason(png, "labels") == "wrong_kind"
    assert reason(jpeg, "instances") == "wrong_kind"
    assert reason(file_of(noise(1, 1)), min_side=8) == "too_small"
    assert reason(file_of(Image.fromarray(np.full((4, 4), 300, np.uint16))), "labels") == "label_range"


def test_a_header_of_a_bomb_costs_no_memory():
    import tracemalloc

    tracemalloc.start()
    assert reason(png_header(9000, 9900)) in {"truncated", "unreadable", "too_large"}
    with pytest.raises(ImageRejected, match=r"^too_large: Image size .* exceeds limit of \d+ pixels$"):
        decode.decode_image(png_header(30000, 30000), "rgb")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_flipped_bit_in_the_pixels_of_a_png_is_found():
    data = bytearray(file_of(noise(64, 64)))
    data[len(data) // 2] ^= 1
    assert reason(bytes(data)) == "unreadable"


def test_a_colour_profile_is_no_obstacle():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode.decode_image(
        file_of(Image.fromarray(noise()), "PNG", icc_profile=profile), "rgb"
    ).shape == (
        20,
        30,
        3,
    )


SEEDS = [
    file_of(noise(9, 11)),
    file_of(noise(9, 11), "JPEG"),
    file_of(noise(9, 11), "WEBP"),
    file_of(noise(9, 11), "GIF"),
    file_of(noise(9, 11), "TIFF"),
    file_of(noise(9, 11), "BMP"),
    file_of(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11))),
    file_of(Image.fromarray(noise(9, 11)).convert("CMYK"), "JPEG"),
]


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd metadata; what it then decodes is judged here
@settings(max_examples=300, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    cut=st.floats(0, 1),
    tail=st.binary(max_size=40),
    kind=st.sampled_from(KINDS),
)
def test_damaged_files_are_read_or_refused_and_nothing_else(seed, edits, cut, tail, kind):
    data = bytearray(seed)
    for where, value in edits:
        data[int(where * len(data))] = value
    _read_or_refuse(bytes(data[: int(cut * len(data))] if cut < 0.7 else data) + tail, kind)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    head=st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"GIF89a", b"\x93NUMPY\x01\x00"]
    ),
    body=st.binary(max_size=200),
    kind=st.sampled_from(KINDS),
)
def test_invented_files_are_read_or_refused_and_nothing_else(head, body, kind):
    _read_or_refuse(head + body, kind)


def _read_or_refuse(data: bytes, kind: Kind) -> None:
    try:
        array = decode.decode_image(data, kind, max_pixels=1_000_000)
    except ImageRejected as refusal:
        verdict = refusal.reason
    else:
        verdict = None
        assert array.ndim == 3
        if kind not in ("lab_l", "lab_ab"):
            assert array.dtype == kinds.dtype(kind)
            assert array.shape[2] == kinds.CHANNELS.get(kind, array.shape[2])
    assert verdict is None or verdict in get_args(kinds.Reason)
