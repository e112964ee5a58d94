"""TIFFs that are read and written row by row, with their place on Earth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from stages.images import decode, geotiff
from stages.images.kinds import ImageRejected
from stages.models.architecture import Picture

PLACE: list[tuple[int, int, int, Any, bool]] = [
    (33550, 12, 3, (0.5, 0.5, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 440720.0, 3751320.0, 0.0), True),
    (34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1), True),
    (34737, 2, 16, "Réseau /UTM 11|\0".encode("latin-1"), True),  # as it is, whatever its encoding
]


def noise(*shape: int, dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def rows_of(path: Path, how: Picture) -> geotiff.TiffRows:
    rows = geotiff.open_rows(path, how)
    assert rows is not None
    return rows


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 48)},
        {"tile": (32, 48), "planarconfig": "separate"},
        {"rowsperstrip": 40, "predictor": True},
        {"rowsperstrip": 1, "compression": None},
    ],
)
@pytest.mark.parametrize(
    ("how", "shape", "dtype"),
    [
        (Picture(kind="rgb"), (150, 90, 3), "u1"),
        (Picture(kind="rgb"), (150, 90, 3), "u2"),
        (Picture(kind="grey16"), (150, 90, 1), "u2"),
        (Picture(kind="channels", channel_count=5), (150, 90, 5), "u1"),
    ],
)
def test_rows_are_those_of_the_picture_read_whole(
    tmp_path: Path, options: dict[str, Any], how: Picture, shape: tuple[int, ...], dtype: str
) -> None:
    pixels = noise(*shape, dtype=dtype)
    stored = np.moveaxis(pixels, 2, 0) if options.get("planarconfig") and shape[2] > 1 else pixels
    given = {"compression": "adobe_deflate", "photometric": "rgb" if shape[2] == 3 else "minisblack"}
    if shape[2] == 1:
        stored, options = pixels[:, :, 0], {k: v for k, v in options.items() if k != "planarconfig"}
    elif "planarconfig" not in options:
        given["planarconfig"] = "contig"
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=PLACE, **(given | options))
    whole = decode.decode_image((tmp_path / "a.tif").read_bytes(), how)
    rows = rows_of(tmp_path / "a.tif", how)
    assert rows.shape == whole.shape
    for start, stop in ((0, 1), (31, 34), (30, 150), (149, 150), (10, 20), (0, 150)):
        assert np.array_equal(rows.read(start, stop), whole[start:stop])
    rows.file.close()


@pytest.mark.parametrize("shape", [(300, 520, 3), (256, 256, 1), (1, 700, 3), (20, 10, 1)])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_bands_become_one_tiff_that_any_reader_reads_with_its_place(
    shape: tuple[int, ...], dtype: str
) -> None:
    pixels = noise(*shape, dtype=dtype)
    file = io.BytesIO()
    bands = (pixels[start : start + 90] for start in range(0, shape[0], 90))
    geotiff.write(file, bands, shape, pixels.dtype, PLACE)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as read:
        page = read.pages.first
        assert np.array_equal(page.asarray().reshape(shape), pixels)
        assert page.is_tiled
        assert page.geotiff_tags["GTModelTypeGeoKey"] == 1
    assert [tag[3] for tag in geotiff.place_tags(file.getvalue())] == [tag[3] for tag in PLACE]
    if dtype == "u1" or shape[2] == 1:
        with Image.open(io.BytesIO(file.getvalue())) as image:
            assert np.array_equal(np.asarray(image).reshape(shape), pixels)
            assert image.tag_v2[33922][3:5] == (440720.0, 3751320.0)  # type: ignore[attr-defined]


def test_what_must_be_read_whole_has_no_rows_and_a_turned_picture_no_place(tmp_path: Path) -> None:
    turned = tmp_path / "turned.tif"
    tifffile.imwrite(turned, noise(40, 30), extratags=[*PLACE, (274, 3, 1, 6, True)])
    assert geotiff.open_rows(turned, Picture(kind="grey")) is None
    assert geotiff.place_tags(turned.read_bytes()) == ()
    plain = tmp_path / "plain.tif"
    tifffile.imwrite(plain, noise(40, 30))
    assert geotiff.open_rows(plain, Picture(kind="grey", range="percentile")) is None
    rows_of(plain, Picture(kind="grey")).file.close()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tifffile.imwrite(tmp_path / "colours.tif", noise(40, 30, 3), photometric="rgb", iccprofile=profile)
    assert geotiff.open_rows(tmp_path / "colours.tif", Picture(kind="rgb")) is None
    (tmp_path / "cut.tif").write_bytes(plain.read_bytes()[:600])
    assert geotiff.open_rows(tmp_path / "cut.tif", Picture(kind="grey")) is None
    (tmp_path / "no.tif").write_bytes(b"no TIFF")
    assert geotiff.open_rows(tmp_path / "no.tif", Picture(kind="grey")) is None
    assert geotiff.place_tags(b"no TIFF") == ()


def test_damage_that_is_met_on_the_way_rejects_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(200, 64, 3), photometric="rgb", tile=(64, 64), compression="adobe_deflate")
    with tifffile.TiffFile(path) as file:
        place = file.pages.first.dataoffsets[2]
    data = bytearray(path.read_bytes())
    data[place : place + 50] = bytes(50)
    path.write_bytes(bytes(data))
    rows = rows_of(path, Picture(kind="rgb"))
    assert rows.read(0, 128).shape == (128, 64, 3)
    with pytest.raises(ImageRejected, match="unreadable"):
        rows.read(100, 140)
    rows.file.close()
