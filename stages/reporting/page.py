# ruff: noqa: E501 - a line of markup is read as one line
"""The report as one HTML file that asks nobody for anything: what a run made, how good it is, how it got there.

    ReportData  ->  page(data)  ->  HTML text

Everything that came from a user (keys, groups, reasons, config) passes through `text`. A content security
policy allows the one script and the one style sheet by their hashes and images from `data:` only, so that
even a hole in the escaping would run nothing and fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from PIL import Image

from stages.progress import duration
from stages.scoring.metrics import lower_is_better

ROLES = ("source", "generated", "target")

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
class Picture:
    """One card. `images` maps a role to a data URI; a role that is missing is said to be."""

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
class Reject:
    """One reason for which objects went to quarantine, with a few of them."""

    stage: str
    reason: str
    count: int
    examples: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """How long a step took and what it counted."""

    name: str
    seconds: float
    counts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that the page shows."""

    title: str
    lede: str = ""
    created: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The model's mean per metric, the headline ones first."""
    deviations: Mapping[str, float] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Baseline name -> metric -> value."""
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Group name -> metric -> mean, with "num_images"."""
    facts: Sequence[str] = ()
    """Sentences below the headline metrics."""
    num_images: int = 0
    pictures: Sequence[Picture] = ()
    curves: Sequence[Curve] = ()
    card: Sequence[tuple[str, str]] = ()
    rejects: Sequence[Reject] = ()
    steps: Sequence[StepTime] = ()
    config_text: str = ""
    command: str = ""


# -- text --------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Anything as HTML text or attribute value: escaped, and nothing in it invisible or reordering.

    Control characters, lone surrogates and bidirectional overrides are written as `\\uXXXX`.
    """
    plain = "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn"}
        else f"\\u{ord(char):04x}"
        for char in str(value)
    )
    return html.escape(plain, quote=True)


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
        scale = side / max(picture.size)
        sized = picture
        if scale < 1:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            sized = picture.resize(size, Image.Resampling.LANCZOS)
        for quality in (86, 74, 60):
            file = io.BytesIO()
            sized.save(file, "WEBP", quality=quality, method=4)
            if file.tell() <= max_bytes or (side <= 32 and quality == 60):
                return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        side = max(32, int(side * 0.75))


# -- pieces of the page ------------------------------------------------------------------------------------


def tiles(data: ReportData) -> str:
    """The headline metrics, each beside its baselines."""
    found = [_tile(name, value, data) for name, value in data.scores.items()]
    if not found:
        return '<p class="muted">No metrics.</p>'
    facts = "".join(f'<p class="facts">{text(fact)}</p>' for fact in data.facts)
    return f'<dl class="tiles">{"".join(found)}</dl>{facts}'


def _tile(name: str, value: float, data: ReportData) -> str:
    lower = lower_is_better(name)
    rivals = {base: row[name] for base, row in data.baselines.items() if name in row}
    verdict, kind = "", ""
    if rivals:
        best = (min if lower else max)(rivals, key=lambda base: rivals[base])
        wins = value < rivals[best] if lower else value > rivals[best]
        change = abs(value - rivals[best]) / abs(rivals[best]) * 100 if rivals[best] else math.inf
        amount = f"{change:.0f} % " if math.isfinite(change) else ""
        kind = "better" if wins else "worse"
        verdict = f"{amount}{kind} than the best baseline ({_base_name(best)})"
    longest = max([abs(value), *(abs(v) for v in rivals.values())], default=1) or 1
    rows = [("this model", value, "model"), *((_base_name(b), v, "base") for b, v in rivals.items())]
    bars = "".join(
        f'<tr class="{css}"><td>{text(label)}</td><td><svg viewBox="0 0 100 9" preserveAspectRatio="none" '
        f'aria-hidden="true"><rect class="{css}" width="{max(0.5, 100 * abs(v) / longest):.1f}" height="9" rx="1"/>'
        f"</svg></td><td>{number(v)}</td></tr>"
        for label, v, css in rows
    )
    spread = data.deviations.get(name)
    around = f' <span class="spread">± {number(spread, 2)}</span>' if spread is not None else ""
    return (
        f'<div class="tile"><dt>{text(metric_name(name))} · {"lower" if lower else "higher"} is better</dt>'
        f'<dd><div class="value">{number(value)}{around}</div>'
        f'<div class="verdict {kind}">{text(verdict) or "&nbsp;"}</div>'
        f'<table class="bars"><tbody>{bars}</tbody></table></dd></div>'
    )


def _base_name(name: str) -> str:
    return {
        "mean_target": "mean target",
        "untrained": "untrained",
        "nearest": "nearest target",
    }.get(name, name.replace("_", " "))


def card(picture: Picture, metrics: Sequence[str]) -> str:
    """One picture: source, generated, target, with its key and scores; `data-s0` is the first metric's value."""
    shape = f'width="{picture.width}" height="{picture.height}"'
    images = "".join(
        f'<img data-role="{role}" alt="{role}" loading="lazy" decoding="async" {shape} src="{text(uri)}">'
        if (uri := picture.images.get(role))
        else f"<span>no {role}</span>"
        for role in ROLES
    )
    values = "".join(
        f' data-s{index}="{value:.6g}"'
        for index, name in enumerate(metrics)
        if (value := picture.scores.get(name)) is not None and math.isfinite(value)
    )
    scores = "".join(
        f"<span>{text(metric_name(name))} {number(value)}</span> "
        for name, value in picture.scores.items()
        if math.isfinite(value)
    )
    tags = "".join(f' <span class="tag">{text(pick)}</span>' for pick in picture.picks)
    where = " · ".join(part for part in (picture.split, picture.group) if part)
    note = f'<span class="worse">{text(picture.note)}</span>' if picture.note else ""
    return (
        f'<li class="card" data-key="{text(picture.key)}" data-split="{text(picture.split)}" '
        f'data-group="{text(picture.group)}" data-pick="{text(" ".join(picture.picks))}"{values}>'
        f'<button type="button" aria-label="Open {text(picture.key)}"><span class="triple">{images}</span></button>'
        f'<div class="caption"><span class="key"><bdi>{text(picture.key)}</bdi></span>'
        f'<span class="scores"><span>{text(where)}</span> {scores}</span><span>{note}{tags}</span></div></li>'
    )


