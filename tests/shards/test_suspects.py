"""Pairs to look at: what was made wrong is named, what is right is not."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import sample
from stages.base import Split
from stages.images import colour
from stages.images.kinds import Array
from stages.shards import suspects
from stages.shards.dataset import RoleSpec
from stages.shards.suspects import Explanation, Found, Suspect, Thumbnails
from tests.support.pairs import make_shards, photo, photo_pairs

SPECS: Mapping[Any, RoleSpec] = {role: RoleSpec(kind="rgb", encoding="raw") for role in ("source", "target")}
COUNT = 60


def sign(source: Array, target: Array) -> dict[str, Any]:
    return suspects.sign({"source": source, "target": np.ascontiguousarray(target)}, SPECS)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Array, Array]]:
    drawn = (sample.draw(0, n, 192, 96) for n in range(COUNT))
    return [(colour.colorize(scene.label), scene.photo) for scene in drawn]


def search(folder: Path, signs: list[dict[str, Any]]) -> dict[str, set[int]]:
    """The numbers of the suspects of each kind."""
    shards: dict[Split, list[str]] = {"train": ["train-00000.parquet"]}
    write_signs(folder, shards["train"][0], {str(n): row for n, row in enumerate(signs)})
    found = suspects.search(
        ("train", shards["train"][0]),
        folder=str(folder),
        explanation=Explanation.of(suspects.first_signs(str(folder), shards["train"], suspects.SAMPLE)),
        thumbnails=Thumbnails.read(str(folder), shards),
    )
    return {kind: {int(suspect.key) for suspect in ranked} for kind, ranked in found.suspects.items()}


def write_signs(folder: Path, shard: str, signs: Mapping[str, dict[str, Any]]) -> None:
    rows = [{"key": key} | row for key, row in signs.items()]
    pq.write_table(pa.Table.from_pylist(rows, schema=suspects.SIGNS), folder / suspects.signs_name(shard))


def test_what_is_wrong_is_named_by_its_kind_and_nothing_else(
    tmp_path: Path, scenes: list[tuple[Array, Array]]
) -> None:
    clean = [sign(*scene) for scene in scenes]
    assert search(tmp_path, clean) == {}
    wrong = list(clean)
    wrong[3] = sign(scenes[3][0], np.roll(scenes[3][1], 9, axis=1))
    wrong[8] = sign(scenes[8][0], scenes[8][1][:, ::-1])
    wrong[20], wrong[40] = sign(scenes[20][0], scenes[40][1]), sign(scenes[40][0], scenes[20][1])
    wrong[31] = clean[30]
    wrong[50] = sign(scenes[50][0], np.full_like(scenes[50][1], 90))
    named = search(tmp_path, wrong)
    assert (named.pop("shifted"), named.pop("mirrored"), named.pop("mismatched")) == ({3}, {8}, {20, 40})
    assert named == {"near_duplicate": {31}, "constant": {50}}


def test_mismatched_pairs_are_hardly_ever_mirrored_or_shifted(
    tmp_path: Path, scenes: list[tuple[Array, Array]]
) -> None:
    named = 0
    for first in range(0, COUNT, 6):  # of some the edges agree better when mirrored or moved
        wrong = [sign(*scene) for scene in scenes]
        for n in range(first, first + 6):
            wrong[n] = sign(scenes[n][0], scenes[(n + 7) % COUNT][1])
        found = search(tmp_path, wrong)["mismatched"]
        assert found <= set(range(first, first + 6))
        named += len(found)
    assert named > 0.9 * COUNT


@pytest.mark.parametrize(("x", "y"), [(9, 0), (-5, 3), (0, -6)])
def test_a_shift_is_measured(scenes: list[tuple[Array, Array]], x: int, y: int) -> None:
    rows = [{"key": str(n)} | sign(*scene) for n, scene in enumerate(scenes)]
    rows[0] |= sign(scenes[0][0], np.roll(scenes[0][1], (y, x), axis=(0, 1)))
    table = pa.Table.from_pylist(rows, schema=suspects.SIGNS)
    fits = Explanation.of(table).fits(table)
    assert fits.dx[0] == pytest.approx(x / 192, abs=0.006)
    assert fits.dy[0] == pytest.approx(y / 96, abs=0.012)
    assert fits.moved[0] - fits.own[0] > 2
    assert not fits.dx[1:].any()


def test_strong_edges_that_the_source_does_not_explain_hide_nothing(tmp_path: Path) -> None:
    """The photos have strong stripes down, of which their labels know nothing, and faint lines across."""
    rng = np.random.default_rng(0)
    labels = (rng.random((COUNT, 1, 24, 1)) < 0.3).repeat(8, 2).repeat(192, 1)
    lines = np.abs(np.diff(labels.astype(int), axis=2, append=labels[:, :, -1:])) * 60
    stripes = rng.normal(120, 50, (COUNT, 24, 1, 1)).repeat(8, 1) + rng.normal(0, 9, (COUNT, 192, 192, 1))
    photos = np.clip(stripes - lines, 0, 255).astype(np.uint8).repeat(3, 3)
    sources = np.uint8(255) * labels.repeat(3, 3)
    signs = [sign(*pair) for pair in zip(sources, photos, strict=True)]
    assert search(tmp_path, signs) == {}
    signs[3], signs[9] = sign(sources[3], photos[9]), sign(sources[9], photos[3])
    signs[20] = sign(sources[20], np.roll(photos[20], 7, axis=1))
    signs[30] = sign(sources[30], photos[30][:, ::-1])
    named = search(tmp_path, signs)
    assert (named.pop("mismatched"), named.pop("shifted"), named.pop("mirrored")) == ({3, 9}, {20}, {30})


def test_every_kind_of_image_has_signs() -> None:
    rng = np.random.default_rng(0)
    images: dict[Any, Array] = {
        "source": rng.integers(0, 255, (48, 64, 1), np.uint8),
        "target": rng.integers(100, 150, (48, 64, 2), np.uint8),
    }
    specs: dict[Any, RoleSpec] = {
        "source": RoleSpec(kind="lab_l", encoding="raw"),
        "target": RoleSpec(kind="lab_ab", encoding="raw"),
    }
    row = {"key": "a"} | suspects.sign(images, specs)
    assert pa.Table.from_pylist([row], schema=suspects.SIGNS).num_rows == 1
    images["source"] = rng.random((5, 7, 4), np.float32)
    specs["source"] = RoleSpec(kind="channels", encoding="raw", channel_count=4)
    assert len(suspects.sign(images, specs)["target"]) == suspects.FEATURES * suspects.GRID**2


@pytest.mark.parametrize("count", [1, 2, 29])
def test_few_pairs_are_searched_without_a_warning(tmp_path: Path, count: int) -> None:
    assert "mismatched" not in search(tmp_path, [sign(photo(n), photo(n)) for n in range(count)])
    assert search(tmp_path, [sign(np.zeros((9, 9, 3), np.uint8), photo(n)) for n in range(count)]) == {
        "constant": set(range(count))
    }


def test_an_image_is_compared_with_those_before_it(tmp_path: Path) -> None:
    rows = photo_pairs(tmp_path / "in", 6)
    rows += photo_pairs(tmp_path / "val", 2, "val", first=4)
    rows += photo_pairs(tmp_path / "test", 3, "test", first=3)
    make_shards(tmp_path / "shards", rows, parts=1)
    folder = str(tmp_path / "shards")
    shards: dict[Split, list[str]] = {s: [f"{s}-00000.parquet"] for s in suspects.ORDER}
    thumbnails = Thumbnails.read(folder, shards)
    assert thumbnails.starts == {"test": 0, "val": 3, "train": 5}
    near = {s: thumbnails.nearest(suspects.first_signs(folder, shards[s], 99), s) for s in shards}
    assert near["test"] == []
    assert [(key[-1], other, leaked) for key, other, _, leaked in near["val"]] == [
        ("4", "test/0004", True),
        ("5", "test/0005", True),
    ]
    assert [(key[-1], other) for key, other, _, _ in near["train"]] == [
        (str(n), f"test/{n:04d}") for n in (3, 4, 5)
    ]
    keys = ("test/0003", "val/0005", "train/0000")
    assert [thumbnails.split_of(key) for key in keys] == ["test", "val", "train"]


def test_what_was_found_adds_up_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MOST", 2)
    parts = []
    for n in range(3):
        part = Found()
        part.rank([Suspect("shifted", f"k{n}{m}", "train", 1.0 + m % 3, "", "x") for m in range(4)])
        part.counts["shifted"] = 4
        part.colours["train"] += n
        parts.append(part)
    totals = []
    for order in itertools.permutations(parts):
        total = Found()
        for part in order:
            total.add(part)
        totals.append(total.table())
        assert (total.counts["shifted"], int(total.colours["train"][0, 0])) == (12, 3)
    assert len(set(totals)) == 1
    rows = list(csv.DictReader(io.StringIO(totals[0].decode(), newline="")))
    assert [(row["key"], row["score"]) for row in rows] == [("k02", "3.0"), ("k12", "3.0")]


def test_a_key_comes_back_from_the_table_as_it_was() -> None:
    hostile = 'a,"b"\r\n;<script>é'
    found = Found()
    found.rank([Suspect("constant", hostile, "train", 2, "", "x")])
    (row,) = csv.DictReader(io.StringIO(found.table().decode(), newline=""))
    assert row["key"] == hostile


@pytest.mark.parametrize(("darker", "remarks"), [(0, 0), (60, 1)])
def test_a_split_of_other_colours_is_remarked(tmp_path: Path, darker: int, remarks: int) -> None:
    rng = np.random.default_rng(0)
    found = Found()
    for split, count in (("train", 200), ("val", 60)):
        images = rng.integers(80, 255, (count, 4, 4, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)
        images -= np.uint8(darker if split == "val" else 0)
        name = f"{split}-00000.parquet"
        write_signs(tmp_path, name, {f"{split}{n}": sign(i, i) for n, i in enumerate(images)})
        found.add(
            suspects.search(
                ("train" if split == "train" else "val", name),
                folder=str(tmp_path),
                explanation=Explanation.of(suspects.first_signs(str(tmp_path), [name], 99)),
                thumbnails=Thumbnails.read(str(tmp_path), {"train": [name]}),
            )
        )
    assert len([text for text in found.remarks() if text.startswith("val: the mean ")]) == remarks
