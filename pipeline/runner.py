"""Plan and run the steps: what is done is not done again, what is unfinished is taken up where it stopped.

A step's folder is `<workspace>/<step>-<fingerprint>`. It is finished when it holds `_SUCCESS.json`, which is
written last; without it, the folder is work in hand that the next run of the same step goes on with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.dag import Step, fingerprint
from stages import storage
from stages.base import Outcome, Resources
from stages.errors import PixloomError, StageError, UserError
from stages.progress import duration
from stages.tracking.run import Run

MARKER = "_SUCCESS.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A step with its place, and what the last run left there."""

    step: Step
    fingerprint: str
    folder: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input name -> folder URI."""
    marker: Mapping[str, Any] | None = None
    """What the step said of itself when it finished, or None."""
    why: str = ""

    @property
    def done(self) -> bool:
        """Whether the output is there, whole, for exactly this config and input."""
        return self.marker is not None


def plan(steps: Sequence[Step], workspace: str) -> tuple[Planned, ...]:
    """Fingerprint every step and look at what is done. Starts nothing; reads listings and markers only."""
    planned: dict[str, Planned] = {}
    earlier = _folders(workspace)
    for step in steps:
        inputs = {name: planned[source] for name, source in step.needs.items()}
        digest = step.digest() if step.digest else None
        print_ = fingerprint(step, {name: source.fingerprint for name, source in inputs.items()}, digest)
        folder = storage.join(workspace, f"{step.name}-{print_}")
        known = folder.rpartition("/")[2] in earlier.get(step.name, ())
        marker = _marker(folder) if known else None
        planned[step.name] = Planned(
            step=step,
            fingerprint=print_,
            folder=folder,
            inputs={name: source.folder for name, source in inputs.items()},
            marker=marker,
            why=_why(step, inputs, digest, marker, known, workspace, earlier.get(step.name, ())),
        )
    return tuple(planned.values())


def select(planned: Sequence[Planned], *, only: str | None, until: str | None) -> tuple[Planned, ...]:
    """The steps a run was asked for: all, those up to a stage, or one stage whose inputs are there.

    Raises UserError where the stage's name is unknown or an input of it is not done.
    """
    wanted = only or until
    if wanted is None:
        return tuple(planned)
    places = [i for i, p in enumerate(planned) if wanted in (p.step.name, p.step.group)]
    if not places:
        names = ", ".join(dict.fromkeys(p.step.group for p in planned))
        raise UserError(f"--{'only' if only else 'until'} {wanted}: no such stage; there are {names}")
    if until:
        return tuple(planned[: places[-1] + 1])
    chosen = [planned[i] for i in places]
    there = {p.step.name for p in planned if p.done} | {p.step.name for p in chosen}
    for p in chosen:
        for name, source in p.step.needs.items():
            if source not in there:
                raise UserError(
                    f"--only {wanted}: its input `{name}` comes from {source}, which is not done yet"
                )
    return tuple(chosen)


def execute(
    planned: Iterable[Planned],
    resources: Resources,
    *,
    parent: Run,
    extra: Callable[[Step], Mapping[str, Any]],
    finished: dict[str, dict[str, Any]],
) -> None:
    """Run what is not done, in order. `finished` gains every step's marker as it is known, also on failure.

    `extra` gives a step further arguments that are no part of its fingerprint (the report's view of the run).
    Raises StageError naming the stage and its folder, or the UserError of a stage.
    """
    for p in planned:
        if p.marker is not None:
            finished[p.step.name] = dict(p.marker)
            logger.info("%-13s done before", p.step.name)
            continue
        logger.info("%-13s starts (%s)", p.step.name, p.why)
        started = time.monotonic()
        with parent.child(
            p.step.name, {"pixloom.step": p.step.name, "pixloom.fingerprint": p.fingerprint}
        ) as run:
            outcome = _run(p, resources, run, extra(p.step))
            seconds = time.monotonic() - started
            # A phase has logged its losses as curves already; a last point at step 0 would spoil them.
            metrics = {} if p.step.group == "train" else outcome.metrics
            run.metrics({**metrics, **outcome.counts, "seconds": seconds}, step=0)
        marker = {
            "step": p.step.name,
            "fingerprint": p.fingerprint,
            "version": p.step.stage.VERSION,
            "config": p.step.config.model_dump(mode="json"),
            "inputs": {name: uri.rpartition("/")[2] for name, uri in p.inputs.items()},
            "counts": dict(outcome.counts),
            "metrics": dict(outcome.metrics),
            "seconds": round(seconds, 3),
        }
        storage.write_json(storage.join(p.folder, MARKER), marker)
        finished[p.step.name] = marker
        told = ", ".join(f"{name} {value:,}" for name, value in outcome.counts.items())
        logger.info("%-13s done in %s%s", p.step.name, duration(seconds), f": {told}" if told else "")


def _run(p: Planned, resources: Resources, run: Run, extra: Mapping[str, Any]) -> Outcome:
    try:
        outcome: Outcome = p.step.stage.run(
            p.step.config, resources, output=p.folder, track=run, **{**p.inputs, **extra}
        )
    except PixloomError:
        raise
    except Exception as error:
        raise StageError(
            f"{p.step.name} failed: {_cause(error)} (its work so far is in {p.folder})"
        ) from error
    return outcome


def _cause(error: BaseException) -> str:
    """The innermost cause in one line: Ray wraps what a task raised several times over."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"[:500]


def _folders(workspace: str) -> dict[str, list[str]]:
    """The names of the folders in the workspace by step name."""
    fs, path = storage.filesystem(workspace)
    fs.invalidate_cache()
    try:
        entries = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    folders: dict[str, list[str]] = {}
    for entry in entries:
        name = entry["name"].rstrip("/").rpartition("/")[2]
        folders.setdefault(name.rpartition("-")[0], []).append(name)
    return folders


def _marker(folder: str) -> Mapping[str, Any] | None:
    try:
        marker: Mapping[str, Any] = storage.read_json(storage.join(folder, MARKER))
    except (FileNotFoundError, ValueError):
        return None
    return marker


def _why(
    step: Step,
    inputs: Mapping[str, Planned],
    digest: str | None,
    marker: Mapping[str, Any] | None,
    known: bool,
    workspace: str,
    earlier: Sequence[str],
) -> str:
    """The reason in a few words: for a person who wonders why this runs again."""
    if marker is not None:
        return f"done in {duration(marker['seconds'])}"
    waiting = [source.step.name for source in inputs.values() if not source.done]
    if waiting:
        return f"after {', '.join(waiting)}"
    if known:
        return "unfinished, goes on"
    others = [m for name in earlier if (m := _marker(storage.join(workspace, name))) is not None]
    if not others:
        return "never run"
    closest = min((_changes(m, step, inputs) for m in others), key=len)
    if closest:
        return "changed: " + ", ".join(closest[:3]) + (" ..." if len(closest) > 3 else "")
    return "what it reads has changed" if digest else "changed"


def _changes(marker: Mapping[str, Any], step: Step, inputs: Mapping[str, Planned]) -> list[str]:
    """Dotted keys in which a finished run's config and inputs differ from the ones wanted."""
    wanted = dict(_flat(step.config.model_dump(mode="json")))
    had = dict(_flat(marker["config"]))
    changes = [key for key in sorted(wanted.keys() | had.keys()) if wanted.get(key) != had.get(key)]
    for name, source in inputs.items():
        if marker["inputs"].get(name) != source.folder.rpartition("/")[2]:
            changes.append(f"input {name}")
    if marker["version"] != step.stage.VERSION:
        changes.append("the stage's code version")
    return changes


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value
