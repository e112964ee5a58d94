"""Seeds are functions of what they are for."""

from __future__ import annotations

from stages.seeding import number


def test_a_seed_differs_by_each_of_its_parts_and_by_nothing_else() -> None:
    seeds = {number(s, p, k, r) for s in (0, 1) for p in ("a", "b") for k in (0, 1) for r in (0, 1)}
    assert len(seeds) == 16
    assert number(1, "a", 2, 3) == number(1, "a", 2, 3)
