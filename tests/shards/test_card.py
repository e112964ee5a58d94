"""The data set card: statistics, near-duplicates, Markdown."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from stages.images import geometry
from stages.shards import card
from stages.shards.card import HeldOut, Statistics
from tests.support.pairs import ids, make_shards, photo, photo_pairs


def test_sums_do_not_depend_on_the_order_of_adding_and_are_those_of_all_pixels() -> None:
    photos = [photo(n, 24, 16 + n) for n in range(3)]
    parts = []
    for image in photos:
        part = Statistics()
        part.add("target", card.measures(image, "rgb"), (image.shape[1], image.shape[0]))
        parts.append(part.to_json())
    totals = []
    for order in itertools.permutations(parts):
        total = Statistics()
        for part_json in order:
            total.merge(part_json)
        totals.append(total.to_json())
    assert all(total == totals[0] for total in totals)
    entry = total.roles["target"].description("rgb")
    pixels = np.concatenate([image.reshape(-1, 3) for image in photos])
    assert np.allclose(entry["mean"], pixels.mean(0))
    assert np.allclose(entry["std"], pixels.std(0))
    assert (entry["images"], entry["smallest"], entry["largest"]) == (3, [24, 16], [24, 18])


def test_labels_have_frequencies_and_instances_a_number() -> None:
    statistics = Statistics()
    for n in range(2):
        statistics.add("label", card.measures(ids(n), "labels"), (24, 16))
        statistics.add("instance", card.measures(ids(n).astype("<u2") + 9000, "instances"), (24, 16))
    both = np.concatenate([ids(0), ids(1)])
    entry = statistics.roles["label"].description("labels")
    values, counts = np.unique(both, return_counts=True)
    assert entry["classes_present"] == values.tolist()
    assert entry["frequencies"] == {str(v): n / both.size for v, n in zip(values, counts, strict=True)}
    assert statistics.roles["instance"].description("instances")["distinct_ids"] == len(values)


def test_the_nearest_hash_within_the_distance_is_found() -> None:
    ours = np.array([0b1111, 0, 1 << 63], np.uint64)
    theirs = np.array([0b0111, 0b11, (1 << 63) | 0b110], np.uint64)
    assert card.near(ours, theirs).tolist() == [0, 1, 2]
    assert card.near(ours, theirs, distance=1).tolist() == [0, -1, -1]
    assert card.near(ours, theirs[:0]).tolist() == [-1, -1, -1]


def test_validation_images_are_compared_with_test_images_alone(tmp_path: Path) -> None:
    rows = photo_pairs(tmp_path / "in", 6)
    rows += photo_pairs(tmp_path / "val", 2, "val", first=4)
    rows += photo_pairs(tmp_path / "test", 3, "test", first=3)
    make_shards(tmp_path / "shards", rows, parts=1)
    folder = str(tmp_path / "shards")
    names = {split: [f"{split}-00000.parquet"] for split in ("train", "val", "test")}
    held_out = card.read_held_out(folder, names, "target")
    assert held_out.keys == ["test/0003", "test/0004", "test/0005", "val/0004", "val/0005"]
    assert held_out.test == 3

    def compare(split: str, held_out: HeldOut = held_out) -> list[tuple[str, str, int]]:
        likeness = card._compare((split, names[split][0]), folder=folder, role="target", held_out=held_out)
        assert likeness.found == len(likeness.examples)
        return likeness.examples

    assert [(key[-1], other) for key, other, _ in compare("train")] == [
        (str(n), f"test/{n:04d}") for n in (3, 4, 5)
    ]
    assert [other for _, other, _ in compare("val")] == ["test/0004", "test/0005"]
    assert compare("val", HeldOut(held_out.keys, held_out.hashes, test=0)) == []


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_held_out_images_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(card, "LEAK_SAMPLE", limit)
    rows = photo_pairs(tmp_path / "in", 3, "test") + photo_pairs(tmp_path / "val", 3, "val")
    make_shards(tmp_path / "shards", rows, parts=1)
    names = {"val": ["val-00000.parquet"], "test": ["test-00000.parquet"]}
    held_out = card.read_held_out(str(tmp_path / "shards"), names, "target")
    assert len(held_out.keys) == len(held_out.hashes) == min(limit, 6)
    assert held_out.test == min(limit, 3)


def test_plain_images_and_near_copies() -> None:
    flat = card.measures(np.full((16, 16, 3), 9, np.uint8), "rgb")
    assert flat["hash"] == 0
    one, copy = photo(1, 240, 160), geometry.resize(photo(1, 240, 160), (120, 80), "rgb")
    hashes = [card.measures(image, "rgb")["hash"] for image in (one, copy)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= card.LEAK_DISTANCE
    assert card.measures(np.zeros((4, 4, 2), np.uint8), "lab_ab")["hash"] is None


def test_a_key_cannot_break_the_table() -> None:
    cell = card._cell("a|b`c\n<script>\x1b" + "x" * 500)
    assert "\n" not in cell
    assert cell.count("`") == 2
    assert cell.startswith("`a\\|b'c")
    assert len(cell) < 130
