"""Hashes of a listing's columns, vectorised: of keys, and of whole rows in whatever order they come.

Every number is a function of the text alone (SipHash), the same on every machine and in every release:
splits and fingerprints depend on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc

Uint64s = np.ndarray[Any, np.dtype[np.uint64]]

_LANES = ("pixloom-listing0", "pixloom-listing1")  # SipHash's keys, of 16 bytes


def key_hashes(keys: pa.Array | pa.ChunkedArray, seed: int = 0) -> Uint64s:
    """A uniform 64-bit hash of each key; null counts as ""."""
    return _hashes(pc.fill_null(keys, ""), f"pixloom {seed % 10**8:08d}")


def no_rows() -> Uint64s:
    """The sums of no rows, to add the sums of rows to."""
    return np.zeros(2, np.uint64)


def row_sums(*columns: pa.Array | pa.ChunkedArray) -> Uint64s:
    """Two 64-bit sums over the rows of some columns: the sums of parts, in any order, add up to the whole's.

    A row is the text of its columns, one a line; null counts as "".
    """
    text = pc.binary_join_element_wise(
        *(column.cast(pa.string()) for column in columns), "\n", null_handling="replace", null_replacement=""
    )
    return np.array([_hashes(text, lane).sum(dtype=np.uint64) for lane in _LANES], np.uint64)


def spell(sums: Uint64s, count: int) -> str:
    """A digest of `count` rows as text."""
    return f"{int(sums[0]):016x}{int(sums[1]) ^ count:016x}"


def _hashes(text: pa.Array | pa.ChunkedArray, key: str) -> Uint64s:
    values = np.asarray(text.to_pandas(), dtype=object)
    hashes: Uint64s = pd.util.hash_array(values, hash_key=key, categorize=False)
    return hashes
