"""Look at your images, write a config for them, and draw ten pairs to confirm by eye.

python -m pipeline.init FOLDER_OR_BUCKET [FOLDER]     -> pixloom.yaml, pixloom.png
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import re
import shlex
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import cli, config as configuration
from stages.config.ingest import LocationConfig
from stages.config.locations import is_archive
from stages.errors import UserError, one_line
from stages.images.decode import decode_image
from stages.images.encode import encode_png
from stages.images.geometry import crop_half, resize
from stages.images.kinds import ImageRejected
from stages.images.pictures import picture, sheet
from stages.models.architecture import Picture
from stages.objects.fetch import Object, Reader

HELP = """\
Look at a sample of the images in a folder or bucket, or in two, and write a commented config for them: which
images make a pair, what they hold, their size and classes. A picture of up to ten pairs beside it shows what
was taken for source (left) and target (right). No file is overwritten."""

LAYOUTS = (
    "init knows two locations with the same names, folders a/1.png and b/1.png or 1/a.png and 1/b.png, words "
    "in names (1_a.png and 1_b.png, a_1.png and b_1.png, 1.png and 1_mask.png), files of both images side by "
    "side, an archive of these (x.zip), or tables with two columns of images ('data/{split}-*.parquet'); "
    "docs/data.md shows how to write others"
)
PARTS = 64  # of a listing, of each of which one page is read; of few parts as many as make `PAGES`
PAGES = 16
PAIRS = 10
SIDE = 256  # the longer side of the stored images, about
MULTIPLE = 32  # of both sides, as the recipe's networks need
FEW = 64  # values of a label map, at most
WHOLE = 2**23  # float32 has all whole numbers of twice as many

_SPLIT = r"(?i:train(?:ing)?|val(?:id|idation)?|test(?:ing)?)"
_SOURCE = (
    r"src|source|input|condition(?:ing)?|original|a|label\w*|annot\w*|masks?|seg\w*|edges?|sketch\w*|lr|gr[ea]y"
    r"|gt\w*|maps?|thermal"
)
_TARGET = r"tgt|target|output|edited|b|photos?|images?|imgs?|leftimg|real|hr|rgb|colou?r"

AROUND = {  # the words before a number, those after a key, the name in a folder that is the key
    "before": r"((?:[^/]+/)?)([A-Za-z][A-Za-z_.-]*)(\d.*)",
    "after": r"(.*?[^/])((?:[_.-][A-Za-z][^\W_]*)*)()",
    "name": r"(.*[^/])(/[^/]+)()",
}

decoded = lru_cache(2 * PAIRS)(decode_image)

Name = tuple[int, str, str]  # the number of the location, the path of an image below it, its URI


@dataclass(frozen=True)
class Side:
    """One half of every pair: its location, its name there, its images by key, and what they hold."""

    uri: str
    word: str
    pattern: str
    images: Mapping[str, str]
    kind: str = "rgb"
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = "colours"

    def leaning(self) -> int:
        """How many of the name's words are a target's, less those of a source."""
        words = re.split(r"[^a-z]+", self.word.lower())
        return sum(bool(re.fullmatch(_TARGET, one)) - bool(re.fullmatch(_SOURCE, one)) for one in words)


# -- names: plain values in, plain values out ----------------------------------


def divide(names: Sequence[Name], slot: str) -> dict[str, dict[str, Name]]:
    """The names by marker and key.

    slot   where the marker is: the location, the (sub)folder; "": there is none
    """
    found: dict[str, dict[str, Name]] = defaultdict(dict)
    for name in names:
        key = unicodedata.normalize("NFC", name[1].rpartition(".")[0])  # as ingest does
        folders, parts, at = name[1].split("/"), key.split("/"), int(slot == "subfolder")
        marker = str(name[0]) if slot == "location" else ""
        if "folder" in slot and len(parts) > at + 1:
            split = re.fullmatch(rf"({_SPLIT})([_-]\w+|[AB]|)", parts[at])
            marker = split[2] if split else folders[at]
            key = "/".join([*parts[:at], *([split[1]] if split else []), *parts[at + 1 :]])
        if marker or not slot:
            found[marker][key] = name
    return found


def find_sides(names: Sequence[Name], uris: Sequence[str]) -> list[Side]:
    """The two groups of names that share most keys, and whose names say most; none if no two share half."""
    most, best = (0, 0), list[Side]()
    for slot in ["location"] if len(uris) > 1 else ["folder", "subfolder", ""]:
        groups = divide(names, slot)
        largest = sorted(groups, key=lambda marker: -len(groups[marker]))[:12]
        sides = [side for marker in sorted(largest) for side in _sides(groups[marker], marker, slot, uris)]
        for one, other in combinations(sides, 2):
            first, second = one.images, other.images
            shared = len(first.keys() & second.keys()) - len(first.items() & second.items())
            rank = shared, abs(one.leaning() - other.leaning())
            if rank > most and 2 * shared >= min(len(first), len(second)):
                most, best = rank, [one, other]
    return best


def _sides(group: Mapping[str, Name], marker: str, slot: str, uris: Sequence[str]) -> Iterator[Side]:
    """A group of names, and its parts with one word around their keys; many words are numbers of images."""
    yield _side(group, marker, slot, uris)
    for place, pattern in AROUND.items():
        parts: dict[str, dict[str, Name]] = defaultdict(dict)
        for key, name in group.items():
            if match := re.fullmatch(pattern, key):
                parts[match[2]][match[1] + match[3]] = name
        for word in sorted(parts, key=lambda word: (-len(parts[word]), word))[:8]:
            part, words = parts[word], (word, "") if place == "before" else ("", word)
            if len(part) >= max(2, len(parts)) and (not words[0] or _split(part) or "/" not in "".join(part)):
                yield _side(part, marker, slot, uris, *words)


def _side(
    group: Mapping[str, Name], marker: str, slot: str, uris: Sequence[str], before: str = "", after: str = ""
) -> Side:
    """A group of names as a location and a pattern."""
    number, path, _ = next(iter(group.values()))
    suffixes = {name[1].rpartition(".")[2] for name in group.values()}
    uri, suffix = uris[number].rstrip("/"), suffixes.pop() if len(suffixes) == 1 else "*"
    start, word = _split(group), marker
    if slot in ("location", ""):
        word = uri.rpartition("/")[2]
    elif slot == "subfolder":
        firsts = {key.partition("/")[0] for key in group}
        start = (start or f"{'{group}' if len(firsts) > 1 else firsts.pop()}/") + f"{marker}/"
    elif path.partition("/")[0] != marker:  # train_label
        start = f"{{split}}{marker}/"
    elif is_archive(uri):
        start = f"{marker}/{start}"
    else:
        uri = f"{uri}/{marker}"
    images = {key: name[2] for key, name in group.items()}
    pattern = f"{start}{before}{{key}}{after}.{suffix}"
    return Side(uri, " ".join(filter(None, (word, before, after.strip("/")))), pattern, images)


def _split(keys: Iterable[str]) -> str:
    """The pattern of the first folder, if the keys' first folders name different splits."""
    firsts = {key.partition("/")[0] for key in keys}
    return "{split}/" if len(firsts) > 1 and all(re.fullmatch(_SPLIT, one) for one in firsts) else ""


