"""How sure a mean over images is: 95 % intervals, from groups of images where there are groups.

Images of one group (a drive, a site) resemble each other, so the groups are what is drawn again, each with
all of its images. With 10 to 5,000 of them an interval is the bootstrap's: the 2.5th and 97.5th percentile
of the means of 1,000 draws with a fixed seed. With fewer, draws say too little, and with more they say what
the normal approximation says at a fraction of the cost: mean +- t * standard error, with Student's t.

A number of a whole set (a Frechet distance, an IoU) is no mean. Its standard error is the jackknife's: the
number again without each of 20 blocks of images, or without each group where there are fewer groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

DRAWS = 1000
FEW, MANY = 10, 5000
BLOCKS = 20
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""The 97.5th percentile of Student's t for 1 to BLOCKS - 1 degrees of freedom."""
NORMAL = 1.960


class Interval(NamedTuple):
    """A mean, and the interval of 95 % around it."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval is clear."""
        return self.low > 0 or self.high < 0


def interval(values: np.ndarray, groups: np.ndarray | None = None) -> Interval | None:
    """The mean of values (N,) float64 with its interval; None for fewer than two images.

    values   NaN stands for an image without the value
    groups   an integer for each image; where all are equal, or None, each image is drawn by itself
    """
    there = np.isfinite(values)
    values = values[there]
    if len(values) < 2:
        return None
    units = _units(np.zeros(len(values)) if groups is None else groups[there])
    counts, totals = np.bincount(units), np.bincount(units, weights=values)
    mean, number = float(values.mean()), len(counts)
    if FEW <= number <= MANY:
        times = _times_drawn(number)
        low, high = np.quantile((times @ totals) / (times @ counts), (0.025, 0.975))
        return Interval(mean, float(low), float(high))
    variance = number / (number - 1) * ((totals - mean * counts) ** 2).sum() / len(values) ** 2
    reach = (STUDENT[number - 2] if number < FEW else NORMAL) * float(np.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach)


def blocks(groups: np.ndarray) -> np.ndarray:
    """The block of each image, a number below BLOCKS. Images of a group are in one block."""
    units = _units(groups)
    number = units.max(initial=-1) + 1
    return np.asarray(units * min(BLOCKS, number) // max(1, number))


def jackknife(score: Callable[[np.ndarray], float], blocks: np.ndarray) -> Interval | None:
    """A score of a whole set with its interval; None where a block leaves fewer than two images.

    Blocks may differ in size (Busing, Meijer and van der Leeden 1999). The interval is of the score that as
    many other images would have: where a score is biased by their number, it still is.

    score    of the blocks that are kept, (number of blocks,) bool
    blocks   the block of each image
    """
    sizes = np.bincount(blocks)
    number, images = len(sizes), len(blocks)
    if number < 2 or images - sizes.max() < 2:
        return None
    value = score(np.ones(number, bool))
    without = np.array([score(np.arange(number) != block) for block in range(number)])
    share = images / sizes
    differences = share * value - (share - 1) * without
    differences -= number * value - ((1 - 1 / share) * without).sum()
    reach = STUDENT[number - 2] * float(np.sqrt((differences**2 / (share - 1)).mean()))
    return Interval(value, value - reach, value + reach)


def _units(groups: np.ndarray) -> np.ndarray:
    """The unit that each image is drawn with: its group, or itself where all groups are equal."""
    names, numbers = np.unique(groups, return_inverse=True)
    return numbers if len(names) > 1 else np.arange(len(groups))


@lru_cache(maxsize=2)
def _times_drawn(number: int) -> np.ndarray:
    """(DRAWS, number) float64: how often each of `number` units is in each draw."""
    drawn = np.random.default_rng(0).integers(number, size=(DRAWS, number))
    drawn += number * np.arange(DRAWS)[:, None]
    counts = np.bincount(drawn.reshape(-1), minlength=DRAWS * number)
    return counts.reshape(DRAWS, number).astype(np.float64)


def group_numbers(names: pa.ChunkedArray) -> np.ndarray:
    """A number for each name, equal for equal names; one of its own for each null or empty name."""
    encoded = names.combine_chunks().fill_null("").dictionary_encode()
    alone = np.asarray(pc.equal(encoded, "").to_numpy(zero_copy_only=False))
    return np.where(alone, len(encoded) + np.arange(len(encoded)), np.asarray(encoded.indices))


def difference(one: pa.Table, other: pa.Table, metric: str) -> Interval | None:
    """The mean of `one` minus `other` over the images that both have, with its interval; None for too few.

    one, other   tables {key, group, metric}
    """
    both = one.join(other.drop_columns("group"), "key", join_type="inner", right_suffix="_other").sort_by(
        "key"
    )
    values = both[metric].to_numpy() - both[f"{metric}_other"].to_numpy()
    return interval(values, group_numbers(both["group"]))
