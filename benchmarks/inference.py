"""Batch inference as a whole against the bare model, and against the published way, in one run.

    python -m benchmarks.inference [--turns 5] [--images 300] [--memory 5000] [--rerun 10000] [--store s3]

    whole        the infer stage: PNGs read from the store, generated, PNGs and table written to the store;
                 once it runs, since starting Ray and torch is paid once however many images follow
    bare         the same network, batches and settings on tensors in memory, one on every core, nothing else
    together     the same, one batch at a time on all cores
    published    one image at a time: Pillow in, eager float32, Pillow out, as the published test scripts do,
                 with the layers of the published code
    singly       the same with our layers, as they train
    memory       the largest resident size of a generating process, over 100 small images and over many
    no-op        the command again over --rerun finished outputs, a process of its own

The first five sides are measured in turns; ratios are of their medians.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from pipeline.cluster import cluster
from stages import infer, storage
from stages.base import Precision, Resources
from stages.config.infer import InferConfig
from stages.infer import batch_size
from stages.inference import inputs, outputs
from stages.inference.translator import Translator
from stages.models.architecture import InputSpec, Pix2Pix
from stages.models.build import build_generator
from stages.models.fast import heap
from stages.models.fast.process import keep_freed_memory, return_freed_memory
from stages.models.files.saved import Picture, Preprocessing, load_model, save_model
from stages.parallel.cluster import own_cores
from stages.storage import join, write_bytes
from stages.tracking.run import NullRun
from tests.reference.published_step import PlainUnet, copy_weights
from tests.stores.seaweed import SeaweedS3


def picture(seed: int, size: int) -> bytes:
    """A source with structure: noise would make PNG the whole story."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, "PNG", compress_level=1)
    return file.getvalue()


def fill(folder: str, count: int, size: int) -> None:
    drawn = [picture(seed, size) for seed in range(min(count, 64))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: write_bytes(join(folder, f"{i:06d}.png"), drawn[i % 64]), range(count)))


def make_model(folder: Path, width: int, size: int) -> Path:
    arch = Pix2Pix(levels=min(8, size.bit_length() - 1), width=width, dropout="none")
    inputs = InputSpec(channels=3)
    roles = {"source": Picture(kind="rgb"), "target": Picture(kind="rgb")}
    generator = build_generator(arch, inputs).eval()
    save_model(
        folder, generator, architecture=arch, inputs=inputs, preprocessing=Preprocessing(pictures=roles)
    )
    return folder


