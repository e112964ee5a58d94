"""docs/bad-data.md has every reason that leaves an image out, in the stages' own words, with a picture."""

from __future__ import annotations

import re
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from stages import shard
from stages.images.kinds import Reason
from tests.support.bad_data import BAD_FILES, MADE, PICTURES, Example, examples, picture

PAGE = (PICTURES.parent / "bad-data.md").read_text()
ENTRIES = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def made() -> dict[str, Example]:
    return examples()


def test_the_page_has_every_reason() -> None:
    assert set(BAD_FILES) == set(get_args(Reason))
    assert list(ENTRIES) == [*MADE, *BAD_FILES]
    for reason in ENTRIES:
        assert f"[`{reason}`](#{reason})" in PAGE


@pytest.mark.parametrize("reason", [*MADE, *BAD_FILES])
def test_an_entry_is_what_the_stage_says(reason: str, made: dict[str, Example]) -> None:
    assert reason in {row["reason"] for row in made[reason].rows}
    for line in made[reason].lines():
        assert f"    {line}\n" in ENTRIES[reason]
    for setting in re.findall(r"shard\.\w+", shard.ADVICE.get(reason, "")):
        assert setting in ENTRIES[reason]


@pytest.mark.parametrize("reason", ["bad_key", "no_target", "label_range"])
def test_a_message_is_the_stage_s_own(reason: str, made: dict[str, Example]) -> None:
    assert made[reason].message in " ".join(PAGE.split())


@pytest.mark.parametrize("reason", [*MADE, *BAD_FILES])
def test_a_picture_shows_the_example(reason: str, made: dict[str, Example]) -> None:
    assert f"(bad-data/{reason}.png)" in ENTRIES[reason]
    with Image.open(PICTURES / f"{reason}.png") as image:
        kept = np.asarray(image.convert("RGB"), np.float32)
    drawn = np.asarray(picture(made[reason].tiles).convert("RGB"), np.float32)
    assert kept.shape == drawn.shape
    assert np.abs(kept - drawn).mean() < 2, "python -m tests.support.bad_data draws it again"


def test_the_pictures_are_small_and_none_is_left_over() -> None:
    files = list(PICTURES.iterdir())
    assert {file.stem for file in files} == set(ENTRIES)
    assert sum(file.stat().st_size for file in files) < 50_000
