"""Score generated images against their targets, and baselines with them.

in:  shards (targets, and the training split for the baselines), a folder of generated images
out: table/                 a part for each unit of work (`scoring.table`)
     metrics.parquet        a row an image: key, split, group, every metric, every baseline's
     summary.json           the means with their intervals: of the model, of each baseline, by split and group
     confusion.json         class by class, where a segmenter or a palette is configured
     mean_target.png        the mean training target

The images are another stage's (`inference.outputs` names them) or any other system's (`images`, `names`).
Units of work do not depend on how many processes do them, and their sums are added in unit order: one worker
and many give the same numbers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from stages import storage
from stages.base import Outcome, Resources, Role, Split
from stages.config.evaluate import SMALLEST_SIDE, BaselineConfig, EvaluateConfig
from stages.errors import StageError, UserError, named
from stages.images import colour, decode, encode, geometry, pictures
from stages.images.kinds import Array, ImageRejected
from stages.inference import inputs, outputs
from stages.inference.inputs import RowGroupRange as RowGroups
from stages.inference.translator import Translator
from stages.models.fast.heap import keep_freed_memory
from stages.models.files.saved import fingerprint
from stages.objects.fetch import Object, Reader
from stages.parallel.cluster import UNITS_AT_ONCE, each, on_actors, pool_size, threads, uses_gpu
from stages.parallel.threads import prefetch_map
from stages.progress import Progress
from stages.scoring import baselines, efficientnet, metrics, table
from stages.scoring.baselines import BaselineData, Place
from stages.scoring.lpips import PUBLISHED_BACKBONES, LpipsScorer, lpips_name
from stages.scoring.metrics import MeanImage
from stages.scoring.networks import Inception, Segmenter, feature_names
from stages.scoring.table import UnitScores
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample
from stages.shards.row_groups import read_unit

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 7

READ_AHEAD = 8
DIGITS = "<digits>"  # in a metric's name: the first ones of its weights' SHA-256
AT_ONCE = {"cpu": 1, "cuda": 16}
"""Pairs that are scored together."""

SCAN_PARTS = 256  # parts of the training split at most: the driver adds up as many partial sums
PAIRS_A_SCAN = 1000  # that a process is worth starting for: it takes some seconds

logger = logging.getLogger(__name__)


# -- rules -----------------------------------------------------------------------------------------


def same_size(generated: Array, target: Array) -> tuple[Array, Array]:
    """Two pictures at one size: the larger is made as small as the smaller, never the other way."""
    if generated.shape == target.shape:
        return generated, target
    size = (min(generated.shape[1], target.shape[1]), min(generated.shape[0], target.shape[0]))
    return geometry.resize(generated, size, "rgb"), geometry.resize(target, size, "rgb")


def first_units(spec: DatasetSpec, split: Split, rows: int) -> int:
    """How many units, from the first, together hold at least `rows` pairs; or the number of all."""
    row_groups = {file.name: file.row_groups for file in spec.splits[split]}
    units = inputs.shard_units(spec, split)
    held = accumulate((sum(row_groups[one.name][one.start : one.stop]) for one in units), initial=0)
    return sum(before < rows for before, _ in zip(held, units, strict=False))


def label_role(spec: DatasetSpec) -> Role | None:
    """The role whose images are the classes of the target's pixels."""
    for role in ("label", "source"):
        if role in spec.roles and spec.roles[role].kind == "labels":
            return role
    return None


# -- the training split, for the baselines -----------------------------------------------------------


def stored_pairs(shards: str, spec: DatasetSpec, unit: RowGroups) -> Iterator[tuple[Place, Sample]]:
    """The pairs in a run of row groups."""
    for group in range(unit.start, unit.stop):
        rows = read_unit(shards, {"file": unit.name, "group": group}, dataset.columns(spec))
        for row in range(rows.num_rows):
            sample = dataset.sample_of(shards, spec, unit.split, unit.name, rows, row)
            yield (unit.name, group, row), sample


