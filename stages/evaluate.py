"""Judge generated images against their targets, beside baselines.

in:  shards (targets, and the training split for the baselines), a folder of generated images
out: metrics.parquet        a row an image: key, split, group, every metric, every baseline's
     summary.json           the means: of the model, of each baseline, by split and group
     confusion.json         class by class, where a segmenter or a palette was given
     mean_target.png        the mean training target

The images are another stage's (`inference.outputs` names them) or any other system's (`images`, `names`).
Units of work do not depend on how many processes do them, and their sums are added in unit order: one worker
and many give the same numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from ray.exceptions import RayError

from stages import storage
from stages.base import Outcome, Resources, Role, Split
from stages.config.evaluate import (
    BaselineConfig,
    EvaluateConfig,
)
from stages.errors import StageError, UserError
from stages.images import colour, decode, encode, geometry, pictures
from stages.images.kinds import Array, ImageRejected
from stages.inference import inputs, outputs
from stages.inference.inputs import Run as RowGroups
from stages.inference.model_source import fingerprint
from stages.inference.translator import Translator
from stages.models.build import build_encoder, build_generator
from stages.models.fast.heap import keep_freed_memory
from stages.models.files.saved import LoadedModel, Manifest
from stages.objects.fetch import Object, Reader
from stages.parallel.cluster import UNITS_AT_ONCE, failure, on_actors, pool_size, threads, uses_gpu
from stages.progress import Progress
from stages.scoring import metrics
from stages.scoring.metrics import MeanImage, Moments, Sums
from stages.scoring.networks import Inception, Segmenter, feature_names, load_lpips, lpips_name, pairwise_mean
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample
from stages.shards.row_groups import num_row_groups, read_unit

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1

MODEL, BASELINES = "model", ("mean_target", "untrained", "nearest")
COMPARED = ("l1", "psnr", "ssim", "ms_ssim")
THUMBNAIL = 16  # side of the pictures by which the nearest training source is found
MAX_GROUPS = 200  # groups in summary.json; more are no summary
KID_IMAGES = 10_000
READ_AHEAD = 8

logger = logging.getLogger(__name__)


# -- rules -----------------------------------------------------------------------------------------


def same_size(generated: Array, target: Array) -> tuple[Array, Array]:
    """Two pictures at one size: the larger is made as small as the smaller, never the other way."""
    if generated.shape == target.shape:
        return generated, target
    size = (min(generated.shape[1], target.shape[1]), min(generated.shape[0], target.shape[0]))
    return geometry.resize(generated, size, "rgb"), geometry.resize(target, size, "rgb")


def thumbnail(source: Array) -> np.ndarray:
    """A source picture (H, W, 3) as the vector by which the nearest one is found, uint8."""
    return geometry.resize(source, (THUMBNAIL, THUMBNAIL), "rgb").reshape(-1)


def is_candidate(key: str, share: float) -> bool:
    """Whether a training pair is among the share that is looked through; a function of its key."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    return number < share * 2**64


def nearest(vector: np.ndarray, candidates: np.ndarray) -> int:
    """Index of the candidate (N, D) uint8 with the least squared distance; the first of equals."""
    wide = vector.astype(np.int32)
    best, least = 0, np.iinfo(np.int64).max
    for start in range(0, len(candidates), 4096):
        part = ((candidates[start : start + 4096].astype(np.int32) - wide) ** 2).sum(1)
        place = int(part.argmin())
        if part[place] < least:
            best, least = start + place, int(part[place])
    return best


