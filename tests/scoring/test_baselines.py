"""Baselines: which training source is the nearest, and which are compared."""

from __future__ import annotations

import numpy as np

from stages.scoring.baselines import BaselineData, is_candidate, merge, nearest
from stages.scoring.metrics import MeanImage


def test_the_nearest_candidate_is_the_first_of_the_closest() -> None:
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, 256, (5000, 12), np.uint8)
    candidates[4500] = candidates[17]
    assert nearest(candidates[4500], candidates) == 17
    for _ in range(5):
        vector = rng.integers(0, 256, 12, np.uint8)
        distances = ((candidates.astype(float) - vector) ** 2).sum(1)
        assert nearest(vector, candidates) == distances.argmin()


def test_candidates_are_a_share_of_the_keys_whoever_asks() -> None:
    keys = [f"train/{i}" for i in range(4000)]
    chosen = {key for key in keys if is_candidate(key, 0.25)}
    assert 800 < len(chosen) < 1200
    assert chosen <= {key for key in keys if is_candidate(key, 0.5)}
    assert all(is_candidate(key, 1.0) for key in keys)


def test_parts_of_the_training_split_are_joined_in_their_order() -> None:
    def part(value: int) -> BaselineData:
        mean = MeanImage()
        mean.add(np.full((2, 2, 3), value, np.uint8))
        vectors = np.full((1, 16 * 16 * 3), value, np.uint8)
        return BaselineData(mean=mean, vectors=vectors, places=[(f"{value}.parquet", 0, value)])

    whole = merge([part(10), part(30)])
    assert (whole.mean.image() == 20).all()
    assert whole.vectors[:, 0].tolist() == [10, 30]
    assert whole.places == [("10.parquet", 0, 10), ("30.parquet", 0, 30)]
    assert merge([]).vectors.shape == (0, 16 * 16 * 3)
