"""Two workers over slow networks: steps that wait for the generator's means, and steps that leave them.

    python -m benchmarks.network [--rates none,1gbit,400mbit] [--size 128x64] [--turns 5]

alone    a step without an exchange
waits    a step ends with the generator's update
leaves   the update is left to the next step, which judges its real images meanwhile (`stages.models.step`)

The three are measured in turns, five steps each, by the same two processes of one thread; ratios are of
medians. The network is the loopback of a network namespace of their own (`unshare`, `ip`, `tc`; Linux): what
goes from one to the other passes it once each way, at the rate given.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.distributed import BATCH, CLASSES, job, make_shards
from stages import averaging
from stages.dataset import DatasetSpec
from stages.models.process import tune_process
from stages.models.step import Batch, build_translator, settle, step
from stages.phases import PhaseJob, input_spec

STEPS = 5  # a side and turn
SIDES = ("alone", "waits", "leaves")


def seconds(given: PhaseJob, spec: DatasetSpec, turns: int) -> dict[str, list[float]]:
    """Seconds a step by side, of two workers that take turns together."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with tempfile.TemporaryDirectory() as meet:
        started = [
            context.Process(target=_worker, args=(rank, meet, given, spec, turns, found)) for rank in range(2)
        ]
        for process in started:
            process.start()
        times: dict[str, list[float]] = found.get(timeout=1200)
        for process in started:
            process.join()
    return times


def _worker(rank: int, meet: str, given: PhaseJob, spec: DatasetSpec, turns: int, found: Any) -> None:
    torch.set_num_threads(1)
    tune_process("cpu")
    dist.init_process_group("gloo", init_method=f"file://{meet}/store", rank=rank, world_size=2)
    gan = build_translator(given.model, input_spec(spec), weights=given.losses)
    width, height = spec.size
    batch = Batch(
        source=torch.randint(0, CLASSES, (BATCH, 1, height, width), dtype=torch.uint8),
        target=torch.randint(0, 256, (BATCH, 3, height, width), dtype=torch.uint8),
    )
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(turns + 1):
        for side in SIDES:
            average = None if side == "alone" else averaging.send
            dist.barrier()
            started = time.perf_counter()
            for _ in range(STEPS):
                step(gan, batch, weights=given.losses, average=average, leave=side == "leaves")
            settle(gan)
            dist.barrier()
            if turn:  # the first makes the optimizers' state
                times[side].append((time.perf_counter() - started) / STEPS)
    if rank == 0:
        found.put(times)
    dist.destroy_process_group()


def limit(rate: str) -> None:
    """Let this namespace's loopback pass so much and no more."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=False, stderr=subprocess.DEVNULL)
    if rate != "none":
        words = ["tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", rate]
        subprocess.run([*words, "burst", "256kb", "latency", "200ms"], check=True)


def main() -> int:
    """Measure and print, in a network of one's own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", default="none,1gbit,400mbit", help="as tc takes them")
    parser.add_argument("--size", default="128x64", help="width x height")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        command = [sys.executable, "-m", "benchmarks.network", *sys.argv[1:], "--inside"]
        return subprocess.run(["unshare", "--map-root-user", "--net", *command], check=False).returncode
    width, height = (int(side) for side in options.size.split("x"))
    with tempfile.TemporaryDirectory(prefix="pixloom-") as scratch:
        spec = make_shards(Path(scratch) / "shards", (width, height))
        print(f"{'network':<10} {'alone':>8} {'waits':>8} {'leaves':>8}   leaving over waiting, by turn")
        for rate in options.rates.split(","):
            limit(rate)
            times = seconds(job(1), spec, options.turns)
            middle = {side: statistics.median(times[side]) for side in SIDES}
            ratios = [a / b for a, b in zip(times["waits"], times["leaves"], strict=True)]
            shown = "  ".join(f"{middle[side]:6.3f} s" for side in SIDES)
            by_turn = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{rate:<10} {shown}   {middle['waits'] / middle['leaves']:.2f}x ({by_turn})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
