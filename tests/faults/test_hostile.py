"""Everything a stranger may put into an archive, from its listing to the shards: used, or left out by name.

Nothing vanishes: what is not in the shards is a reject with a reason.
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import shard
from stages.config.ingest import IngestConfig
from stages.config.shard import ShardConfig
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from tests.support.pairs import SIZE, list_and_pair, photo

GREEN = np.full((16, 24, 3), (0, 128, 0), np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header says so, with as many rows as are given."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def images() -> dict[str, tuple[bytes, str]]:
    """Hostile and odd images by name, with what becomes of them ("" if they are used)."""
    green = Image.fromarray(GREEN)
    plain = encoded(green, "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6  # lay it on its side
    frames = [Image.fromarray(photo(n)) for n in range(3)]
    deep = Image.fromarray(np.full((16, 24), 32768, np.uint16))
    return {
        "bomb.png": (png_of(3000, 3000, b"\0" * 3001 * 3000), "too_large"),
        "header_30000x30000.png": (png_of(30000, 30000), "too_large"),
        "truncated.png": (plain[: len(plain) // 2], "truncated"),
        "truncated_photo.jpg": (encoded(Image.fromarray(photo(1)), "JPEG")[:-60], "truncated"),
        "empty.png": (b"", "empty"),
        "page.png": (b"<html>404 not found</html>", "not_an_image"),
        "wrong_extension.jpg": (plain, ""),
        "cmyk.jpg": (encoded(green.convert("CMYK"), "JPEG"), ""),
        "palette.png": (encoded(green.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), ""),
        "alpha.png": (encoded(green.convert("RGBA"), "PNG"), ""),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "animated"),
        "animated_too.webp": (
            encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            "animated",
        ),
        "exif_rotated.jpg": (encoded(green.rotate(90, expand=True), "JPEG", exif=turned), ""),
        "deep_16_bit.png": (encoded(deep, "PNG"), ""),
        "one_pixel_1x1.png": (encoded(green.resize((1, 1)), "PNG"), "too_small"),
    }


def keys() -> dict[str, str]:
    """Names of sound images, with the reason they are left out by ("" if they are used)."""
    return {
        "../../etc/passwd.png": "bad_key",
        "a/../../up.png": "bad_key",
        "/absolute.png": "",  # read as tar unpacks it, below the folder
        "new\nline.png": "bad_key",
        f"{'long/' * 200}.png": "",  # a hidden name, which counts as no image at all
        f"{'long/' * 199}x.png": "bad_key",  # a thousand characters
        "emoji \N{GRINNING FACE}.png": "",
        "spaces and %2e%2e.png": "",
    }


def build(path: Path) -> dict[str, str]:
    """An archive of all of it, and links; returns what should become of each."""
    sound = encoded(Image.fromarray(GREEN), "PNG")
    contents = {name: data for name, (data, _) in images().items()} | dict.fromkeys(keys(), sound)
    links = {"link_to_passwd.png": "/etc/passwd", "link_up.png": "../../outside.png"}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(zipfile.ZipInfo(name), data)
            for name, target in links.items():
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o120777 << 16
                archive.writestr(info, target)
    else:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
            for name, data in contents.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                for name, target in links.items():
                    info = tarfile.TarInfo(name if kind == tarfile.SYMTYPE else f"hard_{name}")
                    info.type, info.linkname = kind, target
                    archive.addfile(info)
            links |= {f"hard_{name}": target for name, target in links.items()}
    fates = {name: fate for name, (_, fate) in images().items()} | keys() | dict.fromkeys(links, "link")
    fates.pop(f"{'long/' * 200}.png")
    return fates


def rejects(folder: Path, pattern: str) -> dict[str, str]:
    rows = [row for path in sorted(folder.glob(pattern)) for row in pq.read_table(path).to_pylist()]
    return {row["uri"]: row["reason"] for row in rows}


@pytest.mark.parametrize("name", ["all.tar", "all.tar.gz", "all.zip"])
def test_hostile_archives_give_sound_pairs_and_named_rejects(tmp_path: Path, name: str) -> None:
    fates = build(tmp_path / name)
    before = set(os.listdir(tmp_path))  # noqa: PTH208
    listed = IngestConfig.model_validate({"locations": [{"uri": str(tmp_path / name), "role": "target"}]})
    parts = list_and_pair(listed, str(tmp_path / "work"), derive_source="grey")
    config = ShardConfig(size=SIZE, max_pixels=1_000_000)
    specs = shard.role_specs(config, ["source", "target"])
    done = shard.Summary()
    output = str(tmp_path / "work" / "shards")
    for part in parts:
        done.add(shard.shard_part(part, output=output, config=config, specs=specs, io_threads=4))
    reasons = rejects(tmp_path / "work", "objects/rejects-*") | rejects(
        tmp_path / "work", "shards/quarantine-*"
    )
    protocol = "zip" if name.endswith("zip") else "tar"

    def uri(member: str) -> str:
        return f"{protocol}://{member}::{tmp_path / name}"

    assert reasons == {uri(member): reason for member, reason in fates.items() if reason}
    spec = DatasetSpec(size=SIZE, roles=specs, splits=done.splits())
    used = {
        sample.uris["target"]: sample.images["target"] for sample in dataset.read_split(output, spec, "train")
    }
    assert set(used) == {uri(member) for member, reason in fates.items() if not reason}
    for member, image in used.items():
        wanted = np.full_like(GREEN, 128) if "16_bit" in member else GREEN
        assert np.abs(image.astype(int) - wanted).max() <= 12, member
    assert set(os.listdir(tmp_path)) == before | {"work"}  # noqa: PTH208 - nothing was unpacked anywhere
