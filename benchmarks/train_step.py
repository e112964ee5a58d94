"""Our training step against the published way of doing it: wall time and peak memory.

    python -m benchmarks.train_step                        # every case, float32 and bf16
    python -m benchmarks.train_step local --precision float32 --turns 5

Both sides have the same weights and data and run in turns in one process, so that whatever else the machine
does hits both; the ratio is that of the medians. Peak memory is that of a process of its own for each side,
less what the interpreter and the libraries take.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.base import Precision
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD, condition_channels, paper_weights
from stages.models.fast.heap import return_freed_memory
from stages.models.fast.process import tune_process
from stages.models.gan import GanState, build_gan
from stages.models.inputs import make_condition
from stages.models.step import Batch, update
from tests.reference.published_step import (
    Plain,
    PlainGenerator,
    PlainMultiScale,
    PlainPatch,
    PlainUnet,
    copy_weights,
    pix2pix_step,
    pix2pixhd_step,
)

HD_INPUTS = InputSpec(source="labels", classes=35, instances=True)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    arch: Pix2Pix | Pix2PixHD
    size: tuple[int, int]  # width, height
    rows: int = 1  # pairs of a batch
    enhancers: int = 0
    scales: int = 0
    local: bool = False
    checkpointing: bool = False
    time_goal: tuple[float, float] | None = None  # float32, bf16
    memory_goal: float | None = None  # float32

    @property
    def inputs(self) -> InputSpec:
        """Streets for pix2pixHD, photos for pix2pix."""
        return HD_INPUTS if isinstance(self.arch, Pix2PixHD) else InputSpec()


CASES = {
    "global": Case(Pix2PixHD(enhancers=0), (256, 256), scales=2, time_goal=(1.25, 2.2)),
    "local": Case(
        Pix2PixHD(), (512, 256), enhancers=1, scales=3, local=True, time_goal=(2, 3.5), memory_goal=0.7
    ),
    "joint": Case(Pix2PixHD(), (512, 256), enhancers=1, scales=3, time_goal=(1.4, 2.4), memory_goal=1),
    "joint-checkpointing": Case(
        Pix2PixHD(), (512, 256), enhancers=1, scales=3, checkpointing=True, memory_goal=0.7
    ),
    "unet": Case(Pix2Pix(), (256, 256), time_goal=(1.25, 1.8)),
}


def make_batch(case: Case, seed: int = 0) -> Batch:
    """A street-like batch: blocky labels and instances, random photos."""
    source = torch.Generator().manual_seed(seed)
    width, height = case.size
    shape = (case.rows, 3, height, width)
    photo = torch.randint(0, 256, shape, generator=source, dtype=torch.uint8, device="cpu")
    if isinstance(case.arch, Pix2Pix):
        return Batch(source=photo.flip(3), target=photo)
    shape = (case.rows, 1, height // 16, width // 16)
    blocks = torch.randint(0, 35, shape, generator=source, dtype=torch.uint8, device="cpu")
    labels = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    return Batch(source=labels, target=photo, instance=labels.to(torch.int32))


def our_gan(case: Case, precision: Precision, device: torch.device | str = "cpu") -> GanState:
    """The state of our step."""
    hd = isinstance(case.arch, Pix2PixHD)
    return build_gan(
        case.arch,
        case.inputs,
        weights=paper_weights(case.arch),
        enhancers=case.enhancers if hd else None,
        discriminators=case.scales if hd else None,
        parts="outermost" if case.local else "all",
        precision=precision,
        checkpointing=case.checkpointing,
        device=device,
    )


def our_side(
    case: Case, precision: Precision, device: str = "cpu"
) -> tuple[Callable[[], None], torch.nn.Module, torch.nn.Module]:
    """Our step, and the networks it trains."""
    weights = paper_weights(case.arch)
    gan = our_gan(case, precision, device)
    batch = make_batch(case).to(device)
    assert gan.discriminator is not None
    if device == "meta":  # only operations are counted, and fused optimizers do not know the device
        for optimizer in (gan.generator_optimizer, gan.discriminator_optimizer):
            optimizer.update = _drop_gradients  # type: ignore[method-assign]
            optimizer.step = lambda: None  # type: ignore[method-assign]
    return lambda: _discard(update(gan, batch, weights=weights)), gan.generator, gan.discriminator


def _drop_gradients(parameters: Sequence[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def plain_gan(case: Case) -> Plain:
    """The state of the published step."""
    arch = case.arch
    if isinstance(arch, Pix2Pix):
        noisy = {level for level in (7, 6, 5) if level < arch.levels}
        unet = PlainUnet(3, 3, levels=arch.levels, width=arch.width, noisy=noisy)
        return Plain(unet, PlainPatch(6, width=arch.discriminator_width, layers=arch.discriminator_layers))
    channels = condition_channels(arch, HD_INPUTS)
    coarse_to_fine = PlainGenerator(
        channels,
        global_width=arch.global_width,
        downsamplings=arch.downsamplings,
        blocks=arch.blocks,
        enhancers=case.enhancers,
        enhancer_blocks=arch.enhancer_blocks,
    )
    scales = PlainMultiScale(
        channels + 3, scales=case.scales, width=arch.discriminator_width, layers=arch.discriminator_layers
    )
    return Plain(coarse_to_fine, scales, local=case.local)


def plain_step(case: Case, plain: Plain, batch: Batch) -> None:
    """One published step."""
    target = batch.target.float() / 127.5 - 1
    if isinstance(case.arch, Pix2Pix):
        pix2pix_step(plain, batch.source.float() / 127.5 - 1, target)
    else:
        condition = make_condition(batch.source, batch.instance, arch=case.arch, inputs=HD_INPUTS)
        pix2pixhd_step(plain, condition, target)


def plain_side(
    case: Case, generator: torch.nn.Module | None, discriminator: torch.nn.Module | None
) -> Callable[[], None]:
    """The published step, with the weights of ours if given."""
    batch = make_batch(case).to(torch.get_default_device())
    plain = plain_gan(case)
    if generator is not None and discriminator is not None:
        copy_weights(generator, plain.generator)
        copy_weights(discriminator, plain.discriminator)
    return lambda: plain_step(case, plain, batch)


def _discard(_: object) -> None:
    """Losses are read by nobody here."""


# -- time ---------------------------------------------------------------------


def time_in_turns(
    case: Case, precision: Precision, turns: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of each plain and each of our steps."""
    ours, generator, discriminator = our_side(case, precision)
    plain = plain_side(case, generator, discriminator)
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 2):  # two to warm up: compilation, allocations
        for side, run in enumerate((plain, ours)):
            return_freed_memory()
            if side == 1:
                tune_process("cpu", save_memory=case.checkpointing)
            start = clock()
            run()
            if turn >= 2:
                times[side].append(clock() - start)
    return times


