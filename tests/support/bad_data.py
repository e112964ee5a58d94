"""One example of bad data for each reason that leaves an image out: made, read by its stage, and drawn.

`python -m tests.support.bad_data` draws the pictures of docs/bad-data.md and prints what the stages say.
"""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from stages import ingest, pair, shard
from stages.config.ingest import IngestConfig
from stages.config.pair import PairConfig
from stages.config.shard import ShardConfig
from stages.errors import StageError
from tests.support.pairs import pair_row, write_parts

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "bad-data"
COLOURS = np.array([[150, 190, 235], [190, 120, 90], [110, 160, 90], [70, 70, 160]], np.uint8)
SIZE = (120, 80)
RED, INK, EMPTY = (205, 40, 40), (50, 50, 60), (236, 236, 240)


@dataclass(frozen=True, slots=True)
class Tile:
    """A file in a picture: its name, how it looks (None: an empty frame with `text`), if it is at fault."""

    name: str
    pixels: np.ndarray | None = None
    text: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """What a stage says of bad data: rows {key, role, uri, reason, detail} of its table, and its message."""

    rows: Sequence[Mapping[str, str]]
    message: str
    tiles: Sequence[Tile] = field(default=())

    def lines(self) -> list[str]:
        """The rows as text."""
        return ["  ".join(filter(None, row.values())).replace("\n", "\\n") for row in self.rows]


# -- images -------------------------------------------------------------------


