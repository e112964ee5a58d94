"""Run a sweep: do what the trials share, run the rest of each with Ray Tune, name the best.

    python -m pipeline.sweep recipes/sweeps/losses.yaml

Train V2 trainers cannot be passed to Tune, so each trial is a function that runs its own steps as
`pipeline.run` does. It runs on the machine of this command, where MLflow's SQLite file may be; its workers
run anywhere. The results are read from the trials' folders, not from Tune: the same command does what is
missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import logging.handlers
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.util.queue import Queue

from pipeline import cli
from pipeline.cluster import check_folders, cluster, result_folders
from pipeline.config import located
from pipeline.dag import check_metric, steps
from pipeline.runner import PlannedStep, check, execute, plan
from pipeline.session import run_tags, run_view
from pipeline.sweep.config import EarlyStop, SweepConfig, load
from pipeline.sweep.trials import (
    State,
    Trial,
    TrialResult,
    best_of,
    check_curve,
    make_trials,
    not_clearly_worse,
    reporting,
    shared,
)
from stages import storage
from stages.base import Seen
from stages.errors import StageError, UserError, cause, without_password
from stages.scoring.table import shown
from stages.tracking.run import Run, flatten, open_parent

CELL = 27  # characters of a number with its interval

logger = logging.getLogger(__name__)

HELP = """\
Try a recipe with other settings, evaluate every trial in the same way, name the best.

The data is prepared once. Each trial is a child run in MLflow whose parameters are the settings that
differ, so that MLflow's own pages compare them. The same command does only what is missing."""

EXAMPLES = f"""\
examples:
  python -m pipeline.sweep recipes/sweeps/losses.yaml                  the paper's ablation of its losses
  python -m pipeline.sweep recipes/sweeps/losses.yaml --plan           which trials there are, what is to do
  python -m pipeline.sweep recipes/sweeps/tuning.yaml --trials 30 --concurrent 4
  python -m pipeline.sweep recipes/sweeps/losses.yaml -c recipes/pix2pix/maps-to-aerial.yaml --profile paper

{cli.EXIT_CODES}"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser("pipeline.sweep", HELP, EXAMPLES)
    p.add_argument("sweep", metavar="SWEEP", type=located, help="the sweep's YAML file")
    p.add_argument(
        "-c", "--config", metavar="FILE", type=located, help="vary this recipe, not the sweep's own"
    )
    p.add_argument("--profile", metavar="NAME", help="profile of the recipe")
    cli.add_settings(p, "change one setting of all trials")
    p.add_argument("--trials", type=cli.count, metavar="N", help="draws of a random search")
    p.add_argument(
        "--concurrent",
        type=cli.count,
        default=1,
        metavar="N",
        help="trials at a time (default 1); each has its own workers",
    )
    p.add_argument("--plan", action="store_true", help="print the trials and what is to do; run nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    cli.log_to_stdout()
    command = shlex.join(["python", "-m", "pipeline.sweep", *words])
    return cli.exit_code(lambda: run(options, command=command))


def configured(options: argparse.Namespace) -> tuple[SweepConfig, str]:
    """The sweep with the command line's changes, and the recipe's path."""
    changes = {"profile": options.profile, "trials": options.trials}
    sweep = load(options.sweep, **{key: value for key, value in changes.items() if value is not None})
    return sweep, options.config or located(sweep.recipe, Path(options.sweep).parent)


def run(options: argparse.Namespace, *, command: str) -> None:
    """Plan the trials, run the steps they share, run the rest of each, record and print the results."""
    sweep, recipe = configured(options)
    trials = make_trials(sweep, options.sweep, recipe, options.set)
    config = trials[0].config
    check_folders(result_folders(config), recipe)
    storage.configure(config.storage)
    digests: dict[str, Seen] = {}
    with cli.planning():
        storage.check_reachable({"workspace": config.workspace} | config.inputs())
        plans = [plan(steps(trial.config), trial.config.workspace, digests) for trial in trials]
        for trial, planned in zip(trials, plans, strict=True):
            check_metric(trial.config, sweep.metric, f"{options.sweep}: metric")
            if sweep.stop_early is not None:
                key = f"{options.sweep}: {trial.name}: stop_early.metric"
                check_curve(trial.config, sweep.stop_early.metric, key)
            check(planned)
    if options.plan:
        sys.stdout.write(plan_table(trials, plans))
        return
    failed: dict[int, str] = {}
    name = Path(options.sweep).stem
    tags = config.about.tags() | run_tags(config, command) | {"pixloom.sweep": name}
    title = f"{name} {time.strftime('%Y-%m-%d %H:%M')}"
    with open_parent(config.tracking, title, tags, config.workspace) as parent:
        parent.artifact("sweep.yaml", without_password(Path(options.sweep).read_text("utf-8")).encode())
        runs = [child(parent, trial, sweep) for trial in trials]
        parent.flush()  # a trial's process looks its run up
        to_do = [index for index, planned in enumerate(plans) if not all(p.done for p in planned)]
        try:
            if to_do:
                with cluster(config.resources, config.storage, result_folders(config)):
                    view = run_view(config, plans[0], command)
                    execute(shared(plans), config.resources, parent=parent, view=view)
                    failed = run_with_tune(sweep, trials, runs, digests, to_do, options.concurrent, command)
        finally:
            results = outcomes(trials, digests, failed)
            best = best_of(results, sweep.metric, sweep.best)
            record(parent, runs, results, best, sweep)
        sys.stdout.write(table(results, best, sweep))
    if failed:
        raise StageError(f"{len(failed)} of {len(trials)} trials failed; what they did so far is kept")
    if best is None:
        raise UserError(f"{options.sweep}: metric: no trial has a value of {sweep.metric}; all else is kept")


# -- trials on Ray Tune -------------------------------------------------------


def run_trial(
    space: Mapping[str, int],
    *,
    trials: Sequence[Trial],
    runs: Sequence[Run],
    digests: dict[str, Seen],
    curve: str | None,
    log: Queue,
    command: str,
) -> None:
    """Run one trial's steps, in a process of Tune's. Results are in the trial's folders and in MLflow."""
    trial, run = trials[space["trial"]], runs[space["trial"]]
    cli.log_to_stdout()
    handler = logging.handlers.QueueHandler(log)
    handler.setFormatter(logging.Formatter(f"{trial.name}: %(message)s"))
    logging.getLogger().handlers = [handler]
    logger.info("starts")
    storage.configure(trial.config.storage)
    planned = plan(steps(trial.config), trial.config.workspace, digests)
    with run:
        execute(
            planned,
            trial.config.resources,
            parent=run,
            view=run_view(trial.config, planned, command),
            observe=lambda step, child: reporting(child, step.name, trial.config, curve, tune.report),
        )
    logger.info("is done")


