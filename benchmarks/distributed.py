"""Training on Ray against the bare loop of the same step, and two workers against one: in turns.

    python -m benchmarks.distributed                 # three turns, 50 minutes
    python -m benchmarks.distributed --turns 5 --epochs 3 --size 128x64

bare     the step alone, on 8 pairs that are already there, in a process of one thread
pair     two such processes at once that know nothing of one another: what two cores of this machine give at
         best
one      a whole `train.run`, one worker of one thread, 8 pairs a step: Ray Train, feed, curves, checkpoints
two      the same with two workers of one thread each: 4 pairs a worker, the same global batch
double   two workers, 8 pairs each

Of these `double` at 256x128 is the nearest to real training: 110 bytes of gradients travel for a million
operations, as for one pair of 2048x1024 a worker (docs/scale.md); 219 in `two`, 840 in `two` at 128x64.

images/s are taken from the first point of the curves to the last, by their time stamps, so starting up is
not in them (it is shown apart). The end of an epoch is, with its picture and checkpoint: once in two epochs
of 400 pairs, as many as Facades has. The checkpoint pause is what training itself waits, not what writing
takes. Ray runs as a user has it who starts no cluster.

Of the cores that were busy in `double` it says how much the two threads that compute had, how much the other
threads of their processes, how much everything else on the machine: Ray's own processes, mostly. Where there
are as many workers as cores, all that is taken from them.
"""

from __future__ import annotations

import argparse
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from pipeline.cluster import cluster
from stages import train
from stages.base import Resources, Role
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.images import encode, geometry
from stages.models.fast.process import tune_process
from stages.models.gan import build_gan, state_of
from stages.models.step import Batch, update
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, RoleSpec, ShardFile, ShardFiles
from stages.tracking.run import Run
from stages.training import checkpoints, curves, gradients
from stages.training.checkpoints import Checkpoint, Position
from stages.training.loop import Worker

CLASSES, BATCH = 8, 8
ROWS = 400  # as many as Facades has; whole batches of 8 and of 16


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
            "target": geometry.resize(
                rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8), size, "rgb"
            ),
        }
        row: dict[str, object] = {"key": f"{index:05d}", "group": ""}
        for role, array in pair.items():
            data = encode.encode_image(array, "png")
            row |= {role: data, f"{role}_crc": encode.checksum(data), f"{role}_uri": ""}
            row |= {f"{role}_width": width, f"{role}_height": height}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=16)
    spec = DatasetSpec(
        size=size,
        roles=roles,
        splits={"train": ShardFiles.of([ShardFile("train-00000.parquet", ROWS, 16)])},
    )
    dataset.save(str(folder), spec)
    return spec


def job(epochs: int, batch: int = BATCH) -> PhaseJob:
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
    phase = {"name": "joint", "kind": "global", "epochs": epochs, "batch": batch}
    config = TrainConfig.model_validate({"model": model, "phases": [phase], "log_every": 4})
    return jobs(config, AugmentConfig())[0]


def random_batch(spec: DatasetSpec) -> Batch:
    """A worker's pairs of one step, in memory."""
    width, height = spec.size
    return Batch(
        source=torch.randint(0, CLASSES, (BATCH, 1, height, width), dtype=torch.uint8),
        target=torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8),
    )


def by_two(work: Callable[..., None], *arguments: object) -> list[Any]:
    """Run `work(*arguments, results)` in two processes of one thread, a gloo group; returns their results."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as meet:
        processes = [
            context.Process(target=_of_two, args=(rank, meet, work, *arguments, results)) for rank in range(2)
        ]
        for process in processes:
            process.start()
        values = [results.get(timeout=1200) for _ in processes]
        for process in processes:
            process.join()
    return values


def _of_two(rank: int, meet: str, work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    tune_process("cpu")
    dist.init_process_group("gloo", init_method=f"file://{meet}/store", rank=rank, world_size=2)
    work(*arguments)
    dist.destroy_process_group()


def at_once(given: PhaseJob, spec: DatasetSpec, *, processes: int, seconds: float) -> float:
    """images/s of so many processes together, each with a batch."""
    context = multiprocessing.get_context("spawn")
    ready, rates = context.Barrier(processes), context.Queue()
    arguments = (given, spec, seconds, ready, rates)
    started = [context.Process(target=_alone, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    total = sum(rates.get(timeout=300) for _ in started)
    for process in started:
        process.join()
    return total


def _alone(given: PhaseJob, spec: DatasetSpec, seconds: float, ready: Any, rates: Any) -> None:
    torch.set_num_threads(1)
    tune_process("cpu")
    rates.put(bare(given, spec, seconds, ready.wait))


def bare(given: PhaseJob, spec: DatasetSpec, seconds: float, ready: Callable[[], object]) -> float:
    """images/s of the step alone."""
    worker = Worker()
    gan = build_gan(given.model, spec.inputs(), weights=given.losses, device=worker.device)
    batch = random_batch(spec)
    for _ in range(2):
        update(gan, batch, weights=given.losses)
    ready()
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        update(gan, batch, weights=given.losses)
        count += 1
    return count * BATCH / (time.monotonic() - started)


def exchange(given: PhaseJob, spec: DatasetSpec) -> tuple[int, float]:
    """Bytes of one step's gradients, and seconds that two workers take to average them."""
    sizes, seconds = zip(*by_two(_exchange, given, spec), strict=True)
    return sizes[0], max(seconds)


