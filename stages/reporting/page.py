"""The report as one HTML file that loads nothing: images, metrics, losses and times of a run.

    ReportData  ->  page(data)  ->  HTML text, by report.html.j2, report.css and report.js

Jinja escapes every value, after `text` has made it visible. A content security policy allows the one script
and the one style sheet by their hashes and images from `data:` only, so that even a hole in the escaping
would run nothing and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from stages.progress import duration
from stages.scoring.intervals import Interval
from stages.scoring.metrics import lower_is_better

SOURCE, GENERATED, TARGET = "source", "generated", "target"

METRIC_NAMES = {
    "l1": "L1",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "pixel_accuracy": "Pixel accuracy",
    "class_accuracy": "Class accuracy",
    "mean_iou": "Mean IoU",
    "fid": "FID",
    "kid": "KID",
    "sharpness": "Sharpness",
    "diversity": "Diversity",
}

CURVE_POINTS = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureCard:
    """One image of the data set. `images` maps a role to a data URI; a missing one is named there."""

    key: str
    split: str = ""
    group: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    width: int = 1
    height: int = 1
    picks: tuple[str, ...] = ()
    """Why it is here: "worst", "best", "sample"."""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One loss of one phase: values at steps, in step order."""

    phase: str
    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectCount:
    """One reason for which objects went to quarantine, with a few of them."""

    stage: str
    reason: str
    count: int
    examples: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """How long a step took, what it counted, and how it was done where the config leaves that open."""

    name: str
    seconds: float
    counts: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that the page shows."""

    title: str
    lede: str = ""
    system: str = "this model"
    """What the page calls what made the images."""
    created: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The model's mean per metric, the headline ones first."""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The ends of the means' intervals."""
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Baseline name -> metric -> value, with "intervals" and the model's "differences"."""
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The same of other systems, by their names; their pictures are in each card under these names."""
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Group name -> metric -> mean, with "num_images" and "intervals"."""
    facts: Sequence[str] = ()
    """Sentences below the headline metrics."""
    num_images: int = 0
    pictures: Sequence[PictureCard] = ()
    curves: Sequence[Curve] = ()
    card: Sequence[tuple[str, str]] = ()
    suspects: Mapping[str, Sequence[PictureCard]] = field(default_factory=dict)
    """Pairs to look at by kind, the worst first; the note says why."""
    rejects: Sequence[RejectCount] = ()
    steps: Sequence[StepTime] = ()
    config_text: str = ""
    command: str = ""


# -- text --------------------------------------------------------------------------------------------------


def text(value: object) -> Markup:
    """Anything as HTML text or attribute value: escaped, and nothing in it invisible or reordering.

    Control characters, lone surrogates and bidirectional overrides are written as `\\uXXXX`.
    """
    if isinstance(value, Markup):
        return value
    plain = str(value)
    if not (plain.isascii() and plain.isprintable()):
        plain = "".join(
            char
            if char in "\n\t" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn"}
            else f"\\u{ord(char):04x}"
            for char in plain
        )
    return escape(plain)


def number(value: float | None, digits: int = 3) -> str:
    """A metric's value to a sensible number of digits; a dash for none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if abs(value) >= 100:
        return f"{value:,.0f}" if digits <= 3 else f"{value:,.1f}"
    return f"{value:.{digits}g}" if abs(value) < 1 else f"{value:.{max(0, digits - 1)}f}"


def metric_name(name: str) -> str:
    """How a metric is called on the page."""
    return METRIC_NAMES.get(name, name.replace("_", " "))


# -- pictures ----------------------------------------------------------------------------------------------


def data_uri(image: np.ndarray, *, max_side: int, max_bytes: int) -> str:
    """An image (H, W, 1 or 3) uint8 as a WebP data URI, made smaller until it fits.

    First the sides (to `max_side`), then the quality, then the sides again; the result is within `max_bytes`
    unless it is 32 pixels small already.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
    side = min(max_side, max(picture.size))
    while True:
        sized = picture.copy()
        sized.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=None)
        for quality in (86, 74, 60):
            file = io.BytesIO()
            sized.save(file, "WEBP", quality=quality, method=4)
            if file.tell() <= max_bytes or (side <= 32 and quality == 60):
                return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        side = max(32, int(side * 0.75))


# -- what the template shows -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline metric and its baselines; a bar is (name, value, style, length in percent)."""

    name: str
    lower: bool
    value: float
    interval: Sequence[float] | None
    kind: str
    verdict: str
    bars: Sequence[tuple[str, float, str, float]]


def tile(name: str, value: float, data: ReportData) -> Tile:
    """A metric beside the baselines that have it, with the verdict against the best of them."""
    lower = lower_is_better(name)
    rivals = {base: row[name] for base, row in data.baselines.items() if name in row}
    verdict = kind = ""
    if rivals:
        best = (min if lower else max)(rivals, key=lambda base: rivals[base])
        than = f"the best baseline ({baseline_name(best)})"
        verdict = f"no clear difference from {than}"
        apart = data.baselines[best].get("differences", {}).get(name)
        if kind := judged(name, apart):
            change = abs(apart[0]) / abs(rivals[best]) * 100 if rivals[best] else math.inf
            amount = f"{change:.0f} % " if math.isfinite(change) else ""
            verdict = f"{amount}{kind} than {than}"
    shown = {baseline_name(base): rival for base, rival in rivals.items()}
    shown |= {other: row[name] for other, row in data.others.items() if name in row}
    longest = max(abs(value), *(abs(rival) for rival in shown.values()), 0) or 1
    rows = [(data.system, value, "model"), *((label, rival, "base") for label, rival in shown.items())]
    bars = [(label, v, css, max(0.5, 100 * abs(v) / longest)) for label, v, css in rows]
    return Tile(metric_name(name), lower, value, data.intervals.get(name), kind, verdict, bars)


