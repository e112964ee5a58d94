"""Try a recipe with other settings: an ablation, a grid, a search at random.

    python -m pipeline.sweep recipes/sweeps/losses.yaml

A trial is the pipeline with some keys set. What several trials share (the data, or the phases before the one
that differs) is done once, before them; the rest of each trial is run by Ray Tune, `--concurrent` at a time.

A Tune trial is a process that drives its steps as `pipeline.run` does, and so calls Ray Train's `fit`: since
Train V2 a trainer can no longer be handed to Tune, and a function that starts one is what replaced that. It
runs on the machine of this command, where a SQLite file of MLflow's may lie; its workers run anywhere.
What a trial came to is read from its folders, not from Tune: the same command again does what is missing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import ray
from pydantic import Field, JsonValue, PositiveInt, ValidationError, model_validator
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline import config as configuration
from pipeline.cluster import check_folders, cluster, kept_in
from pipeline.config import PipelineConfig
from pipeline.dag import Step, steps
from pipeline.run import commit, exit_code, extra_arguments, log_to_stdout, stop_on_sigterm
from pipeline.runner import Planned, execute, plan
from stages import storage
from stages.base import Config, Split
from stages.errors import StageError, UserError
from stages.tracking.run import Run, open_parent
from stages.tracking.sender import MetricRow
from stages.training.control import Courier, open_mailbox, reading
from stages.training.news import News, Note

logger = logging.getLogger(__name__)

State = Literal["done", "stopped early", "failed", "to do"]
Best = Literal["min", "max"]


class Range(Config):
    """A number drawn between two ends."""

    low: float
    high: float
    log: Annotated[bool, Field(description="draw its logarithm evenly")] = False

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithm needs low > 0")
        return self

    def draw(self, random: np.random.RandomState) -> float:
        """One value."""
        between = tune.loguniform if self.log else tune.uniform
        return float(between(self.low, self.high).sample(random_state=random))


class EarlyStop(Config):
    """Asynchronous successive halving (ASHA): after every rung only the best go on."""

    metric: Annotated[str, Field(description="a curve of training, e.g. validation/l1")]
    best: Best = "min"
    grace_epochs: Annotated[PositiveInt, Field(description="none is stopped before")] = 1
    factor: Annotated[int, Field(ge=2, description="one in so many goes on; rungs lie so far apart")] = 3


class SweepConfig(Config):
    """Which trials there are, and by what the best is chosen. Keys are dotted, as for `--set`."""

    recipe: Annotated[str, Field(description="the config that is varied; relative to this file")]
    profile: Annotated[str | None, Field(description="of the recipe; null: its own choice")] = None
    settings: Annotated[
        dict[str, dict[str, JsonValue]], Field(default_factory=dict, description="keys to set, by trial name")
    ]
    grid: Annotated[
        dict[str, tuple[JsonValue, ...]], Field(default_factory=dict, description="every combination")
    ]
    random: Annotated[
        dict[str, Range | tuple[JsonValue, ...]],
        Field(
            default_factory=dict, description="drawn anew for each of `trials`: between ends, or of a list"
        ),
    ]
    trials: Annotated[int, Field(ge=1, le=10_000, description="draws, where `random` has keys")] = 10
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    split: Annotated[
        Split, Field(description="what the trials are judged on: keep test for the one chosen")
    ] = "val"
    metric: Annotated[str, Field(description="one of evaluate's, by which the best trial is named")] = "l1"
    best: Best = "min"
    stop_early: EarlyStop | None = None

    @model_validator(mode="after")
    def _varies_something(self) -> Self:
        if not (self.settings or self.grid or self.random):
            raise ValueError("settings, grid or random: there is nothing to vary")
        empty = [key for key, values in (self.grid | self.random).items() if values == ()]
        if empty:
            raise ValueError(f"{empty[0]}: an empty list of values")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that some trial sets."""
        return tuple(dict.fromkeys([*itertools.chain(*self.settings.values()), *self.grid, *self.random]))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One config of the sweep, and what of it differs."""

    name: str
    values: Mapping[str, JsonValue]
    config: PipelineConfig


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial."""

    trial: Trial
    state: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


# -- rules: from a sweep file to trials ---------------------------------------


def load(path: str) -> SweepConfig:
    """Read a sweep file. Raises UserError with one line that names file and key."""
    values = configuration.parse(Path(path))
    if "recipe" not in values:
        raise UserError(f"{path}: recipe: is required: a sweep names the config it varies")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {place + ': ' if place else ''}{' '.join(message.split())}") from error


