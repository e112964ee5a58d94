"""Generate an image for every source: of a split of the shards, or of any folder, bucket, archive or table.

in:  a model folder; shards, or `infer.input`
out: images/<key>.png and table/part-<unit>.parquet, as `stages.inference.outputs` describes

The sources are cut into work units. Within a unit, sources are read ahead, generated in batches of one shape
and written while the model works on the next; the unit's table part is written last. A rerun does the units
that have no part; their images get the same names and, on the same device, the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch

from stages import storage
from stages.base import MAX_PIXELS, Kind, Outcome, Resources
from stages.config.infer import InferConfig
from stages.errors import StageError, UserError, named
from stages.images import colour, decode, encode, geometry, geotiff, kinds
from stages.images.geotiff import Tags, TiffRows
from stages.images.kinds import Array, ImageRejected
from stages.inference import inputs, outputs
from stages.inference.inputs import InputImages, InputPlan, Item
from stages.inference.model_source import description, local_model
from stages.inference.translator import Translator, noise_seed
from stages.models.architecture import Picture
from stages.models.fast.process import tune_process
from stages.models.files.saved import fingerprint, load_model
from stages.objects.fetch import Object, Reader
from stages.parallel.cluster import on_actors, pool_size, threads, uses_gpu
from stages.parallel.monitoring import INFER_IMAGES
from stages.parallel.threads import prefetch_map, results
from stages.progress import Progress
from stages.shards import dataset
from stages.storage.local import upload

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 6

BATCH_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Pixels of a batch: four images of 256x256 for a CPU's core, 64 for a GPU."""

LARGE_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 22}
"""Images with more pixels than these are generated one at a time: on a CPU by all its cores together."""

GPU_BATCHES = 2
"""Batches in flight on a GPU: one is copied there or back while the other is computed."""

EXAMPLES = 3  # unusable sources that a message quotes
MAX_BATCH = 64
COPY_BYTES = 1 << 20

logger = logging.getLogger(__name__)


# -- rules ---------------------------------------------------------------------------------------------------


def batch_size(height: int, width: int, device: str) -> int:
    """The number of images of a (padded) size that go through the network together."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS[device] // (height * width)))


def source_size(
    stored: tuple[int, int], trained: tuple[int, int] | None, configured: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The width and height that sources of shards are resized to before generating; None: as they are stored.

    A training crop of at least 0.8 of both sides is jitter: the papers test at the crop's size. A smaller one
    saves memory in training, and whole images are generated.
    """
    if configured is not None:
        return None if configured == stored else configured
    if trained is None or trained == stored:
        return None
    jitter = all(0.8 * side <= crop <= side for crop, side in zip(trained, stored, strict=True))
    return trained if jitter else None


def output_file(array: Array, config: InferConfig, tags: Tags) -> bytes:
    """The image file of an array: a picture, or class ids if the config has the classes' colours.

    tags   of the source's file: where it is on Earth
    """
    if config.format == "tiff":
        return geotiff.encode(array, tags)
    if config.palette is None:
        return encode.encode_image(array, config.format, quality=config.quality)
    ids, colours = colour.nearest_class(array, config.palette), colour.rgb_palette(config.palette)
    return encode.encode_png(ids[:, :, None], colours.tobytes())


@dataclass(frozen=True, slots=True)
class LoadedItem:
    """A decoded input and its place in the work unit."""

    place: int
    item: Item
    images: InputImages


def same_shape_batches(
    items: Iterable[LoadedItem], limit: Callable[[tuple[int, ...]], int], most: int
) -> Iterator[list[LoadedItem]]:
    """Batches of sources of one shape, arrays or files read by rows, in order of arrival.

    limit   the size of a batch of a shape
    most    items that may wait for their batch to fill; then the fullest batch is yielded as it is
    """
    waiting: dict[tuple[type, tuple[int, ...]], list[LoadedItem]] = {}
    for item in items:
        shape = item.images.source.shape
        key = (type(item.images.source), shape)
        batch = waiting.setdefault(key, [])
        batch.append(item)
        if len(batch) >= limit(shape):
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) >= most:
            yield waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
    yield from waiting.values()


def draws(batch: Sequence[LoadedItem], samples: int, size: int) -> Iterator[list[tuple[LoadedItem, int]]]:
    """Sources and sample numbers of the images to generate from a batch, at most `size` at a time."""
    pairs = [(loaded, sample) for sample in range(samples) for loaded in batch]
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


