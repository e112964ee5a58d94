"""What grows with the size of a data set, at three sizes: does it stay linear, and what is the next limit?

    python -m benchmarks.scale [--only description,plan] [--shards 2000,20000,195312]

description   open a shards folder's description in a fresh process, as a training worker does: the Parquet
              manifest, and beside it the JSON document of older folders, in turns
finished      what a resumed shard stage reads to know its parts and what the finished ones hold, on a real S3
              server whose every answer is 20 ms late

plan          the plan of an epoch for one of 64 workers
inventory     ingest of an S3 Inventory, and of the synthetic listing, in one process: 50 objects a shard
sharding      processor time of a pair from S3 to a raw shard, of two objects and of halves of one; one size
stages        whole stages from and to a real S3 server: list, pair and shard images of 64x32 with both sides
              (half as many as `--shards`), generate from a tenth of them by a tiny network, twice, and score

A shard has 512 pairs in row groups of 17. Stated are seconds, and by how much the process's memory grew at
most.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.listing import PeakMemory, register
from pipeline.cluster import cluster
from stages import evaluate, infer, ingest, pair, shard, storage
from stages.base import Outcome, Resources
from stages.config.evaluate import BaselineConfig, EvaluateConfig
from stages.config.infer import InferConfig
from stages.config.ingest import IngestConfig
from stages.config.pair import PairConfig, SplitConfig
from stages.config.shard import ShardConfig
from stages.shards import dataset
from stages.shards.card import RoleSums
from stages.shards.dataset import DatasetSpec, RoleSpec, ShardFile, ShardFiles
from stages.shards.order import plan_epoch
from stages.storage.finished import GROUP, Finished
from stages.tracking.run import Run
from tests.stores.faults import Fault, FaultProxy
from tests.stores.seaweed import SeaweedS3
from tests.support.models import make_model

PAIRS = 200  # of `sharding`
HELD_OUT = 0.1  # of `stages`, for which images are generated
OPEN = """
import json, sys, time
from pathlib import Path
from stages.shards import dataset, feed

def memory(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) / 1024

dataset.load(sys.argv[2])  # what loads at the first use
before, started = memory("VmRSS"), time.perf_counter()
spec = dataset.load(sys.argv[1])
sizes = spec.splits["train"].sizes()  # of row groups, of which an epoch's plan is made
seconds = time.perf_counter() - started
peak, after = memory("VmHWM") - before, memory("VmRSS") - before
print(json.dumps({"rows": spec.rows("train"), "seconds": seconds, "peak": peak, "mb": after}))
"""


def described(shards: int) -> DatasetSpec:
    """The description of so many shards."""
    files = ShardFiles.of(ShardFile(f"train-{n:05d}.parquet", 512, 17) for n in range(shards))
    roles = {role: RoleSpec(kind="rgb", encoding="raw") for role in ("source", "target")}
    return DatasetSpec(size=(286, 286), roles=roles, splits={"train": files})  # type: ignore[arg-type]


def write_older(folder: Path, spec: DatasetSpec) -> None:
    """Write the JSON document that older folders have."""
    files = [{"name": f.name, "rows": f.rows, "row_groups": f.row_groups} for f in spec.splits["train"]]
    roles = {role: stored.model_dump() for role, stored in spec.roles.items()}
    content = {"version": 1, "size": spec.size, "roles": roles, "splits": {"train": files}}
    (folder / dataset.OLD_NAME).write_text(json.dumps(content, indent=1))


def description(shards: int, folder: Path) -> list[dict[str, Any]]:
    """Seconds and memory to open the description of so many shards, as Parquet and as JSON."""
    spec = described(shards)
    kinds: dict[str, Path] = {}
    for kind in ("small", "parquet", "json"):
        kinds[kind] = folder / f"{kind}-{shards}"
        kinds[kind].mkdir()
    dataset.save(str(kinds["small"]), described(1))
    dataset.save(str(kinds["parquet"]), spec)
    write_older(kinds["json"], spec)
    rows = []
    for kind in ("json", "parquet") * 3:
        command = [sys.executable, "-c", OPEN, str(kinds[kind]), str(kinds["small"])]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        assert measured.pop("rows") == spec.rows("train")
        size = sum(file.stat().st_size for file in kinds[kind].iterdir())
        rows.append({"kind": kind, "shards": shards, "file_mb": size / 2**20} | measured)
    return rows


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of the turns of each kind."""
    found: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -row["seconds"]):
        found[row["kind"]] = row
    return [found[kind] for kind in sorted(found)]


