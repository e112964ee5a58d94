"""One page a person can look at: the run's images, their metrics beside baselines, losses, data, times.

in:  shards, generated images, metrics, the phases' curves, the markers of every step, other systems' metrics
out: report.html, self-contained (`stages.reporting.page`)

It shows at most `max_images`: the worst, the best, and a fixed random sample. Only those and their metrics
are in memory, however large the data set is.
"""

from __future__ import annotations

import csv
import hashlib
import heapq
import io
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages import seeding, storage
from stages.base import Outcome, Resources, Split
from stages.config.report import ReportConfig
from stages.errors import UserError, one_line
from stages.images import decode, encode, geometry, pictures
from stages.images.kinds import Array, ImageRejected
from stages.inference import outputs
from stages.parallel.threads import prefetch_map
from stages.progress import duration
from stages.reporting.page import Curve, PictureCard, RejectCount, ReportData, StepTime, data_uri, page
from stages.scoring.metrics import PIXEL_METRICS, SET_DISTANCES, lower_is_better
from stages.scoring.table import difference_of, segmentation
from stages.shards import dataset, suspects
from stages.shards.dataset import DatasetSpec, Sample
from stages.storage.local import local_file

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 3

SUSPECTS = 10  # pairs of each kind
EXAMPLES = 5  # of each reason in the quarantine
QUARANTINE_FILES = 100  # looked through for examples
BASE64 = 4 / 3
SHEET_ROWS = 8  # of the overviews worst.png and best.png
PAGE_BYTES = 300_000  # of style, script, curves and tables
SUSPECT_SIDE = 192  # pixels

Picks = Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]]
"""By key: the image's row of metrics, and why it was picked (worst, best, sample)."""

logger = logging.getLogger(__name__)


# -- rules -------------------------------------------------------------------------------------------


