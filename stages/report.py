"""One page a person can look at: what the run made, how good it is beside baselines, how it got there.

in:  shards, generated images, metrics, the phases' curves, the markers of every step
out: report.html, self-contained (`stages.reporting.page`)

Of the images it picks at most `max_images`: the worst, the best, and a fixed random sample; it holds those
few, and a table of numbers, however large the data set is.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages import storage
from stages.base import Outcome, Resources, Split
from stages.config.report import ReportConfig
from stages.errors import UserError
from stages.images import decode, encode, geometry, pictures
from stages.images.kinds import Array, ImageRejected
from stages.inference import outputs
from stages.reporting.page import Curve, Picture, Reject, ReportData, StepTime, data_uri, page
from stages.scoring.metrics import PIXEL_METRICS, lower_is_better
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 1

EXAMPLES = 5  # of each reason in the quarantine
QUARANTINE_FILES = 100  # looked through for examples
BASE64 = 4 / 3
PAGE_BYTES = 300_000  # of style, script, curves and tables

logger = logging.getLogger(__name__)


# -- rules -------------------------------------------------------------------------------------------


def pick(
    rows: Iterator[Mapping[str, Any]], *, most: int, metric: str, seed: int
) -> dict[str, tuple[Mapping[str, Any], tuple[str, ...]]]:
    """At most `most` rows by key, with why each was picked: worst, best, sample. Holds no more than it picks.

    No more than a third of the rows are called worst, or best. The sample is that of a hash of the key, so it
    stays the same while the split does. Rows without the metric can only be in the sample.
    """
    sign = 1 if lower_is_better(metric) else -1
    worst: list[tuple[float, str, Mapping[str, Any]]] = []
    best: list[tuple[float, str, Mapping[str, Any]]] = []
    drawn: list[tuple[float, str, Mapping[str, Any]]] = []

    def keep(heap: list[tuple[float, str, Mapping[str, Any]]], rank: float, row: Mapping[str, Any]) -> None:
        heapq.heappush(heap, (rank, row["key"], row))
        if len(heap) > most:
            heapq.heappop(heap)

    scored = 0
    for row in rows:
        digest = hashlib.blake2b(f"{seed}\0{row['key']}".encode(), digest_size=8).digest()
        keep(drawn, int.from_bytes(digest, "little") / 2**64, row)
        value = row.get(metric)
        if value is not None:
            scored += 1
            keep(worst, sign * value, row)
            keep(best, -sign * value, row)
    third = max(1, min(most, scored) // 3)
    found: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {}
    for name, heap, count in (("worst", worst, third), ("best", best, third), ("sample", drawn, most)):
        for _, key, row in sorted(heap, key=lambda entry: (-entry[0], entry[1]))[:count]:
            if key in found:
                found[key] = (found[key][0], (*found[key][1], name))
            elif len(found) < most:
                found[key] = (row, (name,))
    return found


def curves(table: pa.Table, phase: str) -> list[Curve]:
    """The losses of a phase's metrics table {step, name, value}; those of single layers are left out."""
    names = table["name"].cast(pa.string())
    found = []
    for name in sorted(set(names.to_pylist())):
        if name.count("/") > 1:
            continue
        rows = table.filter(pc.equal(names, name)).sort_by("step")
        found.append(
            Curve(phase=phase, name=name, steps=rows["step"].to_pylist(), values=rows["value"].to_pylist())
        )
    return found


def phase_name(folder: str) -> str:
    """`.../train-global-0123456789ab` -> `global`."""
    name = folder.rstrip("/").rpartition("/")[2]
    return name.removeprefix("train-").rpartition("-")[0] or name