def report_description(sizes: Sequence[int], folder: Path) -> None:
    """Print what opening a description costs."""
    for shards in sizes:
        for row in best(description(shards, folder)):
            print(
                f"description, {row['shards']:>7,} shards, {row['kind']:>7}: {row['seconds']:6.2f} s, "
                f"+{row['mb']:4.0f} MB (at most {row['peak']:.0f}); the file has {row['file_mb']:.1f} MB",
                flush=True,
            )


def finished_parts(store: str, shards: int) -> dict[str, Any]:
    """Seconds until a resumed run knows its parts and what all finished ones hold."""
    pairs, output = f"{store}/pairs-{shards}", f"{store}/shards-{shards}"
    names = [f"part-{n:05d}.parquet" for n in range(shards)]
    storage.write_json(f"{pairs}/_listing.json", {"parts": names})
    sums = RoleSums(512, 1, [1.0] * 3, [1.0] * 3, smallest=[1, 1], largest=[9, 9], low=0.0, high=255.0)
    statistics = {"train": dict.fromkeys(("source", "target"), asdict(sums))}
    groups = Finished(f"{output}/_parts/groups", range(shards))
    for first in range(0, shards, GROUP):
        thousand = shard.Summary()
        for number in range(first, min(first + GROUP, shards)):
            file = {"rows": 512, "row_groups": [17] * 30 + [2], "bytes": 1}
            marker = {"bucket": number, "rows": 512, "files": {"train": file}, "rejects": {}, "examples": {}}
            thousand.add(marker | {"statistics": statistics})
        groups.write(first, thousand.to_json())
    started = time.perf_counter()
    parts = {shard.partition_of(part) for part in shard.parts_of(pairs)}
    finished, summary = Finished(f"{output}/_parts/groups", parts), shard.Summary()
    for of_group in finished.read():
        summary.merge(of_group)
    seconds = time.perf_counter() - started
    assert not finished.left
    assert summary.rows == 512 * shards
    return {"shards": shards, "seconds": seconds}


def report_finished(sizes: Sequence[int], folder: Path) -> None:
    """Print how long a resumed run looks for what is done."""
    late = Fault("delay", seconds=0.02)
    with SeaweedS3(folder / "s3") as server, FaultProxy(server.address, [late]) as slow:
        server.client().call_s3("create_bucket", Bucket="scale")
        storage.configure({"s3": server.options(endpoint=slow.url)})
        for shards in sizes:
            before = slow.counts["requests"]
            row = finished_parts("s3://scale", shards)
            requests = slow.counts["requests"] - before
            print(
                f"finished, {shards:>7,} parts: {row['seconds']:6.2f} s; {requests:,} requests with writing"
            )


def report_plan(sizes: Sequence[int], _: Path) -> None:
    """Print what the plan of an epoch costs one of 64 workers, with batches of 256."""
    for shards in sizes:
        groups = described(shards).splits["train"].sizes()
        started = time.perf_counter()
        with PeakMemory() as memory:
            plan = plan_epoch(groups, seed=0, epoch=0, batch=256, rank=31, world=64)
        print(
            f"plan of an epoch, {shards:>7,} shards: {time.perf_counter() - started:6.2f} s, "
            f"+{memory.growth:4.0f} MB; {plan.steps:,} steps, {len(plan.units):,} reads",
            flush=True,
        )


