"""Key patterns, and which keys may name anything."""

from __future__ import annotations

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from stages.config.locations import compile_pattern
from stages.objects.patterns import bad_keys, canonical_splits, match


def captures(pattern: str, *paths: str) -> list[dict[str, object]]:
    return match(compile_pattern(pattern), pa.array(paths, pa.string())).to_pylist()


def keys(pattern: str, *paths: str) -> list[object]:
    return [row["key"] for row in captures(pattern, *paths)]


def test_the_key_is_everything_captured() -> None:
    (row,) = captures("{split}/{group}/{key}_leftImg8bit.png", "train/aachen/aachen_0_leftImg8bit.png")
    assert row == {"key": "train/aachen/aachen_0", "split": "train", "group": "aachen", "x": None, "y": None}


def test_names_that_differ_in_their_fixed_parts_meet_under_one_key() -> None:
    photo = keys("{split}_photo/{group}_{key}.jpg", "val_photo/0016E5_07979.jpg")
    label = keys("{split}_label/{group}_{key}.png", "val_label/0016E5_07979.png")
    assert photo == label == ["val/0016E5/07979"]


def test_names_that_differ_in_their_order_meet_under_one_key() -> None:
    assert keys("{x}_{y}.png", "3_5.png") == keys("{y}_{x}.png", "5_3.png") == ["3/5"]
    assert keys("{group}/{split}/{key}.png", "a/val/1.png") == keys("{split}_{group}_{key}.*", "val_a_1.jpg")


def test_the_default_pattern_takes_images_of_any_suffix_at_any_depth() -> None:
    captured = keys("{key}.*", "a.jpg", "deep/er/b.PNG", "c.tar.webp", "notes.md", "no_suffix", ".jpg")
    assert captured == ["a", "deep/er/b", "c.tar", None, None, None]


def test_pictures_that_may_not_be_readable_are_taken_to_be_rejected_by_name() -> None:
    names = ("a.avif", "b.JP2", "c.heic", "d.jxl")
    assert [captured is not None for captured in keys("{key}.*", *names)] == [True] * 4


def test_a_suffix_that_is_written_out_is_taken_at_its_word() -> None:
    assert keys("{key}.dat", "a.dat", "a.jpg") == ["a", None]


def test_a_star_stays_within_a_segment_and_two_cross_them() -> None:
    assert keys("*/{key}.png", "a/x.png", "a/b/x.png") == ["x", "b/x"]
    assert keys("*/img_{group}.png", "a/img_1.png", "a/b/img_1.png") == ["1", None]
    assert keys("**/img_{group}.png", "a/img_1.png", "a/b/img_1.png") == ["1", "1"]


def test_positions_are_numbers_and_part_of_the_key() -> None:
    (row, other) = captures("tile_{x}_{y}.*", "tile_-3_4.5.png", "tile_a_1.png")
    assert (row["key"], row["x"], row["y"]) == ("-3/4.5", -3.0, 4.5)
    assert other["key"] is None


def test_hidden_files_never_match() -> None:
    assert keys("{key}.*", ".x.png", "a/._b.png", ".git/c.png", "a..b.png") == [None, None, None, "a..b"]


def test_decomposed_and_composed_names_are_one_key() -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert keys("{key}.*", composed, decomposed) == ["café", "café"]


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("{name}.png", "is not one of"),
        ("{key}/{key}.png", "comes twice"),
        ("{key.png", "unbalanced"),
        ("photos/*.png", "captures nothing"),
        ("{split}/x.png", "captures nothing"),
        ("../{key}.png", "below the location"),
        ("/{key}.png", "below the location"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(pattern: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compile_pattern(pattern)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_compiles_or_is_refused_as_a_value(text: str) -> None:
    try:
        pattern = compile_pattern(text)
    except ValueError:
        return
    match(pattern, pa.array(["a/b/c.png"]))


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=60), max_size=20))
def test_any_name_can_be_matched_and_checked(names: list[str]) -> None:
    captured = match(compile_pattern("{key}.*"), pa.array(names, pa.string()))
    assert captured.num_rows == len(names)
    bad = bad_keys(captured["key"]).to_pylist()
    for key, fault in zip(captured["key"].to_pylist(), bad, strict=True):
        if key is not None and not fault:
            assert not {"", ".", ".."} & set(key.split("/"))
            assert not any(unicodedata.category(letter) == "Cc" for letter in key)
            assert len(key.encode()) <= 512


@pytest.mark.parametrize(
    "key",
    [
        "",
        "..",
        "a/../b",
        "../a",
        "a/..",
        "./a",
        "a//b",
        "/a",
        "a/",
        "a\nb",
        "a\x00",
        "\x85",
        "a::b",
        "x" * 513,
        "é" * 257,
    ],
)
def test_hostile_keys_are_bad(key: str) -> None:
    assert bad_keys(pa.array([key])).to_pylist() == [True]


@pytest.mark.parametrize("key", ["a", "a/b", "a..b", "...", "a b", "😀", "ключ", "a:b", "%2e%2e", "x" * 512])
def test_odd_but_harmless_keys_are_good(key: str) -> None:
    assert bad_keys(pa.array([key])).to_pylist() == [False]


def test_splits_go_by_their_common_names() -> None:
    given_names = pa.array(["Train", "training", "valid", "dev", "TEST", "extra", None])
    assert canonical_splits(given_names).to_pylist() == [
        "train",
        "train",
        "val",
        "val",
        "test",
        "extra",
        None,
    ]