def _exchange(given: PhaseJob, spec: DatasetSpec, found: Any) -> None:
    gan = build_gan(given.model, spec.inputs(), weights=given.losses)
    assert gan.discriminator is not None
    networks = [
        [parameter for parameter in network.parameters() if parameter.requires_grad]
        for network in (gan.discriminator, gan.generator)
    ]
    exchanges = [gradients.Exchange(parameters) for parameters in networks]
    for round_ in range(21):
        if round_ == 1:
            dist.barrier()
            started = time.monotonic()
        for parameter in (parameter for parameters in networks for parameter in parameters):
            parameter.grad = torch.zeros_like(parameter)
        for averaged in [exchange.start(during_backward=False) for exchange in exchanges]:
            for _ in averaged:
                pass
    seconds = (time.monotonic() - started) / 20
    found.put((sum(4 * p.numel() for parameters in networks for p in parameters), seconds))


def checkpoint(given: PhaseJob, spec: DatasetSpec, folder: Path) -> tuple[int, float, float]:
    """Bytes of a checkpoint; seconds that training waits for its copy; seconds of writing it to disk."""
    gan = build_gan(given.model, spec.inputs(), weights=given.losses)
    width, height = spec.size
    batch = Batch(
        source=torch.zeros((1, 1, height, width), dtype=torch.uint8),
        target=torch.zeros((1, 3, height, width), dtype=torch.uint8),
    )
    update(gan, batch, weights=given.losses)
    copying, writing = [], []
    for number in range(5):
        started = time.monotonic()
        state = checkpoints.copied(state_of(gan))
        copying.append(time.monotonic() - started)
        saved = Checkpoint("benchmark", Position(steps=number), state, curves.to_table([]))
        started = time.monotonic()
        checkpoints.save(str(folder), saved, keep=2)
        writing.append(time.monotonic() - started)
    place = folder / checkpoints.names(str(folder))[-1]
    size = sum(file.stat().st_size for file in place.iterdir())
    return size, statistics.median(copying), statistics.median(writing)


class Account(threading.Thread):
    """Processor time of training processes, and of the whole machine, every second while they train."""

    def __init__(self, workers: int) -> None:
        super().__init__(daemon=True)
        self.workers = workers
        self.samples: list[tuple[float, float, dict[tuple[int, int], float]]] = []
        self.over = threading.Event()

    def run(self) -> None:
        workers: list[psutil.Process] = []
        while not self.over.wait(1):
            if len(workers) < self.workers:  # to look through all processes is work itself
                workers = [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in p.info["name"]]
            with suppress(psutil.NoSuchProcess):
                threads = {(p.pid, t.id): t.user_time + t.system_time for p in workers for t in p.threads()}
                times = psutil.cpu_times()
                busy = sum(times) - times.idle - times.iowait - times.steal
                self.samples.append((time.time(), busy, threads))

    def shares(self, start: float, end: float) -> dict[str, float]:
        """Cores, between two times, of the threads that compute, of those beside them, of all else.

        NaN if training was too short for two samples.
        """
        self.over.set()
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        if len(inside) < 2:
            return dict.fromkeys(("computing", "beside", "rest"), math.nan)
        (began, busy, before), (ended, busy_then, after) = inside[0], inside[-1]
        of_process = defaultdict(list)
        for (pid, thread), seconds in after.items():
            of_process[pid].append(seconds - before.get((pid, thread), 0))
        computing = sum(max(threads) for threads in of_process.values())
        training = sum(map(sum, of_process.values()))
        rest = busy_then - busy - training
        parts = {"computing": computing, "beside": training - computing, "rest": rest}
        return {name: seconds / (ended - began) for name, seconds in parts.items()}