class Silent(TrialProgressCallback):  # type: ignore[misc]
    """In place of Tune's own lines: trials write theirs."""

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        """Print nothing."""

    on_trial_complete = on_trial_error = on_trial_result


@contextmanager
def written_here() -> Iterator[Queue]:
    """A queue whose log records are written by this process's handlers."""
    queue = Queue()
    listener = logging.handlers.QueueListener(queue, *logging.getLogger().handlers)
    listener.start()
    try:
        yield queue
    finally:
        listener.stop()
        queue.shutdown()


def run_with_tune(
    sweep: SweepConfig,
    trials: Sequence[Trial],
    runs: Sequence[Run],
    digests: dict[str, Seen],
    to_do: Sequence[int],
    concurrent: int,
    command: str,
) -> dict[int, str]:
    """Run the trials with these indices; returns the reasons of those that failed, by index."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the whole command
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that is done reports no curve
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    here = f"node:{ray.util.get_node_ip_address()}"
    with tempfile.TemporaryDirectory(prefix="pixloom-sweep-") as folder, written_here() as log:
        work = tune.with_parameters(
            run_trial,
            trials=trials,
            runs=runs,
            digests=digests,
            curve=sweep.stop_early and sweep.stop_early.metric,
            log=log,
            command=command,
        )
        tuner = tune.Tuner(
            # A trial's own process only waits: its steps request their CPUs and GPUs themselves.
            tune.with_resources(work, {"cpu": 0, here: 0.001}),
            param_space={"trial": tune.grid_search(list(to_do))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                scheduler=scheduler(sweep.stop_early, [trials[index] for index in to_do]),
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Silent()]),
        )
        results = tuner.fit()
    return {
        result.config["trial"]: cause(result.error)
        for result in results
        if result.config is not None and result.error is not None
    }


def scheduler(stop_early: EarlyStop | None, trials: Sequence[Trial]) -> TrialScheduler:
    """ASHA over epochs if trials may be stopped early."""
    if stop_early is None:
        return FIFOScheduler()
    longest = max(sum(phase.epochs for phase in trial.config.train.phases) for trial in trials)
    return ASHAScheduler(
        time_attr="epoch",
        metric=stop_early.metric,
        mode=stop_early.best,
        max_t=max(longest, stop_early.grace_epochs) + 1,  # ASHA stops a trial at max_t; ours end before
        grace_period=stop_early.grace_epochs,
        reduction_factor=stop_early.factor,
    )


# -- results ------------------------------------------------------------------


def child(parent: Run, trial: Trial, sweep: SweepConfig) -> Run:
    """A trial's run in MLflow. Every key of the sweep is a parameter, set by this trial or not."""
    run = parent.child(trial.name, {"pixloom.trial": trial.name})
    varied = [f"{key}." for key in sweep.keys]
    values = {f"{name}.": text for name, text in flatten(trial.config.model_dump(mode="json")).items()}
    shown = {n: text for n, text in values.items() if any(n.startswith(k) or k.startswith(n) for k in varied)}
    run.params({"trial": trial.name} | {name.rstrip("."): text for name, text in shown.items()})
    return run