def card(spec: DatasetSpec, found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The data card's lines: what the shards hold, and what the shard stage measured of it."""
    lines = [("stored size", f"{spec.size[0]} x {spec.size[1]} pixels")]
    lines += [
        (f"{split} split", f"{spec.rows(split):,} pairs in {len(spec.splits[split]):,} shards")
        for split in get_args(Split)
        if split in spec.splits
    ]
    for role, known in spec.roles.items():
        classes = f", {known.classes} classes" if known.classes else ""
        lines.append((role, f"{known.kind}{classes}, kept as {known.encoding}"))
    for split, told in (found or {}).get("splits", {}).items():
        for role, sums in told.get("roles", {}).items():
            smallest, largest = ("x".join(map(str, sums.get(name, ()))) for name in ("smallest", "largest"))
            if smallest:
                sizes = smallest if smallest == largest else f"{smallest} to {largest}"
                lines.append((f"{split} {role}, as found", sizes))
    leaks = (found or {}).get("leakage") or {}
    if leaks.get("role"):
        alike = leaks.get("found", 0) + leaks.get("found_in_val", 0)
        lines.append(("near-duplicates between splits", f"{alike:,} of those compared"))
    return lines


def rejects(steps: Sequence[Mapping[str, Any]], examples: Mapping[str, Sequence[str]]) -> list[Reject]:
    """Reasons and counts out of the steps' markers (`reject_...`, `rejected_...`, `error_...`)."""
    found = []
    for marker in steps:
        for name, count in marker["counts"].items():
            head, _, reason = name.partition("_")
            if head in ("reject", "rejected", "error") and reason and count:
                told = examples.get(f"{marker['step']}/{reason}", ())
                found.append(Reject(stage=marker["step"], reason=reason, count=count, examples=told))
    return sorted(found, key=lambda reject: (-reject.count, reject.stage, reject.reason))


def title(model: Mapping[str, Any], spec: DatasetSpec) -> str:
    """What kind of model, from what to what."""
    kind = (model.get("architecture") or {}).get("kind", "")
    name = {"pix2pix": "Pix2Pix", "pix2pixhd": "Pix2PixHD"}.get(kind, "Image translation")
    words = {"rgb": "photo", "grey16": "16-bit grey", "lab_l": "lightness", "lab_ab": "colour"}
    source, target = (spec.roles[role].kind for role in ("source", "target"))
    return f"{name}: {words.get(source, source)} to {words.get(target, target)}"


# -- reading -----------------------------------------------------------------------------------------


def metric_rows(uri: str) -> Iterator[dict[str, Any]]:
    """Rows of `metrics.parquet`, a batch at a time."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as handle:
        for batch in pq.ParquetFile(handle).iter_batches(batch_size=10_000):
            yield from batch.to_pylist()


def draw_pictures(
    picked: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]],
    *,
    shards: str,
    spec: DatasetSpec,
    folder: str,
    names: Sequence[str],
    max_side: int,
    max_bytes: int,
    threads: int,
) -> list[Picture]:
    """Source, generated and target of the picked keys, in the order they were picked."""
    by_file: dict[tuple[Split, str], set[str]] = defaultdict(set)
    for key, (row, _) in picked.items():
        by_file[row["split"], row["file"]].add(key)

    def one(sample: Sample) -> Picture:
        row, picks = picked[sample.key]
        generated, note = _generated(folder, row)
        arrays: dict[str, Array | None] = {
            "source": sample.picture(spec, "source"),
            "generated": generated,
            "target": sample.picture(spec, "target"),
        }
        shown = {
            role: data_uri(array, max_side=max_side, max_bytes=max_bytes)
            for role, array in arrays.items()
            if array is not None
        }
        target = arrays["target"]
        assert target is not None
        return Picture(
            key=sample.key,
            split=sample.split,
            group=sample.group,
            scores={name: row[name] for name in names if row.get(name) is not None},
            images=shown,
            width=target.shape[1],
            height=target.shape[0],
            picks=picks,
            note=note,
        )

    found: dict[str, Picture] = {}
    with ThreadPoolExecutor(threads) as pool:  # Pillow and the stores let go of the GIL
        for (split, name), keys in by_file.items():
            for picture in pool.map(one, dataset.read_file(shards, spec, split, name, keys)):
                found[picture.key] = picture
    return [found[key] for key in picked if key in found]


def _generated(folder: str, row: Mapping[str, Any]) -> tuple[Array | None, str]:
    if row["error"] is not None:
        return None, row["error"]
    try:
        return decode.decode_image(storage.read_bytes(storage.join(folder, row["generated"])), "rgb"), ""
    except (OSError, ImageRejected) as why:
        return None, f"the generated image is gone: {why}"


def read_curves(phases: Sequence[str]) -> list[Curve]:
    """The losses of every phase that recorded any."""
    found: list[Curve] = []
    for folder in phases:
        uri = storage.join(folder, "metrics.parquet")
        if storage.exists(uri):
            found += curves(storage.read_parquet(uri, columns=["step", "name", "value"]), phase_name(folder))
    return found


def reject_examples(shards: str, generated: str) -> dict[str, list[str]]:
    """A few keys for each reason, by "stage/reason"."""
    found: dict[str, list[str]] = defaultdict(list)
    seen: Counter[str] = Counter()

    def add(name: str, text: str) -> None:
        if seen[name] < EXAMPLES:
            found[name].append(text)
        seen[name] += 1

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
    return dict(found)


def _json(uri: str) -> dict[str, Any]:
    """A JSON file's object; empty if it is not there."""
    if not storage.exists(uri):
        return {}
    value = storage.read_json(uri)
    return value if isinstance(value, dict) else {}


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
    if not storage.exists(storage.join(metrics, "summary.json")):
        raise UserError(f"report: {metrics}: there is no summary.json, so nothing was evaluated")
    spec = dataset.load(shards)
    summary = storage.read_json(storage.join(metrics, "summary.json"))
    names = score_names(summary)
    picked = pick(
        metric_rows(storage.join(metrics, "metrics.parquet")),
        most=config.max_images,
        metric=config.order_by,
        seed=config.seed,
    )
    shown = draw_pictures(
        picked,
        shards=shards,
        spec=spec,
        folder=summary.get("images") or images,
        names=names,
        max_side=config.max_side,
        max_bytes=budget(config, len(picked)),
        threads=resources.io_threads,
    )
    model = _json(storage.join(images, "model", "model.json"))
    data = ReportData(
        title=config.title or title(model, spec),
        lede=lede(summary, spec, phases),
        created=time.strftime("%Y-%m-%d %H:%M"),
        scores=headline(summary),
        deviations=summary.get("deviations", {}),
        baselines=summary.get("baselines", {}),
        groups=summary.get("groups", {}),
        facts=facts(summary),
        num_images=summary["num_images"],
        pictures=shown,
        curves=read_curves(phases),
        card=card(spec, _json(storage.join(shards, "card.json"))),
        rejects=rejects(steps, reject_examples(shards, images)),
        steps=[StepTime(name=m["step"], seconds=m["seconds"], counts=m["counts"]) for m in steps],
        config_text=config_text,
        command=command,
    )
    html = page(data).encode()
    storage.write_bytes(storage.join(output, "report.html"), html)
    track.artifact("report.html", html)
    for why in ("worst", "best"):
        grid = sheet(
            [key for key, (_, picks) in picked.items() if why in picks][:8],
            picked,
            shards,
            spec,
            data_folder=summary.get("images") or images,
        )
        if grid is not None:
            track.artifact(f"{why}.png", grid)
    logger.info("report        %s", storage.join(output, "report.html"))
    return Outcome(counts={"images": len(shown), "bytes": len(html)})


def budget(config: ReportConfig, rows: int) -> int:
    """Bytes a picture may have, so that the page with three of them a row is as large as configured."""
    whole = (config.max_megabytes * 1e6 - PAGE_BYTES) / BASE64
    return max(1500, int(whole / (3 * max(1, rows))))


def sheet(
    keys: Sequence[str],
    picked: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]],
    shards: str,
    spec: DatasetSpec,
    *,
    data_folder: str,
) -> bytes | None:
    """Source, generated and target of a few keys as one PNG; None if there are none."""
    rows = []
    for key in keys:
        row, _ = picked[key]
        generated, _ = _generated(data_folder, row)
        for sample in dataset.read_file(shards, spec, row["split"], row["file"], {key}):
            if generated is not None:
                fake = geometry.resize(generated, spec.size, "rgb")
                rows.append([sample.picture(spec, "source"), fake, sample.picture(spec, "target")])
    return encode.encode_png(pictures.sheet(rows)) if rows else None


