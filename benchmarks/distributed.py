"""Training on Ray against the bare loop of the same step, and two workers against one: in turns.

    python -m benchmarks.distributed                 # three turns
    python -m benchmarks.distributed --turns 5 --epochs 6 --size 256x128

bare     the step alone, on a batch that is already there, in this process, one thread
one      a whole `train.run` with one worker of one thread: Ray Train, Ray Data, curves, checkpoints
two      the same with two workers of one thread each, the same global batch

images/s are taken from the second epoch on, from the time stamps of the curves, so starting up is not in
them (it is shown apart). The checkpoint pause is what training itself waits, not what the writing takes.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from stages import curves, dataset, images, train
from stages.augment import AugmentConfig
from stages.base import Resources, Role
from stages.dataset import DatasetSpec, RoleSpec, ShardFile
from stages.loop import Worker
from stages.models.process import tune_process
from stages.models.step import Batch, build_translator, step
from stages.phases import PhaseJob, TrainConfig, input_spec, jobs
from stages.tracking import NullRun

CLASSES, BATCH, ROWS = 8, 4, 64


def make_shards(folder: Path, size: tuple[int, int]) -> DatasetSpec:
    """Label maps of blocks and noise for photos: what the pixels are does not matter here."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    width, height = size
    roles: dict[Role, RoleSpec] = {
        "source": RoleSpec(kind="labels", encoding="png", classes=CLASSES),
        "target": RoleSpec(kind="rgb", encoding="png"),
    }
    rows = []
    for index in range(ROWS):
        blocks = rng.integers(0, CLASSES, (height // 16, width // 16, 1), np.uint8)
        pair: dict[Role, np.ndarray] = {
            "source": blocks.repeat(16, 0).repeat(16, 1),
            "target": images.resize(
                rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), size, "rgb"
            ),
        }
        row: dict[str, object] = {"key": f"{index:05d}", "group": ""}
        for role, array in pair.items():
            data = images.encode(array, "png")
            row |= {role: data, f"{role}_crc": images.checksum(data), f"{role}_uri": ""}
            row |= {f"{role}_width": width, f"{role}_height": height}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=16)
    groups = (16,) * (ROWS // 16)
    spec = DatasetSpec(
        size=size,
        roles=roles,
        splits={"train": (ShardFile(name="train-00000.parquet", rows=ROWS, row_groups=groups),)},
    )
    dataset.save(str(folder), spec)
    return spec


def job(epochs: int) -> PhaseJob:
    """A joint phase with the sample run's model, a little wider."""
    model = {
        "kind": "pix2pixhd",
        "enhancers": 0,
        "width": 32,
        "downsamplings": 3,
        "blocks": 4,
        "discriminator_width": 32,
        "discriminators": 2,
    }
    phase = {"name": "joint", "kind": "global", "epochs": epochs, "batch": BATCH}
    config = TrainConfig.model_validate({"model": model, "phases": [phase]})
    return jobs(config, AugmentConfig())[0]


def bare(given: PhaseJob, spec: DatasetSpec, seconds: float) -> float:
    """images/s of the step alone."""
    worker = Worker()
    gan = build_translator(given.model, input_spec(spec), weights=given.losses, device=worker.device)
    width, height = spec.size
    batch = Batch(
        source=torch.randint(0, CLASSES, (BATCH, 1, height, width), dtype=torch.uint8),
        target=torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8),
    )
    step(gan, batch, weights=given.losses)
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        step(gan, batch, weights=given.losses)
        count += 1
    return count * BATCH / (time.monotonic() - started)


def trained(given: PhaseJob, shards: str, output: Path, workers: int) -> dict[str, float]:
    """images/s, seconds beside training, and the checkpoint pause of a whole run."""
    started = time.monotonic()
    resources = Resources(train_workers=workers, threads_per_worker=1)
    train.run(given, resources, output=str(output), track=NullRun(), shards=shards)
    seconds = time.monotonic() - started
    rows = curves.from_table(pq.read_table(output / "metrics.parquet"))
    times = {row.images: row.time_ms / 1000 for row in rows}
    ends = [count for count in sorted(times) if count >= ROWS]
    rate = (ends[-1] - ends[0]) / (times[ends[-1]] - times[ends[0]])
    pauses = [row.value for row in rows if row.name == "throughput/checkpoint_fraction" and row.images > ROWS]
    waits = [row.value for row in rows if row.name == "throughput/data_wait_fraction" and row.images > ROWS]
    return {
        "rate": rate,
        "start": seconds - ROWS * given.phase.epochs / rate,
        "pause": statistics.fmean(pauses),
        "wait": statistics.fmean(waits),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", default="128x64", help="width x height")
    options = parser.parse_args(arguments)
    width, height = (int(side) for side in options.size.split("x"))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    tune_process("cpu")
    given = job(options.epochs)
    with tempfile.TemporaryDirectory(prefix="pixloom-") as scratch:
        spec = make_shards(Path(scratch) / "shards", (width, height))
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        found: dict[str, list[float]] = {
            "bare": [],
            "one": [],
            "two": [],
            "start": [],
            "pause": [],
            "wait": [],
        }
        for turn in range(options.turns):
            found["bare"].append(bare(given, spec, seconds=8))
            for name, workers in (("one", 1), ("two", 2)):
                output = Path(scratch) / f"{name}-{turn}"
                one = trained(given, str(Path(scratch) / "shards"), output, workers)
                found[name].append(one["rate"])
                for key in ("start", "pause", "wait"):
                    found[key].append(one[key])
        ray.shutdown()
    middle = {name: statistics.median(values) for name, values in found.items()}
    for name in ("bare", "one", "two"):
        print(f"{name:<6} {middle[name]:7.2f} images/s   ({', '.join(f'{v:.2f}' for v in found[name])})")
    print(f"two workers against one     {middle['two'] / middle['one']:.2f}x   (goal 1.8x)")
    print(
        f"Ray against the bare loop   {100 * (1 - middle['one'] / middle['bare']):.1f} % slower   (goal 5 %)"
    )
    print(f"checkpoint pause            {100 * middle['pause']:.2f} % of the time   (goal 2 %)")
    print(f"waiting for data            {100 * middle['wait']:.2f} % of the time")
    print(f"a run beside its training   {middle['start']:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