def variants(sweep: SweepConfig) -> list[tuple[str, dict[str, JsonValue]]]:
    """Name and values of every trial: each setting with each combination of the grid with each draw."""
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    random = np.random.RandomState(sweep.seed)
    draws = [
        {
            key: space.draw(random) if isinstance(space, Range) else space[random.randint(len(space))]
            for key, space in sweep.random.items()
        }
        for _ in range(sweep.trials if sweep.random else 1)
    ]
    short = short_names([*sweep.grid, *sweep.random])
    found: list[tuple[str, dict[str, JsonValue]]] = []
    for (setting, fixed), cell, drawn in itertools.product(sweep.settings.items() or [("", {})], grid, draws):
        varied = cell | drawn
        told = [f"{short[key]}={_shown(value)}" for key, value in varied.items()]
        found.append((", ".join([setting, *told] if setting else told), {**fixed, **varied}))
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key's last part, or all of it where two would be alike."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: tail if last[tail := key.rpartition(".")[2]] == 1 else key for key in keys}


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value).strip('"')


def make_trials(sweep: SweepConfig, path: str, recipe: str, overrides: Sequence[str]) -> list[Trial]:
    """The checked config of every trial. Raises UserError naming the trial that has a wrong key."""
    base = configuration.read(recipe, sweep.profile)
    for section in ("infer", "evaluate"):
        configuration.assign(base, f"{section}.split", sweep.split, said=recipe)
    configuration.override(base, overrides)
    found = []
    for name, values in variants(sweep):
        changed = copy.deepcopy(base)
        for key, value in values.items():
            configuration.assign(changed, key, value, said=f"{path}: {name}: {key}")
        found.append(
            Trial(name=name, values=values, config=configuration.validated(changed, f"{path}: {name}"))
        )
    return found


def shared(plans: Iterable[Sequence[Planned]]) -> tuple[Planned, ...]:
    """The steps that more than one trial needs, in the order they can be done."""
    plans = list(plans)
    counts = Counter(p.folder for planned in plans for p in planned)
    found: dict[str, Planned] = {}
    for p in itertools.chain(*plans):
        if counts[p.folder] > 1:
            found.setdefault(p.folder, p)
    return tuple(found.values())


def best_of(results: Sequence[Result], metric: str, best: Best) -> Result | None:
    """The trial whose metric is best, None if none was judged by it."""
    judged = [result for result in results if result.state == "done" and metric in result.metrics]
    chosen = min if best == "min" else max
    return chosen(judged, key=lambda result: result.metrics[metric]) if judged else None


class Asked:
    """The digests of what lies outside the pipeline, asked once for all trials and processes."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def steps(self, config: PipelineConfig) -> tuple[Step, ...]:
        """The pipeline's steps, their digests known."""
        return tuple(self._fixed(step) for step in steps(config))

    def _fixed(self, step: Step) -> Step:
        if step.digest is None:
            return step
        key = f"{step.name} {step.config.model_dump_json()}"
        if key not in self.known:
            self.known[key] = step.digest()
        return replace(step, digest=partial(str, self.known[key]))


# -- wiring: one trial --------------------------------------------------------


class Watched(Run):
    """A run whose curve of one name is also told to Tune, as a mean an epoch."""

    def __init__(self, inner: Run, curve: str, first_epochs: Mapping[str, int], before: int = 0) -> None:
        super().__init__(inner.sender, inner.key)
        self.inner, self.curve, self.first_epochs = inner, curve, first_epochs
        self.epochs = MeanByEpoch(before)

    def child(self, name: str, tags: Mapping[str, str] | None = None, *, key: str | None = None) -> Run:
        """A stage's run; a phase's goes on telling."""
        run = self.inner.child(name, tags, key=key)
        if name not in self.first_epochs:
            return run
        return Watched(run, self.curve, self.first_epochs, self.first_epochs[name])

    def metrics_batch(self, rows: Iterable[MetricRow]) -> None:
        """Pass on, and tell Tune of an epoch when the next one begins."""
        rows = list(rows)
        self.inner.metrics_batch(rows)
        for epoch, mean in self.epochs.take(rows, self.curve):
            tune.report({self.curve: mean, "epoch": epoch})