def summarise(rows: Iterator[Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
    """The summary of rows in order: means and deviations of the model, means of baselines and groups."""
    model, groups = Sums(), dict[str, Sums]()
    baselines = {name: Sums() for name in BASELINES}
    counts: Counter[str] = Counter()
    for row in rows:
        if row["error"] is not None:
            counts["missing"] += 1
            continue
        counts["images"] += 1
        scores = {name: row[name] for name in names if row.get(name) is not None}
        model.add(scores)
        for group in dict.fromkeys((row["split"], "/".join(filter(None, (row["split"], row["group"]))))):
            if group in groups or len(groups) < MAX_GROUPS:
                groups.setdefault(group, Sums()).add({**scores, "_": 1.0})
        for base, sums in baselines.items():
            found = {n: row[f"{base}_{n}"] for n in COMPARED if row.get(f"{base}_{n}") is not None}
            if found:
                sums.add({**found, "_": 1.0})
    means = model.means()
    return {
        **{name: means[name] for name in names if name in means},
        "num_images": counts["images"],
        "num_missing": counts["missing"],
        "deviations": model.deviations(),
        "baselines": {name: _told(sums) for name, sums in baselines.items() if sums.count},
        "groups": {name: _told(sums) for name, sums in sorted(groups.items())},
    }


def _told(sums: Sums) -> dict[str, float]:
    return {
        **{name: value for name, value in sums.means().items() if name != "_"},
        "num_images": sums.count.get("_", 0),
    }


# -- the baselines' view of the training split -----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the baselines know of the training split."""

    mean: Array | None
    """(H, W, 3) uint8."""
    vectors: np.ndarray
    """(N, D) uint8 thumbnails of candidates."""
    places: list[tuple[str, int, int]]
    """File, row group and row in it of each candidate."""


def look_through(item: Mapping[str, Any], *, shards: str, share: float, mean: bool) -> dict[str, Any]:
    """A partial sum of the targets of some training files, and thumbnails of the candidates among them."""
    spec = dataset.load(shards)
    width, height = spec.size
    total = MeanImage.empty(height, width, 3)
    vectors, places = [], []
    for name in item["files"]:
        for group, row, sample in stored(shards, spec, "train", RowGroups(name, 0, 1 << 30)):
            if mean:
                total.add(sample.picture(spec, "target"))
            if is_candidate(sample.key, share):
                vectors.append(thumbnail(sample.picture(spec, "source")))
                places.append((name, group, row))
    return {
        "order": item["order"],
        "total": total.total.tobytes() if mean else b"",
        "count": total.count,
        "vectors": np.array(vectors, np.uint8).tobytes(),
        "places": json.dumps(places),
    }


def stored(shards: str, spec: DatasetSpec, split: Split, run: RowGroups) -> Iterator[tuple[int, int, Sample]]:
    """Row group, row and sample of every pair in a run of row groups."""
    for group in range(run.start, min(run.stop, num_row_groups(storage.join(shards, run.name)))):
        table = read_unit(shards, {"file": run.name, "group": group}, dataset.columns(spec))
        for row in range(table.num_rows):
            yield group, row, dataset.sample_of(shards, spec, split, run.name, table, row)


def training(config: BaselineConfig, shards: str, spec: DatasetSpec) -> Training | None:
    """Look through the training split in parallel; None if there is none or nobody asks for it."""
    files = [file.name for file in spec.splits.get("train", ())]
    if not files or not (config.mean_target or config.nearest):
        return None
    share = min(1.0, config.nearest_candidates / max(1, spec.rows("train"))) if config.nearest else 0.0
    pieces = min(len(files), 256)  # what the driver adds up is 256 partial sums, however many files there are
    items = [{"order": i, "files": files[i::pieces]} for i in range(pieces)]
    work = ray.data.from_items(items, override_num_blocks=pieces).map(
        look_through,
        fn_kwargs={"shards": shards, "share": share, "mean": config.mean_target},
        num_cpus=0.5,
    )
    width, height = spec.size
    whole = MeanImage.empty(height, width, 3)
    found: dict[int, tuple[np.ndarray, list[tuple[str, int, int]]]] = {}
    try:
        for part in work.iter_rows():
            if part["count"]:
                whole.merge(
                    MeanImage(
                        np.frombuffer(part["total"], np.int64).reshape(whole.total.shape), part["count"]
                    )
                )
            vectors = np.frombuffer(part["vectors"], np.uint8).reshape(-1, THUMBNAIL * THUMBNAIL * 3)
            found[part["order"]] = (vectors, [tuple(place) for place in json.loads(part["places"])])
    except RayError as error:
        raise failure("evaluate", error) from error
    ordered = [found[order] for order in sorted(found)]
    return Training(
        mean=whole.image() if whole.count else None,
        vectors=np.concatenate([vectors for vectors, _ in ordered]),
        places=[place for _, places in ordered for place in places],
    )


# -- one process that judges -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that a process needs to know."""

    config: EvaluateConfig
    shards: str
    images: str
    suffix: str  # of our own outputs; "" for another system's images
    samples: int
    manifest: str  # model.json of the model that generated, "" if unknown
    training: Any  # reference to a Training in Ray's store, or None
    output: str
    device: str
    threads: int
    io_threads: int
    lpips: str
    untrained: frozenset[int]
    """Units whose images the untrained network is run on."""
    nearest: frozenset[int]


class Judge:
    """Scores units of targets."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(max(1, job.threads // UNITS_AT_ONCE))  # units are judged side by side
        keep_freed_memory()
        self.job, self.config = job, job.config
        self.spec = dataset.load(job.shards)
        self.units = inputs.shard_units(self.spec, job.config.split)
        self.training: Training | None = None if job.training is None else ray.get(job.training)
        self.reader = Reader()
        self.pool = ThreadPoolExecutor(job.io_threads, thread_name_prefix="evaluate-io")
        with tempfile.TemporaryDirectory() as temp:
            folder, config = Path(temp), job.config
            self.lpips = load_lpips(config.lpips, folder, job.device) if config.lpips else None
            self.inception = Inception(config.inception, folder, job.device) if config.inception else None
            self.segmenter = Segmenter(config.segmenter, folder, job.device) if config.segmenter else None
        self._untrained: Translator | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Judge units; returns, for each, {unit, images}."""
        return {"unit": list(batch["unit"]), "images": [self.do(int(unit)) for unit in batch["unit"]]}

    def do(self, unit: int) -> int:
        """Judge one unit and write its part; returns the number of its images."""
        run = self.units[unit]
        rows, features = [], []
        matrices: dict[str, np.ndarray] = {}
        for group, place, sample, future in self._ahead(run):
            row: dict[str, Any] = {
                "key": sample.key,
                "split": sample.split,
                "group": sample.group,
                "error": None,
                "file": run.name,
                "row_group": group,
                "row": place,
                "generated": self._names(sample.key)[0],
            }
            rows.append(row)
            try:
                generated, others = future.result()
            except ImageRejected as why:
                row["error"] = str(why)
                continue
            target = sample.picture(self.spec, "target")
            row |= self._scores(generated, target, others)
            row |= self._baselines(unit, sample, target, generated)
            self._segment(sample, generated, target, matrices)
            if self.inception is not None:
                features.append((self.inception(generated), self.inception(target)))
        self._write(unit, rows, features, matrices)
        return len(rows)

    def _ahead(self, run: RowGroups) -> Iterator[tuple[int, int, Sample, Future[tuple[Array, list[Array]]]]]:
        """The pairs of a unit, a few of their generated pictures being read meanwhile."""
        waiting: deque[tuple[int, int, Sample, Future[tuple[Array, list[Array]]]]] = deque()
        for group, row, sample in stored(self.job.shards, self.spec, self.config.split, run):
            waiting.append((group, row, sample, self.pool.submit(self._generated, sample.key)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _generated(self, key: str) -> tuple[Array, list[Array]]:
        """The picture of a key, and its further samples."""
        found = [
            decode.decode_image(self.reader.read(Object(storage.join(self.job.images, name))), "rgb")
            for name in self._names(key)
        ]
        return found[0], found

    def _names(self, key: str) -> list[str]:
        """Where the pictures of a key are, below the folder of images."""
        if self.job.suffix:
            return [outputs.output_name(key, self.job.suffix, sample) for sample in range(self.job.samples)]
        return [self.config.names.replace("{key}", key).replace("{name}", key.rpartition("/")[2])]

    def _scores(self, generated: Array, target: Array, samples: list[Array]) -> dict[str, float]:
        fake, real = same_size(generated, target)
        scores = metrics.pixel_scores(fake, real)
        scores["sharpness"] = metrics.sharpness(fake)
        scores["target_sharpness"] = metrics.sharpness(real)
        if len(samples) > 1:
            scores["diversity"] = metrics.diversity(samples)
        if self.lpips is not None:
            with torch.inference_mode():
                one, other = (metrics.to_unit(x).to(self.job.device) * 2 - 1 for x in (fake, real))
                scores[self.job.lpips] = float(self.lpips(one, other))
            if len(samples) > 1:
                scores[f"diversity_{self.job.lpips}"] = pairwise_mean(self.lpips, samples, self.job.device)
        return scores

    def _baselines(self, unit: int, sample: Sample, target: Array, generated: Array) -> dict[str, float]:
        """The same scores for what a baseline gives instead, at the size the model is judged at."""
        known = self.training
        rivals: dict[str, Array] = {}
        if known is not None and known.mean is not None and self.config.baselines.mean_target:
            rivals["mean_target"] = known.mean
        if unit in self.job.untrained and self.job.manifest:
            rivals["untrained"] = self._from_untrained(sample, target, generated)
        if unit in self.job.nearest and known is not None and len(known.vectors):
            vector = thumbnail(sample.picture(self.spec, "source"))
            name, group, row = known.places[nearest(vector, known.vectors)]
            rivals["nearest"] = self._stored_target(name, group, row)
        size = (generated.shape[1], generated.shape[0])
        found: dict[str, float] = {}
        for base, image in rivals.items():
            fake, real = same_size(geometry.resize(image, size, "rgb"), target)
            found |= {f"{base}_{name}": value for name, value in metrics.pixel_scores(fake, real).items()}
        return found

    def _stored_target(self, name: str, group: int, row: int) -> Array:
        table = read_unit(self.job.shards, {"file": name, "group": group}, dataset.columns(self.spec))
        found = dataset.sample_of(self.job.shards, self.spec, "train", name, table, row)
        return found.picture(self.spec, "target")

    def _from_untrained(self, sample: Sample, target: Array, generated: Array) -> Array:
        if self._untrained is None:
            self._untrained = Translator(untrained(self.job.manifest), device=self.job.device)
        translator = self._untrained
        size = (generated.shape[1], generated.shape[0])
        source = geometry.resize(sample.images["source"], size, translator.source_kind)
        instance = sample.images.get("instance")
        ids = None if instance is None else geometry.resize(instance, size, "instances")
        reference = None
        if translator.model.encoder is not None and ids is not None:
            reference = (geometry.resize(target, size, "rgb"), ids, source)
        try:
            (out,) = translator.translate(
                [source], None if ids is None else [ids], style="reference", reference=reference
            )
        except ValueError as error:
            raise StageError(f"evaluate: the untrained network refuses {sample.key}: {error}") from error
        light = source if translator.source_kind == "lab_l" else None
        return pictures.picture(out, translator.target_kind, lightness=light)

    def _segment(
        self, sample: Sample, generated: Array, target: Array, matrices: dict[str, np.ndarray]
    ) -> None:
        def add(
            name: str, predicted: np.ndarray, actual: np.ndarray, classes: int, ignore: int | None
        ) -> None:
            found = metrics.confusion(predicted, actual, classes, ignore)
            matrices[name] = matrices.get(name, 0) + found

        config = self.config
        if self.segmenter is not None and config.segmenter is not None:
            role: Role | None = label_role(self.spec)
            if role is not None and role in sample.images:
                actual = self.segmenter.actual(sample.images[role])
                for name, image in (("generated", generated), ("target", target)):
                    sized = geometry.resize(image, (actual.shape[1], actual.shape[0]), "rgb")
                    add(name, self.segmenter(sized), actual, config.segmenter.classes, -1)
        if config.palette is not None:
            fake, real = same_size(generated, target)
            colors = config.palette.colors
            predicted, wanted = (colour.nearest_class(image, colors) for image in (fake, real))
            add("palette", predicted, wanted, len(colors), config.palette.ignore)

    def _write(
        self,
        unit: int,
        rows: list[dict[str, Any]],
        features: list[tuple[np.ndarray, np.ndarray]],
        matrices: dict[str, np.ndarray],
    ) -> None:
        """Sums first, the part that says "finished" last."""
        sink = io.BytesIO()
        arrays = {f"matrix_{name}": matrix for name, matrix in matrices.items()}
        if features:
            arrays |= {"fake": np.stack([f for f, _ in features]), "real": np.stack([r for _, r in features])}
        if arrays:
            np.savez(sink, **arrays)  # type: ignore[arg-type]
            where = storage.join(self.job.output, "parts", f"sums-{unit:05d}.npz")
            storage.write_bytes(where, sink.getvalue())
        fields = {
            **ROW_FIELDS,
            **{name: pa.float64() for name in dict.fromkeys(n for r in rows for n in r)},
            **ROW_FIELDS,
        }
        table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
        storage.write_parquet(part_uri(self.job.output, unit), table)


ROW_FIELDS = {
    "key": pa.string(),
    "split": pa.string(),
    "group": pa.string(),
    "error": pa.string(),
    "file": pa.string(),
    "row_group": pa.int32(),
    "row": pa.int32(),
    "generated": pa.string(),  # below the folder of images
}


def part_uri(output: str, unit: int) -> str:
    """A unit's rows."""
    return storage.join(output, "parts", f"part-{unit:05d}.parquet")


def label_role(spec: DatasetSpec) -> Role | None:
    """The role whose images are the classes of the target's pixels."""
    for role in ("label", "source"):
        if role in spec.roles and spec.roles[role].kind == "labels":
            return role
    return None


def untrained(manifest: str) -> LoadedModel:
    """The network of a `model.json` with initial weights."""
    told = Manifest.model_validate_json(manifest)
    return LoadedModel(
        generator=build_generator(told.architecture, told.inputs, enhancers=told.enhancers, seed=0).eval(),
        encoder=None if (made := build_encoder(told.architecture, told.inputs)) is None else made.eval(),
        styles=None,
        architecture=told.architecture,
        inputs=told.inputs,
        enhancers=told.enhancers,
        preprocessing=told.preprocessing,
        extra={},
        weights="raw",
        fingerprint="untrained",
    )


# -- wiring ----------------------------------------------------------------------------------------


def run(
    config: EvaluateConfig,
    resources: Resources,
    *,
    output: str,
    track: Run,
    shards: str,
    images: str = "",
) -> Outcome:
    """Judge the split's images into `output`. `images`: the folder infer wrote, where the config names none.

    Raises UserError for absent weights, an absent folder or split; StageError where images are missing.
    """
    spec = dataset.load(shards)
    units = inputs.shard_units(spec, config.split)
    if not units:
        raise UserError(f"evaluate.split: the shards hold no pair of the split {config.split!r}")
    job = make_job(config, resources, spec, shards, images, output)
    with Progress("evaluate", total=spec.rows(config.split), unit="images") as progress:
        done = finished(output)
        left = [unit for unit in range(len(units)) if unit not in done]
        if left:
            known = training(config.baselines, shards, spec)
            if known is not None:
                job = with_training(job, known, output)
            gpu = job.device == "cuda"
            most = pool_size(resources, gpu=gpu)
            for row in on_actors(Judge, job, left, stage="evaluate", most=most, gpu=gpu):
                progress.advance(int(row["images"]))
    summary = gather(config, job, output, len(units))
    if summary["num_missing"] > config.max_missing_fraction * (
        summary["num_images"] + summary["num_missing"]
    ):
        raise StageError(
            f"evaluate: {summary['num_missing']:,} targets have no usable image in {job.images} "
            f"(e.g. {summary['example_missing']}); evaluate.max_missing_fraction is "
            f"{config.max_missing_fraction}"
        )
    storage.write_json(storage.join(output, "summary.json"), summary)
    told = headline(summary)
    track.artifact("summary.json", json.dumps(summary, indent=2).encode())
    for name in summary.get("segmentation", {}):
        matrix = np.array(storage.read_json(storage.join(output, "confusion.json"))[name])
        track.artifact(f"confusion/{name}.json", json.dumps(matrix.tolist()).encode())
        track.artifact(f"confusion/{name}.png", encode.encode_png(metrics.confusion_picture(matrix)))
    return Outcome(counts={"images": summary["num_images"], "missing": summary["num_missing"]}, metrics=told)


def make_job(
    config: EvaluateConfig, resources: Resources, spec: DatasetSpec, shards: str, images: str, output: str
) -> Job:
    """The job for the processes. Raises UserError for weights or a folder that are not there."""
    if config.segmenter is not None and label_role(spec) is None:
        raise UserError("evaluate.segmenter: the pairs have no label maps to judge by")
    folder, suffix, samples, manifest = images, "", 1, ""
    if config.images is not None:
        folder = storage.absolute(config.images)
        if not storage.exists(folder):
            raise UserError(f"evaluate.images: {folder}: there is no such folder")
    elif folder:
        told = storage.read_json(storage.join(folder, outputs.MANIFEST))
        suffix, samples = outputs.SUFFIX[told["config"]["format"]], int(told["config"]["samples"])
        manifest = storage.read_bytes(storage.join(folder, "model", "model.json")).decode()
    else:
        raise UserError("evaluate.images: name a folder of images; none were generated here")
    gpu = uses_gpu(resources)
    units = inputs.shard_units(spec, config.split)
    return Job(
        config=config,
        shards=shards,
        images=folder,
        suffix=suffix,
        samples=samples,
        manifest=manifest,
        training=None,
        output=output,
        device="cuda" if gpu else "cpu",
        threads=threads(resources, pool_size(resources, gpu=gpu)),
        io_threads=resources.io_threads,
        lpips=lpips_name(config.lpips) if config.lpips else "",
        untrained=first_units(spec, config.split, units, config.baselines.untrained),
        nearest=first_units(spec, config.split, units, config.baselines.nearest),
    )


def first_units(spec: DatasetSpec, split: Split, units: list[RowGroups], rows: int) -> frozenset[int]:
    """The first units that together hold at least `rows` pairs, or all."""
    groups = {file.name: file.row_groups for file in spec.splits[split]}
    chosen, held = [], 0
    for index, unit in enumerate(units):
        if held >= rows:
            break
        chosen.append(index)
        held += sum(groups[unit.name][unit.start : unit.stop])
    return frozenset(chosen)


def with_training(job: Job, known: Training, output: str) -> Job:
    """The job with the training split's view in Ray's store, its mean also as a picture."""
    if known.mean is not None:
        storage.write_bytes(storage.join(output, "mean_target.png"), encode.encode_png(known.mean))
    values = {name: getattr(job, name) for name in Job.__dataclass_fields__}
    return Job(**{**values, "training": ray.put(known)})


def finished(output: str) -> set[int]:
    """Units whose part is there."""
    return {
        int(name[5:-8])
        for name in storage.list_names(storage.join(output, "parts"))
        if name.startswith("part-") and name.endswith(".parquet")
    }


def gather(config: EvaluateConfig, job: Job, output: str, units: int) -> dict[str, Any]:
    """Add the units up in order: metrics.parquet, and the summary. Holds one unit at a time."""
    schema = pa.unify_schemas([pq.read_schema(_open(part_uri(output, unit))) for unit in range(units)])
    names = [
        n for n in schema.names if n not in ROW_FIELDS and not n.startswith(tuple(f"{b}_" for b in BASELINES))
    ]
    missing: list[str] = []

    def rows(writer: pq.ParquetWriter) -> Iterator[dict[str, Any]]:
        for unit in range(units):
            table = storage.read_parquet(part_uri(output, unit))
            for name in schema.names:
                if name not in table.column_names:
                    table = table.append_column(name, pa.nulls(table.num_rows, schema.field(name).type))
            table = table.select(schema.names)
            writer.write_table(table)
            for row in table.to_pylist():
                if row["error"] is not None and not missing:
                    missing.append(f"{row['key']}: {row['error']}")
                yield row

    uri = storage.join(output, "metrics.parquet")

    def added_up() -> dict[str, Any]:
        with storage.create(uri) as file, pq.ParquetWriter(file, schema) as writer:
            return summarise(rows(writer), names)

    summary = storage.written(added_up, uri)
    summary["example_missing"] = missing[0] if missing else None
    summary["images"] = job.images
    summary |= gather_sums(config, output, units)
    if job.manifest:
        summary["model"] = fingerprint(json.loads(job.manifest))
    return summary


def _open(uri: str) -> Any:
    return io.BytesIO(storage.read_bytes(uri))


def gather_sums(config: EvaluateConfig, output: str, units: int) -> dict[str, Any]:
    """Segmentation scores, FID and KID over all units, in unit order."""
    matrices: dict[str, np.ndarray] = {}
    moments: dict[str, Moments] = {}
    kept: dict[str, list[np.ndarray]] = {"fake": [], "real": []}
    for unit in range(units):
        where = storage.join(output, "parts", f"sums-{unit:05d}.npz")
        if not (config.inception or config.segmenter or config.palette) or not storage.exists(where):
            continue
        with np.load(_open(where)) as arrays:
            for name in arrays.files:
                if name.startswith("matrix_"):
                    matrices[name[7:]] = matrices.get(name[7:], 0) + arrays[name]
                else:
                    moments.setdefault(name, Moments.empty(arrays[name].shape[1])).add(arrays[name])
                    if sum(map(len, kept[name])) < KID_IMAGES:
                        kept[name].append(arrays[name])
    found: dict[str, Any] = {}
    if matrices:
        listed = {name: matrix.tolist() for name, matrix in matrices.items()}
        storage.write_json(storage.join(output, "confusion.json"), listed)
        found["segmentation"] = {n: metrics.segmentation_scores(m) for n, m in matrices.items()}
    if config.inception is not None and moments and moments["fake"].count > 1:
        fid, kid = feature_names(config.inception)
        found[fid] = metrics.frechet_distance(moments["fake"], moments["real"])
        found[kid] = metrics.kernel_distance(np.concatenate(kept["fake"]), np.concatenate(kept["real"]))
        found["feature_images"] = moments["fake"].count
    return found


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers by which runs are compared."""
    told = {name: float(summary[name]) for name in summary if isinstance(summary[name], float)}
    for base, row in summary["baselines"].items():
        told |= {f"{base}_l1": float(row["l1"])} if "l1" in row else {}
    for name, scores in summary.get("segmentation", {}).items():
        prefix = "" if name in ("generated", "palette") else f"{name}_"
        told |= {f"{prefix}{key}": float(value) for key, value in scores.items()}
    return told
