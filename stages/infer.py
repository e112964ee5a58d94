"""Generate an image for every source: of a split of the shards, or of any folder, bucket, archive or table.

in:  a model folder; shards, or `infer.input`
out: images/<key>.png and table/part-<unit>.parquet, as `stages.inference.outputs` describes

A unit of work is read ahead, generated in batches of equal size, and written behind the model; its table part
is written when all its images are. A rerun does the units that have none; their images get the names and,
on the same device, the bytes they would have had.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stages import storage
from stages.base import MAX_PIXELS, Kind, Outcome, Resources
from stages.config.infer import InferConfig, StyleConfig
from stages.errors import StageError, UserError
from stages.images import colour, decode, encode, geometry, pictures
from stages.images.kinds import Array, ImageRejected
from stages.inference import inputs, outputs
from stages.inference.inputs import Item, Loaded, Location, Planned
from stages.inference.model_source import description, fingerprint, local_model
from stages.inference.translator import Translator, noise_seed
from stages.models.fast.process import tune_process
from stages.models.files.saved import load_model
from stages.objects.fetch import Object, Reader
from stages.parallel.cluster import on_actors, pool_size, threads, uses_gpu
from stages.progress import Progress
from stages.shards import dataset

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1

BATCH_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Pixels of a batch: four pictures of 256x256 for a CPU's core, 64 for a GPU."""

LARGE_PIXELS = 1 << 19
"""Pictures with more than these (1024x512) are painted by all cores together, one at a time."""

MAX_BATCH = 64

logger = logging.getLogger(__name__)


# -- rules ---------------------------------------------------------------------------------------------------


def batch_size(height: int, width: int, device: str) -> int:
    """How many pictures of a (padded) size go through the network at once."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS[device] // (height * width)))


def generated_size(
    stored: tuple[int, int], trained: tuple[int, int] | None, asked: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Width and height to make the sources of shards before generating; None: as they are stored.

    A training crop of at least 0.8 of both sides is jitter: the papers test at the crop's size then. A
    smaller one is a crop for memory's sake, and whole pictures are generated.
    """
    if asked is not None:
        return None if asked == stored else asked
    if trained is None or trained == stored:
        return None
    jitter = all(0.8 * side <= crop <= side for crop, side in zip(trained, stored, strict=True))
    return trained if jitter else None


def written(array: Array, kind: Kind, source: Array, source_kind: Kind) -> Array:
    """The generated array as it is written: depth is kept, Lab and channels become pictures."""
    if kind in ("rgb", "grey", "grey16"):
        return array
    return pictures.picture(array, kind, lightness=source if source_kind == "lab_l" else None)


def encoded(array: Array, config: InferConfig) -> bytes:
    """An image file: the picture, or its class ids where the config knows their colours."""
    if config.colors is None:
        return encode.encode_image(array, config.format, quality=config.quality)
    return encode.encode_ids(colour.nearest_class(array, config.colors), config.colors)


def bucketed(
    loaded: Iterable[tuple[int, Item, Loaded]], limit: Callable[[tuple[int, ...]], int], most: int
) -> Iterator[list[tuple[int, Item, Loaded]]]:
    """Batches of one shape, in order of arrival; at most `most` inputs wait for their batch to fill."""
    waiting: dict[tuple[int, ...], list[tuple[int, Item, Loaded]]] = {}
    for entry in loaded:
        shape = entry[2].source.shape
        batch = waiting.setdefault(shape, [])
        batch.append(entry)
        if len(batch) >= limit(shape):
            yield waiting.pop(shape)
        elif sum(map(len, waiting.values())) >= most:
            yield waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
    yield from waiting.values()


# -- one process that generates ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a process needs to know; small, and the same for each."""

    config: InferConfig
    model: str
    tracking_uri: str | None
    output: str
    shards: str  # "" for objects
    planned: Planned | None
    size: tuple[int, int] | None
    device: str
    threads: int
    io_threads: int


Painted = tuple[int, dict[str, Any], Array, Array]
"""A picture: its place in the unit, its row, the source, and what the model made of it."""