@dataclass
class MeanByEpoch:
    """A curve's mean over each epoch. `before`: epochs of the phases before this one."""

    before: int = 0
    epoch: int = 0
    values: dict[int, float] = field(default_factory=dict)
    """By step: of the epoch under way, and of steps whose epoch is not told yet."""

    def take(self, rows: Iterable[MetricRow], curve: str) -> Iterator[tuple[int, float]]:
        """Epochs (counted from 1, over all phases) that are over by what these rows say, and their means.

        Rows come as the train stage sends them: a step's curves, then its epoch.
        """
        for row in rows:
            if row.name == curve:
                self.values[row.step] = row.value
            elif row.name == "epoch" and row.value > self.epoch:
                past = [self.values.pop(step) for step in list(self.values) if step < row.step]
                if past:
                    yield self.before + self.epoch + 1, float(np.mean(past))
                self.epoch = int(row.value)


def run_trial(
    setting: Mapping[str, int],
    *,
    trials: Sequence[Trial],
    runs: Sequence[Run],
    asked: Asked,
    stop_early: EarlyStop | None,
    board: Any,
    command: str,
) -> None:
    """Drive one trial's steps, in a process of Tune's. What comes of it is in its folders and in MLflow."""
    trial, run = trials[setting["trial"]], runs[setting["trial"]]
    log_to_stdout()
    logging.getLogger().handlers = [ToBoard(trial.name, board)]
    storage.configure(trial.config.storage)
    planned = plan(asked.steps(trial.config), trial.config.workspace)
    if stop_early is not None:
        run = watched(run, trial.config, stop_early)
    finished: dict[str, dict[str, Any]] = {}
    extra = extra_arguments(trial.config, planned, finished, command)
    with run:
        execute(planned, trial.config.resources, parent=run, extra=extra, finished=finished)


def watched(run: Run, config: PipelineConfig, stop_early: EarlyStop) -> Watched:
    """The trial's run, which tells Tune of its phases' epochs."""
    phases = config.train.phases
    before = [0, *itertools.accumulate(phase.epochs for phase in phases)]
    first = {f"train-{phase.name}": epochs for phase, epochs in zip(phases, before, strict=False)}
    return Watched(run, stop_early.metric, first)


class ToBoard(logging.Handler):
    """A trial's log lines, for the command to write."""

    def __init__(self, name: str, board: Any) -> None:
        super().__init__()
        self.trial, self.courier = name, Courier(board)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one without waiting."""
        self.courier([Note(f"{self.trial}: {record.getMessage()}")])


def say(news: Sequence[News]) -> None:
    """Write trials' lines into the log of the command."""
    for one in news:
        if isinstance(one, Note):
            logger.info("%s", one.text)