def report_inventory(sizes: Sequence[int], folder: Path) -> None:
    """Print how fast an inventory and the synthetic listing are ingested in one process."""
    register()
    for shards in sizes:
        objects, rates = 50 * shards, {}
        manifest = write_inventory(folder / f"inventory-{objects}", objects)
        listed = {"uri": "s3://bucket/photos", "inventory": manifest, "pattern": "{group}/{key}_source.png"}
        synthetic = {"uri": f"synthetic://{2 * objects}/source", "pattern": "{group}/{key}_source.png"}
        for name, location in (("synthetic", synthetic), ("inventory", listed)):
            config = IngestConfig.model_validate({"locations": [location | {"role": "source"}]})
            started = time.perf_counter()
            with PeakMemory() as memory:
                unit = partial(ingest.list_unit, config=config, output=str(folder / name), requests=8)
                total = ingest.list_units(ingest.units(config), unit=unit).total
            assert total["objects"] == objects
            rates[name] = (
                f"{objects / (time.perf_counter() - started):9,.0f} objects/s, +{memory.growth:.0f} MB"
            )
        started = time.perf_counter()
        ingest.survey(config)
        seconds = time.perf_counter() - started
        print(
            f"ingest of {objects:>9,} objects: synthetic listing {rates['synthetic']}; "
            f"inventory {rates['inventory']}; unchanged? {seconds:.3f} s",
            flush=True,
        )


def write_inventory(folder: Path, objects: int) -> str:
    """An inventory of so many objects in Parquet files of a million; returns its manifest."""
    (folder / "data").mkdir(parents=True)
    (folder / "day").mkdir()
    files = []
    for first in range(0, objects, 1_000_000):
        numbers = range(first, min(first + 1_000_000, objects))
        keys = [f"photos/city_{n % 500}/frame_{n:09d}_source.png" for n in numbers]
        table = pa.table(
            {
                "bucket": ["bucket"] * len(keys),
                "key": keys,
                "size": [1] * len(keys),
                "e_tag": list(map(hex, numbers)),
            }
        )
        pq.write_table(table, folder / "data" / f"{first}.parquet")
        files.append({"key": f"inventory/data/{first}.parquet"})
    content = {"sourceBucket": "bucket", "fileFormat": "Parquet", "files": files}
    (folder / "day" / "manifest.json").write_text(json.dumps(content))
    return str(folder / "day" / "manifest.json")


def report_sharding(_: Sequence[int], folder: Path) -> None:
    """Print the processor time of a pair from S3 to a raw shard in S3: two objects or halves of one."""
    rng = np.random.default_rng(0)
    with SeaweedS3(folder / "weed") as server:
        storage.configure({"s3": server.options()})
        server.client().call_s3("create_bucket", Bucket="shard")
        for name, width, crops in (("two objects", 286, ("", "")), ("halves of one", 572, ("left", "right"))):
            rows: list[dict[str, Any]] = []
            for n in range(PAIRS):
                row: dict[str, Any] = {"key": f"{n:04d}", "split": "train", "group": None}
                for role, crop in zip(("source", "target"), crops, strict=True):
                    uri = f"s3://shard/{name}/{n}-{role if not crop else 'both'}.jpg"
                    if crop != "right":
                        noise = rng.normal(128, 22, (286, width, 3)).clip(0, 255).astype(np.uint8)
                        file = io.BytesIO()
                        Image.fromarray(noise).save(file, "jpeg", quality=93)
                        storage.write_bytes(uri, file.getvalue())
                    row |= {f"{role}_uri": uri, f"{role}_crop": crop, f"{role}_derive": ""}
                    row |= {f"{role}_size": file.tell(), f"{role}_etag": ""}
                rows.append(row)
            config = ShardConfig(size=(286, 286))
            specs = shard.role_specs(config, ["source", "target"])
            parts = [folder / f"{name}-{turn}" / "part-00000.parquet" for turn in range(4)]
            spent = []
            for part in parts:
                part.parent.mkdir()
                pq.write_table(pa.Table.from_pylist(rows), part)
                before = time.process_time()
                output = f"s3://shard/out/{part.parent.name}"
                shard.shard_part(str(part), output=output, config=config, specs=specs, io_threads=16)
                spent.append(1000 * (time.process_time() - before) / PAIRS)
            print(
                f"sharding, {name:>13}: {min(spent[1:]):5.1f} ms of a core a pair "
                f"({', '.join(f'{ms:.1f}' for ms in spent)}), {file.tell() / 1000:.0f} KB an object",
                flush=True,
            )


