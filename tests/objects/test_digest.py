"""Hashes of keys and order-free sums of rows, with the numbers that workspaces hold."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings, strategies as st

from stages.objects import digest

TABLE = pa.table({"uri": [f"s3://b/{n}é" for n in range(50)], "size": range(50), "etag": ["v"] * 50})
SUMS = [6232837054541743615, 6977946047571152100]
TEXT = "567f7c4732da45ff60d6a4f5a351ccd6"


def sums(table: pa.Table) -> list[int]:
    return digest.row_sums(table["uri"], table["size"], table["etag"]).tolist()


def test_hashes_are_the_same_in_every_release() -> None:
    keys = pa.array(["a", "é/😀"])
    assert digest.key_hashes(keys, 3).tolist() == [16450672117849719392, 14399020511253034552]
    assert sums(TABLE) == SUMS
    assert digest.spell(np.array(SUMS, np.uint64), 50) == TEXT


def test_a_null_is_as_an_empty_text() -> None:
    empty, null = pa.array([""]), pa.array([None], pa.string())
    assert digest.key_hashes(empty) == digest.key_hashes(null)
    assert (digest.row_sums(empty, empty) == digest.row_sums(null, empty)).all()


@settings(deadline=None)
@given(st.permutations(range(50)), st.integers(0, 50))
def test_the_sums_of_parts_in_any_order_are_those_of_the_whole(order: list[int], at: int) -> None:
    shuffled = TABLE.take(pa.array(order))
    total = digest.no_rows()
    for part in (shuffled.slice(0, at), shuffled.slice(at)):
        total += digest.row_sums(part["uri"], part["size"], part["etag"])
    assert total.tolist() == sums(TABLE)


def test_every_column_of_a_row_counts() -> None:
    changed = {tuple(sums(TABLE))}
    for name in TABLE.column_names:
        column = TABLE[name].to_pylist()
        column[7] = column[7] * 2 + column[8]
        changed.add(tuple(sums(TABLE.set_column(TABLE.column_names.index(name), name, [column]))))
    assert len(changed) == 4
