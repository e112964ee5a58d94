"""Plan and run the steps: finished steps are not run again, unfinished ones continue where they stopped.

A step's folder is `<workspace>/<step>-<fingerprint>`. The step is finished when the folder holds
`_SUCCESS.json`, which is written last; without it, the next run of the same step continues the work there.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.dag import RunView, Step, StepContext, fingerprint
from stages import storage
from stages.base import Outcome, Resources, Seen
from stages.errors import PixloomError, StageError, UserError, cause
from stages.progress import duration
from stages.storage.local import alone
from stages.tracking.run import Run, flatten

MARKER = "_SUCCESS.json"
PREDICTED = "cost.json"
"""In the workspace: folder -> the seconds that the last plan expected of the step (`pipeline.cost`)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """A step with its folder, and the marker that an earlier run left there."""

    step: Step
    fingerprint: str
    folder: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input name -> folder URI."""
    marker: Mapping[str, Any] | None = None
    """The content of `_SUCCESS.json`, or None."""
    why: str = ""
    resumes: bool = False
    """Whether an earlier run left unfinished work in the folder."""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Counts of what the step reads from outside."""
    predicted: float | None = None
    """Seconds that the last `--plan` expected."""

    @property
    def done(self) -> bool:
        """Whether the output of exactly this config and these inputs is complete."""
        return self.marker is not None


def plan(
    steps: Sequence[Step], workspace: str, digests: dict[str, Seen] | None = None
) -> tuple[PlannedStep, ...]:
    """Fingerprint every step and find out what is done. Starts nothing; reads listings and markers only.

    digests: digests of what steps read from outside, computed by an earlier plan; this plan adds its own
    """
    digests = {} if digests is None else digests
    planned: dict[str, PlannedStep] = {}
    earlier: dict[str, list[str]] = defaultdict(list)  # folders' names by the step's
    with storage.located(f"workspace: {workspace}"):
        for name in storage.list_folders(workspace):
            earlier[name.rpartition("-")[0]].append(name)
    predicted = storage.find_json(storage.join(workspace, PREDICTED)) or {}
    for step in steps:
        inputs = {name: planned[source] for name, source in step.needs.items()}
        seen = Seen("")
        if step.digest is not None:
            read = f"{step.name} {step.config.model_dump_json()}"
            seen = digests[read] if read in digests else digests.setdefault(read, step.digest())
        digest = seen.digest or None
        print_ = fingerprint(step, {name: source.fingerprint for name, source in inputs.items()}, digest)
        folder = storage.join(workspace, f"{step.name}-{print_}")
        exists = folder.rpartition("/")[2] in earlier[step.name]
        marker = read_marker(folder) if exists else None
        planned[step.name] = PlannedStep(
            step=step,
            fingerprint=print_,
            folder=folder,
            inputs={name: source.folder for name, source in inputs.items()},
            marker=marker,
            why=_why(step, inputs, digest, marker, exists, workspace, earlier[step.name]),
            resumes=exists and marker is None,
            seen=seen.counts,
            predicted=predicted.get(folder.rpartition("/")[2]),
        )
    return tuple(planned.values())


def select(planned: Sequence[PlannedStep], *, only: str | None, until: str | None) -> tuple[PlannedStep, ...]:
    """The steps to run: all, those up to a stage, or one stage whose inputs are done.

    Raises UserError where the stage's name is unknown or an input of it is not done.
    """
    wanted = only or until
    if wanted is None:
        return tuple(planned)
    places = [i for i, p in enumerate(planned) if wanted in (p.step.name, p.step.stage)]
    if not places:
        names = ", ".join(dict.fromkeys(p.step.stage for p in planned))
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


def check(planned: Iterable[PlannedStep]) -> None:
    """Raise UserError for what a step to do would refuse, as far as its inputs that are done show it."""
    for p in planned:
        if p.step.check is not None and not p.done:
            p.step.check({name: uri for name, uri in p.inputs.items() if read_marker(uri) is not None})