def judged(name: str, difference: Sequence[float] | None) -> str:
    """ "better" or "worse" where the interval of a metric's difference excludes zero, else ""."""
    if difference is None or not Interval(*difference).excludes_zero:
        return ""
    return "better" if (difference[0] < 0) == lower_is_better(name) else "worse"


def baseline_name(name: str) -> str:
    """How a baseline is called on the page."""
    names = {"mean_target": "mean target", "nearest": "nearest target"}
    return names.get(name, name.replace("_", " "))


def thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """At most CURVE_POINTS steps and values: means over equal runs of steps, of finite values only."""
    kept = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    size = max(1, math.ceil(len(kept) / CURVE_POINTS))
    means = [np.mean(kept[i : i + size], axis=0).tolist() for i in range(0, len(kept), size)]
    return [step for step, _ in means], [value for _, value in means]


@dataclass(frozen=True, slots=True)
class Chart:
    """A curve as the points of an SVG line, "" if it has none, and the numbers around it."""

    name: str
    line: str = ""
    first: float = 0.0
    last: float = 0.0
    low: float = 0.0
    high: float = 0.0
    first_step: float = 0.0
    last_step: float = 0.0


def chart(curve: Curve) -> Chart:
    """A loss as a small line chart."""
    steps, values = thinned(curve)
    if not values:
        return Chart(curve.name)
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom, top = low - margin, high + margin
    width = (steps[-1] - steps[0]) or 1.0
    line = " ".join(
        f"{8 + 284 * (s - steps[0]) / width:.1f},{100 - 92 * (v - bottom) / (top - bottom):.1f}"
        for s, v in zip(steps, values, strict=True)
    )
    if len(values) == 1:
        line = f"{line} {292},{line.split(',')[1]}"
    return Chart(curve.name, line, values[0], values[-1], low, high, steps[0], steps[-1])


# -- the page ----------------------------------------------------------------------------------------------


def page(data: ReportData) -> str:
    """The whole report."""
    charts: dict[str, list[Chart]] = {}
    for curve in data.curves:
        charts.setdefault(curve.phase, []).append(chart(curve))
    own = {**data.scores, "intervals": data.intervals}
    rivals = {baseline_name(b): row for b, row in data.baselines.items()} | dict(data.others)
    environment = Environment(
        loader=PackageLoader("stages.reporting", ""),
        autoescape=True,
        finalize=text,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "metric_name": metric_name,
        "between": between,
        "duration": duration,
        "source_hash": _source_hash,
    }
    environment.tests |= {
        "finite": lambda value: value is not None and math.isfinite(value),
        "lower_better": lower_is_better,
    }
    return environment.get_template("report.html.j2").render(
        data=data,
        style=_asset("report.css"),
        script=_asset("report.js"),
        roles=(SOURCE, GENERATED, *data.others, TARGET),
        tiles=[tile(name, value, data) for name, value in data.scores.items()],
        metrics=list(dict.fromkeys(name for p in data.pictures for name in p.scores)),
        splits=sorted({p.split for p in data.pictures if p.split}),
        groups=sorted({p.group for p in data.pictures if p.group}),
        picks=sorted({pick for p in data.pictures for pick in p.picks}),
        names=[metric_name(name) for name in data.scores],
        comparison=[[name, *_cells(row, data)] for name, row in {data.system: own, **rivals}.items()],
        differences=[
            [name, *_difference_cells(row, data)] for name, row in rivals.items() if row.get("differences")
        ],
        by_group=[
            [group, f"{row.get('num_images', 0):,.0f}", *_cells(row, data)]
            for group, row in data.groups.items()
        ],
        charts=charts,
        longest=max((step.seconds for step in data.steps), default=0) or 1,
    )


def _cells(row: Mapping[str, Any], data: ReportData) -> list[str]:
    return [number(row.get(name), 4) + between(row.get("intervals", {}).get(name)) for name in data.scores]


def _difference_cells(row: Mapping[str, Any], data: ReportData) -> list[str]:
    found = [(name, row["differences"].get(name)) for name in data.scores]
    return [
        f"{number(apart[0])}{between(apart[1:])} {judged(name, apart)}".rstrip() if apart else number(None)
        for name, apart in found
    ]


def between(interval: Sequence[float] | None) -> str:
    """The ends of an interval, in brackets; "" for none."""
    return f" ({number(interval[0])} to {number(interval[1])})" if interval else ""


def _asset(name: str) -> Markup:
    """A file of ours, which is not escaped."""
    return Markup(resources.files("stages.reporting").joinpath(name).read_text(encoding="utf-8"))  # noqa: S704


def _source_hash(content: str) -> str:
    """The hash by which a content security policy allows a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