def ids(shift: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A label map (H, W): 0 sky, 1 house, 2 ground, 3 car."""
    image = Image.new("L", SIZE, 0)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 52, 120, 80), fill=2)
    draw.rectangle((18 + shift, 22, 58 + shift, 58), fill=1)
    draw.polygon(((14 + shift, 22), (38 + shift, 6), (62 + shift, 22)), fill=1)
    draw.rectangle((72 - shift, 56, 106 - shift, 68), fill=3)
    return np.asarray(image.resize(size, Image.Resampling.NEAREST))


def photo(shift: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The photo (H, W, 3) of the same street."""
    image = Image.fromarray(COLOURS[ids(shift)])
    draw = ImageDraw.Draw(image)
    for left in (24, 42):
        draw.rectangle((left + shift, 30, left + 9 + shift, 40), fill=(250, 235, 160))
    draw.ellipse((76 - shift, 64, 84 - shift, 72), fill=(30, 30, 30))
    draw.ellipse((94 - shift, 64, 102 - shift, 72), fill=(30, 30, 30))
    draw.ellipse((92, 8, 106, 22), fill=(255, 220, 90))
    return np.asarray(image.resize(size))


def coloured(labels: np.ndarray) -> np.ndarray:
    """Ids as a person sees them; those that are no class are red."""
    return np.vstack([COLOURS, np.tile(np.uint8(RED), (252, 1))])[np.minimum(labels, 255)]


def picture(tiles: Sequence[Tile]) -> Image.Image:
    """The files beside one another; what is at fault is framed in red."""
    small, image = ImageFont.load_default(11), Image.new("RGB", (len(tiles) * 136, 114), "white")
    draw = ImageDraw.Draw(image)
    for number, tile in enumerate(tiles):
        left, frame = 8 + number * 136, RED if tile.bad else (200, 200, 205)
        draw.rectangle((left - 2, 6, left + 121, 89), fill=EMPTY, outline=frame, width=2)
        if tile.pixels is not None:
            shown = Image.fromarray(tile.pixels)
            shown.thumbnail(SIZE, Image.Resampling.NEAREST)
            image.paste(shown, (left + (120 - shown.width) // 2, 8 + (80 - shown.height) // 2))
        draw.multiline_text((left + 60, 48), tile.text, INK, small, anchor="mm", align="center")
        draw.text((left + 60, 100), tile.name, RED if tile.bad else INK, small, anchor="mm")
    return image.quantize(32, dither=Image.Dither.NONE)


# -- shard --------------------------------------------------------------------


def saved(array: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def huge() -> bytes:
    """A PNG whose header claims 20,000 x 4,000 pixels."""
    data = bytearray(saved(np.zeros((1, 1), np.uint8)))
    data[16:24] = (20_000).to_bytes(4, "big") + (4_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def npy(array: np.ndarray) -> bytes:
    """The file of an array."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class BadFile:
    """A pair of which one file is bad: its bytes (None: deleted after it was listed), and how it looks."""

    data: bytes | None
    role: str = "target"
    pixels: np.ndarray | None = None
    text: str = ""
    suffix: str = "png"
    settings: Mapping[str, Any] = field(default_factory=dict)
    after_listing: bool = False


def half_grey() -> np.ndarray:
    """A picture whose lower half has not arrived."""
    pixels = photo().copy()
    pixels[44:] = 128
    return pixels


def torn() -> np.ndarray:
    """A picture with damage."""
    pixels = photo().copy()
    pixels[44:] = np.roll(pixels[44:], 37, axis=1)[:, :, ::-1]
    return pixels


GOOD = saved(photo())
MOVING = saved(photo(), "GIF", save_all=True, append_images=[Image.fromarray(photo(n)) for n in (4, 8)])
VOID = np.where(ids() == 3, np.uint8(255), ids())
MANY = np.where(ids() == 3, 70_000, ids().astype(np.uint32))
LABELS = {"kinds": {"source": "labels"}, "classes": 4}
BAD_FILES: Mapping[str, BadFile] = {
    "missing": BadFile(None, text="deleted after\nit was listed", after_listing=True),
    "changed": BadFile(saved(photo(9)), pixels=photo(9), after_listing=True),
    "empty": BadFile(b"", text="0 bytes"),
    "truncated": BadFile(GOOD[: len(GOOD) // 2], pixels=half_grey()),
    "not_an_image": BadFile(b"<!DOCTYPE html><title>404</title>", text="<!DOCTYPE html>\n404", suffix="jpg"),
    "unreadable": BadFile(GOOD[:-30] + b"~" + GOOD[-29:], pixels=torn()),
    "too_large": BadFile(huge(), text="20000 x 4000", settings={"max_pixels": 10_000_000}),
    "too_small": BadFile(saved(np.full((1, 1, 3), 255, np.uint8)), text="1 x 1 pixel", suffix="gif"),
    "animated": BadFile(MOVING, pixels=photo(), text="3 frames\n", suffix="gif"),
    "wrong_kind": BadFile(saved(coloured(ids())), "source", coloured(ids()), settings=LABELS),
    "label_range": BadFile(saved(VOID), "source", coloured(VOID), settings=LABELS),
    "instance_range": BadFile(
        imagecodecs.tiff_encode(MANY), "instance", coloured(MANY), suffix="tif", settings=LABELS
    ),
    "value_range": BadFile(
        npy(photo().astype(np.float32)), "source", photo(), suffix="npy",
        settings={"kinds": {"source": "channels"}, "channels": 3},
    ),
    "size_mismatch": BadFile(saved(photo(size=(80, 80))), pixels=photo(size=(80, 80))),
}  # fmt: skip
FOLDERS = {"source": "labels", "target": "photos", "instance": "instances"}


def shard_example(folder: Path, bad: BadFile) -> Example:
    """A pair with that file, read by the task of the shard stage."""
    labels = bad.settings is LABELS
    files = {"source": saved(ids() if labels else coloured(ids())), "target": GOOD}
    shown = {"source": coloured(ids()), "target": photo()}
    if bad.role == "instance":
        files["instance"] = b""
    paths = {role: folder / FOLDERS[role] / "street-07.png" for role in files}
    paths[bad.role] = paths[bad.role].with_suffix(f".{bad.suffix}")
    for role, path in paths.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(bad.data if role == bad.role and not bad.after_listing else files[role] or GOOD)
    row = pair_row("street-07", "train", {role: str(path) for role, path in paths.items()})
    if bad.after_listing:
        paths[bad.role].unlink()
        if bad.data is not None:
            paths[bad.role].write_bytes(bad.data)
            row[f"{bad.role}_etag"] = "an older one"
    config = ShardConfig.model_validate({"size": SIZE, **bad.settings})
    specs = shard.role_specs(config, [role for role in FOLDERS if role in files])
    part = f"{write_parts(folder / 'pair', [row], 1)}/part-00000.parquet"
    marker = shard.shard_part(part, output=str(folder / "shard"), config=config, specs=specs, io_threads=1)
    summary = shard.Summary()
    summary.add(marker)
    rows = pq.read_table(folder / "shard" / "quarantine-00000.parquet").to_pylist()
    tiles = [
        Tile(f"{FOLDERS[role]}/{path.name}", bad.pixels, bad.text, bad=True)
        if role == bad.role
        else Tile(f"{FOLDERS[role]}/{path.name}", shown[role])
        for role, path in paths.items()
    ]
    return Example(rows, failure(lambda: summary.check(config.max_reject_fraction, "shard-1a2b")), tiles)


def failure(call: Callable[[], Any]) -> str:
    """The message of the StageError that a call raises."""
    try:
        call()
    except StageError as error:
        return str(error)
    raise AssertionError("the stage is content")


# -- ingest and pair ----------------------------------------------------------


def listed(folder: Path, **location: Any) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The rejects and the objects that the ingest stage finds in a location."""
    config = IngestConfig.model_validate({"locations": [location]})
    listing = ingest.Listing()
    for unit in ingest.units(config):
        listing.add(ingest.list_unit(unit, config=config, output=str(folder / "ingest"), requests=1))
    tables = {name: pq.read_table(folder / "ingest" / name).to_pylist() for name in sorted(listing.files)}
    rejects = [row for name, rows in tables.items() if name.startswith("rejects") for row in rows]
    return rejects, [row for name, rows in tables.items() if name.startswith("objects") for row in rows]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def unusable() -> str:
    """What the log says after a listing of which one object is not usable, and 199 are in pairs."""
    lines = Lines()
    pair.logger.addHandler(lines)
    try:
        pair.outcome(PairConfig(), {"train": 199}, 1, "pair-1a2b")
    finally:
        pair.logger.removeHandler(lines)
    return lines.lines[0]


def bad_key(folder: Path) -> Example:
    """A name with a line break in it."""
    (folder / "photos").mkdir()
    (folder / "photos" / "street\n07.png").write_bytes(GOOD)
    rejects, _ = listed(folder, uri=str(folder / "photos"), role="target")
    return Example(rejects, unusable(), [Tile("street\\n07.png", photo(), bad=True)])


def link(folder: Path) -> Example:
    """A link in a tar."""
    with tarfile.open(folder / "photos.tar", "w") as archive:
        info = tarfile.TarInfo("street-07.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/mnt/old/7.png"
        archive.addfile(info)
    rejects, _ = listed(folder, uri=f"tar://::{folder}/photos.tar", role="target")
    return Example(rejects, unusable(), [Tile("street-07.png", text="a link to\n/mnt/old/7.png", bad=True)])


def encrypted(folder: Path) -> Example:
    """A zip with a password."""
    path = folder / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("street-07.png", GOOD)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag that says encrypted
    path.write_bytes(data)
    rejects, _ = listed(folder, uri=f"zip://::{path}", role="target")
    return Example(rejects, unusable(), [Tile("street-07.png", text="needs a\npassword", bad=True)])


def outside(folder: Path) -> Example:
    """A table that names an image elsewhere."""
    (folder / "pairs.csv").write_text("source,target\nlabels/07.png,/mnt/old/07.png\n")
    rejects, _ = listed(folder, uri=str(folder / "pairs.csv"), role="table")
    tiles = [Tile("labels/07.png", coloured(ids())), Tile("/mnt/old/07.png", photo(), bad=True)]
    return Example(rejects, unusable(), tiles)


def bad_row(folder: Path) -> Example:
    """A line of a table with too many cells."""
    (folder / "pairs.csv").write_text("source,target\nlabels/07.png,photos/07.png,blue sky\n")
    rejects, _ = listed(folder, uri=str(folder / "pairs.csv"), role="table")
    return Example(
        rejects, unusable(), [Tile("pairs.csv, line 2", text="07.png,07.png,\nblue sky", bad=True)]
    )


def pair_example(
    folder: Path, sources: Sequence[str], targets: Sequence[str], *, pattern: str = "{key}.png", **config: Any
) -> Example:
    """Two folders with these files, listed and joined by the rules of the pair stage."""
    objects: list[dict[str, Any]] = []
    for role, names in (("source", sources), ("target", targets)):
        for name in names:
            path = folder / FOLDERS[role] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(GOOD)
        objects += listed(folder, uri=str(folder / FOLDERS[role]), role=role, pattern=pattern)[1]
    settings = PairConfig.model_validate(config)
    table = ingest.OBJECTS.empty_table().from_pylist(objects, schema=ingest.OBJECTS)
    _, rejects = pair.join_roles(table, ("source", "target"), settings, (0, 0))
    rows = rejects.to_pylist()
    counts = {f"reject_{row['reason']}": 1 for row in rows}
    examples = [pair.reject_text(row) for row in rows]
    if "reject_buffer" in counts:  # no fault, so no message
        message = ""
    else:
        message = failure(lambda: pair.outcome(settings, counts, 0, "pair-1a2b", examples))
    bad = {row["uri"] for row in rows}
    tiles = [
        Tile(f"{FOLDERS[role]}/{name}", pixels, bad=str(folder / FOLDERS[role] / name) in bad)
        for role, names, pixels in (("source", sources, coloured(ids())), ("target", targets, photo()))
        for name in names
    ]
    return Example(rows, message, tiles)


REGIONS = {"split": {"regions": [{"split": "test", "x": [0, 9]}], "buffer": 5}}
MADE: Mapping[str, Callable[[Path], Example]] = {
    "bad_key": bad_key,
    "link": link,
    "encrypted": encrypted,
    "outside": outside,
    "bad_row": bad_row,
    "no_target": lambda folder: pair_example(folder, ["07.png"], ["08.png"]),
    "duplicate_target": lambda folder: pair_example(
        folder, ["07_a.png"], ["07_a.png", "07_b.png"], pattern="{key}_*.png"
    ),
    "case_differs": lambda folder: pair_example(folder, ["Elm-07.png"], ["elm-07.png"]),
    "bad_split": lambda folder: pair_example(
        folder, ["extra/07.png"], ["extra/07.png"], pattern="{split}/{key}.png"
    ),
    "buffer": lambda folder: pair_example(folder, ["x12.png"], ["x12.png"], pattern="x{x}.png", **REGIONS),
    "no_position": lambda folder: pair_example(folder, ["07.png"], ["07.png"], **REGIONS),
}


def examples() -> dict[str, Example]:
    """The example of every reason; files are below /data."""
    made: dict[str, Example] = {}
    for reason in (*MADE, *BAD_FILES):
        folder = Path(tempfile.mkdtemp())
        try:
            example = MADE[reason](folder) if reason in MADE else shard_example(folder, BAD_FILES[reason])
        finally:
            shutil.rmtree(folder)
        rows = [
            {name: text.replace(str(folder), "/data") for name, text in row.items()} for row in example.rows
        ]
        made[reason] = Example(rows, example.message.replace(str(folder), "/data"), example.tiles)
    return made


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for reason, example in examples().items():
        picture(example.tiles).save(PICTURES / f"{reason}.png", optimize=True)
        print(reason, *example.lines(), example.message, "", sep="\n    ")