def outcomes(
    trials: Sequence[Trial], digests: dict[str, Seen], failed: Mapping[int, str]
) -> list[TrialResult]:
    """The result of each trial, as its folders show it. `failed`: reasons by the trial's index."""
    results = []
    for index, trial in enumerate(trials):
        planned = plan(steps(trial.config), trial.config.workspace, digests)
        evaluated = next(p for p in planned if p.step.name == "evaluate")
        state: State = "stopped early" if any(p.resumes for p in planned) else "to do"
        if index in failed:
            state = "failed"
        elif evaluated.done:
            state = "done"
        metrics = evaluated.marker["metrics"] if evaluated.marker else {}
        folder = evaluated.folder if evaluated.done else ""
        reason = failed.get(index, "")
        results.append(TrialResult(trial=trial, state=state, metrics=metrics, reason=reason, folder=folder))
    return results


def record(
    parent: Run,
    runs: Sequence[Run],
    results: Sequence[TrialResult],
    best: TrialResult | None,
    sweep: SweepConfig,
) -> None:
    """Write the results to MLflow: each trial's to its run, the best one's to the sweep's."""
    status = {"done": "FINISHED", "failed": "FAILED"}
    for run, result in zip(runs, results, strict=True):
        if result.metrics:
            run.metrics(result.metrics, step=0)
        tags = {"pixloom.state": result.state, "pixloom.why": result.reason}
        tags["pixloom.best"] = "true" if result is best else ""
        run.tags({name: text for name, text in tags.items() if text})
        run.end(status.get(result.state, "KILLED"))  # type: ignore[arg-type]
    rows = [
        {"trial": one.trial.name, "state": one.state, "values": one.trial.values, "metrics": one.metrics}
        | {"why": one.reason}
        for one in results
    ]
    parent.artifact("trials.json", json.dumps(rows, indent=1).encode())
    if best is not None:
        parent.metrics(best.metrics, step=0)
        parent.tags({"pixloom.best": best.trial.name, "pixloom.best_by": f"{sweep.metric} ({sweep.split})"})


def plan_table(trials: Sequence[Trial], plans: Sequence[Sequence[PlannedStep]]) -> str:
    """The steps to do once, then each trial with its own steps to do."""
    common = {p.folder: p for p in shared(plans)}
    lines = [f"once         {', '.join(p.step.name for p in common.values() if not p.done) or 'all done'}"]
    for trial, planned in zip(trials, plans, strict=True):
        left = [p.step.name for p in planned if not p.done and p.folder not in common]
        lines.append(f"{trial.name:<24} {', '.join(left) or 'all done'}")
    return "\n".join(lines) + "\n"


def table(results: Sequence[TrialResult], best: TrialResult | None, sweep: SweepConfig) -> str:
    """The trials, best first, with a few metrics and their intervals, and how to run the best one."""
    names = list(dict.fromkeys([sweep.metric, "l1", "psnr", "ssim"]))
    width = max(12, *(len(result.trial.name) for result in results))
    ranked = sorted(results, key=lambda result: result.rank(sweep.metric, sweep.best))
    lines = ["", f"{'trial':<{width}} " + " ".join(f"{name:<{CELL}}" for name in names).rstrip()]
    for result in ranked:
        numbers = [f"{shown(result.metrics, name):<{CELL}}" for name in names]
        state = "" if result.state == "done" else f"  {result.state}"
        reason = f": {result.reason}" if result.reason else ""
        lines.append(f"{result.trial.name:<{width}} {' '.join(numbers)}{state}{reason}".rstrip())
    if best is not None:
        lines.append(f"\nbest by {sweep.metric} on {sweep.split}: {best.trial.name}")
        lines += [
            f"  no clear difference from it: {name} ({one.mean:.4g}, {one.low:.4g} to {one.high:.4g})"
            for name, one in not_clearly_worse(results, best, sweep.metric).items()
        ]
        lines += [f"  --set {key}={json.dumps(value)}" for key, value in best.trial.values.items()]
    config = results[0].trial.config
    lines.append(f"runs    {config.tracking.page_command(config.workspace)}")
    return "\n".join(lines) + "\n"