# -- the store and its images --------------------------------------------------


def sample(uri: str, number: int) -> Iterator[Name]:
    """Names of images below a location: a page of each of some parts of its listing."""
    from stages import ingest  # noqa: PLC0415
    from stages.objects import listing, patterns  # noqa: PLC0415
    from stages.storage.retry import located  # noqa: PLC0415

    location = LocationConfig(uri=uri, role="target")
    with located(uri):
        cut = ingest.cut_location(location)
        units = [replace(unit, paths=(path,)) for unit in cut for path in unit.paths]
        units = units[:: -(-len(units) // PARTS)]
        for unit in units:
            objects = listing.list_objects(ingest.root(location), unit)
            for path, found, _, _, fault in islice(objects, listing.PAGE * -(-PAGES // len(units))):
                if patterns.is_image(path) and not fault and not re.search(r"(?:\A|/)\.", path):
                    yield number, path, found


def table_sides(uri: str) -> list[Side]:
    """Two columns of images of a Parquet table, by what their names say; none if it has no two."""
    import pyarrow as pa  # noqa: PLC0415

    from stages.objects import cells, tables  # noqa: PLC0415
    from stages.storage import absolute, located  # noqa: PLC0415

    with located(uri):
        table = tables.files(absolute(uri))[0][0]
        with cells.opened(table) as parquet:
            words = [field.name for field in parquet.schema_arrow if cells.has_images(field)]
            rows = range(1, parquet.metadata.row_group(0).num_rows + 1 if parquet.num_row_groups else 1)
    sides = [
        Side(uri, word, "", dict(zip(map(str, rows), column.to_pylist(), strict=True)))
        for word in words
        for column in [cells.addresses(table, word, pa.array(rows))]
    ]
    two = max(combinations(sides, 2), key=lambda two: abs(two[0].leaning() - two[1].leaning()), default=())
    return list(two)


def read(groups: Sequence[Sequence[str]]) -> tuple[list[list[bytes]], list[str]]:
    """The contents of each group's files, and why others are left out: an image of theirs cannot be used.

    Raises UserError if no group is left.
    """
    reader = Reader()
    reader.expect(Object(uri) for group in groups for uri in group)
    good, wrong = [], []
    for group in groups:
        try:
            files = [reader.read(Object(uri)) for uri in group]
            for data in files:
                judge(Side("", "", "", {}), [data])
            good.append(files)
        except ImageRejected as error:
            wrong.append(f"{' and '.join(group)}: {error}")
    if not good:
        raise UserError(f"no image of the sample can be used; {wrong[0]}")
    return good, [f"left out of this look, and later of training: {text}" for text in wrong]


def judge(one: Side, files: Sequence[bytes]) -> tuple[Side, list[Any]]:
    """What the files of a side hold, and the files as pictures."""
    try:
        maps = [decode_image(data, "labels") for data in files]
        values = np.unique(np.concatenate([np.unique(ids) for ids in maps])).tolist()
    except ImageRejected as error:
        if error.reason == "label_range" or "has 1 of float" in error.detail:
            how = Picture(kind="grey16", range=(used := values_used(files)))
            note = f"grey from {used[0]} to {used[1]}"
            deep = replace(one, kind="grey16", settings={"range": used}, note=note)
            return deep, [picture(decode_image(data, how), "grey16") for data in files]
        values = []
    pictures = [decoded(data, "rgb") for data in files]
    if 1 < len(values) <= FEW:
        named = [value for value in values if value != 255]
        same = all((image == ids).all() for image, ids in zip(pictures, maps, strict=True))
        settings: dict[str, Any] = {"classes": max(values) + 1}
        if 255 in values and len(named) > 1 and max(named) < 2 * len(named):
            settings = {"classes": max(named) + 2, "ignore_label": 255}  # which becomes the last class
        elif max(values) >= 2 * len(values) and same:  # black and white masks
            settings = {"classes": len(values), "palette": {"source": values}}
        note = f"label ids, {len(values)} values from {values[0]} to {values[-1]}"
        shown = [picture(ids, "labels") for ids in maps]
        return replace(one, kind="labels", settings=settings, note=note), shown
    brightest = max(image.max() for image in pictures)
    if brightest < 127 and brightest < min(255, (used := values_used(files))[1]) // 2:  # deep, of few bits
        pictures = [decode_image(data, Picture(kind="rgb", range=used)) for data in files]
        one = replace(one, settings={"range": used}, note=f"colours up to {used[1]}")
    if all((image == image[:, :, :1]).all() for image in pictures):
        return replace(one, kind="grey", note="grey"), pictures
    return one, pictures


def values_used(files: Sequence[bytes]) -> tuple[float, float]:
    """Powers of two around the values of files: black and white. White of whole numbers is 1 less."""
    how, low, top, whole = Picture(kind="channels", range=(-WHOLE, WHOLE)), 0.0, 0.0, True
    for values in (decode_image(data, how) * WHOLE for data in files):
        known = values[values > -WHOLE]  # others are missing: NaN, the file's nodata
        low, top = min(low, known.min(initial=0)), max(top, abs(known).max(initial=0))
        whole = whole and not (known % 1).any()
    end = 2 ** max(1, int(top).bit_length()) if whole else 2 ** math.ceil(math.log2(top))
    return -end if low < 0 else 0, end - whole


def is_reversed(one: Side, other: Side) -> tuple[bool, str]:
    """Whether `other` is the source, and why."""
    if one.leaning() != other.leaning():
        sure = "sure" if one.leaning() and other.leaning() else "likely"
        return one.leaning() > other.leaning(), f"{sure}, by their names"
    if (one.kind == "labels") != (other.kind == "labels"):
        return other.kind == "labels", "likely, as source has label ids"
    return False, "a guess; if they are the wrong way round, swap `role`"


# -- the config ----------------------------------------------------------------


def look(uris: Sequence[str]) -> tuple[str, list[str], list[list[Any]]]:
    """The config's text, what was taken for what, and pairs of pictures.

    Raises UserError if the images are in no known layout.
    """
    where = " and ".join(uris)
    if uris[0].lower().endswith(".parquet"):
        sides = table_sides(uris[0])
        names = [(0, key, uri) for side in sides for key, uri in side.images.items()]
    else:
        names = [name for number, uri in enumerate(uris) for name in sample(uri, number)]
        sides = find_sides(names, uris) if names else []
    if len(names) < 2:
        raise UserError(f"{where}: {('no images', 'one image')[len(names)]} there; {LAYOUTS}")
    if sides:
        first, second = (side.images for side in sides)
        shared = sorted(first.keys() & second.keys())
        keys = shared[:: -(-len(shared) // PAIRS)]
        files, unusable = read([[side.images[key] for side in sides] for key in keys])
        judged = [judge(side, of_side) for side, of_side in zip(sides, zip(*files, strict=True), strict=True)]
        turned, why = is_reversed(judged[0][0], judged[1][0])
        (source, sources), (target, targets) = judged[::-1] if turned else judged
        rows = list(zip(sources, targets, strict=True))
        said = [
            f"pairs: {len(shared):,}; {len(names) - 2 * len(shared):,} other images",
            f"source: {source.word}, {source.note}",
            f"target: {target.word}, {target.note}",
            f"which is which: {why}",
            *unusable,
        ]
        if target.kind == "labels":
            target = replace(target, kind="rgb", settings={})
            said.append(
                "the target's ids are read as colours, which is what networks generate (infer.palette)"
            )
        locations = [(source, "source"), (target, "target")]
        half, shard = "", {"kinds": {role: side.kind for side, role in locations}}
        if source.kind == "labels":
            shard |= source.settings
        if deep := {role: side.settings["range"] for side, role in locations if "range" in side.settings}:
            shard["range"] = deep
    else:
        files, unusable = read([[uri] for *_, uri in names[:: -(-len(names) // PAIRS)]])
        pattern = f"{_split([path for _, path, _ in names])}{{key}}.*"
        halves, pictures = judge(Side(uris[0], "", pattern, {}), [data for (data,) in files])
        if len(uris) > 1 or any(abs(image.shape[1] / image.shape[0] - 2) > 0.02 for image in pictures):
            raise UserError(f"{where}: {len(names):,} names and no pairs; {LAYOUTS}")
        rows = [(crop_half(image, "left"), crop_half(image, "right")) for image in pictures]
        said = [
            "pairs: every image is twice as wide as high: likely two side by side",
            "source: the left half, a guess; if it is the right one, change `source_half`",
            *unusable,
        ]
        half, locations = "pair:\n  source_half: left\n", [(halves, "pair")]
        shard = {"range": halves.settings["range"]} if "range" in halves.settings else {}
    size, fit = shape(rows)
    high, wide = rows[0][1].shape[:2]
    said = [f"names looked at: {len(names):,}", *said]
    said.append(f"size: {size[0]}x{size[1]}, fit {fit}; a target has {wide}x{high} pixels")
    config = write(said, locations, half, {"size": size, "fit": fit} | shard)
    return config, said, [[resize(image, size, "rgb") for image in row] for row in rows]


def shape(rows: Sequence[tuple[Any, ...]]) -> tuple[tuple[int, int], str]:
    """Width and height to store, and `shard.fit`."""
    ratios = [[image.shape[1] / image.shape[0] for image in row] for row in rows]
    targets = sorted(target for _, target in ratios)
    ratio = targets[len(targets) // 2]
    longest = min(SIDE, max(SIDE // 2, *rows[0][1].shape[:2]))
    sides = (longest * min(1, ratio), longest * min(1, 1 / ratio))
    width, height = (max(2 * MULTIPLE, round(side / MULTIPLE) * MULTIPLE) for side in sides)
    if any(abs(source / target - 1) > 0.02 for source, target in ratios):
        return (width, height), "stretch"
    return (width, height), "crop" if targets[-1] > 1.02 * targets[0] else "same"


def write(
    said: Sequence[str], locations: Sequence[tuple[Side, str]], half: str, shard: dict[str, Any]
) -> str:
    """The config file. JSON is YAML, and quotes what needs quotes."""
    rows = "".join(
        f"    - {{uri: {json.dumps(side.uri)}, role: {role}, pattern: {json.dumps(side.pattern)}}}\n"
        for side, role in locations
    )
    if not locations[0][0].pattern:  # columns of a table
        columns = json.dumps({role: side.word for side, role in locations})
        rows = f"    - {{uri: {json.dumps(locations[0][0].uri)}, role: table, columns: {columns}}}\n"
    return (
        f"# yaml-language-server: $schema={configuration.RECIPES / 'pipeline.schema.json'}\n#\n"
        "# What `pixloom init` took for what. The picture beside this file has source left, target right.\n"
        + "".join(f"#   {cli.printable(line)}\n" for line in said)
        + "extends: base/pix2pixhd.yaml    # the networks; profile cpu is for two cores, paper for a GPU\n"
        "workspace: workspace            # all that a run writes: a folder or a bucket\n\n"
        "# Images with the same {key}, {split} and {group} make a pair; * stands for any text.\n"
        f"ingest:\n  locations:\n{rows}{half}\n"
        f"# Sides are multiples of {MULTIPLE}. Raise `classes`, `range` if other files have higher values.\n"
        "shard:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in shard.items())
    )


# -- the command ---------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.init", HELP)
    text = "where the images are; any fsspec URI"
    p.add_argument("images", type=cli.location, metavar="FOLDER_OR_BUCKET", help=text)
    text = "where their partners are, if elsewhere"
    p.add_argument("partners", type=cli.location, metavar="FOLDER", nargs="?", help=text)
    p.add_argument("--output", type=Path, default=Path("pixloom.yaml"), metavar="FILE", help="what to write")
    return p


def run(options: argparse.Namespace) -> None:
    """Write the config and the picture. Raises UserError if one exists, or no pairs are found."""
    file = options.output
    if not file.name or file.suffix == ".png":
        raise UserError(f"--output {file}: name a file that ends in .yaml; its picture ends in .png")
    drawn = file.with_suffix(".png")
    try:
        for one in filter(Path.exists, (file, drawn)):
            raise FileExistsError(errno.EEXIST, "", one)
        with cli.planning():
            config, said, rows = look([uri for uri in (options.images, options.partners) if uri])
        file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as kept:
            for one, data in (file, config.encode()), (drawn, encode_png(sheet(rows))):
                with one.open("xb") as opened:  # listing takes long: another process may have made it
                    kept.callback(one.unlink)
                    opened.write(data)
            configuration.load(str(file))
            kept.pop_all()
    except FileExistsError as error:
        raise UserError(f"{error.filename}: exists; name another file by --output") from None
    except OSError as error:
        raise UserError(f"--output {file}: it cannot be written: {one_line(error)}") from error
    lines = [
        *said,
        f"look at {drawn}, source left, target right; then: pixloom plan -c {shlex.quote(str(file))}",
    ]
    sys.stdout.write("".join(f"{cli.printable(line)}\n" for line in lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    return cli.exit_code(lambda: run(options), stopped="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
