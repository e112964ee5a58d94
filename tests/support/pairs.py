"""Small image files, pair parts and shards folders for tests; the stages' tasks without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages import ingest, pair, shard
from stages.base import Role
from stages.config.ingest import IngestConfig
from stages.images import encode, geometry
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.storage import local_etag

SIZE = (24, 16)


def photo(seed: int, width: int = 24, height: int = 16) -> np.ndarray:
    """A smooth colour picture; different for every seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return geometry.resize(small, (width, height), "rgb")


def ids(seed: int, width: int = 24, height: int = 16, classes: int = 5) -> np.ndarray:
    """A label map."""
    small = np.random.default_rng(seed + 10_000).integers(0, classes, (4, 4, 1), np.uint8)
    return geometry.resize(small, (width, height), "labels")


def write_image(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode.encode_png(array))
    return str(path)


def pair_row(key: str, split: str, uris: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """A row as the pair stage writes it."""
    row: dict[str, Any] = {"key": key, "split": split, "group": None}
    for role, uri in uris.items():
        row |= {f"{role}_uri": uri, f"{role}_crop": "", f"{role}_derive": ""}
        path = Path(uri)
        row[f"{role}_size"] = path.stat().st_size if path.exists() else 10
        row[f"{role}_etag"] = local_etag(path.stat()) if path.exists() else ""
    return row | more


def write_parts(folder: Path, rows: Sequence[dict[str, Any]], parts: int = 2) -> str:
    """Pair parts of the rows, dealt in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(parts):
        mine = sorted(rows[index::parts], key=lambda row: row["key"])
        if mine:
            pq.write_table(pa.Table.from_pylist(mine), folder / f"part-{index:05d}.parquet")
    return str(folder)


def photo_pairs(
    folder: Path,
    count: int,
    split: str = "train",
    first: int = 0,
    roles: Sequence[Role] = ("source", "target"),
) -> list[dict[str, Any]]:
    """Pairs of PNG files: photos, and label maps for the role `label`."""
    rows = []
    for n in range(first, first + count):
        uris = {}
        for at, role in enumerate(roles):
            array = ids(n) if role == "label" else photo(2 * n + at)
            uris[role] = write_image(folder / role / f"{n:04d}.png", array)
        rows.append(pair_row(f"{split}/{n:04d}", split, uris))
    return rows


def make_shards(
    folder: Path, rows: Sequence[dict[str, Any]], *, parts: int = 2, **config: Any
) -> DatasetSpec:
    """A shards folder of pair rows, made without Ray: every part, then its description."""
    settings = shard.ShardConfig(**({"size": SIZE, "row_group_rows": 4} | config))
    pairs = write_parts(folder.parent / f"{folder.name}-pairs", rows, parts)
    found = sorted(str(p) for p in Path(pairs).glob("part-*.parquet"))
    specs = shard.role_specs(settings, shard.roles_of(found[0]))
    done = shard.Summary()
    for part in found:
        done.add(shard.shard_part(part, output=str(folder), config=settings, specs=specs, io_threads=4))
    spec = DatasetSpec(size=settings.size, roles=shard.stored_specs(specs), splits=done.splits())
    dataset.save(str(folder), spec)
    return spec


def list_and_pair(listed: IngestConfig, work: str, **pairing: Any) -> list[str]:
    """The parts of pairs of what the locations hold, made as the tasks of ingest and pair make them."""
    objects, pairs = f"{work}/objects", f"{work}/pairs"
    config = pair.PairConfig(**pairing)
    unit = partial(ingest.list_unit, config=listed, output=objects, requests=4)
    listing = ingest.list_units(ingest.units(listed), unit=unit)
    roles = {name.removeprefix("role_"): n for name, n in listing.total.items() if "role_" in name}
    files = sorted(name for name in listing.files if name.startswith("objects-"))
    joined = scatter_and_gather(
        files, objects, pairs, partitions=3, roles=pair.check_roles(config, roles), config=config
    )
    return [f"{pairs}/{name}" for name in sorted(joined.files) if name.startswith("part-")]


def scatter_and_gather(
    files: Sequence[str],
    objects: str,
    output: str,
    *,
    partitions: int,
    roles: Sequence[Role],
    config: pair.PairConfig,
) -> pair.Gathered:
    """One task of each kind that pairs all the objects."""
    shuffle = pair.Shuffle(objects, f"{output}/_exchange-1-x", partitions, partitions, seed=0)
    scattered = pair.scatter(pair.ScatterTask(0, files), shuffle=shuffle)
    assert scattered.gathers == [0]
    return pair.gather(
        pair.GatherTask(0, [0]),
        shuffle=shuffle,
        output=output,
        roles=roles,
        config=config,
        cuts=(0, 0),
        threads=4,
    )