class Generator:
    """A model in a process of its own.

    Two units are in its hands at a time: one's input is read, the other's output written, while the model
    works on either. On a CPU every thread of the model paints a batch of its own: several that share one wait
    for one another at every layer, longest where other processes interrupt them (benchmarks/README.md). Only
    large pictures are painted one at a time, by all of them, so that memory holds one.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        self.translator = self._painter()
        self.at_once = job.threads if job.device == "cpu" else 1
        self.together = ThreadPoolExecutor(1, "infer-together", torch.set_num_threads, (job.threads,))
        self.each = self.together
        if job.device == "cpu":
            self.each = ThreadPoolExecutor(self.at_once, "infer-each", torch.set_num_threads, (1,))
        self.fingerprint = self.translator.model.fingerprint
        self.spec = dataset.load(job.shards) if job.shards else None
        self.units = inputs.shard_units(self.spec, job.config.split) if self.spec else []
        self.reference = self._reference()
        self.pool = ThreadPoolExecutor(job.io_threads, thread_name_prefix="infer-io")

    def _painter(self) -> Translator:
        job, config = self.job, self.config
        tune_process(job.device)
        with tempfile.TemporaryDirectory(prefix="pixloom-model-") as temp:  # gone before Ray can end us
            folder = local_model(job.model, Path(temp), weights=config.weights, tracking_uri=job.tracking_uri)
            model = load_model(folder, weights=config.weights, device=job.device)
        return Translator(
            model,
            device=job.device,
            precision=config.precision,
            stochastic=config.stochastic,
            tile=config.tile,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Do units; returns, for each, {unit, images, errors (JSON by reason), seconds}."""
        done = [self.do(int(unit)) for unit in batch["unit"]]
        return {name: [row[name] for row in done] for name in ("unit", "images", "errors", "seconds")}

    def do(self, unit: int) -> dict[str, Any]:
        """Generate one unit: its images, then its part of the table."""
        started = time.monotonic()
        rows: dict[tuple[int, int], dict[str, Any]] = {}
        painting: deque[Future[list[Painted]]] = deque()
        writing: deque[Future[None]] = deque()

        def write_oldest() -> None:
            for place, row, source, picture in painting.popleft().result():
                array = written(picture, self.translator.target_kind, source, self.translator.source_kind)
                row["height"], row["width"] = array.shape[:2]
                rows[place, row["sample"]] = row
                writing.append(self.pool.submit(self._write, row, array))
            while len(writing) > 2 * MAX_BATCH:
                writing.popleft().result()

        loaded = self._loaded(enumerate(self._items(unit)), rows)
        for batch in bucketed(loaded, self._limit, 4 * MAX_BATCH):
            for sample in range(self.config.samples):
                painting.append(self._threads(batch).submit(self._paint, batch, sample))
                if len(painting) > self.at_once:
                    write_oldest()
        while painting:
            write_oldest()
        for one in writing:
            one.result()
        listed = [rows[place] for place in sorted(rows)]
        table = pa.Table.from_pylist(listed, schema=outputs.ROWS)
        storage.write_parquet(outputs.part_uri(self.job.output, unit), table)
        errors = Counter(row["error"].partition(":")[0] for row in listed if row["error"] is not None)
        return {
            "unit": unit,
            "images": len(listed) - errors.total(),
            "errors": json.dumps(errors),
            "seconds": time.monotonic() - started,
        }

    def _items(self, unit: int) -> Iterator[Item]:
        if self.spec is not None:
            return inputs.shard_items(self.job.shards, self.spec, self.units[unit], size=self.job.size)
        assert self.job.planned is not None
        tiled = self.config.tile is not None
        return inputs.object_items(
            self.job.output,
            self.job.planned,
            unit,
            kind=self.translator.source_kind,
            max_pixels=MAX_PIXELS if tiled else self.config.max_pixels,
            instances=self.translator.needs_instances,
        )

    def _loaded(
        self, items: Iterator[tuple[int, Item]], rows: dict[tuple[int, int], dict[str, Any]]
    ) -> Iterator[tuple[int, Item, Loaded]]:
        """Inputs in order, read and decoded ahead; one that cannot be used becomes a row with its reason."""
        ahead: deque[tuple[int, Item, Future[Loaded]]] = deque()
        window = self.job.io_threads + 8

        def next_one() -> tuple[int, Item, Loaded] | None:
            place, item, future = ahead.popleft()
            try:
                return place, item, future.result()
            except ImageRejected as why:
                rows[place, 0] = self._row(item, error=str(why))
                return None

        for place, item in items:
            ahead.append((place, item, self.pool.submit(self._load, item)))
            if len(ahead) >= window and (ready := next_one()) is not None:
                yield ready
        while ahead:
            if (ready := next_one()) is not None:
                yield ready

    def _load(self, item: Item) -> Loaded:
        loaded = item.load()
        if self.job.size is None and self.config.size is not None:
            size = self.config.size
            kind = self.translator.source_kind
            ids = loaded.instance
            loaded = Loaded(
                geometry.resize(loaded.source, size, kind),
                None if ids is None else geometry.resize(ids, size, "instances"),
            )
        if self.translator.needs_instances and loaded.instance is None:
            raise ImageRejected("missing", "the model needs an instance map, the pair has none")
        height, width = loaded.source.shape[:2]
        if self.config.tile is None and height * width > self.config.max_pixels:
            limit = self.config.max_pixels
            raise ImageRejected(
                "too_large", f"{width}x{height}, infer.max_pixels is {limit}; infer.tile cuts it"
            )
        classes = self.translator.model.inputs.classes
        if self.translator.source_kind == "labels" and self.spec is None and classes is not None:
            highest = int(loaded.source.max())
            ignored = self.translator.model.preprocessing.ignore_label
            if highest >= classes and ignored is not None:
                loaded.source[loaded.source == ignored] = classes - 1
                highest = int(loaded.source.max())
            if highest >= classes:
                raise ImageRejected("label_range", f"id {highest}, the model knows 0..{classes - 1}")
        return loaded

    def _limit(self, shape: tuple[int, ...]) -> int:
        return batch_size(*self.translator.padded(shape[0], shape[1]), self.job.device)

    def _threads(self, batch: list[tuple[int, Item, Loaded]]) -> ThreadPoolExecutor:
        """Who paints it: one thread of the model, or all of them together."""
        height, width = batch[0][2].source.shape[:2]
        return self.together if math.prod(self.translator.padded(height, width)) > LARGE_PIXELS else self.each

    def _paint(self, batch: list[tuple[int, Item, Loaded]], sample: int) -> list[Painted]:
        random = self.config.stochastic or self.translator.model.encoder is not None
        seeds = [noise_seed(self.config.seed, item.key, sample) for _, item, _ in batch]
        instances = [loaded.instance for _, _, loaded in batch]
        given = [ids for ids in instances if ids is not None]
        started = time.monotonic()
        pictures = self.translator.translate(
            [loaded.source for _, _, loaded in batch],
            given if len(given) == len(batch) else None,
            seeds=seeds if random else None,
            style=self.config.style.kind,
            cluster=self.config.style.cluster,
            reference=self.reference,
        )
        seconds = (time.monotonic() - started) / len(batch)
        painted = []
        for (place, item, loaded), seed, picture in zip(batch, seeds, pictures, strict=True):
            row = self._row(item, sample=sample, seconds=seconds, seed=seed if random else None)
            row["output"] = outputs.output_name(item.key, outputs.SUFFIX[self.config.format], sample)
            painted.append((place, row, loaded.source, picture))
        return painted

    def _write(self, row: dict[str, Any], picture: Array) -> None:
        data = encoded(picture, self.config)
        row["crc"], row["size"] = encode.checksum(data), len(data)
        storage.write_bytes(storage.join(self.job.output, row["output"]), data)

    def _row(self, item: Item, **values: Any) -> dict[str, Any]:
        empty = dict.fromkeys(outputs.ROWS.names)
        key = item.key
        return {
            **empty,
            "key": key,
            "source": item.uri,
            "sample": 0,
            "output": "",
            "model": self.fingerprint,
            **values,
        }

    def _reference(self) -> tuple[Array, Array, Array] | None:
        style = self.config.style
        if style.kind != "reference":
            return None
        kinds: tuple[Kind, ...] = (self.translator.target_kind, "instances", "labels")
        found = []
        for name, uri, kind in zip(
            ("picture", "instances", "labels"),
            (style.picture, style.instances, style.labels),
            kinds,
            strict=True,
        ):
            try:
                found.append(decode.decode_image(Reader().read(Object(storage.absolute(uri or ""))), kind))
            except ImageRejected as why:
                raise UserError(f"infer.style.{name}: {uri}: {why}") from why
        return found[0], found[1], found[2]