class Told(TrialProgressCallback):  # type: ignore[misc]
    """A log line when a trial starts, and when it ends, in place of what Tune prints."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        super().__init__()
        self.trials = trials

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        """The trial's own lines tell more."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Say so."""
        logger.info("%s: starts", self.trials[trial.config["trial"]].name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Say so."""
        logger.info("%s: over", self.trials[trial.config["trial"]].name)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Say so."""
        logger.warning("%s: failed", self.trials[trial.config["trial"]].name)


def run_with_tune(
    sweep: SweepConfig,
    trials: Sequence[Trial],
    runs: Sequence[Run],
    asked: Asked,
    *,
    concurrent: int,
    command: str,
) -> dict[int, str]:
    """Run the trials; returns why they failed, by the place of those that did."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends this as it ends everything else
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that is done reports no curve
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    here = f"node:{ray.util.get_node_ip_address()}"
    board = open_mailbox()
    work = tune.with_parameters(
        run_trial,
        trials=trials,
        runs=runs,
        asked=asked,
        stop_early=sweep.stop_early,
        board=board,
        command=command,
    )
    with tempfile.TemporaryDirectory(prefix="pixloom-sweep-") as folder:
        tuner = tune.Tuner(
            # A trial's own process only waits: what computes asks for its CPUs and GPUs itself.
            tune.with_resources(work, {"cpu": 0, here: 0.001}),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent, scheduler=scheduler(sweep.stop_early, trials)
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Told(trials)]),
        )
        with reading(board, say):
            results = tuner.fit()
    return {
        result.config["trial"]: _last_line(result.error)
        for result in results
        if result.config is not None and result.error is not None
    }


def scheduler(stop_early: EarlyStop | None, trials: Sequence[Trial]) -> TrialScheduler:
    """ASHA over epochs where trials may be stopped early."""
    if stop_early is None:
        return FIFOScheduler()
    longest = max(sum(phase.epochs for phase in trial.config.train.phases) for trial in trials)
    return ASHAScheduler(
        time_attr="epoch",
        metric=stop_early.metric,
        mode=stop_early.best,
        max_t=max(longest, stop_early.grace_epochs) + 1,  # ASHA stops what reaches it; ours ends by itself
        grace_period=stop_early.grace_epochs,
        reduction_factor=stop_early.factor,
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:500] if lines else type(error).__name__


# -- the command --------------------------------------------------------------

HELP = """\
Try a recipe with other settings, judge every trial alike, name the best.

The data is prepared once. Each trial is a child run in MLflow, with the settings that differ as its
parameters, so that MLflow's own pages compare them; the same command again does only what is missing."""

EXAMPLES = """\
examples:
  python -m pipeline.sweep recipes/sweeps/losses.yaml                  the paper's ablation of its losses
  python -m pipeline.sweep recipes/sweeps/losses.yaml --plan           which trials there are, what is to do
  python -m pipeline.sweep recipes/sweeps/tuning.yaml --trials 30 --concurrent 4
  python -m pipeline.sweep recipes/sweeps/losses.yaml -c recipes/pix2pix/maps-to-aerial.yaml --profile paper

exit codes: as of python -m pipeline.run; 1 if any trial failed
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pipeline.sweep",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("sweep", metavar="SWEEP", help="the sweep's YAML file")
    p.add_argument("-c", "--config", metavar="FILE", help="vary this recipe, not the sweep's own")
    p.add_argument("--profile", metavar="NAME", help="profile of the recipe")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of all trials"
    )
    p.add_argument("--trials", type=int, metavar="N", help="draws of a random search")
    p.add_argument(
        "--concurrent",
        type=int,
        default=1,
        metavar="N",
        help="trials at a time (default 1); each has workers",
    )
    p.add_argument("--plan", action="store_true", help="print the trials and what is to do; run nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    log_to_stdout()
    return exit_code(lambda: run(options, command=shlex.join(["python", "-m", "pipeline.sweep", *words])))


def configured(options: argparse.Namespace) -> tuple[SweepConfig, str]:
    """The sweep with what the command line changes of it, and the recipe's path."""
    sweep = load(options.sweep)
    recipe = options.config or str(Path(options.sweep).parent / sweep.recipe)
    changes = {"profile": options.profile, "trials": options.trials}
    if options.concurrent < 1 or (options.trials is not None and options.trials < 1):
        raise UserError("--trials, --concurrent: must be at least 1")
    return sweep.model_copy(update={k: v for k, v in changes.items() if v is not None}), recipe


def run(options: argparse.Namespace, *, command: str) -> None:
    """Make the trials, do what they share, run the rest of each, name the best."""
    sweep, recipe = configured(options)
    trials = make_trials(sweep, options.sweep, recipe, options.set)
    config = trials[0].config
    check_folders(kept_in(config), recipe)
    storage.configure(config.storage)
    asked = Asked()
    plans = [plan(asked.steps(trial.config), trial.config.workspace) for trial in trials]
    if options.plan:
        sys.stdout.write(plan_table(trials, plans))
        return
    failed: dict[int, str] = {}
    name = Path(options.sweep).stem
    tags = {"pixloom.command": command, "pixloom.workspace": config.workspace, "pixloom.sweep": name}
    tags |= config.about.tags() | commit()
    title = f"{name} {time.strftime('%Y-%m-%d %H:%M')}"
    with open_parent(config.tracking, title, tags, config.workspace) as parent:
        parent.artifact("sweep.yaml", Path(options.sweep).read_bytes())
        runs = [child(parent, trial, sweep) for trial in trials]
        parent.flush()  # a trial's process looks its run up
        to_do = [place for place, planned in enumerate(plans) if not all(p.done for p in planned)]
        try:
            if to_do:
                with cluster(config.resources, config.storage, kept_in(config)):
                    stop_on_sigterm()
                    extra = extra_arguments(config, plans[0], {}, command)
                    execute(shared(plans), config.resources, parent=parent, extra=extra, finished={})
                    failed = run_with_tune(
                        sweep,
                        [trials[place] for place in to_do],
                        [runs[place] for place in to_do],
                        asked,
                        concurrent=options.concurrent,
                        command=command,
                    )
        finally:
            results = outcomes(trials, asked, {to_do[place]: why for place, why in failed.items()})
            best = best_of(results, sweep.metric, sweep.best)
            record(parent, runs, results, best, sweep)
        sys.stdout.write(table(results, best, sweep))
    if failed:
        raise StageError(f"{len(failed)} of {len(trials)} trials failed; what they did so far is kept")


def child(parent: Run, trial: Trial, sweep: SweepConfig) -> Run:
    """A trial's run in MLflow: every key of the sweep is a parameter, also where it has its usual value."""
    run = parent.child(trial.name, {"pixloom.trial": trial.name})
    written = trial.config.model_dump(mode="json")
    run.params({"trial": trial.name, **{key: _found(written, key) for key in sweep.keys}})
    return run


def _found(values: Any, key: str) -> Any:
    for part in key.split("."):
        try:
            values = values[int(part) if isinstance(values, list) else part]
        except (LookupError, TypeError, ValueError):
            return None
    return values


def outcomes(trials: Sequence[Trial], asked: Asked, failed: Mapping[int, str]) -> list[Result]:
    """What came of each trial, by what its folders hold."""
    results = []
    for place, trial in enumerate(trials):
        planned = plan(asked.steps(trial.config), trial.config.workspace)
        marker = next((p.marker for p in planned if p.step.name == "evaluate"), None)
        begun = any(p.why.startswith("unfinished") for p in planned)
        state: State = "stopped early" if begun else "to do"
        if place in failed:
            state = "failed"
        elif marker is not None:
            state = "done"
        results.append(
            Result(
                trial=trial,
                state=state,
                metrics=marker["metrics"] if marker else {},
                reason=failed.get(place, ""),
            )
        )
    return results


def record(
    parent: Run, runs: Sequence[Run], results: Sequence[Result], best: Result | None, sweep: SweepConfig
) -> None:
    """Put the results into MLflow: on each trial's run, and the best one's on the sweep's."""
    for run, result in zip(runs, results, strict=True):
        if result.metrics:
            run.metrics(result.metrics, step=0)
        tags = {"pixloom.best": "true"} if result is best else {}
        run.tags(
            {
                "pixloom.state": result.state,
                **tags,
                **({"pixloom.why": result.reason} if result.reason else {}),
            }
        )
        run.end("FINISHED" if result.state == "done" else "FAILED" if result.state == "failed" else "KILLED")
    written = [
        {
            "trial": r.trial.name,
            "state": r.state,
            "values": r.trial.values,
            "metrics": r.metrics,
            "why": r.reason,
        }
        for r in results
    ]
    parent.artifact("trials.json", json.dumps(written, indent=1).encode())
    if best is not None:
        parent.metrics(best.metrics, step=0)
        parent.tags({"pixloom.best": best.trial.name, "pixloom.best_by": f"{sweep.metric} ({sweep.split})"})


def plan_table(trials: Sequence[Trial], plans: Sequence[Sequence[Planned]]) -> str:
    """Each trial, what it sets, and the steps that are to do; steps of several trials stand first."""
    common = {p.folder for p in shared(plans)}
    once = {p.folder: p for planned in plans for p in planned if p.folder in common}
    lines = [f"once         {', '.join(p.step.name for p in once.values() if not p.done) or 'all done'}"]
    for trial, planned in zip(trials, plans, strict=True):
        left = [p.step.name for p in planned if not p.done and p.folder not in common]
        lines.append(f"{trial.name:<24} {', '.join(left) or 'all done'}")
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result], best: Result | None, sweep: SweepConfig) -> str:
    """The trials, best first, with a few metrics."""
    names = list(dict.fromkeys([sweep.metric, "l1", "psnr", "ssim"]))
    width = max(12, *(len(result.trial.name) for result in results))
    sign = 1 if sweep.best == "min" else -1

    def order(result: Result) -> tuple[bool, float]:
        return sweep.metric not in result.metrics, sign * result.metrics.get(sweep.metric, 0.0)

    lines = ["", f"{'trial':<{width}} " + " ".join(f"{name:>10}" for name in names)]
    for result in sorted(results, key=order):
        numbers = [f"{result.metrics[n]:>10.4g}" if n in result.metrics else f"{'':>10}" for n in names]
        told = "" if result.state == "done" else f"  {result.state}"
        told += f": {result.reason}" if result.reason else ""
        lines.append(f"{result.trial.name:<{width}} {' '.join(numbers)}{told}")
    if best is not None:
        lines.append(f"\nbest by {sweep.metric} on {sweep.split}: {best.trial.name}")
        lines += [f"  --set {key}={json.dumps(value)}" for key, value in best.trial.values.items()]
    else:
        lines.append(f"\nno trial has been judged by {sweep.metric}")
    config = results[0].trial.config
    lines.append(f"runs    {config.tracking.page_command(config.workspace)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
