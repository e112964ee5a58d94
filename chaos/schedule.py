"""Which faults befall a run, when, and whom: a function of the seed, readable as one line each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MOMENTS = (
    "start",  # the command has been started
    "ingest",
    "pair",
    "shard",
    "train-global",
    "train-local",
    "train-joint",
    "infer",
    "evaluate",
    "report",
    "checkpoint",  # a checkpoint's first file is there
    "recovery",  # the fault before this one has just been noticed
)
"""What a fault waits for. The name of a step: its first line in the log."""

WEIGHTS = (1, 2, 1, 3, 5, 4, 3, 4, 4, 1, 3, 3)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    kind     its name in the catalogue
    moment   what it waits for, one of `MOMENTS`
    after    seconds it waits from then on
    lasts    seconds until it is undone, where it is not over at once
    victim   chooses one of several processes or nodes; uniform in [0, 1)
    """

    kind: str
    moment: str
    after: float
    lasts: float
    victim: float

    def __str__(self) -> str:
        return f"{self.moment} + {self.after:.1f} s: {self.kind}, {self.lasts:.1f} s"


def draw(seed: int, kinds: Sequence[str], count: int) -> list[Fault]:
    """The faults of a seed, in the order of their moments; the kinds go round from seed to seed."""
    chance = random.Random(seed)
    faults = []
    for number in range(count):
        # Kinds go round: whatever the seeds, each is drawn as often as any other.
        kind = kinds[(seed * count + number) % len(kinds)]
        moment = chance.choices(MOMENTS, WEIGHTS)[0]
        after = chance.choice([0.0, chance.uniform(0.0, 2.0), chance.uniform(0.0, 12.0)])
        lasts = chance.choice([1.0, chance.uniform(1.0, 6.0), chance.uniform(5.0, 20.0)])
        faults.append(Fault(kind, moment, after, lasts, chance.random()))
    return sorted(faults, key=lambda fault: (MOMENTS.index(fault.moment), fault.after))


def halves(faults: Sequence[int]) -> list[list[int]]:
    """Smaller schedules to try: each half, then all but one."""
    middle = len(faults) // 2
    found = [list(faults[:middle]), list(faults[middle:])] if len(faults) > 1 else []
    found += [[f for f in faults if f != one] for one in faults] if len(faults) > 2 else []
    return found
