"""The files of a data set, as columns: a worker holds numbers, whatever the number of files.

in:  rows {split, name, rows, group_rows} of dataset.parquet, one shard a row, split after split
out: `ShardFiles` of every split
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.base import Split

SCHEMA = pa.schema(
    {
        "split": pa.dictionary(pa.int8(), pa.string()),
        "name": pa.string(),
        "rows": pa.int32(),
        "group_rows": pa.int32(),
    }
)
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One Parquet file of a split: its rows, and those of each of its row groups but the last, the rest."""

    name: str
    rows: int
    group_rows: int

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Rows of each row group."""
        starts = range(0, self.rows, self.group_rows)
        return tuple(min(self.group_rows, self.rows - start) for start in starts)


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """The files of a split in their order, as columns."""

    names: pa.StringArray | pa.ChunkedArray
    file_rows: Ints
    group_rows: Ints

    @classmethod
    def of(cls, files: Iterable[ShardFile]) -> ShardFiles:
        """The columns of these files."""
        every = list(files)
        return cls(
            pa.array([file.name for file in every], pa.string()),
            np.array([file.rows for file in every], np.int32),
            np.array([file.group_rows for file in every], np.int32),
        )

    @property
    def rows(self) -> int:
        """Their pairs."""
        return int(self.file_rows.sum())

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[ShardFile]:
        columns = self.names.to_pylist(), self.file_rows.tolist(), self.group_rows.tolist()
        return map(ShardFile, *columns)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        """Where the row groups of each file end among those of the split."""
        return np.cumsum(-(-self.file_rows // self.group_rows))

    def sizes(self) -> npt.NDArray[np.integer[Any]]:
        """Rows of every row group of the split, in the smallest type: there are millions."""
        smallest = np.min_scalar_type(int(self.group_rows.max(initial=0)))
        counts = np.diff(self._ends, prepend=0)
        sizes: npt.NDArray[np.integer[Any]] = np.repeat(self.group_rows.astype(smallest), counts)
        sizes[self._ends - 1] = self.file_rows - (counts - 1) * self.group_rows
        return sizes

    def place(self, group: int) -> tuple[str, int]:
        """The file of a row group of the split, and the row group's number in it."""
        file = int(np.searchsorted(self._ends, group, "right"))
        return self.names[file].as_py(), group - (int(self._ends[file - 1]) if file else 0)


def to_table(splits: Mapping[Split, ShardFiles]) -> pa.Table:
    """All files as rows of `SCHEMA`, split after split."""
    tables = [
        pa.table(
            [
                pa.array([split]).take(pa.array(np.zeros(len(files), np.int8))),
                files.names,
                files.file_rows,
                files.group_rows,
            ],
            names=SCHEMA.names,
        ).cast(SCHEMA)
        for split, files in splits.items()
    ]
    return pa.concat_tables([SCHEMA.empty_table(), *tables])


def from_table(table: pa.Table, counts: Mapping[Split, int]) -> dict[Split, ShardFiles]:
    """The files of each split, of which there are so many in the table."""
    starts = itertools.accumulate(counts.values(), initial=0)
    parts = {
        split: table.slice(start, count)
        for (split, count), start in zip(counts.items(), starts, strict=False)
    }
    return {
        split: ShardFiles(part["name"], part["rows"].to_numpy(), part["group_rows"].to_numpy())
        for split, part in parts.items()
    }


def from_json(content: Mapping[Split, Iterable[Mapping[str, Any]]]) -> dict[Split, ShardFiles]:
    """The files of each split as the JSON description of older folders lists them."""
    return {
        split: ShardFiles.of(ShardFile(file["name"], file["rows"], file["row_groups"][0]) for file in files)
        for split, files in content.items()
    }