def trained(given: PhaseJob, shards: str, output: Path, workers: int) -> dict[str, float]:
    """images/s, seconds beside training, and the checkpoint pause of a whole run."""
    account = Account(workers)
    account.start()
    started = time.monotonic()
    resources = Resources(train_workers=workers, threads_per_worker=1)
    train.run(given, resources, output=str(output), track=Run(), shards=shards)
    seconds = time.monotonic() - started
    rows = curves.from_table(pq.read_table(output / "metrics.parquet"))
    times = {row.images: row.time_ms / 1000 for row in rows}
    ends = sorted(times)
    rate = (ends[-1] - ends[0]) / (times[ends[-1]] - times[ends[0]])

    def mean(name: str) -> float:
        return statistics.fmean(row.value for row in rows if row.name == name and row.images > ends[0])

    return {
        "rate": rate,
        "start": seconds - ROWS * given.phase.epochs / rate,
        "pause": mean("throughput/checkpoint_fraction"),
        "wait": mean("throughput/data_wait_fraction"),
        **account.shares(times[ends[0]], times[ends[-1]]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--size", default="256x128", help="width x height")
    parser.add_argument("--seconds", type=float, default=15, help="of `bare` and `pair`, each turn")
    options = parser.parse_args(arguments)
    width, height = (int(side) for side in options.size.split("x"))
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    logging.basicConfig(level=logging.WARNING)
    given = job(options.epochs)
    with tempfile.TemporaryDirectory(prefix="pixloom-") as scratch:
        spec = make_shards(Path(scratch) / "shards", (width, height))
        values: dict[str, list[float]] = defaultdict(list)
        with cluster(Resources(train_workers=2), {}, {}):
            for turn in range(options.turns):
                for name, processes in (("bare", 1), ("pair", 2)):
                    values[name].append(at_once(given, spec, processes=processes, seconds=options.seconds))
                for name, workers, batch in (("one", 1, BATCH), ("two", 2, BATCH), ("double", 2, 2 * BATCH)):
                    output = Path(scratch) / f"{name}-{turn}"
                    phase_job = job(options.epochs, batch)
                    one = trained(phase_job, str(Path(scratch) / "shards"), output, workers)
                    values[name].append(one["rate"])
                    of_cores = ("computing", "beside", "rest") if name == "double" else ()
                    for key in ("start", "pause", "wait", *of_cores):
                        values[key].append(one[key])
        sent, exchanging = exchange(given, spec)
        size_, copying, writing = checkpoint(given, spec, Path(scratch) / "checkpoints")
    middle = {name: statistics.median(turns) for name, turns in values.items()}
    for name in ("bare", "pair", "one", "two", "double"):
        print(f"{name:<6} {middle[name]:7.2f} images/s   ({', '.join(f'{v:.2f}' for v in values[name])})")
    print(f"two processes against one   {middle['pair'] / middle['bare']:.2f}x   (what the machine gives)")
    for name, what in (("two", "same batch in all"), ("double", "same batch a worker")):
        by_turn = ", ".join(f"{a / b:.2f}" for a, b in zip(values[name], values["one"], strict=True))
        ratio = middle[name] / middle["one"]
        print(f"two workers against one     {ratio:.2f}x   ({what}; by turn {by_turn}; goal 1.8x)")
    cores = ", ".join(f"{name} {middle[name]:.2f}" for name in ("computing", "beside", "rest"))
    print(f"cores while two train       {cores}")
    print(
        f"Ray against the bare loop   {100 * (1 - middle['one'] / middle['bare']):.1f} % slower   (goal 5 %)"
    )
    print(f"checkpoint pause            {100 * middle['pause']:.2f} % of the time   (goal 2 %)")
    print(f"waiting for data            {100 * middle['wait']:.2f} % of the time")
    print(f"a run beside its training   {middle['start']:.1f} s")
    print(f"a step of {BATCH} images           {1000 * BATCH / middle['bare']:.0f} ms bare, one process")
    print(f"gradients of a step         {sent / 1e6:.1f} MB, averaged by two in {1000 * exchanging:.1f} ms")
    print(
        f"a checkpoint                {size_ / 1e6:.1f} MB, copied in {1000 * copying:.0f} ms, "
        f"written to a local disk in {1000 * writing:.0f} ms"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
