"""Row groups of a training input from a store, read ahead by Ray's tasks.

in:  read units {file, group, rows} of a shards folder, in order of need (`stages.shards.row_groups`)
out: Arrow tables of their rows, in the same order

Without torch, so that a task's process starts in a second and stays small.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from stages.errors import PixloomError, one_line
from stages.shards.prepare import Preparation, StoredPair, Unit
from stages.shards.row_groups import read_unit

UNITS_PER_TASK = 4  # row groups of about 8 MiB: a task's start costs little beside them
READERS = 2  # tasks of one worker that read at once, and so 64 MiB of Ray's store at most


def read_with_ray(preparation: Preparation, units: Iterator[Unit]) -> Iterator[StoredPair]:
    """The rows of each unit, in order, read ahead by Ray's tasks; the tables are views of Ray's object store.

    Not a pipeline of Ray Data: its scheduler polls without pause while its output is waited for, which took
    0.7 of a core, and the interpreter, from the process that trains.
    """
    # no CPUs of its own: reading waits more than it computes, and those that train hold every one
    task = ray.remote(num_cpus=0, num_returns="streaming")(_read_units)
    reading: deque[Any] = deque()
    while True:
        while len(reading) < READERS and (chunk := list(itertools.islice(units, UNITS_PER_TASK))):
            tables = task.remote(preparation.folder, chunk, preparation.columns())
            reading.append((chunk, tables))
        if not reading:
            return
        try:
            for unit, table in zip(*reading[0], strict=True):
                yield from preparation.pairs(unit, ray.get(table))
        except RayTaskError as error:
            if isinstance(error.cause, PixloomError):  # its one line, without what Ray adds to the text
                raise type(error.cause)(one_line(error.cause, limit=1000)) from error
            raise
        reading.popleft()


def _read_units(folder: str, units: list[dict[str, Any]], columns: list[str]) -> Iterator[pa.Table]:
    for unit in units:
        yield read_unit(folder, unit, columns)