def execute(
    planned: Sequence[PlannedStep],
    resources: Resources,
    *,
    parent: Run,
    view: RunView,
    observe: Callable[[Step, Run], Run] = lambda _, run: run,
) -> dict[str, Mapping[str, Any]]:
    """Run the steps that are not done, in order. Returns every step's marker by the step's name.

    After each step, the later ones that need it are checked, before work is wasted.

    view: what the report shows of the run; its `markers` are filled in here
    observe: returns the MLflow run to give a step, e.g. one that also forwards its metrics

    Raises StageError naming the stage and its folder, or the UserError of a stage.
    """
    markers: dict[str, Mapping[str, Any]] = {}
    for p in planned:
        with alone(p.folder) if p.marker is None else nullcontext():
            done = p.marker or read_marker(p.folder)  # of another run, meanwhile
            if done is not None:
                markers[p.step.name] = done
                logger.info("%-13s done before", p.step.name)
                continue
            logger.info("%-13s starts (%s)", p.step.name, p.why)
            started = time.monotonic()
            tags = {"pixloom.step": p.step.name, "pixloom.fingerprint": p.fingerprint}
            with parent.child(p.step.name, tags) as run:
                context = StepContext(
                    resources=resources,
                    output=p.folder,
                    track=observe(p.step, run),
                    parent=parent,
                    inputs=p.inputs,
                    view=replace(view, markers=list(markers.values())),
                )
                outcome = _run(p, context)
                seconds = time.monotonic() - started
                # A phase has logged its losses as curves already; a last point at step 0 would spoil them.
                metrics = {} if p.step.stage == "train" else outcome.metrics
                run.metrics({**metrics, **outcome.counts, "seconds": seconds}, step=0)
            marker = {
                "step": p.step.name,
                "fingerprint": p.fingerprint,
                "version": p.step.version,
                "config": p.step.config.model_dump(mode="json"),
                "inputs": {name: uri.rpartition("/")[2] for name, uri in p.inputs.items()},
                "counts": dict(outcome.counts),
                "metrics": dict(outcome.metrics),
                "notes": dict(outcome.notes),
                "seconds": round(seconds, 3),
                "predicted": None if p.resumes else p.predicted,
                "resumed": p.resumes,
            }
            storage.write_json(storage.join(p.folder, MARKER), marker)
            markers[p.step.name] = marker
            counts = ", ".join(f"{name} {value:,}" for name, value in outcome.counts.items())
            logger.info("%-13s done in %s%s", p.step.name, duration(seconds), f": {counts}" if counts else "")
            check(q for q in planned if q.step.name not in markers and p.step.name in q.step.needs.values())
    return markers


def _run(p: PlannedStep, context: StepContext) -> Outcome:
    try:
        return p.step.work(context)
    except PixloomError:
        raise
    except Exception as error:
        raise StageError(
            f"{p.step.name} failed: {cause(error)} (its work so far is in {p.folder})"
        ) from error


def read_marker(folder: str) -> Mapping[str, Any] | None:
    """What a finished step left in its folder; None if it is not finished."""
    marker: Mapping[str, Any] | None = storage.find_json(storage.join(folder, MARKER))
    return marker


def _why(
    step: Step,
    inputs: Mapping[str, PlannedStep],
    digest: str | None,
    marker: Mapping[str, Any] | None,
    exists: bool,
    workspace: str,
    earlier: Sequence[str],
) -> str:
    """Why the step runs, or does not, in a few words."""
    if marker is not None:
        return f"done in {duration(marker['seconds'])}"
    waiting = [source.step.name for source in inputs.values() if not source.done]
    if waiting:
        return f"after {', '.join(waiting)}"
    if exists:
        return "unfinished, continues"
    others = [m for name in earlier if (m := read_marker(storage.join(workspace, name))) is not None]
    if not others:
        return "never run"
    closest = min((changes(m, step, inputs) for m in others), key=len)
    if closest:
        return "changed: " + ", ".join(closest[:3]) + (" ..." if len(closest) > 3 else "")
    return "the data it reads has changed" if digest else "changed"


def changes(marker: Mapping[str, Any], step: Step, inputs: Mapping[str, PlannedStep]) -> list[str]:
    """Dotted keys in which a finished run's config and inputs differ from the step's."""
    new = flatten(step.config.model_dump(mode="json"))
    old = flatten(marker["config"])
    changed = [key for key in sorted(new.keys() | old.keys()) if new.get(key) != old.get(key)]
    for name, source in inputs.items():
        if marker["inputs"].get(name) != source.folder.rpartition("/")[2]:
            changed.append(f"input {name}")
    if marker["version"] != step.version:
        changed.append("the stage's code version")
    return changed