def scan_files(files: list[RowGroups], *, shards: str, share: float, mean: bool) -> BaselineData:
    """What the baselines keep of some training files: a sum of the targets, a share of the sources."""
    spec = dataset.load(shards)
    total = MeanImage()
    vectors, places = [np.zeros((0, baselines.THUMBNAIL_SIZE), np.uint8)], []
    for file in files:
        for place, sample in stored_pairs(shards, spec, file):
            if mean:
                total.add(sample.picture(spec, "target"))
            if baselines.is_candidate(sample.key, share):
                vectors.append(baselines.thumbnail(sample.picture(spec, "source"))[None])
                places.append(place)
    return BaselineData(mean=total, vectors=np.concatenate(vectors), places=places)


def scan_training_split(config: BaselineConfig, shards: str, spec: DatasetSpec) -> BaselineData | None:
    """What the baselines keep of the training split, read by tasks; None if no baseline reads it."""
    stored = spec.splits.get("train", ())
    files = [RowGroups("train", file.name, 0, len(file.row_groups)) for file in stored]
    if not files or not (config.mean_target or config.nearest):
        return None
    share = min(1.0, config.nearest_candidates / max(1, spec.rows("train"))) if config.nearest else 0.0
    count = min(len(files), SCAN_PARTS)

    def scan(part: int) -> tuple[int, BaselineData]:
        return part, scan_files(files[part::count], shards=shards, share=share, mean=config.mean_target)

    parts = dict(each(scan, range(count), stage="evaluate", blocks=1 + spec.rows("train") // PAIRS_A_SCAN))
    return baselines.merge([parts[part] for part in range(count)])


# -- one process that scores -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """All that an evaluation worker needs to know."""

    config: EvaluateConfig
    shards: str
    split: Split
    images: str  # the folder of generated images
    suffix: str  # of our own outputs; "" for another system's images
    samples: int
    manifest: str  # model.json of the model that generated, "" if unknown
    baseline_data: Any = None  # reference to a BaselineData in Ray's store, or None
    output: str
    device: str
    threads: int
    io_threads: int
    lpips: str  # the name of the distance, "" for none
    untrained: int
    """The number of units, from the first, whose images the untrained network translates."""
    nearest: int
    """The number of units for whose images the nearest training source is looked up."""


@dataclass(frozen=True, slots=True)
class ReadPair:
    """A pair to score: its row of the table, and the pictures generated for it; none if it has an error."""

    record: dict[str, Any]
    sample: Sample
    samples: list[Array]
    target: Array

    @property
    def shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the first generated picture and of the target."""
        return self.samples[0].shape, self.target.shape


class EvaluationWorker:
    """Scores units of targets."""

    def __init__(self, job: EvaluateJob) -> None:
        torch.set_num_threads(max(1, job.threads // UNITS_AT_ONCE))  # units are scored side by side
        keep_freed_memory()
        self.job, self.config = job, (config := job.config)
        self.spec = dataset.load(job.shards)
        self.units = inputs.shard_units(self.spec, job.split)
        data: BaselineData | None = None if job.baseline_data is None else ray.get(job.baseline_data)
        self.baseline_data = data
        self.mean_target = data.mean.image() if data is not None and data.mean.count else None
        self.reader = Reader()
        self.pool = ThreadPoolExecutor(job.io_threads, thread_name_prefix="evaluate-io")
        self.lpips = LpipsScorer(config.lpips, job.device) if config.lpips else None
        self.features: dict[str, Callable[[Sequence[Array]], np.ndarray]] = {}
        if config.inception:
            self.features["inception"] = Inception(config.inception, job.device)
        if config.perceptual:
            self.features[config.perceptual] = efficientnet.PerceptualFeatures(job.device)
        self.segmenter = Segmenter(config.segmenter, job.device) if config.segmenter else None
        self._untrained: Translator | None = None

    def __call__(self, unit: int) -> int:
        """Score one unit and write its part; returns the number of its images."""
        scores = UnitScores()
        pairs = stored_pairs(self.job.shards, self.spec, self.units[unit])
        pending: list[ReadPair] = []
        for pair in prefetch_map(self.pool, self._read, pairs, ahead=READ_AHEAD):
            scores.rows.append(pair.record)
            if not pair.samples:
                continue
            if pending and (pair.shape != pending[0].shape or len(pending) == AT_ONCE[self.job.device]):
                self._add_scores(unit, pending, scores)
                pending = []
            pending.append(pair)
        if pending:
            self._add_scores(unit, pending, scores)
        scores.write(outputs.part_uri(self.job.output, unit))
        return len(scores.rows)

    def _read(self, pair: tuple[Place, Sample]) -> ReadPair:
        """A pair with the pictures generated for it, or with why there are none."""
        (file, row_group, row), sample = pair
        names = self._names(sample.key)
        record: dict[str, Any] = {
            "key": sample.key,
            "split": sample.split,
            "group": sample.group,
            "error": None,
            "file": file,
            "row_group": row_group,
            "row": row,
            "generated": names[0],
        }
        objects = [Object(storage.join(self.job.images, name)) for name in names]
        try:
            samples = [decode.decode_image(self.reader.read(one), "rgb") for one in objects]
        except ImageRejected as rejection:
            record["error"], samples = str(rejection), []
        return ReadPair(record, sample, samples, sample.picture(self.spec, "target"))

    def _names(self, key: str) -> list[str]:
        """Where the pictures of a key are, below the folder of images."""
        if self.job.suffix:
            return [outputs.output_name(key, self.job.suffix, sample) for sample in range(self.job.samples)]
        return [self.config.names.replace("{key}", key).replace("{name}", key.rpartition("/")[2])]

    def _add_scores(self, unit: int, pairs: list[ReadPair], scores: UnitScores) -> None:
        """Score pairs of one shape together, into their records and the unit's sums."""
        sized = [same_size(pair.samples[0], pair.target) for pair in pairs]
        fakes, reals = [fake for fake, _ in sized], [real for _, real in sized]
        records = [pair.record for pair in pairs]
        _update(records, metrics.pixel_scores_of(fakes, reals, self.job.device))
        large = self.config.lpips is not None and min(fakes[0].shape[:2]) >= self.config.lpips.smallest_side
        if self.lpips is not None and large:
            _update(records, [{self.job.lpips: distance} for distance in self.lpips(fakes, reals)])
        for pair, (fake, real) in zip(pairs, sized, strict=True):
            pair.record["sharpness"] = metrics.sharpness(fake)
            pair.record["target_sharpness"] = metrics.sharpness(real)
            if len(pair.samples) > 1:
                pair.record["diversity"] = metrics.diversity(pair.samples)
                if self.lpips is not None and large:
                    pair.record[f"diversity_{self.job.lpips}"] = metrics.diversity(pair.samples, self.lpips)
            self._add_matrices(pair.sample, pair.samples[0], pair.target, scores)
        images = [self._baseline_images(unit, pair) for pair in pairs]
        for baseline in images[0]:
            found = [same_size(one[baseline], pair.target) for one, pair in zip(images, pairs, strict=True)]
            fakes, reals = [fake for fake, _ in found], [real for _, real in found]
            values = metrics.pixel_scores_of(fakes, reals, self.job.device)
            _update(records, [{f"{baseline}_{name}": v for name, v in one.items()} for one in values])
        for name, features in self.features.items():
            generated, targets = [pair.samples[0] for pair in pairs], [pair.target for pair in pairs]
            scores.add_features(name, features(generated), features(targets))

    def _baseline_images(self, unit: int, pair: ReadPair) -> dict[str, Array]:
        """Each baseline's image, at the size the model is scored at."""
        data, images, sample, generated = self.baseline_data, dict[str, Array](), pair.sample, pair.samples[0]
        if self.mean_target is not None:
            images["mean_target"] = self.mean_target
        if unit < self.job.untrained and self.job.manifest:
            images["untrained"] = self._untrained_image(sample, generated)
        places = data.places if data is not None and unit < self.job.nearest else []
        # A training pair finds itself: that is no answer.
        own = tuple(pair.record[name] for name in ("file", "row_group", "row"))
        if data is not None and (others := [number for number, place in enumerate(places) if place != own]):
            vector = baselines.thumbnail(sample.picture(self.spec, "source"))
            closest = others[baselines.nearest(vector, data.vectors[others])]
            images["nearest"] = self._stored_target(data.places[closest])
        size = (generated.shape[1], generated.shape[0])
        return {name: geometry.resize(image, size, "rgb") for name, image in images.items()}

    def _stored_target(self, place: Place) -> Array:
        file, group, row = place
        rows = read_unit(self.job.shards, {"file": file, "group": group}, dataset.columns(self.spec))
        sample = dataset.sample_of(self.job.shards, self.spec, "train", file, rows, row)
        return sample.picture(self.spec, "target")

    def _untrained_image(self, sample: Sample, generated: Array) -> Array:
        if self._untrained is None:
            model = baselines.untrained_model(self.job.manifest, self.job.device)
            self._untrained = Translator(model)
        translator, size = self._untrained, (generated.shape[1], generated.shape[0])
        images = {r: geometry.resize(one, size, self.spec.roles[r].kind) for r, one in sample.images.items()}
        source, ids = images["source"], images.get("instance")
        reference = None if ids is None else (images["target"], ids, source)
        try:
            (image,) = translator.translate(
                [source], None if ids is None else [ids], style="reference", reference=reference
            )
        except ValueError as error:
            raise StageError(f"evaluate: the untrained network refuses {sample.key}: {error}") from error
        lightness = source if translator.source_kind == "lab_l" else None
        return pictures.picture(image, translator.target_kind, lightness=lightness)

    def _add_matrices(self, sample: Sample, generated: Array, target: Array, scores: UnitScores) -> None:
        """Count the image's pixels by actual and predicted class."""
        role, palette = label_role(self.spec), self.config.palette
        if self.segmenter is not None and role is not None:
            classes, labels = self.segmenter.config.classes, sample.images.get(role)
            for name, image in (("generated", generated), ("target", target)):
                if labels is None:
                    scores.add_matrix(name, np.zeros((classes, classes), np.int64))
                    continue
                actual = self.segmenter.actual(labels)
                sized = geometry.resize(image, (actual.shape[1], actual.shape[0]), "rgb")
                scores.add_matrix(name, metrics.confusion(self.segmenter(sized), actual, classes, -1))
        if palette is not None:
            images = same_size(generated, target)
            predicted, actual = (colour.nearest_class(image, palette) for image in images)
            matrix = metrics.confusion(predicted, actual, len(palette), self.config.ignore_class)
            scores.add_matrix("palette", matrix)


def _update(records: list[dict[str, Any]], scores: list[dict[str, float]]) -> None:
    for record, values in zip(records, scores, strict=True):
        record.update(values)


# -- wiring ----------------------------------------------------------------------------------------


def check(config: EvaluateConfig, shards: str = "") -> None:
    """Raise UserError for what is not there. `shards`: where the targets are; "" if not known yet."""
    if config.perceptual is not None:
        efficientnet.weights()
    for key, uri in locations(config).items():
        storage.require(uri, key)
    if shards:
        dataset.load(shards).scored_split(config.split, "evaluate.split")


def locations(config: EvaluateConfig) -> dict[str, str]:
    """What is read from outside the pipeline, by the config's key."""
    found = {}
    for key in ("images", "lpips.backbone", "lpips.linear", "inception.weights", "segmenter.weights"):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part, None)
        if value is not None:
            found[f"evaluate.{key}"] = value
    return found


def digest(config: EvaluateConfig) -> str:
    """Digests of another system's images and of weights: scored again if one changes or is added."""
    digests = []
    for key, uri in locations(config).items():
        with named(key):
            read = inputs.listing_digest if key == "evaluate.images" else storage.file_version
            digests.append(read(uri))
    return "\n".join(filter(None, digests))  # `check` refuses the step where a file is not there


def run(
    config: EvaluateConfig,
    resources: Resources,
    *,
    output: str,
    track: Run,
    shards: str,
    images: str = "",
) -> Outcome:
    """Score the split's images into `output`. `images`: the folder infer wrote, where the config names none.

    Raises UserError for absent weights, an absent folder or split; StageError where images are missing.
    """
    spec = dataset.load(shards)
    split = spec.scored_split(config.split, "evaluate.split")
    logger.info("evaluate      scores the %s split: %s pairs", split, f"{spec.rows(split):,}")
    if config.lpips is None:
        logger.warning("evaluate      leaves out LPIPS: evaluate.lpips.backbone names no weights")
    distances = distance_names(config)
    job = make_job(config, resources, spec, split, shards, images, output)
    count = len(inputs.shard_units(spec, split))
    score_units(job, resources, spec, count)
    summary = summarise_units(job, count, distances, track)
    if config.images is not None and "{key}" not in config.names:
        names = storage.read_parquet(storage.join(output, "metrics.parquet"), ["generated"])["generated"]
        if (different := len(names.unique())) < len(names):
            text = f"{config.names} names {different:,} images for {len(names):,} targets"
            raise UserError(f"evaluate.names: {text}; with {{key}} each has its own")
    num_missing, num_targets = summary["num_missing"], summary["num_images"] + summary["num_missing"]
    if num_missing > config.max_missing_fraction * num_targets:
        raise StageError(
            f"evaluate: {num_missing:,} targets have no usable image in {job.images} "
            f"(e.g. {summary['example_missing']}); evaluate.max_missing_fraction is "
            f"{config.max_missing_fraction}"
        )
    storage.write_json(storage.join(output, "summary.json"), summary)
    track.artifact("summary.json", json.dumps(summary, indent=2).encode())
    counts = {"images": summary["num_images"], "missing": num_missing}
    return Outcome(counts=counts, metrics=table.headline(summary))


def distance_names(config: EvaluateConfig, digest: str | None = None) -> dict[str, tuple[str, str]]:
    """The names of the Frechet and the kernel distance by network.

    digest   the SHA-256 of Inception's weights; None: that of the file. UserError where it is absent
    """
    names = {"inception": feature_names(config.inception, digest)} if config.inception else {}
    if config.perceptual:
        names[config.perceptual] = (f"frechet_{config.perceptual}", f"kernel_{config.perceptual}")
    return names


def check_metric(
    config: EvaluateConfig, name: str, key: str, *, samples: int, side: int, of_images: bool = False
) -> None:
    """Raise UserError, naming the setting, for a metric that is not measured.

    Whether weights are the published ones, from which a metric has its name, is not looked up: the files are
    large, and may be far away.

    samples, side   images per source; the largest that the shorter side of one can be
    of_images       accept only what is measured of single images
    """
    measured, lpips = [one for one in metrics.PIXEL_METRICS if side >= SMALLEST_SIDE.get(one, 0)], []
    if config.lpips is not None and side >= config.lpips.smallest_side:
        lpips = [lpips_name(config.lpips, one) for one in (DIGITS, PUBLISHED_BACKBONES[config.lpips.kind])]
    measured += ["sharpness", "target_sharpness", *lpips]
    measured += ["diversity", *(f"diversity_{one}" for one in lpips)] if samples > 1 else []
    if not of_images:
        for digest in (DIGITS, config.inception and config.inception.published):
            measured += chain(*distance_names(config, digest).values()) if digest else ()
        matrices = {"generated": config.segmenter, "palette": config.palette}
        measured += table.segmentation_names([one for one, configured in matrices.items() if configured])
    if re.sub("_[0-9a-f]{8}(?=_|$)", f"_{DIGITS}", name) not in measured:
        there = ", ".join(dict.fromkeys(measured))
        raise UserError(f"{key}: {name} is not measured; evaluate measures {there}")


def make_job(
    config: EvaluateConfig,
    resources: Resources,
    spec: DatasetSpec,
    split: Split,
    shards: str,
    generated: str,
    output: str,
) -> EvaluateJob:
    """The workers' job. Raises UserError for weights that are not there."""
    if config.segmenter is not None and label_role(spec) is None:
        raise UserError("evaluate.segmenter: the pairs have no label maps to score by")
    folder, suffix, samples, manifest = generated, "", 1, ""
    if config.images is not None:
        folder = storage.absolute(config.images)
    else:
        infer_config = storage.read_json(storage.join(folder, outputs.MANIFEST))["config"]
        suffix, samples = outputs.SUFFIX[infer_config["format"]], int(infer_config["samples"])
        manifest = storage.read_bytes(storage.join(folder, "model", "model.json")).decode()
    gpu = uses_gpu(resources)
    return EvaluateJob(
        config=config,
        shards=shards,
        split=split,
        images=folder,
        suffix=suffix,
        samples=samples,
        manifest=manifest,
        output=output,
        device="cuda" if gpu else "cpu",
        threads=threads(resources, pool_size(resources, gpu=gpu)),
        io_threads=resources.io_threads,
        lpips=lpips_name(config.lpips) if config.lpips else "",
        untrained=first_units(spec, split, config.baselines.untrained),
        nearest=first_units(spec, split, config.baselines.nearest),
    )


def score_units(job: EvaluateJob, resources: Resources, spec: DatasetSpec, count: int) -> None:
    """Score the units that are not finished yet; the mean training target is also written as a picture."""
    config, gpu = job.config, job.device == "cuda"
    with Progress("evaluate", total=spec.rows(job.split), unit="images") as progress:
        finished = outputs.finished_units(job.output)
        unfinished = [unit for unit in range(count) if unit not in finished]
        if not unfinished:
            return
        data = scan_training_split(config.baselines, job.shards, spec)
        if data is not None and data.mean.count:
            picture = encode.encode_png(data.mean.image())
            storage.write_bytes(storage.join(job.output, "mean_target.png"), picture)
        job = replace(job, baseline_data=None if data is None else ray.put(data))
        most = pool_size(resources, gpu=gpu)
        for _, images in on_actors(EvaluationWorker, job, unfinished, stage="evaluate", most=most, gpu=gpu):
            progress.advance(images)


def summarise_units(
    job: EvaluateJob, count: int, distances: dict[str, tuple[str, str]], track: Run
) -> dict[str, Any]:
    """Add up the units, in order, into metrics.parquet, confusion.json and the summary.

    distances   as `distance_names` gives them
    """
    parts = [outputs.part_uri(job.output, unit) for unit in range(count)]
    summary, groups = table.merge_parts(parts, storage.join(job.output, "metrics.parquet"))
    summary["images"] = job.images
    if distances or job.config.segmenter or job.config.palette:
        whole = table.merge_sums(parts, distances, groups)
        if whole.matrices:
            lists = {name: matrix.tolist() for name, matrix in whole.matrices.items()}
            storage.write_json(storage.join(job.output, "confusion.json"), lists)
            summary["segmentation"] = whole.segmentation
        for name, matrix in whole.matrices.items():
            track.artifact(f"confusion/{name}.json", json.dumps(matrix.tolist()).encode())
            track.artifact(f"confusion/{name}.png", encode.encode_png(metrics.confusion_picture(matrix)))
        summary |= whole.distances
        summary["intervals"] |= {name: (one.low, one.high) for name, one in whole.intervals.items()}
    if job.manifest:
        summary["model"] = fingerprint(json.loads(job.manifest))
    return summary
