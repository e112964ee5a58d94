"""Batch inference as a whole against the bare model, and against the published way, in one run.

    python -m benchmarks.inference [--images 600] [--size 256] [--width 32] [--store s3|local] [--rerun 10000]

    whole        the infer stage: PNGs read from the store, generated, PNGs and table written to the store;
                 from the first image on, since starting Ray and torch is paid once however many images follow
    bare         the same network and batch size on tensors in memory, all cores, nothing else
    published    one image at a time: Pillow in, eager float32, Pillow out, as the published test scripts do
    memory       the largest resident size of a generating process, over few images and over many
    no-op        the same command again over --rerun finished outputs

Ratios are of measurements in one run on one machine; other load on it moves both sides.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from PIL import Image

from stages import infer, outputs, storage
from stages.actors import on_actors, own_cores, pool_size
from stages.base import Resources
from stages.infer import InferConfig, batch_size
from stages.models.architecture import InputSpec, Pix2Pix, build_generator
from stages.models.saved import Picture, Preprocessing, load_model, save_model
from stages.storage import join, write_bytes
from stages.tracking import NullRun
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
    for index in range(count):
        write_bytes(join(folder, f"{index:06d}.png"), drawn[index % len(drawn)])


def make_model(folder: Path, width: int, size: int) -> None:
    arch = Pix2Pix(levels=min(8, size.bit_length() - 1), width=width, dropout="none")
    inputs = InputSpec(channels=3)
    roles = {"source": Picture(kind="rgb"), "target": Picture(kind="rgb")}
    generator = build_generator(arch, inputs).eval()
    save_model(
        folder, generator, architecture=arch, inputs=inputs, preprocessing=Preprocessing(pictures=roles)
    )


def bare(model: Path, size: int, images: int) -> float:
    """Images a second of the network alone."""
    torch.set_num_threads(own_cores())
    network = load_model(model).generator
    batch = torch.zeros(batch_size(size, size, "cpu"), 3, size, size)
    with torch.inference_mode():
        network(batch)
        started, done = time.perf_counter(), 0
        while done < images:
            network(batch)
            done += len(batch)
    return done / (time.perf_counter() - started)


def published(model: Path, size: int, images: int) -> float:
    """Images a second, one at a time, a graph built as the published scripts do."""
    torch.set_num_threads(own_cores())
    network = load_model(model).generator
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

    def run(self) -> None:
        while not self.stop.wait(0.5):
            for process in psutil.process_iter(["cmdline", "memory_info"]):
                line = " ".join(process.info["cmdline"] or [])
                if "MapWorker(MapBatches(Generator))" in line and process.info["memory_info"]:
                    self.most = max(self.most, process.info["memory_info"].rss / 2**20)


def whole(model: Path, source: str, output: str, count: int) -> dict[str, float]:
    """The stage. Steady: from the first finished unit to the last, by the table parts' times."""
    watch = Watch()
    watch.start()
    started = time.perf_counter()
    config, resources = InferConfig(input=source, model=str(model)), Resources(gpu=False)
    arrivals: list[tuple[float, int]] = []
    work = infer.prepare(config, output=output, tracking_uri=None)
    job = infer.make_job(config, resources, work, output)
    most = pool_size(resources, gpu=False)
    for row in on_actors(infer.Generator, job, work.left, stage="infer", most=most, gpu=False):
        arrivals.append((time.perf_counter(), int(row["images"])))
    watch.stop.set()
    first, last = arrivals[0][0], arrivals[-1][0]
    steady = sum(images for _, images in arrivals[1:]) / max(1e-9, last - first)
    assert sum(images for _, images in arrivals) == count
    return {
        "seconds": last - started,
        "steady": steady,
        "with_start": count / (last - started),
        "mib": watch.most,
    }


def finished(source: str, output: str, model: Path) -> float:
    """Seconds of a run with nothing to do."""
    config = InferConfig(input=source, model=str(model))
    work = infer.prepare(config, output=output, tracking_uri=None)
    table = outputs.ROWS.empty_table()
    for unit in work.left:  # as if it had been done: what a rerun reads is the table
        storage.write_parquet(outputs.part_uri(output, unit), table)
    started = time.perf_counter()
    infer.run(config, Resources(gpu=False), output=output, track=NullRun())
    return time.perf_counter() - started


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=600)
    p.add_argument("--size", type=int, default=256)
    p.add_argument("--width", type=int, default=32)
    p.add_argument("--store", choices=("s3", "local"), default="s3")
    p.add_argument("--rerun", type=int, default=10_000)
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
        ray.init(
            num_cpus=max(4, own_cores() + 1),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": storage.worker_environment(settings)},
        )
        try:
            model = Path(temp) / "model"
            make_model(model, options.width, options.size)
            few = max(65, options.images // 10)
            fill(join(place, "few"), few, options.size)
            fill(join(place, "many"), options.images, options.size)
            start = whole(model, join(place, "few"), join(place, "out-few"), few)
            run = whole(model, join(place, "many"), join(place, "out-many"), options.images)
            found["bare"] = bare(model, options.size, min(options.images, 300))
            found["published"] = published(model, options.size, min(options.images, 60))
            found["whole"] = run
            found["whole_over_bare"] = run["steady"] / found["bare"]
            found["whole_over_published"] = run["steady"] / found["published"]
            found["memory_mib"] = {str(few): start["mib"], str(options.images): run["mib"]}
            if options.rerun:
                fill(join(temp, "rerun"), options.rerun, 16)
                found["noop_seconds"] = finished(join(temp, "rerun"), join(temp, "out-rerun"), model)
        finally:
            ray.shutdown()
            if server is not None:
                server.kill()
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