# -- one process that generates ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class InferJob:
    """What every process needs to know; small, and the same for all."""

    config: InferConfig
    model: str
    tracking_uri: str | None
    output: str
    shards: str  # "" if the sources are objects
    plan: InputPlan | None  # None if the sources are shards
    size: tuple[int, int] | None
    device: str
    threads: int
    io_threads: int
    compiled: bool


Row = dict[str, Any]
"""A row of the output table (`outputs.ROWS`)."""

Generated = tuple[LoadedItem, Row, Array | IO[bytes] | None]
"""A source, the row of an image generated from it, and the model's output: an array, a file that is ready,
or None for a source that turned out to be unusable."""


class InferenceWorker:
    """A process with a model, which does work units.

    Two units are in progress at a time: one's input is read or output written while the model works on the
    other. On a CPU every thread of the model generates its own batch: threads that share a batch wait for
    one another at every layer, longest where other processes interrupt them (benchmarks/README.md). On a GPU
    every thread has a stream, on which it copies and computes its own batch. Large images alone are generated
    one at a time, on a CPU by all threads, so that memory holds one.
    """

    def __init__(self, job: InferJob) -> None:
        self.job, self.config = job, job.config
        self.translator = self._translator()
        cpu = job.device == "cpu"
        self.at_once = job.threads if cpu else GPU_BATCHES
        self.large = ThreadPoolExecutor(1, "infer-large", _begin_thread, (job.device, job.threads))
        self.small = ThreadPoolExecutor(self.at_once, "infer-small", _begin_thread, (job.device, 1))
        self.fingerprint = self.translator.model.fingerprint
        self.spec, self.units = None, list[inputs.RowGroupRange]()
        if job.shards:
            self.spec = dataset.load(job.shards)
            split = self.spec.scored_split(job.config.split, "infer.split")
            self.units = inputs.shard_units(self.spec, split)
        self.reference = self._reference()
        self.pool = ThreadPoolExecutor(job.io_threads, thread_name_prefix="infer-io")

    def _translator(self) -> Translator:
        job, config = self.job, self.config
        tune_process(job.device)
        with (
            tempfile.TemporaryDirectory(prefix="pixloom-model-") as temp,  # gone before Ray can end us
            named("infer.model"),
        ):
            folder = local_model(job.model, Path(temp), weights=config.weights, tracking_uri=job.tracking_uri)
            model = load_model(folder, weights=config.weights, device=job.device)
        return Translator(
            model,
            precision=config.precision,
            stochastic=config.stochastic,
            tile=config.tile,
            compiled=job.compiled,
        )

    def __call__(self, unit: int) -> Counter[str]:
        """Generate the images of a work unit, then write its table part.

        Returns the number of images, and of errors as `error_<reason>`.
        """
        rows: dict[tuple[int, int], Row] = {}  # by place and sample

        def usable() -> Iterator[LoadedItem]:
            items = enumerate(self._items(unit))
            for loaded in prefetch_map(self.pool, self._load, items, ahead=self.job.io_threads + 7):
                if isinstance(loaded, LoadedItem):
                    yield loaded
                else:
                    place, row = loaded
                    rows[place, 0] = row

        generating = (
            self._model_threads(batch).submit(self._generate, chunk)
            for batch in same_shape_batches(usable(), self._batch_size, 4 * MAX_BATCH)
            for chunk in draws(batch, self.config.samples, self._batch_size(batch[0].images.source.shape))
        )
        writing = (
            self.pool.submit(self._write, *generated)
            for chunk in results(generating, ahead=self.at_once)
            for generated in chunk
        )
        for place, row in results(writing, ahead=2 * MAX_BATCH):
            rows[place, row["sample"]] = row
        ordered = [rows[place] for place in sorted(rows)]
        table = pa.Table.from_pylist(ordered, schema=outputs.ROWS)
        storage.write_parquet(outputs.part_uri(self.job.output, unit), table)
        errors = outputs.error_counts(row["error"] for row in ordered if row["error"] is not None)
        return errors + Counter(images=len(ordered) - errors.total())

    def _items(self, unit: int) -> Iterator[Item]:
        if self.spec is not None:
            return inputs.shard_items(self.job.shards, self.spec, self.units[unit], size=self.job.size)
        assert self.job.plan is not None
        config = self.config
        by_rows = (
            config.tile is not None
            and config.format == "tiff"
            and config.size is None
            and not self.translator.needs_instances
            and self.translator.source_kind not in ("lab_l", "lab_ab")
            and self.translator.target_kind in ("rgb", "grey", "grey16")
        )
        return inputs.object_items(
            self.job.output,
            self.job.plan,
            unit,
            how=self.translator.source,
            max_pixels=config.max_pixels if config.tile is None else MAX_PIXELS,
            instances=self.translator.needs_instances,
            by_rows=config.tile**2 if config.tile and by_rows else None,
        )

    def _load(self, placed: tuple[int, Item]) -> LoadedItem | tuple[int, Row]:
        """An item with its images, or its place and the row that says why it cannot be used."""
        place, item = placed
        try:
            return LoadedItem(place, item, self._checked(item.load()))
        except ImageRejected as error:
            return place, self._row(item, error=str(error))

    def _checked(self, images: InputImages) -> InputImages:
        """The images as the model takes them. Raises ImageRejected if it cannot."""
        config = self.config
        source, instance, tags = images.source, images.instance, images.tags
        if isinstance(source, TiffRows):
            return images
        if self.job.size is None and config.size is not None:
            source, tags = geometry.resize(source, config.size, self.translator.source_kind), ()
            instance = None if instance is None else geometry.resize(instance, config.size, "instances")
        if self.translator.needs_instances and instance is None:
            raise ImageRejected("missing", "the model needs an instance map, the pair has none")
        height, width = source.shape[:2]
        if config.tile is None and height * width > config.max_pixels:
            limit = config.max_pixels
            raise ImageRejected("too_large", f"{width}x{height}, infer.max_pixels is {limit}; set infer.tile")
        return InputImages(self.translator.prepared(source), instance, tags)

    def _batch_size(self, shape: tuple[int, ...]) -> int:
        if self.config.stochastic and self.job.device == "cpu":
            return 1  # so that an image's bits depend on its seed alone
        return batch_size(*self.translator.padded(shape[0], shape[1]), self.job.device)

    def _model_threads(self, batch: list[LoadedItem]) -> ThreadPoolExecutor:
        """The threads that generate a batch: several with a batch each, or the one for large images."""
        height, width = batch[0].images.source.shape[:2]
        large = math.prod(self.translator.padded(height, width)) > LARGE_PIXELS[self.job.device]
        return self.large if large else self.small

    def _generate(self, chunk: list[tuple[LoadedItem, int]]) -> list[Generated]:
        first = chunk[0][0].images.source
        if isinstance(first, TiffRows):
            return [self._generate_by_rows(loaded, sample) for loaded, sample in chunk]
        # A compiled network takes batches of one size: a short one is filled, and the filling dropped.
        filling = self._batch_size(first.shape) - len(chunk) if self.job.compiled else 0
        filled = chunk + filling * chunk[-1:]
        instances = [one.images.instance for one, _ in filled if one.images.instance is not None]
        started = time.monotonic()
        generated = self.translator.translate(
            [cast(Array, loaded.images.source) for loaded, _ in filled],
            instances if len(instances) == len(filled) else None,
            seeds=[self._seed(loaded, sample) for loaded, sample in filled],
            style=self.config.style.kind,
            cluster=self.config.style.cluster,
            reference=self.reference,
        )
        seconds = (time.monotonic() - started) / len(chunk)
        return [
            (loaded, self._image_row(loaded, sample, seconds), array)
            for (loaded, sample), array in zip(chunk, generated, strict=False)
        ]

    def _generate_by_rows(self, loaded: LoadedItem, sample: int) -> Generated:
        """A picture whose source is read, and whose TIFF is written, row by row."""
        translator, source = self.translator, cast(TiffRows, loaded.images.source)
        stored = kinds.dtype(translator.target_kind)
        shape = (*source.shape[:2], kinds.CHANNELS[translator.target_kind])
        started = time.monotonic()
        file = tempfile.NamedTemporaryFile(prefix="pixloom-")  # noqa: SIM115 - `_write` closes it

        def read(start: int, stop: int) -> tuple[list[Array], None]:
            return [translator.prepared(source.read(start, stop))], None

        try:
            bands = translator.bands(read, *shape[:2], seeds=[self._seed(loaded, sample)])
            geotiff.write(file, (band for (band,) in bands), shape, stored, loaded.images.tags)
        except BaseException as error:
            file.close()
            if not isinstance(error, ImageRejected):
                raise
            return loaded, self._row(loaded.item, error=str(error)), None
        return loaded, self._image_row(loaded, sample, time.monotonic() - started), file

    def _write(self, loaded: LoadedItem, row: Row, generated: Array | IO[bytes] | None) -> tuple[int, Row]:
        """Write an image; returns its place in the work unit and its row."""
        uri = storage.join(self.job.output, row["output"])
        if isinstance(generated, np.ndarray):
            array = self.translator.output(generated, cast(Array, loaded.images.source))
            data = output_file(array, self.config, loaded.images.tags)
            row |= {"crc": encode.checksum(data), "size": len(data)}
            storage.write_bytes(uri, data)
        elif generated is not None:
            with generated as file:
                row |= {"crc": 0, "size": file.seek(0, os.SEEK_END)}
                file.seek(0)
                while part := file.read(COPY_BYTES):
                    row["crc"] = zlib.crc32(part, row["crc"])
                upload(file, uri)
        return loaded.place, row

    def _seed(self, loaded: LoadedItem, sample: int) -> int:
        return noise_seed(self.config.seed, loaded.item.key, sample)

    def _image_row(self, loaded: LoadedItem, sample: int, seconds: float) -> Row:
        height, width = loaded.images.source.shape[:2]
        random = self.config.stochastic or self.translator.model.encoder is not None
        return self._row(
            loaded.item,
            sample=sample,
            output=outputs.output_name(loaded.item.key, outputs.SUFFIX[self.config.format], sample),
            width=width,
            height=height,
            seconds=seconds,
            seed=self._seed(loaded, sample) if random else None,
        )

    def _row(self, item: Item, **values: Any) -> Row:
        common = {"key": item.key, "source": item.uri, "sample": 0, "output": "", "model": self.fingerprint}
        return dict.fromkeys(outputs.ROWS.names) | common | values

    def _reference(self) -> tuple[Array, Array, Array] | None:
        """The images of a reference style: picture, instance map, label map."""
        style = self.config.style
        if style.kind != "reference":
            return None
        images = (
            _read_style("picture", style.picture, self.translator.target),
            _read_style("instances", style.instances, "instances"),
            _read_style("labels", style.labels, self.translator.source),
        )
        if len({image.shape[:2] for image in images}) > 1:
            sizes = ", ".join(f"{image.shape[1]}x{image.shape[0]}" for image in images)
            raise UserError(f"infer.style: picture, instances and labels differ in size: {sizes}")
        return images


