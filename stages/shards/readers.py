"""Row groups of a training input from a store, read ahead by Ray's tasks.

in:  read units {file, group, rows} of a shards folder, in order of need (`stages.shards.row_groups`)
out: Arrow tables of their rows, in the same order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from stages.parallel.cluster import in_order
from stages.shards.prepare import Preparation, StoredPair, Unit
from stages.shards.row_groups import read_units

UNITS_PER_TASK = 4  # row groups of about 8 MiB: a task's start costs little beside them
READERS = 2  # tasks of one worker that read at once, and so 64 MiB of Ray's store at most


def read_with_ray(preparation: Preparation, units: Iterator[Unit]) -> Iterator[StoredPair]:
    """The rows of each unit, in order, read ahead by Ray's tasks: views of Ray's object store."""
    columns = preparation.columns()
    chunks = iter(lambda: list(itertools.islice(units, UNITS_PER_TASK)), [])
    jobs = ((preparation.folder, columns, chunk) for chunk in chunks)
    for unit, table in in_order(read_units, jobs, stage="train-input", at_once=READERS):
        yield from preparation.pairs(unit, table)