def score_names(summary: Mapping[str, Any]) -> list[str]:
    """The metrics an image has, the well-known ones first."""
    known = [name for name in PIXEL_METRICS if name in summary]
    means = summary.get("deviations", {})
    return known + [n for n in means if n not in known and not n.endswith("sharpness")]


def headline(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the tiles: per-image means, then those of the whole set."""
    found = {name: summary[name] for name in score_names(summary) if name in summary}
    for name, scores in summary.get("segmentation", {}).items():
        if name in ("generated", "palette"):
            found |= scores
    return found | {n: v for n, v in summary.items() if n.split("_")[0] in ("fid", "kid")}


def facts(summary: Mapping[str, Any]) -> list[str]:
    """What is no contest, but worth a sentence."""
    found = []
    if "sharpness" in summary and summary.get("target_sharpness"):
        share = summary["sharpness"] / summary["target_sharpness"]
        found.append(
            f"Sharpness (mean gradient): {summary['sharpness']:.3g}, the targets have "
            f"{summary['target_sharpness']:.3g}: the generated pictures are {share:.0%} as sharp."
        )
    for name, scores in summary.get("segmentation", {}).items():
        if name == "target":
            told = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in scores.items())
            found.append(f"The segmenter on the targets themselves: {told}.")
    return found


def lede(summary: Mapping[str, Any], spec: DatasetSpec, phases: Sequence[str]) -> str:
    """The page's first sentence."""
    trained = spec.rows("train")
    parts = [f"{summary['num_images']:,} images judged against their targets"]
    if phases and trained:
        named = ", ".join(phase_name(folder) for folder in phases)
        parts.append(
            f"a model trained on {trained:,} pairs in {len(phases)} phase{'s'[: len(phases) > 1]} ({named})"
        )
    missing = f" {summary['num_missing']:,} targets have no image." if summary.get("num_missing") else ""
    return "; ".join(parts) + "." + missing


__all__ = ["VERSION", "ReportConfig", "run"]
