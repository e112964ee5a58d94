"""Shards of a few kilobytes, written as the shard stage writes them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Kind, Role, Split
from stages.images import colour, encode
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec, ShardFile, ShardFiles
from tests.support.models import CLASSES, scene


def make_shards(
    folder: Path,
    counts: dict[Split, Sequence[int]],
    *,
    size: tuple[int, int] = (32, 32),
    source: Kind = "labels",
    target: Kind = "rgb",
    instances: bool = False,
    row_group: int = 4,
) -> DatasetSpec:
    """Shards with files of so many rows per split; keys are `<split>/<number>`, groups "even" and "odd"."""
    folder.mkdir(parents=True, exist_ok=True)
    roles: dict[Role, RoleSpec] = {
        "source": RoleSpec(kind=source, encoding="raw", classes=CLASSES if source == "labels" else None),
        "target": RoleSpec(kind=target, encoding="raw"),
    }
    if instances:
        roles["instance"] = RoleSpec(kind="instances", encoding="raw")
    splits: dict[Split, ShardFiles] = {}
    number = 0
    for split, files in counts.items():
        listed = []
        for bucket, rows in enumerate(files):
            records = []
            for _ in range(rows):
                drawn = scene(number, *size)
                if source == "rgb":
                    drawn["source"] = colour.colorize(drawn["source"], CLASSES)
                if target == "grey":
                    drawn["target"] = drawn["target"][:, :, :1]
                record: dict[str, object] = {
                    "key": f"{split}/{number:03d}",
                    "group": ("even", "odd")[number % 2],
                }
                for role in roles:
                    data = encode.encode_image(drawn[role], "raw")
                    record |= {
                        role: data,
                        f"{role}_crc": zlib.crc32(data),
                        f"{role}_uri": f"file:///{role}/{number}",
                    }
                    record |= {f"{role}_width": size[0], f"{role}_height": size[1]}
                records.append(record)
                number += 1
            name = f"{split}-{bucket:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(records), folder / name, row_group_size=row_group)
            listed.append(ShardFile(name, rows, min(rows, row_group)))
        splits[split] = ShardFiles.of(listed)
    spec = DatasetSpec(size=size, roles=roles, splits=splits)
    dataset.save(str(folder), spec)
    return spec
