"""Row groups are read whole and verified, by processes that stay small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stages import storage
from stages.errors import StageError
from stages.shards.row_groups import read_row_group, read_unit
from stages.storage import retry
from tests.support.pairs import make_shards, photo_pairs

COLUMNS = ["key", "target", "target_crc"]


@pytest.fixture
def shard_file(tmp_path: Path) -> bytes:
    make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 9), parts=1, encoding="png")
    return (tmp_path / "shards" / "train-00000.parquet").read_bytes()


def test_a_row_group_from_a_store_is_that_of_the_file(tmp_path: Path, shard_file: bytes) -> None:
    storage.write_bytes("memory://row-groups/train-00000.parquet", shard_file)
    for group in range(3):
        local = read_row_group(str(tmp_path / "shards" / "train-00000.parquet"), group, COLUMNS)
        assert read_row_group("memory://row-groups/train-00000.parquet", group, COLUMNS).equals(local)


def test_columns_with_lists_are_read_too(tmp_path: Path, shard_file: bytes) -> None:
    storage.write_bytes("memory://row-groups/lists.parquet", shard_file)
    columns = ["key", "target_mean"]
    local = read_row_group(str(tmp_path / "shards" / "train-00000.parquet"), 1, columns)
    assert read_row_group("memory://row-groups/lists.parquet", 1, columns).equals(local)


def test_damage_in_any_column_is_found(
    tmp_path: Path, shard_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    data = bytearray(shard_file)
    data[data.index(b"train/0002") + 9] ^= 1  # a key, which has no checksum of its own
    storage.write_bytes("memory://row-groups/damaged.parquet", bytes(data))
    unit = {"file": "damaged.parquet", "group": 0}
    with pytest.raises(StageError, match=r"damaged\.parquet: failed at each .*CRC"):
        read_unit("memory://row-groups", unit, COLUMNS)


def test_reading_needs_no_torch() -> None:
    code = "import sys, stages.shards.row_groups; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
