"""The trials of a sweep: their configs, what they share, how one runs, and which is the best.

A trial is the pipeline with some keys set. The steps that several trials share (the data, or the phases
before the one that differs) are done once, before the trials.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from pydantic import JsonValue
from ray import tune

from pipeline import config as configuration
from pipeline.config import PipelineConfig
from pipeline.runner import PlannedStep
from pipeline.sweep.config import Best, Range, SweepConfig
from stages import storage
from stages.base import Point
from stages.errors import UserError
from stages.scoring.intervals import Interval
from stages.scoring.table import difference_of
from stages.tracking.run import Run
from stages.tracking.sender import stored_points

State = Literal["done", "stopped early", "failed", "to do"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One config of the sweep, and the values in which it differs from the recipe."""

    name: str
    values: Mapping[str, JsonValue]
    config: PipelineConfig


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The state of a trial after the sweep; its metrics if it is done, the reason if it failed."""

    trial: Trial
    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    folder: str = ""
    """Of its evaluation."""

    def rank(self, metric: str, best: Best) -> tuple[bool, float]:
        """The trial's place; the smallest is the best. It begins with True if there is no number."""
        value = self.metrics.get(metric, math.nan)
        return not math.isfinite(value), value if best == "min" else -value


def variants(sweep: SweepConfig) -> list[tuple[str, dict[str, JsonValue]]]:
    """Name and values of every trial: each setting with each combination of the grid with each draw.

    A draw that repeats an earlier one is no trial of its own. Names are short; where an earlier trial has the
    name, values are shown with all digits, so that more draws leave the names of those before them.
    """
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    generator = np.random.RandomState(sweep.seed)
    draws = [
        {key: _draw(space, generator) for key, space in sweep.random.items()}
        for _ in range(sweep.trials if sweep.random else 1)
    ]
    keys = [*sweep.grid, *sweep.random]
    last = Counter(key.rpartition(".")[2] for key in keys)  # parts; a key with that of another is shown whole
    short = {key: tail if last[tail := key.rpartition(".")[2]] == 1 else key for key in keys}
    trials: dict[str, dict[str, JsonValue]] = {}
    for (setting, fixed), cell, draw in itertools.product(sweep.settings.items() or [("", {})], grid, draws):
        varied = cell | draw
        values, names = fixed | varied, list[str]()
        for text in (_shown, json.dumps):
            labels = [f"{short[key]}={text(value)}" for key, value in varied.items()]
            names.append(", ".join([setting, *labels] if setting else labels))
        more = (f"{names[1]} ({number})" for number in itertools.count(2))
        free = (
            n for n in itertools.chain(names, more) if json.dumps(trials.get(n, values)) == json.dumps(values)
        )
        trials[next(free)] = values
    return list(trials.items())


def _draw(space: Range | tuple[JsonValue, ...], generator: np.random.RandomState) -> JsonValue:
    if not isinstance(space, Range):
        return space[generator.randint(len(space))]
    distribution = tune.loguniform if space.log else tune.uniform
    return float(distribution(space.low, space.high).sample(random_state=generator))


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value).strip('"')


def make_trials(sweep: SweepConfig, path: str, recipe: str, overrides: Sequence[str]) -> list[Trial]:
    """The checked config of every trial. Raises UserError naming the trial that has a wrong key."""
    base = configuration.read(recipe, sweep.profile)
    for section in ("infer", "evaluate"):
        configuration.assign(base, f"{section}.split", sweep.split, said=recipe)
    configuration.override(base, overrides)
    trials = []
    for name, values in variants(sweep):
        changed = copy.deepcopy(base)
        for key, value in values.items():
            configuration.assign(changed, key, value, said=f"{path}: {name}: {key}")
        config = configuration.validated(changed, f"{path}: {name}")
        trials.append(Trial(name=name, values=values, config=config))
    return trials


def shared(plans: Iterable[Sequence[PlannedStep]]) -> tuple[PlannedStep, ...]:
    """The steps that more than one trial needs, each after those it needs itself."""
    steps = list(itertools.chain(*plans))
    counts = Counter(p.folder for p in steps)
    return tuple({p.folder: p for p in steps if counts[p.folder] > 1}.values())


def best_of(results: Sequence[TrialResult], metric: str, best: Best) -> TrialResult | None:
    """The finished trial with the best value of the metric, or None."""
    scored = [result for result in results if result.state == "done" and not result.rank(metric, best)[0]]
    return min(scored, key=lambda result: result.rank(metric, best), default=None)


def not_clearly_worse(results: Sequence[TrialResult], best: TrialResult, metric: str) -> dict[str, Interval]:
    """The finished trials whose difference from the best, image by image, has an interval with zero in it."""
    found = {}
    for result in results:
        if result is not best and result.folder:
            theirs, own = (storage.join(one.folder, "metrics.parquet") for one in (result, best))
            apart = difference_of(theirs, own, metric)
            if apart is not None and not apart.excludes_zero:
                found[result.trial.name] = apart
    return found


def check_curve(config: PipelineConfig, curve: str, key: str) -> None:
    """Raise UserError, naming the setting, for a curve that training lacks: it would stop no trial."""
    losses, select = config.train.losses, config.train.select
    weights = losses.model_dump() | {"gan": losses.gan_weight}
    terms = [name for name in ("gan", "feature_matching", "l1", "perceptual", "lpips") if weights[name]]
    there = ["validation/l1", *([f"validation/{select.replace(':', '_')}"] if select else [])]
    there += [f"generator/{term}" for term in terms]
    there += ["discriminator/real", "discriminator/fake"] if losses.uses_discriminator else []
    there += ["health/discriminator_over_generator"] if losses.gan_weight else []
    there += ["discriminator/r1"] if losses.r1 else []
    if "/".join(curve.split("/")[:2]) not in there:  # the third word is a scale or a layer
        raise UserError(f"{key}: {curve} is no curve of its training; there are {', '.join(there)}")


class EpochReports:
    """A phase's MLflow run that also reports one curve's mean over each epoch, e.g. to Tune.

    before   the epochs of earlier phases
    report   gets {curve: mean, "epoch": epochs so far} when the first point of the next epoch comes
    """

    def __init__(self, run: Run, curve: str, before: int, report: Callable[[dict[str, Any]], None]) -> None:
        self._run, self._curve, self._before, self._report = run, curve, before, report
        self._epoch = 0
        self._values: dict[int, float] = {}  # by step, of this epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def points(self, points: Sequence[Point]) -> None:
        """Record points in MLflow, and report every epoch that they end."""
        self._run.points(points)
        self._take(points)

    def curves(self, folder: str) -> None:
        """Name the phase's folder; report the epochs that an earlier process ended."""
        self._run.curves(folder)
        for points in stored_points(folder):
            self._take(points)

    def _take(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.epoch > self._epoch:
                if past := list(self._values.values()):
                    self._report({self._curve: float(np.mean(past)), "epoch": self._before + self._epoch + 1})
                self._epoch, self._values = point.epoch, {}
            if point.name == self._curve and point.epoch == self._epoch:
                self._values[point.step] = point.value


def reporting(
    run: Run, step: str, trial: PipelineConfig, curve: str | None, report: Callable[[dict[str, Any]], None]
) -> Run:
    """The run of a trial's step; with a curve, a training phase's run also reports its epochs."""
    before = 0
    for phase in trial.train.phases:
        if curve and step == f"train-{phase.name}":
            return cast(Run, EpochReports(run, curve, before, report))
        before += phase.epochs
    return run