def bare(model: Path, size: int, images: int, *, precision: Precision, at_once: int) -> float:
    """Images a second of the network alone: so many batches at once, sharing the cores.

    One at a time is painted by the calling thread, which has threads of OpenMP's already: with a second set
    of them none would spin any more.
    """
    keep_freed_memory()
    torch.set_num_threads(own_cores() // at_once)
    translator = Translator(load_model(model), precision=precision)
    batch = torch.zeros(batch_size(size, size, "cpu"), 3, size, size)
    batch = batch.contiguous(memory_format=torch.channels_last)

    def paint(rounds: int) -> None:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), autocast:
            for _ in range(rounds):
                translator.model.generator(batch)

    rounds = -(-images // (at_once * len(batch)))
    with ThreadPoolExecutor(at_once, "bare", torch.set_num_threads, (own_cores() // at_once,)) as pool:
        paint_each = map if at_once == 1 else pool.map
        list(paint_each(paint, [1] * at_once))
        started = time.perf_counter()
        list(paint_each(paint, [rounds] * at_once))
        return at_once * rounds * len(batch) / (time.perf_counter() - started)


def published(model: Path) -> nn.Module:
    """The network in the layers of the published code, with batch statistics at test time as there."""
    ours = load_model(model)
    arch = ours.architecture
    assert isinstance(arch, Pix2Pix)
    plain = PlainUnet(3, 3, levels=arch.levels, width=arch.width, noisy=set()).train()
    copy_weights(ours.generator, plain)
    return plain


def singly(network: nn.Module, size: int, images: int) -> float:
    """Images a second, one at a time, a graph built as the published scripts do."""
    torch.set_num_threads(own_cores())
    return_freed_memory()
    with tempfile.TemporaryDirectory() as temp:
        source = Path(temp) / "in.png"
        source.write_bytes(picture(0, size))
        started = 0.0
        for index in range(images + 1):
            if index == 1:
                started = time.perf_counter()
            with Image.open(source) as image:
                array = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
            out = network(torch.from_numpy(array).permute(2, 0, 1)[None])[0]
            values = (out.detach().permute(1, 2, 0).numpy() + 1) * 127.5
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(Path(temp) / f"{index}.png")
        return images / (time.perf_counter() - started)


class Watch(threading.Thread):
    """Largest resident size of a generating process, in MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0.0, threading.Event()
        self.others = {process.pid for process in generating()}  # of a run that has just ended

    def run(self) -> None:
        watched: list[psutil.Process] = []
        while not self.stop.wait(1):
            if not watched:  # to look through all processes is work itself
                watched = [process for process in generating() if process.pid not in self.others]
            for process in watched:
                with suppress(psutil.NoSuchProcess):
                    self.most = max(self.most, process.memory_info().rss / 2**20)


def generating() -> list[psutil.Process]:
    """Processes that hold a model."""
    name = "MapWorker(MapBatches(Generator))"
    return [p for p in psutil.process_iter(["cmdline"]) if name in " ".join(p.info["cmdline"] or [])]


def whole(
    model: Path, source: str, output: str, count: int, *, precision: Precision = "float32"
) -> dict[str, float]:
    """The stage: seconds in all, images a second once it runs, the most memory a process took.

    Once it runs: of the images between the first and the last tenth, as a line through when each was written,
    which a store tells in whole seconds.
    """
    watch = Watch()
    watch.start()
    config = InferConfig(input=source, model=str(model), precision=precision)
    started = time.perf_counter()
    outcome = infer.run(config, Resources(gpu=False), output=output, track=NullRun())
    seconds = time.perf_counter() - started
    watch.stop.set()
    assert outcome.counts["images"] == count
    ranks = np.arange(count // 10, count * 9 // 10)
    steady = 1 / float(np.polyfit(ranks, np.sort(times(output))[ranks], 1)[0])
    return {"seconds": seconds, "steady": steady, "with_start": count / seconds, "mib": watch.most}


def times(output: str) -> list[float]:
    """When each image was written, in seconds."""
    fs, path = storage.filesystem(join(output, outputs.IMAGES))
    fs.invalidate_cache()
    entries = fs.find(path, detail=True).values()
    return [e["LastModified"].timestamp() if "LastModified" in e else e["mtime"] for e in entries]


def finished(source: str, output: str, model: Path, settings: Mapping[str, Any]) -> float:
    """Seconds of the command with nothing left to do."""
    work = infer.prepare(InferConfig(input=source, model=str(model)), output=output, tracking_uri=None)
    assert work.planned is not None
    for unit in work.left:  # as if it had been done: what a rerun reads is the table
        rows = min(inputs.UNIT_ROWS, work.rows - unit * inputs.UNIT_ROWS)
        row = dict.fromkeys(outputs.ROWS.names) | {"key": "k", "output": "images/k.png", "size": 1, "crc": 1}
        table = pa.Table.from_pylist([row] * rows, schema=outputs.ROWS)
        storage.write_parquet(outputs.part_uri(output, unit), table)
    words = ["--model", str(model), "--input", source, "--output", output]
    environment = {**os.environ, **storage.worker_environment(settings)}
    started = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.infer", *words]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - started
    assert f"images {work.rows:,}" in told, told
    return seconds


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--turns", type=int, default=5, help="0: leave the ratios out")
    p.add_argument("--images", type=int, default=300)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--width", type=int, default=64, help="of the U-Net; the paper's is 64")
    p.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of all sides but the published"
    )
    p.add_argument("--store", choices=("s3", "local"), default="s3")
    p.add_argument("--memory", type=int, default=5000, help="0: leave the comparison of memory out")
    p.add_argument("--rerun", type=int, default=10_000, help="0: leave the rerun out")
    options = p.parse_args()
    found: dict[str, Any] = {"cores": own_cores(), **vars(options)}
    with tempfile.TemporaryDirectory(prefix="pixloom-benchmark-") as temp:
        place, server = temp, None
        settings: dict[str, Any] = {}
        if options.store == "s3":
            server = SeaweedS3(Path(temp) / "store").start()
            settings = {"s3": server.options()}
            storage.configure(settings)
            fs, _ = storage.filesystem("s3://benchmark")
            fs.call_s3("create_bucket", Bucket="benchmark")
            place = "s3://benchmark"
        os.environ["RAY_AUTH_MODE"] = "disabled"
        try:
            with cluster(Resources(), settings, {}):
                if options.turns:
                    found |= ratios(options, Path(temp) / "model", place)
                small = make_model(Path(temp) / "small", 16, 64)
                if options.memory:
                    found["memory_mib"] = memory(small, place, (100, options.memory))
            if options.rerun:
                fill(join(place, "rerun"), options.rerun, 16)
                found["noop_seconds"] = finished(join(place, "rerun"), join(place, "done"), small, settings)
        finally:
            if server is not None:
                server.kill()
    print(json.dumps(found, indent=2))


def memory(model: Path, place: str, counts: Sequence[int]) -> dict[str, float]:
    """The most that a generating process took, in MiB, by the number of images."""
    found = {}
    for count in counts:
        source, output = join(place, f"memory-{count}"), join(place, f"out-{count}")
        fill(source, count, 64)
        found[str(count)] = whole(model, source, output, count)["mib"]
    return found


def ratios(options: argparse.Namespace, folder: Path, place: str) -> dict[str, Any]:
    """The stage beside the network alone and the published way, in turns."""
    model = make_model(folder, options.width, options.size)
    fill(join(place, "in"), options.images, options.size)
    sides: dict[str, list[float]] = {
        name: [] for name in ("bare", "together", "published", "singly", "whole")
    }
    runs = []
    few = max(16, options.images // 4)
    for turn in range(options.turns):
        sides["bare"].append(bare(model, options.size, few, precision=options.precision, at_once=own_cores()))
        sides["together"].append(bare(model, options.size, few, precision=options.precision, at_once=1))
        sides["published"].append(singly(published(model), options.size, few // 2))
        sides["singly"].append(singly(load_model(model).generator, options.size, few // 2))
        output = join(place, f"out-{turn}")
        runs.append(whole(model, join(place, "in"), output, options.images, precision=options.precision))
        sides["whole"].append(runs[-1]["steady"])
        print({name: round(values[-1], 2) for name, values in sides.items()}, file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in sides.items()}
    return {
        **medians,
        **{f"whole_over_{name}": medians["whole"] / medians[name] for name in sides if name != "whole"},
        "whole_with_start": statistics.median(run["with_start"] for run in runs),
        "whole_mib": max(run["mib"] for run in runs),
        "all": sides,
    }


if __name__ == "__main__":
    if not heap.ENVIRONMENT.items() <= os.environ.items():  # of a process that generates, from its start on
        words = [sys.executable, "-m", "benchmarks.inference", *sys.argv[1:]]
        sys.exit(subprocess.run(words, env=os.environ | heap.ENVIRONMENT, check=False).returncode)
    main()
