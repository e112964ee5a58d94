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
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.distributed import by_two, job, make_shards, random_batch
from stages.config.train import PhaseJob
from stages.models.step import build_gan, settle, step
from stages.shards.dataset import DatasetSpec
from stages.training import gradients
from stages.training.phases import input_spec

STEPS = 5  # a side and turn
SIDES = ("alone", "waits", "leaves")


def measure(given: PhaseJob, spec: DatasetSpec, turns: int, found: Any) -> None:
    """One of the two workers, which take turns together: seconds a step by side."""
    gan = build_gan(given.model, input_spec(spec), weights=given.losses)
    batch = random_batch(spec)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(turns + 1):
        for side in SIDES:
            average = None if side == "alone" else gradients.send
            dist.barrier()
            started = time.perf_counter()
            for _ in range(STEPS):
                step(gan, batch, weights=given.losses, average=average, leave=side == "leaves")
            settle(gan)
            dist.barrier()
            if turn:  # the first makes the optimizers' state
                times[side].append((time.perf_counter() - started) / STEPS)
    found.put(times)


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
            times, _ = by_two(measure, job(1), spec, options.turns)
            middle = {side: statistics.median(times[side]) for side in SIDES}
            ratios = [a / b for a, b in zip(times["waits"], times["leaves"], strict=True)]
            shown = "  ".join(f"{middle[side]:6.3f} s" for side in SIDES)
            by_turn = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{rate:<10} {shown}   {middle['waits'] / middle['leaves']:.2f}x ({by_turn})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