def grid(data: ReportData) -> str:
    """The pictures with filters and order, worst first."""
    if not data.pictures:
        return '<p class="muted">No pictures.</p>'
    metrics = list(dict.fromkeys(name for p in data.pictures for name in p.scores))
    orders = "".join(
        f'<option value="s{index} {down if worst else up}">{"worst" if worst else "best"} '
        f"{text(metric_name(name))} first</option>"
        for index, name in enumerate(metrics)
        for up, down in [("up", "down") if lower_is_better(name) else ("down", "up")]
        for worst in (True, False)
    )
    splits = sorted({p.split for p in data.pictures if p.split})
    groups = sorted({p.group for p in data.pictures if p.group})
    picks = sorted({pick for p in data.pictures for pick in p.picks})
    tools = (
        '<label>Find key<input id="find" type="search" autocomplete="off" placeholder="press /"></label>'
        + _select("order", "Order", f'{orders}<option value="none up">as listed</option>')
        + _select("split", "Split", _options("every split", splits))
        + _select("group", "Group", _options("every group", groups))
        + _select("pick", "Chosen as", _options("all", picks))
    )
    roles = "".join(f'<option value="{role}">{role}</option>' for role in ROLES)
    viewer = (
        '<dialog id="viewer" aria-labelledby="viewer-key"><header><h2><bdi id="viewer-key"></bdi></h2>'
        '<span id="viewer-scores" class="muted"></span>'
        '<button type="button" id="previous">Previous</button><button type="button" id="next">Next</button>'
        '<button type="button" id="close">Close</button></header>'
        '<div class="stage"><div class="stack"><img id="under" alt=""><img id="over" class="over" alt="">'
        '<div id="edge" class="edge"></div></div></div><div class="controls">'
        f'<label>left<select id="left">{_selected(roles, "generated")}</select></label>'
        '<input id="slider" type="range" min="0" max="100" value="50" step="1" '
        'aria-label="Boundary between the left and the right picture">'
        f'<label>right<select id="right">{_selected(roles, "target")}</select></label>'
        '<span class="muted"><kbd>&larr;</kbd> <kbd>&rarr;</kbd> slide, <kbd>n</kbd> <kbd>p</kbd> next, previous, '
        "<kbd>1</kbd> <kbd>2</kbd> <kbd>3</kbd> source, generated, target, <kbd>Esc</kbd> close</span>"
        "</div></dialog>"
    )
    return (
        f'<div class="toolbar" role="search">{tools}<span id="count" class="count" role="status"></span></div>'
        f'<ul id="cards" class="cards">{"".join(card(p, metrics) for p in data.pictures)}</ul>{viewer}'
        "<noscript><p>Without scripts the pictures are shown, but neither sorted, filtered nor enlarged.</p></noscript>"
    )


def _select(name: str, label: str, options: str) -> str:
    return f'<label>{label}<select id="{name}">{options}</select></label>'


def _options(every: str, values: Iterable[str]) -> str:
    return f'<option value="">{every}</option>' + "".join(
        f'<option value="{text(v)}">{text(v)}</option>' for v in values
    )


def _selected(options: str, value: str) -> str:
    return options.replace(f'value="{value}"', f'value="{value}" selected', 1)


def thinned(curve: Curve, points: int = CURVE_POINTS) -> tuple[list[float], list[float]]:
    """At most `points` (step, value) pairs: means over equal runs of steps. Values that are not finite are left out."""
    kept = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    size = max(1, math.ceil(len(kept) / points))
    runs = [kept[i : i + size] for i in range(0, len(kept), size)]
    return [math.fsum(s for s, _ in r) / len(r) for r in runs], [
        math.fsum(v for _, v in r) / len(r) for r in runs
    ]