def _begin_thread(device: str, threads: int) -> None:
    """Prepare a thread that generates. Its stream on a GPU is its own."""
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.synchronize()  # the model is there
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def _read_style(name: str, uri: str | None, how: Kind | Picture) -> Array:
    try:
        return decode.decode_image(Reader().read(Object(storage.absolute(uri or ""))), how)
    except ImageRejected as error:
        raise UserError(f"infer.style.{name}: {uri}: {error}") from error


# -- wiring --------------------------------------------------------------------------------------------------


def check(config: InferConfig, shards: str = "") -> None:
    """Raise UserError for what `digest` does not see. `shards`: their folder; "" if not known yet."""
    if config.input is not None:
        shards = input_shards(config)
    if shards:
        dataset.load(shards).scored_split(config.split, "infer.split")


def digest(config: InferConfig, tracking_uri: str | None = None) -> str:
    """A digest of what a run reads from outside: the input's listing, the files of model and style; or ""."""
    texts = []
    if config.input:
        if shards := input_shards(config):
            texts.append(dataset.load(shards).digest())
        else:
            with named("infer.input"):
                texts.append(inputs.plan(config, None).digest)
    if config.model:
        with named("infer.model"):
            texts.append(json.dumps(description(config.model, tracking_uri), sort_keys=True))
    texts += style_checksums(config)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest() if texts else ""