# -- memory -------------------------------------------------------------------


def peak_bytes() -> int:
    """The most this process ever held. (`ru_maxrss` would start from the parent's.)"""
    line = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def measure_memory(name: str, side: str, precision: Precision) -> int:
    """In a process of its own: peak over what the libraries take."""
    before = peak_bytes()
    if side == "ours":
        tune_process("cpu", save_memory=CASES[name].checkpointing)
        run = our_side(CASES[name], precision)[0]
    else:
        run = plain_side(CASES[name], None, None)
    for _ in range(2):  # the second has the optimizers' state
        run()
    return peak_bytes() - before


def memory_in_child(name: str, side: str, precision: Precision) -> int:
    """`measure_memory`, from outside."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        name,
        "--memory-of",
        side,
        "--precision",
        precision,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1]
    )
    return int(json.loads(result.stdout.splitlines()[-1]))


# -- table --------------------------------------------------------------------


def main() -> None:
    """Measure what was asked for and print one row for each case and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}; all if none is named"
    )
    parser.add_argument("--precision", choices=["float32", "bf16"], action="append")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with --threads 1")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    precisions: list[Precision] = arguments.precision or ["float32", "bf16"]
    if arguments.memory_of:
        print(measure_memory(arguments.cases[0], arguments.memory_of, precisions[0]))
        return
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.turns} steps in turns"
    )
    print("| case | precision | plain s | ours s | ratio | goal | plain MiB | ours MiB | ratio | goal |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.cases or CASES:
        case = CASES[name]
        plain_memory = 0 if arguments.no_memory else memory_in_child(name, "plain", "float32")
        for precision in precisions:
            row = [name, precision]
            if arguments.no_time:
                row += ["-"] * 4
            else:
                plain, ours = (
                    statistics.median(side) for side in time_in_turns(case, precision, arguments.turns, clock)
                )
                goal = case.time_goal[precision == "bf16"] if case.time_goal else None
                row += [f"{plain:.3f}", f"{ours:.3f}", f"{plain / ours:.2f}x", f"{goal}x" if goal else "-"]
            gc.collect()
            if arguments.no_memory:
                row += ["-"] * 4
            else:
                ours_memory = memory_in_child(name, "ours", precision)
                goal = case.memory_goal if precision == "float32" else None
                row += [f"{plain_memory >> 20}", f"{ours_memory >> 20}", f"{ours_memory / plain_memory:.2f}x"]
                row += [f"{goal}x" if goal else "-"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
