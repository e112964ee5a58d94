"""List and pair 10 k, 100 k and 1 M objects: does the cost grow with the number, and only there?

    python -m benchmarks.listing [--sizes 10000,100000,1000000] [--workspace DIR]

The objects are a synthetic listing (an fsspec file system that makes up names and holds nothing), half
sources and half targets of the same keys, in 500 cities. Ray is running and warm. Stated are wall seconds,
the CPU seconds of driver and workers (which other load on the machine leaves alone), the driver's memory,
and how the cost grows from size to size against the number of objects: 1 is linear, and less means that
Ray's scheduling of a handful of tasks outweighs the objects.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import psutil
import ray
from fsspec.spec import AbstractFileSystem

from stages import ingest, pair
from stages.base import Resources
from stages.config.ingest import IngestConfig
from stages.config.pair import PairConfig
from stages.parallel.cluster import set_up_data
from stages.tracking.run import Run

CITIES = 500
WALL = ("list_seconds", "pair_seconds")


class SyntheticFileSystem(AbstractFileSystem):
    """`synthetic://N/role`: N/2 images in folders by city, invented as they are listed."""

    protocol = "synthetic"
    cachable = False

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "type": "directory", "size": 0}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        count, role, *below = self._strip_protocol(path).strip("/").split("/")
        base = f"{count}/{role}"
        if not below:
            entries = [{"name": f"{base}/city_{n}", "type": "directory", "size": 0} for n in range(CITIES)]
        else:
            city = int(below[0].removeprefix("city_"))
            entries = [
                {
                    "name": f"{base}/{below[0]}/frame_{n:09d}_{role}.png",
                    "type": "file",
                    "size": 1,
                    "ETag": f"{n:x}",
                }
                for n in range(city, int(count) // 2, CITIES)
            ]
        return entries if detail else [entry["name"] for entry in entries]


class PeakMemory:
    """The largest resident memory of this process while the block runs, sampled, in MB."""

    def __enter__(self) -> PeakMemory:
        self.process = psutil.Process()
        self.first = self.peak = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.peak = max(self.peak, self.process.memory_info().rss)

    @property
    def growth(self) -> float:
        return (self.peak - self.first) / 2**20


def cpu_seconds() -> float:
    """What this process and Ray's workers have computed so far."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            if process.pid == os.getpid() or "ray::" in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total


def measure(size: int, folder: Path) -> dict[str, float]:
    """Seconds of each stage and of the digest, the driver's memory."""
    config = IngestConfig.model_validate(
        {
            "locations": [
                {
                    "uri": f"synthetic://{size}/{role}",
                    "role": role,
                    "pattern": f"{{group}}/{{key}}_{role}.png",
                }
                for role in ("source", "target")
            ]
        }
    )
    objects, pairs = str(folder / f"{size}" / "objects"), str(folder / f"{size}" / "pairs")
    with PeakMemory() as memory:
        started, cpu = time.perf_counter(), cpu_seconds()
        ingest.run(config, Resources(), output=objects, track=Run())
        listed = time.perf_counter()
        outcome = pair.run(PairConfig(), Resources(), output=pairs, objects=objects, track=Run())
        paired, cpu = time.perf_counter(), cpu_seconds() - cpu
    assert outcome.counts["pairs"] == size // 2
    with PeakMemory() as planner:
        ingest.survey(config)
        digested = time.perf_counter()
    return {
        "objects": size,
        "list_seconds": listed - started,
        "pair_seconds": paired - listed,
        "cpu_seconds": cpu,
        "digest_seconds": digested - paired,
        "driver_growth_mb": memory.growth,
        "driver_peak_mb": memory.peak / 2**20,
        "planner_growth_mb": planner.growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--workspace", default=None, help="where the tables go (default: a temporary folder)")
    sizes = [int(size) for size in parser.parse_args().sizes.split(",")]
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    register()
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 << 20,
        runtime_env={
            "worker_process_setup_hook": "benchmarks.listing.register",
            "env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        },
    )
    set_up_data()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().workspace) as temporary:
        measure(1000, Path(temporary))  # starts the workers
        rows = [measure(size, Path(temporary)) for size in sizes]
    ray.shutdown()
    for row in rows:
        total = row["list_seconds"] + row["pair_seconds"]
        print(
            f"{row['objects']:>9,} objects: list {row['list_seconds']:6.2f} s, "
            f"pair {row['pair_seconds']:6.2f} s, "
            f"CPU {row['cpu_seconds']:6.2f} s; {row['objects'] / total:9,.0f} objects/s"
        )
        print(
            f"{'':>9}  driver at most {row['driver_peak_mb']:.0f} MB (+{row['driver_growth_mb']:.0f}); "
            f"digest {row['digest_seconds']:.2f} s (+{row['planner_growth_mb']:.0f} MB)"
        )
    for small, large in pairwise(rows):
        more = large["objects"] / small["objects"]
        wall = sum(large[name] for name in WALL) / sum(small[name] for name in WALL) / more
        cpu = large["cpu_seconds"] / small["cpu_seconds"] / more
        step = f"{small['objects']:,} -> {large['objects']:,}"
        print(f"{step}: {wall:.2f} of linear by the clock, {cpu:.2f} in CPU")
    grown = rows[-1]["driver_peak_mb"] - rows[0]["driver_peak_mb"]
    print(f"driver memory from {rows[0]['objects']:,} to {rows[-1]['objects']:,} objects: {grown:+.0f} MB")
    print(json.dumps(rows))


def register() -> None:
    """Make the synthetic file system known to a worker."""
    fsspec.register_implementation("synthetic", SyntheticFileSystem, clobber=True)


if __name__ == "__main__":
    main()