def style_checksums(config: InferConfig) -> list[str]:
    """The checksums of a reference style's images. Raises UserError for one that is not there."""
    checksums = []
    if config.style.kind == "reference":
        for name in ("picture", "instances", "labels"):
            uri = getattr(config.style, name)
            storage.require(uri, f"infer.style.{name}")
            checksums.append(hashlib.sha256(storage.read_bytes(storage.absolute(uri))).hexdigest())
    return checksums


def input_shards(config: InferConfig) -> str:
    """The config's `input` if it is a shards folder; else ""."""
    uri = inputs.location(config)
    return uri if not uri.lower().endswith(".parquet") and dataset.exists(uri) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a run, and how much of it is finished."""

    model: str
    manifest: Mapping[str, Any]
    """The model's `model.json`."""
    tracking_uri: str | None
    shards: str
    plan: InputPlan | None
    rows: int
    counts: outputs.UnitCounts
    """Images and errors of the finished units."""

    @property
    def left(self) -> list[int]:
        """Work units that are not finished."""
        return sorted(self.counts.finished.left)


def prepare(
    config: InferConfig,
    *,
    output: str,
    tracking_uri: str | None,
    model: str = "",
    shards: str = "",
    model_key: str = "infer.model",
    input_key: str = "infer.input",
) -> Work:
    """Read the model's description, list the input, and look up what `output` holds. Needs no Ray.

    model_key, input_key   what messages call the settings: a config key or a command's option

    Raises UserError as `run` does.
    """
    model = config.model or model
    with named(model_key):
        manifest = description(model, tracking_uri)
    try:
        config.check_model(manifest.get("architecture") or {})
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.overwrite:
        outputs.clear(output)
    plan = None
    if config.input is not None:
        shards = input_shards(config)
        if not shards:
            with named(input_key):
                begun = storage.exists(storage.join(output, outputs.MANIFEST))
                plan = inputs.plan(config, None if begun else output)
    if plan is None:
        spec = dataset.load(shards)
        split = spec.scored_split(config.split, "infer.split")
        logger.info("infer         generates the %s split: %s pairs", split, f"{spec.rows(split):,}")
        units, rows = len(inputs.shard_units(spec, split)), spec.rows(split)
        source = spec.digest()[:16]
    else:
        units, rows, source = plan.units, plan.rows, plan.digest
    settings = config.model_dump(mode="json", exclude={"overwrite", "model", "input", "max_reject_fraction"})
    read = " ".join([source, *style_checksums(config)])
    identity = {"model": fingerprint(manifest), "config": settings, "input": read}
    outputs.begin(output, identity, {"rows": rows, "units": units})
    storage.write_json(storage.join(output, "model", "model.json"), manifest)
    return Work(
        model=model,
        manifest=manifest,
        tracking_uri=tracking_uri,
        shards=shards,
        plan=plan,
        rows=rows,
        counts=outputs.UnitCounts(output, units),
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
    """Generate into `output`. `model` and `shards` are the pipeline's, used if the config names no others.

    Raises UserError if there is no such model or input, or the output folder holds another run's images;
    StageError if the work failed.
    """
    work = prepare(config, output=output, tracking_uri=track.uri or None, model=model, shards=shards)
    return finish(config, resources, work, output)


def finish(config: InferConfig, resources: Resources, work: Work, output: str) -> Outcome:
    """Do the units that are left. Raises StageError if more sources than allowed cannot be used."""
    if work.left:
        job = make_job(config, resources, work, output)
        gpu, total, before = job.device == "cuda", work.rows * config.samples, work.counts.total["images"]
        most = pool_size(resources, gpu=gpu)
        with Progress("infer", total=total, unit="images", done=before) as progress:
            for unit, done in on_actors(InferenceWorker, job, work.left, stage="infer", most=most, gpu=gpu):
                work.counts.add(unit, done)
                if done["images"]:
                    INFER_IMAGES.inc(done["images"])
                progress.advance(done["images"])
    counts = work.counts.total
    errors = {name: value for name, value in sorted(counts.items()) if name.startswith("error_")}
    failed = sum(errors.values())
    if failed > config.max_reject_fraction * work.rows:
        worst = max(errors, key=lambda name: errors[name]).removeprefix("error_")
        raise StageError(
            f"infer: {failed:,} of {work.rows:,} sources cannot be used, most for {worst!r}"
            + "".join(f"; {key!r}: {error}" for key, error in outputs.failures(output, EXAMPLES))
            + f"; {output}/table has every reason; infer.max_reject_fraction is {config.max_reject_fraction}"
        )
    return Outcome(counts={"images": counts["images"], "errors": failed, **errors})


def make_job(config: InferConfig, resources: Resources, work: Work, output: str) -> InferJob:
    """The job for the processes of this cluster. Raises UserError for settings that do not fit the model."""
    gpu = uses_gpu(resources)
    size, preprocessing = None, work.manifest.get("preprocessing") or {}
    if work.shards:
        trained = preprocessing.get("size")
        stored = dataset.load(work.shards).size
        size = source_size(stored, tuple(trained) if trained else None, config.size)
    kind = (preprocessing.get("pictures") or {}).get("target", {}).get("kind", "rgb")
    if kind == "grey16" and config.format not in ("png", "tiff"):
        raise UserError(
            f"infer.format: {config.format} cannot hold this model's 16-bit images; use png or tiff"
        )
    if kind != "rgb" and config.palette is not None:
        raise UserError(f"infer.palette: this model's images are {kind}, not colours of labels")
    return InferJob(
        config=config,
        model=work.model,
        tracking_uri=work.tracking_uri,
        output=output,
        shards=work.shards,
        plan=work.plan,
        size=size,
        device="cuda" if gpu else "cpu",
        threads=threads(resources, pool_size(resources, gpu=gpu)),
        io_threads=resources.io_threads,
        # Without shards or a size, shapes may differ from image to image, and each would be compiled.
        compiled=resources.compile
        and gpu
        and (bool(work.shards) or config.size is not None)
        and config.tile is None
        and not config.stochastic,
    )