def write_pairs(uri: str, pairs: int) -> None:
    """Write so many images of a photo beside its target, each another one."""

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (4, 8, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((64, 32), Image.Resampling.BICUBIC).save(file, "png")
        storage.write_bytes(f"{uri}/{number:07d}.png", file.getvalue())

    with ThreadPoolExecutor(16) as pool:
        for first in range(0, pairs, 10_000):  # so that this process stays small
            list(pool.map(write, range(first, min(first + 10_000, pairs))))


def whole_stages(pairs: int, store: str, model: Path) -> dict[str, tuple[float, float]]:
    """Seconds of each stage over so many pairs, and by how many MB the driver's memory grew at most."""
    root = f"{store}/{pairs}"
    write_pairs(f"{root}/data", pairs)
    location = {"uri": f"{root}/data", "role": "pair", "pattern": "{key}.png"}
    listing = IngestConfig.model_validate({"locations": [location]})
    pairing = PairConfig(source_half="left", split=SplitConfig(val=0, test=HELD_OUT))
    generating = InferConfig(split="test", model=str(model))
    scoring = EvaluateConfig(split="test", baselines=BaselineConfig(untrained=0, nearest=0))
    how, track = Resources(), Run()
    folder = {name: f"{root}/{name}" for name in ("objects", "pairs", "shards", "images", "scores")}
    generate = partial(
        infer.run, generating, how, output=folder["images"], track=track, shards=folder["shards"]
    )
    calls: dict[str, Callable[[], Outcome]] = {
        "ingest": lambda: ingest.run(listing, how, output=folder["objects"], track=track),
        "pair": lambda: pair.run(
            pairing, how, output=folder["pairs"], track=track, objects=folder["objects"]
        ),
        "shard": lambda: shard.run(
            ShardConfig(size=(32, 32)), how, output=folder["shards"], track=track, pairs=folder["pairs"]
        ),
        "infer": generate,
        "infer, all there": generate,
        "evaluate": lambda: evaluate.run(
            scoring,
            how,
            output=folder["scores"],
            track=track,
            shards=folder["shards"],
            images=folder["images"],
        ),
    }
    measured = {}
    for name, call in calls.items():
        started = time.perf_counter()
        with PeakMemory() as memory:
            call()
        measured[name] = time.perf_counter() - started, memory.growth
    return measured


def report_stages(sizes: Sequence[int], folder: Path) -> None:
    """Print what whole stages cost."""
    model = make_model(folder / "model", source="rgb")
    with SeaweedS3(folder / "stages") as server:
        server.client().call_s3("create_bucket", Bucket="stages")
        options = {"s3": server.options()}
        storage.configure(options)
        with cluster(Resources(), options, {}):
            whole_stages(100, "s3://stages/start", model)  # starts what starts once
            for size in sizes:
                for name, (seconds, growth) in whole_stages(size // 2, "s3://stages", model).items():
                    images = size // 2 if name in ("ingest", "pair", "shard") else int(size // 2 * HELD_OUT)
                    print(
                        f"{name:>16}, {images:>7,} images: {seconds:7.1f} s, {images / seconds:8,.0f} a "
                        f"second, driver +{growth:.0f} MB",
                        flush=True,
                    )


REPORTS: dict[str, Callable[[Sequence[int], Path], None]] = {
    "description": report_description,
    "finished": report_finished,
    "plan": report_plan,
    "inventory": report_inventory,
    "sharding": report_sharding,
    "stages": report_stages,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default=",".join(REPORTS), help="what to measure")
    parser.add_argument("--shards", default="2000,20000,195312")
    given = parser.parse_args()
    sizes = [int(size) for size in given.shards.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only.split(","):
            REPORTS[name](sizes, Path(folder))


if __name__ == "__main__":
    main()
