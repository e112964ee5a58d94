"""A picture generated in bands against the sum of its tiles, and against itself whole.

    python -m benchmarks.tiled [--size 4096x2048] [--width 64] [--tile 512] [--sides tiled tiles whole]

    tiled    `infer.tile`: the exact picture, layer by layer
    tiles    its tiles of that side one by one, each as a picture of its own: not the same picture. Of more
             than --most tiles, that many are measured and the time is scaled
    whole    the picture at once

Each side is a process of its own: seconds, seconds of processor time, the largest resident size beyond what
it had before, and the largest difference between tiled and whole where both are asked for.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Literal

import numpy as np
import torch

from stages.images.kinds import Array
from stages.inference.translator import Translator
from stages.models.architecture import InputSpec, Pix2PixHD
from stages.models.build import build_generator
from stages.models.fast.process import tune_process
from stages.models.files.saved import LoadedModel, Manifest

Side = Literal["tiled", "tiles", "whole"]


def translator(width: int, enhancers: int, tile: int | None) -> Translator:
    """G1, or with local enhancers, for photos, with initial weights."""
    arch, inputs = Pix2PixHD(width=width, enhancers=enhancers), InputSpec(channels=3)
    generator = build_generator(arch, inputs, enhancers=enhancers, seed=0).eval()
    model = LoadedModel(
        generator=generator,
        encoder=None,
        styles=None,
        manifest=Manifest(architecture=arch, inputs=inputs, enhancers=enhancers, files={}),
        weights="raw",
        fingerprint="",
    )
    return Translator(model, tile=tile)


def rows(start: int, stop: int, width: int) -> Array:
    """Rows of a source that is drawn as it is read."""
    y, x = np.ogrid[start:stop, :width]
    bands = np.broadcast_arrays((x * y) >> 6, x >> 3, (y >> 3) | (x & y))
    return np.stack(bands, axis=2).astype(np.uint8)


def measure(side: Side, options: argparse.Namespace) -> tuple[float, float, float, Array]:
    """Seconds, processor seconds, MB beyond what the process had before, and every 16th row of the result."""
    tune_process("cpu")
    torch.set_num_threads(options.threads)
    width, height = (int(number) for number in options.size.split("x"))
    network = translator(options.width, options.enhancers, options.tile if side == "tiled" else None)
    network.translate([rows(0, 64, 64)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shares, kept = 1.0, np.zeros((0, width, 3), np.uint8)
    start, processor = time.perf_counter(), time.process_time()
    if side == "tiled":
        first = 0
        for (band,) in network.bands(lambda a, b: ([rows(a, b, width)], None), height, width):
            kept = np.concatenate([kept, band[-first % 16 :: 16]])
            first += len(band)
    elif side == "tiles":
        places = [(y, x) for y in range(0, height, options.tile) for x in range(0, width, options.tile)]
        shares = len(places) / len(places[: options.most])
        for y, x in places[: options.most]:
            part = rows(y, min(y + options.tile, height), width)
            network.translate([part[:, x : x + options.tile]])
    else:
        kept = network.translate([rows(0, height, width)])[0][::16]
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return (
        seconds * shares,
        processor * shares,
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        kept,
    )


def main() -> None:
    """Measure and print one row for each side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="4096x2048")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--enhancers", type=int, default=0)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--most", type=int, default=16)
    parser.add_argument("--sides", nargs="*", choices=["tiled", "tiles", "whole"], default=["tiled", "tiles"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print("| side | seconds | processor seconds | MB |\n|---|---|---|---|")
    pictures = []
    for side in options.sides:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, processor, megabytes, picture = pool.apply(measure, (side, options))
        print(f"| {side} | {seconds:.1f} | {processor:.1f} | {megabytes:,.0f} |", flush=True)
        pictures += [picture] if len(picture) else []
    if len(pictures) == 2:
        print(f"largest difference {np.abs(pictures[0].astype(int) - pictures[1]).max()} of 255")


if __name__ == "__main__":
    main()