def chart(curve: Curve) -> str:
    """One loss as a small line chart in SVG, with a text alternative."""
    steps, values = thinned(curve)
    title = text(curve.name)
    if not values:
        return f'<figure><figcaption><b>{title}</b></figcaption><p class="muted">no values</p></figure>'
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
    label = f"{curve.name}: from {number(values[0])} to {number(values[-1])}, between {number(low)} and {number(high)}"
    return (
        f'<figure><figcaption><b>{title}</b><span class="muted">{number(values[0])} → {number(values[-1])}</span>'
        f'</figcaption><svg class="curve" viewBox="0 0 300 118" role="img" aria-label="{text(label)}">'
        f'<path class="axis" d="M8 4V100H292"/><polyline class="line" points="{line}"/>'
        f'<text x="12" y="14">{number(high)}</text><text x="12" y="96">{number(low)}</text>'
        f'<text x="8" y="114">{steps[0]:,.0f}</text><text x="292" y="114" text-anchor="end">{steps[-1]:,.0f} steps</text>'
        "</svg></figure>"
    )


def charts(curves: Sequence[Curve]) -> str:
    """Loss curves, phase by phase."""
    if not curves:
        return '<p class="muted">No loss was recorded.</p>'
    phases = dict.fromkeys(curve.phase for curve in curves)
    return "".join(
        f'<h3>{text(phase)}</h3><div class="charts">{"".join(chart(c) for c in curves if c.phase == phase)}</div>'
        for phase in phases
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers`: the columns to align right."""
    right = set(numbers)
    css = [' class="number"' if i in right else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{css[i]}>{text(name)}</th>' for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td{css[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="data"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def baseline_table(data: ReportData) -> str:
    """Model and baselines, and the groups, metric by metric."""
    names = list(data.scores)
    rows = [
        ["this model", *(number(data.scores[n], 4) for n in names)],
        *(
            [text(_base_name(b)), *(number(row.get(n), 4) for n in names)]
            for b, row in data.baselines.items()
        ),
    ]
    out = table(["", *map(metric_name, names)], rows, range(1, len(names) + 1))
    if data.groups:
        lines = (
            [text(group), f"{row.get('num_images', 0):,.0f}", *(number(row.get(n), 4) for n in names)]
            for group, row in data.groups.items()
        )
        out += f"<h3>By split and group</h3>{table(['', 'images', *map(metric_name, names)], lines, range(1, len(names) + 2))}"
    return out


def timings(steps: Sequence[StepTime]) -> str:
    """Seconds per step as bars, with what each counted."""
    longest = max((s.seconds for s in steps), default=0) or 1
    return table(
        ["step", "time", "", "counts"],
        (
            [
                text(s.name),
                text(duration(s.seconds)),
                '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
                f'<rect class="model" width="{max(0.5, 100 * s.seconds / longest):.1f}" height="10"/></svg>',
                text(", ".join(f"{n} {c:,.0f}" for n, c in s.counts.items())),
            ]
            for s in steps
        ),
        [1],
    )


def quarantine(rejects: Sequence[Reject]) -> str:
    """What was refused, why, and a few examples of each."""
    if not rejects:
        return '<p class="muted">Nothing was refused.</p>'
    return table(
        ["stage", "reason", "count", "for example"],
        (
            [
                text(r.stage),
                text(r.reason),
                f"{r.count:,}",
                "<br>".join(f"<code><bdi>{text(e)}</bdi></code>" for e in r.examples),
            ]
            for r in rejects
        ),
        [2],
    )


# -- the page ----------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return resources.files("stages.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


def page(data: ReportData) -> str:
    """The whole report."""
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    card_rows = ([text(name), text(value)] for name, value in data.card)
    sections = [
        ("results", "Results", tiles(data)),
        ("pictures", f"Pictures ({len(data.pictures):,} of {data.num_images:,})", grid(data)),
        ("numbers", "Numbers", baseline_table(data) if data.scores else ""),
        ("losses", "Losses", charts(data.curves)),
        ("data", "Data", table(["", ""], card_rows) if data.card else ""),
        ("quarantine", "Quarantine", quarantine(data.rejects)),
        ("time", "Time", timings(data.steps) if data.steps else ""),
        ("reproduce", "Reproduce", _reproduce(data)),
    ]
    sections = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{name}">{title.partition(" (")[0]}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{text(data.title)}</title><style>{style}</style></head><body>"
        '<a class="skip" href="#pictures">Skip to the pictures</a>'
        f'<nav aria-label="Sections"><div class="links">{links}</div>'
        '<button type="button" id="theme">Theme: auto</button></nav>'
        f'<main><h1>{text(data.title)}</h1><p class="lede">{text(data.lede)}</p>'
        f'<p class="muted">{text(data.created)}</p>{body}</main>'
        f"<script>{script}</script></body></html>\n"
    )


def _reproduce(data: ReportData) -> str:
    command = (
        f'<div class="command"><pre id="command"><code>{text(data.command)}</code></pre>'
        '<button type="button" data-copy="command">Copy</button></div>'
        if data.command
        else ""
    )
    config = (
        "<details><summary>The whole configuration</summary>"
        f'<div class="command"><pre id="config"><code>{text(data.config_text)}</code></pre>'
        '<button type="button" data-copy="config">Copy</button></div></details>'
        if data.config_text
        else ""
    )
    return command + config