def pick(rows: Iterator[Mapping[str, Any]], *, most: int, metric: str, seed: int) -> Picks:
    """The at most `most` rows to show: the worst, the best and a sample. Holds no more rows than that.

    No more than a third of the rows are called worst, or best. The sample depends on the seed and the key
    only, so it stays the same while the split does. Rows without the metric can only be in the sample.
    """
    sign = 1 if lower_is_better(metric) else -1
    heaps: dict[str, list[tuple[float, str, Mapping[str, Any]]]] = {"worst": [], "best": [], "sample": []}
    scored = 0
    for row in rows:
        ranks = {"sample": seeding.share(seed, row["key"])}
        value = row.get(metric)
        if value is not None:
            scored += 1
            ranks |= {"worst": sign * value, "best": -sign * value}
        for name, rank in ranks.items():
            heapq.heappush(heaps[name], (rank, row["key"], row))
            if len(heaps[name]) > most:
                heapq.heappop(heaps[name])
    third = max(1, min(most, scored) // 3)
    picks: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {}
    for name, heap in heaps.items():
        ranked = sorted(heap, key=lambda entry: (-entry[0], entry[1]))
        for _, key, row in ranked[: most if name == "sample" else third]:
            if key in picks:
                picks[key] = (row, (*picks[key][1], name))
            elif len(picks) < most:
                picks[key] = (row, (name,))
    return picks


def curves(table: pa.Table, phase: str) -> list[Curve]:
    """The losses of a phase's metrics table {step, name, value}; those of single layers are left out."""
    names = table["name"].cast(pa.string())
    losses = []
    for name in sorted(set(names.to_pylist())):
        if name.count("/") <= 1:
            rows = table.filter(pc.equal(names, name)).sort_by("step")
            steps, values = rows["step"].to_pylist(), rows["value"].to_pylist()
            losses.append(Curve(phase=phase, name=name, steps=steps, values=values))
    return losses


def phase_name(folder: str) -> str:
    """`.../train-global-0123456789ab` -> `global`."""
    name = folder.rstrip("/").rpartition("/")[2]
    return name.removeprefix("train-").rpartition("-")[0] or name


def card(spec: DatasetSpec, measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The data card's lines: the shards' contents, and what the shard stage `measured` of them."""
    lines = [("stored size", f"{spec.size[0]} x {spec.size[1]} pixels")]
    lines += [
        (f"{split} split", f"{spec.rows(split):,} pairs in {len(spec.splits[split]):,} shards")
        for split in get_args(Split)
        if split in spec.splits
    ]
    for role, stored in spec.roles.items():
        classes = f", {stored.classes} classes" if stored.classes else ""
        lines.append((role, f"{stored.kind}{classes}, kept as {stored.encoding}"))
    for split, statistics in measured.get("splits", {}).items():
        for role, sums in statistics.get("roles", {}).items():
            smallest, largest = ("x".join(map(str, sums.get(name, ()))) for name in ("smallest", "largest"))
            if smallest:
                sizes = smallest if smallest == largest else f"{smallest} to {largest}"
                lines.append((f"{split} {role}, as found", sizes))
    leaks = measured.get("leakage") or {}
    if leaks.get("held_out"):
        alike = leaks.get("found", 0) + leaks.get("found_in_val", 0)
        lines.append(("near-duplicates between splits", f"{alike:,} of those compared"))
    return lines


def notes(marker: Mapping[str, Any]) -> dict[str, str]:
    """A step's notes, and how far off the time was that the plan expected of it."""
    expected, seconds = marker.get("predicted"), marker["seconds"]
    if not expected:
        return dict(marker.get("notes", {}))
    off = f"{duration(expected)} ({expected / max(seconds, 0.001) - 1:+.0%})"
    return {**marker.get("notes", {}), "expected": off}


def rejects(steps: Sequence[Mapping[str, Any]], examples: Mapping[str, Sequence[str]]) -> list[RejectCount]:
    """Reasons and counts from the steps' markers (`reject_...`, `rejected_...`, `error_...`)."""
    refused = []
    for marker in steps:
        for name, count in marker["counts"].items():
            head, _, reason = name.partition("_")
            if head in ("reject", "rejected", "error") and reason and count:
                keys = examples.get(f"{marker['step']}/{reason}", ())
                refused.append(RejectCount(stage=marker["step"], reason=reason, count=count, examples=keys))
    return sorted(refused, key=lambda reject: (-reject.count, reject.stage, reject.reason))


def title(model: Mapping[str, Any], spec: DatasetSpec) -> str:
    """What kind of model, from what to what."""
    kind = (model.get("architecture") or {}).get("kind", "")
    name = {"pix2pix": "Pix2Pix", "pix2pixhd": "Pix2PixHD"}.get(kind, "Image translation")
    words = {"rgb": "photo", "grey16": "16-bit grey", "lab_l": "lightness", "lab_ab": "colour"}
    source, target = (spec.roles[role].kind for role in ("source", "target"))
    return f"{name}: {words.get(source, source)} to {words.get(target, target)}"


# -- reading -----------------------------------------------------------------------------------------


def samples(shards: str, spec: DatasetSpec, rows: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    """The samples of rows {key, split, file}, shard file by shard file."""
    by_file: dict[tuple[Split, str], set[str]] = defaultdict(set)
    for row in rows:
        by_file[row["split"], row["file"]].add(row["key"])
    for (split, name), keys in by_file.items():
        yield from dataset.read_file(shards, spec, split, name, keys)


def draw_pictures(
    picks: Picks,
    shards: str,
    folder: str,
    names: Sequence[str],
    others: Mapping[str, OtherSystem],
    uri_of: Callable[[Array], str],
    threads: int,
) -> list[PictureCard]:
    """Source, generated and target of each pick, with its metrics of these names, in the picks' order.

    uri_of   a picture as a data URI
    """
    spec = dataset.load(shards)

    def draw(sample: Sample) -> PictureCard:
        row, reasons = picks[sample.key]
        generated, note = _generated(folder, row)
        images = {name: other.picture(sample.key) for name, other in others.items()}
        images["generated"] = generated
        scores = {name: row[name] for name in names if row.get(name) is not None}
        drawn = _card(sample, spec, images, uri_of)
        return replace(drawn, scores=scores, picks=reasons, note=note)

    with ThreadPoolExecutor(threads) as pool:  # Pillow and the stores let go of the GIL
        found = samples(shards, spec, (row for row, _ in picks.values()))
        drawn = {card.key: card for card in prefetch_map(pool, draw, found, ahead=2 * threads)}
    return [drawn[key] for key in picks if key in drawn]


def draw_suspects(shards: str, uri_of: Callable[[Array], str]) -> dict[str, list[PictureCard]]:
    """Source and target of the worst suspects of each kind, as the shard stage listed them."""
    uri, spec = storage.join(shards, suspects.NAME), dataset.load(shards)
    if not storage.exists(uri):
        return {}
    worst: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in csv.DictReader(io.StringIO(storage.read_bytes(uri).decode(), newline="")):
        if len(worst[row["kind"]]) < SUSPECTS:
            worst[row["kind"]][row["key"]] = row | {"file": row["shard"]}
    found = samples(shards, spec, (row for rows in worst.values() for row in rows.values()))
    drawn = {one.key: _card(one, spec, {}, uri_of) for one in found}
    return {
        kind: [replace(drawn[key], note=row["reason"]) for key, row in rows.items() if key in drawn]
        for kind, rows in worst.items()
    }


def _card(
    sample: Sample, spec: DatasetSpec, others: Mapping[str, Array | None], uri_of: Callable[[Array], str]
) -> PictureCard:
    """Source and target of a sample, and other pictures by role."""
    images = {role: sample.picture(spec, role) for role in suspects.ROLES} | dict(others)
    return PictureCard(
        key=sample.key,
        split=sample.split,
        group=sample.group,
        images={role: uri_of(image) for role, image in images.items() if image is not None},
        width=spec.size[0],
        height=spec.size[1],
    )


def _generated(folder: str, row: Mapping[str, Any]) -> tuple[Array | None, str]:
    if row["error"] is not None:
        return None, row["error"]
    try:
        return decode.decode_image(storage.read_bytes(storage.join(folder, row["generated"])), "rgb"), ""
    except (OSError, ImageRejected) as error:
        return None, f"the generated image cannot be read: {one_line(error)}"


@dataclass(frozen=True, kw_only=True)
class OtherSystem:
    """What was measured of another system's images."""

    scores: Mapping[str, Any]
    """Means with "intervals", and with "differences": this model's scores minus its own, image by image."""
    images: str
    """The folder of its images."""
    rows: Mapping[str, Mapping[str, Any]]
    """{generated, error} of the images to show, by key."""

    def picture(self, key: str) -> Array | None:
        """Its image of a key; None if it has none."""
        return _generated(self.images, self.rows[key])[0] if key in self.rows else None


def other_system(folder: str, own: str, picks: Picks, names: Sequence[str]) -> OtherSystem:
    """Another system by the folder of its evaluation.

    own     the `metrics.parquet` of this model
    names   the metrics to compare
    """
    summary = storage.read_json(storage.join(folder, "summary.json"))
    theirs = storage.join(folder, "metrics.parquet")
    differences = {name: one for name in names if (one := difference_of(own, theirs, name))}
    table = storage.read_parquet(theirs, ["key", "generated", "error"])
    shown = table.filter(pc.is_in(table["key"], pa.array(list(picks), pa.string())))
    rows = {row["key"]: row for row in shown.to_pylist()}
    return OtherSystem(scores={**summary, "differences": differences}, images=summary["images"], rows=rows)


def digest(config: ReportConfig) -> str:
    """A digest of the other systems' evaluations. Raises UserError for one that is not there."""
    summaries = []
    for name, folder in config.others.items():
        uri = storage.join(storage.absolute(folder), "summary.json")
        storage.require(uri, f"report.others.{name}")
        summaries.append(storage.read_bytes(uri))
    return hashlib.sha256(b"".join(summaries)).hexdigest()


def read_curves(phases: Sequence[str]) -> list[Curve]:
    """The losses of every phase that recorded any."""
    losses: list[Curve] = []
    for folder in phases:
        uri = storage.join(folder, "metrics.parquet")
        if storage.exists(uri):
            losses += curves(storage.read_parquet(uri, columns=["step", "name", "value"]), phase_name(folder))
    return losses


def reject_examples(shards: str, generated: str) -> dict[str, list[str]]:
    """A few keys for each reason, by "stage/reason"."""
    examples: dict[str, list[str]] = defaultdict(list)

    def add(name: str, text: str) -> None:
        if len(examples[name]) < EXAMPLES:
            examples[name].append(text)

    for _, uri in zip(range(QUARANTINE_FILES), storage.parquet_parts(shards, "quarantine-"), strict=False):
        for row in storage.read_parquet(uri).to_pylist():
            detail = f" ({row['detail']})" if row.get("detail") else ""
            add(f"shard/{row['reason']}", f"{row['key']}{detail}")
    if generated:
        for _, uri in zip(range(QUARANTINE_FILES), outputs.parts(generated), strict=False):
            table = storage.read_parquet(uri, columns=["key", "error"])
            for row in table.filter(table["error"].is_valid()).to_pylist():
                reason, _, detail = row["error"].partition(": ")
                add(f"infer/{reason}", row["key"] + (f" ({detail})" if detail else ""))
    return dict(examples)


# -- wiring ------------------------------------------------------------------------------------------


def run(
    config: ReportConfig,
    resources: Resources,
    *,
    output: str,
    track: Run,
    shards: str,
    images: str,
    metrics: str,
    phases: Sequence[str] = (),
    steps: Sequence[Mapping[str, Any]] = (),
    config_text: str = "",
    command: str = "",
) -> Outcome:
    """Write `report.html` into `output`. Raises UserError if there are no metrics to show."""
    summary = storage.find_json(storage.join(metrics, "summary.json"))
    if summary is None:
        raise UserError(f"report: {metrics}: there is no summary.json, so nothing was evaluated")
    generated = summary.get("images") or images
    own, spec = storage.join(metrics, "metrics.parquet"), dataset.load(shards)
    with local_file(own) as path:
        batches = pq.ParquetFile(path).iter_batches(batch_size=10_000)
        rows = (row for batch in batches for row in batch.to_pylist())
        picks = pick(rows, most=config.max_images, metric=config.order_by, seed=config.seed)
    names = score_names(summary)
    others = {
        name: other_system(storage.absolute(folder), own, picks, names)
        for name, folder in config.others.items()
    }
    most = budget(config, len(picks) + SUSPECTS * len(suspects.KINDS))
    shown = draw_suspects(shards, partial(data_uri, max_side=SUSPECT_SIDE, max_bytes=most))
    most = budget(config, len(picks) + sum(map(len, shown.values())))
    uri_of = partial(data_uri, max_side=config.max_side, max_bytes=most)
    drawn = draw_pictures(picks, shards, generated, names, others, uri_of, resources.io_threads)
    model = ("model" in summary and storage.find_json(storage.join(images, "model", "model.json"))) or {}
    data = ReportData(
        title=config.title or title(model, spec),
        lede=lede(summary, spec, phases if model else ()),
        created=time.strftime("%Y-%m-%d %H:%M"),
        system="this model" if model else "these images",
        scores=headline(summary),
        intervals=summary.get("intervals", {}),
        baselines=summary.get("baselines", {}),
        others={name: other.scores for name, other in others.items()},
        groups=summary.get("groups", {}),
        facts=facts(summary),
        num_images=summary["num_images"],
        pictures=drawn,
        curves=read_curves(phases),
        card=card(spec, storage.find_json(storage.join(shards, "card.json")) or {}),
        suspects=shown,
        rejects=rejects(steps, reject_examples(shards, images)),
        steps=[
            StepTime(name=m["step"], seconds=m["seconds"], counts=m["counts"], notes=notes(m)) for m in steps
        ],
        config_text=config_text,
        command=command,
    )
    html = page(data).encode()
    storage.write_bytes(storage.join(output, "report.html"), html)
    track.artifact("report.html", html)
    for reason in ("worst", "best"):
        keys = [key for key, (_, reasons) in picks.items() if reason in reasons][:SHEET_ROWS]
        if png := sheet({key: picks[key] for key in keys}, shards, generated):
            track.artifact(f"{reason}.png", png)
    logger.info("report        %s", storage.join(output, "report.html"))
    return Outcome(counts={"images": len(drawn), "bytes": len(html)})


def budget(config: ReportConfig, rows: int) -> int:
    """The size limit of a picture in bytes, so that `rows` of source, target and each system fit."""
    whole = (config.max_megabytes * 1e6 - PAGE_BYTES) / BASE64
    return max(1500, int(whole / ((3 + len(config.others)) * max(1, rows))))


def sheet(picks: Picks, shards: str, folder: str) -> bytes | None:
    """Source, generated and target of the picked keys as one PNG; None if none was generated."""
    spec = dataset.load(shards)
    pairs = {sample.key: sample for sample in samples(shards, spec, (row for row, _ in picks.values()))}
    rows = []
    for key, (row, _) in picks.items():
        generated, _ = _generated(folder, row)
        if generated is not None:
            source, target = (pairs[key].picture(spec, role) for role in ("source", "target"))
            rows.append([source, geometry.resize(generated, spec.size, "rgb"), target])
    return encode.encode_png(pictures.sheet(rows)) if rows else None


def score_names(summary: Mapping[str, Any]) -> list[str]:
    """The metrics of single images, the pixel metrics first."""
    names = [name for name in PIXEL_METRICS if name in summary]
    means = summary.get("deviations", {})
    return names + [n for n in means if n not in names and not n.endswith("sharpness")]


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the tiles: per-image means, then those of the whole set."""
    scores = {name: summary[name] for name in score_names(summary) if name in summary}
    scores |= {n: v for n, v in segmentation(summary).items() if not n.startswith("target_")}
    return scores | {n: v for n, v in summary.items() if n.split("_")[0] in SET_DISTANCES}


def facts(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about measurements that have no baseline to beat."""
    sentences = []
    if "sharpness" in summary and summary.get("target_sharpness"):
        share = summary["sharpness"] / summary["target_sharpness"]
        sentences.append(
            f"Sharpness (mean gradient): {summary['sharpness']:.3g}, the targets have "
            f"{summary['target_sharpness']:.3g}: the generated pictures are {share:.0%} as sharp."
        )
    if scores := summary.get("segmentation", {}).get("target"):
        values = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in scores.items())
        sentences.append(f"The segmenter on the targets themselves: {values}.")
    return sentences


def lede(summary: Mapping[str, Any], spec: DatasetSpec, phases: Sequence[str]) -> str:
    """The page's first sentence."""
    pairs = spec.rows("train")
    sentence = f"{summary['num_images']:,} images evaluated against their targets"
    if phases and pairs:
        names = ", ".join(phase_name(folder) for folder in phases)
        noun = "phase" if len(phases) == 1 else "phases"
        sentence += f"; a model trained on {pairs:,} pairs in {len(phases)} {noun} ({names})"
    missing = f" {summary['num_missing']:,} targets have no image." if summary.get("num_missing") else ""
    return f"{sentence}.{missing}"
