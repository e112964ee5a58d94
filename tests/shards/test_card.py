"""The data set card: statistics, near-duplicates, Markdown."""

from __future__ import annotations

import itertools

import numpy as np

from stages.shards import card
from stages.shards.card import Statistics
from tests.support.pairs import ids, photo


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


def test_a_key_cannot_break_the_table() -> None:
    cell = card._cell("a|b`c\n<script>\x1b" + "x" * 500)
    assert "\n" not in cell
    assert cell.count("`") == 2
    assert cell.startswith("`a\\|b'c")
    assert len(cell) < 130