# -- wiring --------------------------------------------------------------------------------------------------


def digest(config: InferConfig, tracking_uri: str | None = None) -> str:
    """What a run reads from outside the pipeline: the listing of `input` and the model's checksums."""
    parts = []
    if config.input:
        where = location(config)
        if is_shards(where.uri):
            parts.append(storage.read_bytes(storage.join(where.uri, dataset.NAME)).decode())
        else:
            parts.append(inputs.plan(where, None).digest)
    if config.model:
        parts.append(json.dumps(description(config.model, tracking_uri), sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def location(config: InferConfig) -> Location:
    """Where the sources are."""
    assert config.input is not None
    return Location(
        uri=storage.absolute(config.input),
        pattern=config.pattern,
        instance=storage.absolute(config.instance) if config.instance else "",
        instance_pattern=config.instance_pattern or "",
    )


def is_shards(uri: str) -> bool:
    """Whether a location is a shards folder."""
    return not uri.lower().endswith(".parquet") and storage.exists(storage.join(uri, dataset.NAME))


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run has to do, and what is done of it."""

    model: str
    told: Mapping[str, Any]
    """The model's `model.json`."""
    tracking_uri: str | None
    shards: str
    planned: Planned | None
    rows: int
    left: list[int]
    """Units that are not finished."""
    counts: Counter[str]
    """Of those that are."""


def prepare(
    config: InferConfig, *, output: str, tracking_uri: str | None, model: str = "", shards: str = ""
) -> Work:
    """Look at the model, the input and what `output` holds. Needs no Ray; raises UserError as `run` does."""
    model = config.model or model
    if not model:
        raise UserError("infer.model: name a model; none was trained here")
    told = description(model, tracking_uri)
    if config.overwrite:
        forget(output)
    planned = None
    if config.input is not None:
        where = location(config)
        shards = where.uri if is_shards(where.uri) else ""
        if not shards:
            planned = begin_objects(where, output, told, config)
    if planned is None:
        spec = dataset.load(shards)
        units, rows = len(inputs.shard_units(spec, config.split)), spec.rows(config.split)
        if not rows:
            raise UserError(f"infer.split: the shards hold no pair of the split {config.split!r}")
        content = storage.read_bytes(storage.join(shards, dataset.NAME))
        who = identity(told, config, hashlib.sha256(content).hexdigest()[:16])
        begin(output, who, {"rows": rows, "units": units})
    else:
        units, rows = planned.units, planned.rows
    storage.write_json(storage.join(output, "model", "model.json"), told)
    done = outputs.finished_units(output)
    return Work(
        model=model,
        told=told,
        tracking_uri=tracking_uri,
        shards=shards,
        planned=planned,
        rows=rows,
        left=[unit for unit in range(units) if unit not in done],
        counts=finished_counts(output, sorted(done & set(range(units)))),
    )


def run(
    config: InferConfig,
    resources: Resources,
    *,
    output: str,
    track: Run,
    model: str = "",
    shards: str = "",
) -> Outcome:
    """Generate into `output`. `model` and `shards`: what the pipeline made, where the config names no others.

    Raises UserError for a model or input that is none, and for an output folder that holds another run's
    images; StageError if the work failed.
    """
    work = prepare(config, output=output, tracking_uri=track.uri or None, model=model, shards=shards)
    return finish(config, resources, work, output)


def finish(config: InferConfig, resources: Resources, work: Work, output: str) -> Outcome:
    """Do what is left. Raises StageError if more sources than allowed cannot be used."""
    counts = Counter(work.counts)
    if work.left:
        job = make_job(config, resources, work, output)
        counts += generate(job, resources, work.left, work.rows * config.samples, counts["images"])
    errors = {name: value for name, value in sorted(counts.items()) if name.startswith("error_")}
    failed = sum(errors.values())
    if failed > config.max_reject_fraction * work.rows:
        worst = max(errors, key=lambda name: errors[name]).removeprefix("error_")
        raise StageError(
            f"infer: {failed:,} of {work.rows:,} sources cannot be used, most for {worst!r}; {output}/table "
            f"has every reason; infer.max_reject_fraction is {config.max_reject_fraction}"
        )
    return Outcome(counts={"images": counts["images"], "errors": failed, **errors})


def make_job(config: InferConfig, resources: Resources, work: Work, output: str) -> Job:
    """The job for the processes, with what depends on this cluster."""
    gpu = uses_gpu(resources)
    size, read = None, work.told.get("preprocessing") or {}
    if work.shards:
        trained = read.get("size")
        stored = dataset.load(work.shards).size
        size = generated_size(stored, tuple(trained) if trained else None, config.size)
    kind = (read.get("pictures") or {}).get("target", {}).get("kind", "rgb")
    if kind == "grey16" and config.format != "png":
        raise UserError(f"infer.format: {config.format} cannot hold this model's 16-bit pictures; use png")
    if kind != "rgb" and config.colors is not None:
        raise UserError(f"infer.colors: this model's pictures are {kind}, not colours of labels")
    return Job(
        config=config,
        model=work.model,
        tracking_uri=work.tracking_uri,
        output=output,
        shards=work.shards,
        planned=work.planned,
        size=size,
        device="cuda" if gpu else "cpu",
        threads=threads(resources, pool_size(resources, gpu=gpu)),
        io_threads=resources.io_threads,
    )


def generate(job: Job, resources: Resources, left: list[int], total: int, done: int) -> Counter[str]:
    """Do the units that are left, on as many processes as allowed. Returns what they counted."""
    counts: Counter[str] = Counter()
    gpu = job.device == "cuda"
    with Progress("infer", total=total, unit="images", done=done) as progress:
        most = pool_size(resources, gpu=gpu)
        for row in on_actors(Generator, job, left, stage="infer", most=most, gpu=gpu):
            counts["images"] += int(row["images"])
            for reason, number in json.loads(row["errors"]).items():
                counts[f"error_{reason}"] += number
            progress.advance(int(row["images"]))
    return counts


def identity(told: Mapping[str, Any], config: InferConfig, source: str) -> dict[str, Any]:
    """What must be the same for a rerun to continue what an output folder holds."""
    unseen = {"overwrite", "model", "input", "max_reject_fraction"}
    settings = config.model_dump(mode="json", exclude=unseen)
    return {
        "model": fingerprint(told),
        "config": settings,
        "input": source,
    }


def begin(output: str, who: Mapping[str, Any], extent: Mapping[str, Any]) -> None:
    """Write `infer.json`, or check that the folder holds just this run's work. Raises UserError if not."""
    uri = storage.join(output, outputs.MANIFEST)
    if storage.exists(uri):
        held = storage.read_json(uri)
        for name, value in who.items():
            if held.get(name) != value:
                raise UserError(
                    f"{output}: holds images of another {name}; take another output folder, or overwrite"
                )
        return
    storage.write_json(uri, {**who, **extent})


def begin_objects(where: Location, output: str, told: Mapping[str, Any], config: InferConfig) -> Planned:
    """The plan over a listing: the one this folder was begun with, or a new one, written down."""
    uri = storage.join(output, outputs.MANIFEST)
    if storage.exists(uri):
        found = inputs.plan(where, None)
        begin(output, identity(told, config, found.digest), {})
        return found
    planned = inputs.plan(where, output)
    begin(output, identity(told, config, planned.digest), {"rows": planned.rows, "units": planned.units})
    return planned


def forget(output: str) -> None:
    """Take away what an earlier run left in a folder; the table first: without it nothing counts as done."""
    fs, path = storage.filesystem(output)
    if not any(storage.exists(storage.join(output, name)) for name in (outputs.MANIFEST, outputs.TABLE)):
        return  # no folder of ours
    for name in (outputs.TABLE, outputs.IMAGES, outputs.SAMPLES, outputs.MANIFEST, "plan"):
        if storage.exists(storage.join(output, name)):
            fs.rm(f"{path}/{name}", recursive=True)


def finished_counts(output: str, units: list[int]) -> Counter[str]:
    """Images and errors in the parts that are there."""

    def count(unit: int) -> Counter[str]:
        fs, path = storage.filesystem(outputs.part_uri(output, unit))
        with fs.open(path, "rb") as handle:
            errors = pq.read_table(handle, columns=["error"])["error"]
        reasons = Counter(f"error_{text.partition(':')[0]}" for text in errors.drop_null().to_pylist())
        return reasons + Counter(images=errors.null_count)

    with ThreadPoolExecutor(16) as threads:
        return sum(threads.map(count, units), Counter[str]())


__all__ = ["VERSION", "InferConfig", "StyleConfig", "digest", "run"]
