"""One run of the pipeline: plan, execute on a cluster, record in MLflow, register the model, summarise."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import ray
import yaml

from pipeline import cost
from pipeline.cli import planning
from pipeline.cluster import check_folders, cluster, result_folders
from pipeline.config import PipelineConfig
from pipeline.dag import RunView, needed, registration, steps
from pipeline.runner import PlannedStep, check, execute, plan, select
from stages import storage
from stages.config.train import PhaseJob, full_size
from stages.errors import without_password
from stages.models.fast.process import best_precision
from stages.progress import duration
from stages.report import notes
from stages.scoring.table import BASELINES, is_bound, shown
from stages.shards import dataset
from stages.tracking.run import Run, catch_up, open_parent
from stages.training.memory import advice

Markers = Mapping[str, Mapping[str, Any]]
"""The markers of finished steps by the step's name."""

logger = logging.getLogger(__name__)


def run(
    config: PipelineConfig,
    *,
    path: str,
    command: str,
    only: str | None = None,
    until: str | None = None,
    plan_only: bool = False,
    prices: str | None = None,
    machine: str = "",
) -> str:
    """Run what is not done, and return a summary; with `plan_only`, return the plan and run nothing.

    path, command: of the config file and as typed, for MLflow and the report
    only, until: see `select`
    prices, machine: for the plan, a price list's file and a name in it
    """
    price_list = cost.read_prices(prices or cost.PRICES)
    if machine:
        price_list.hourly(machine)
    check_folders(result_folders(config), path)
    storage.configure(config.storage)
    pipeline = (*steps(config), *registration(config))
    with planning():
        storage.check_reachable({"workspace": config.workspace} | config.inputs())
    # A cluster that is there also looks whether the data changed. One of our own is not started for that.
    with run_cluster(config) if "RAY_ADDRESS" in os.environ else nullcontext():
        with planning():
            planned = plan(needed(pipeline, only) if only else pipeline, config.workspace)
        chosen = select(planned, only=None if plan_only else only, until=until)
        check(chosen)
        if plan_only:
            view = cost.PlannedRun(config=config, planned=planned)
            return table(view) + cost.report(view, chosen, price_list, machine)
        return do_planned(config, planned, chosen, path=path, command=command)


def do_planned(
    config: PipelineConfig,
    planned: Sequence[PlannedStep],
    chosen: Sequence[PlannedStep],
    *,
    path: str,
    command: str,
) -> str:
    """Run the chosen steps that are not done; as `run`."""
    if all(p.done for p in chosen):
        logger.info("nothing to do: every step is done")
        catch_up(config.tracking, config.workspace)
        return summary(config, chosen, {p.step.name: p.marker for p in chosen if p.marker is not None})
    tags = config.about.tags() | run_tags(config, command) | {"pixloom.config": path}
    with open_parent(config.tracking, time.strftime("%Y-%m-%d %H:%M"), tags, config.workspace) as parent:
        parent.artifact("config.yaml", as_yaml(config).encode())
        size = full_size(config.shard.size, config.augment)
        parent.params(config.train.compared(config.train.phases, size))
        run_steps = partial(
            execute, resources=config.resources, parent=parent, view=run_view(config, planned, command)
        )
        work = [p for p in chosen if p.step.stage != "register"]
        busy = not all(p.done for p in work)
        with run_cluster(config) if busy and not ray.is_initialized() else nullcontext():
            if busy:
                parent.tags({"pixloom.hosts": hosts()})
            markers = run_steps(work)
        log_results(config, planned, markers, parent)
        markers |= run_steps([p for p in chosen if p.step.stage == "register"])
    return summary(config, chosen, markers, parent.page())


def run_cluster(config: PipelineConfig) -> AbstractContextManager[None]:
    """The run's cluster."""
    return cluster(config.resources, config.storage, result_folders(config))


def as_yaml(config: PipelineConfig) -> str:
    """The whole config, defaults included, without passwords in URIs."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return without_password(text)


def run_view(config: PipelineConfig, planned: Sequence[PlannedStep], command: str) -> RunView:
    """What the report shows of this run."""
    return RunView(
        command=without_password(command),
        config_text=as_yaml(config),
        phases=[p.folder for p in planned if p.step.stage == "train"],
    )


def run_tags(config: PipelineConfig, command: str) -> dict[str, str]:
    """The tags of the parent run in MLflow: the command, the workspace, the code's commit."""
    return {"pixloom.command": without_password(command), "pixloom.workspace": config.workspace} | commit()


def log_results(
    config: PipelineConfig, planned: Sequence[PlannedStep], markers: Markers, parent: Run
) -> None:
    """Log the data set, and the metrics by which runs are compared, to the parent run."""
    if "shard" in markers:
        folder = next(p.folder for p in planned if p.step.name == "shard")
        spec, (source, *_) = dataset.load(folder), config.ingest.locations
        parent.dataset(
            config.about.title or config.tracking.experiment,
            uri=source.uri,
            digest=spec.digest(),
            context="training",
            counts=spec.counts(),
        )
    trained = [marker for name, marker in markers.items() if name.startswith("train-")]
    if trained and "notes" in trained[-1]:
        parent.params({"precision": trained[-1]["notes"]["precision"]})
    if "evaluate" in markers:
        parent.metrics(markers["evaluate"]["metrics"], step=0)
        folder = next(p.folder for p in planned if p.step.name == "evaluate")
        parent.tags({"pixloom.evaluation": folder})  # where `compare` finds the scores of single images


def commit() -> dict[str, str]:
    """The code's git commit as a tag, if known. A job's folder is no repository: `submit.sh` names it."""
    revision = os.environ.get("PIXLOOM_COMMIT")
    if not revision:
        try:
            git = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return {}
        revision = git.stdout.strip()
    return {"mlflow.source.git.commit": revision}


def hosts() -> str:
    """The cluster's machines and what Ray may use of them, as a tag: `2 x 8 CPU, 1 GPU`."""
    kinds = Counter(
        ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        for node in ray.nodes()
        if node["Alive"]
    )
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())


def table(run: cost.PlannedRun) -> str:
    """The plan as a table: step, done or to do, why; of a phase also its memory and precision."""
    available, workers = run.gpu_memory, run.config.resources.train_workers
    lines = [f"{'step':<15} {'fingerprint':<13} {'':<6} why"]
    for p in run.planned:
        line = f"{p.step.name:<15} {p.fingerprint:<13} {'done' if p.done else 'to do':<6} {p.why}"
        if isinstance(job := p.step.config, PhaseJob):
            if not p.done:
                needed = run.memory(job, workers)
                line += f"; a training worker needs about {needed / 1e9:.1f} GB"
                if available is not None and needed <= available:
                    line += f" of the GPU's {available / 1e9:.1f} GB"
                elif available is not None:
                    line += f", more than the GPU's {available / 1e9:.1f} GB: {advice(job)}"
            here = f"{best_precision(run.device)} if it begins on a machine like this one"
            line += f"; precision: {run.fixed_precision(p) or here}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def summary(config: PipelineConfig, chosen: Sequence[PlannedStep], markers: Markers, page: str = "") -> str:
    """The results of each step, where the report is, and MLflow's page or the command that opens it."""
    lines = ["", f"{'step':<15} {'time':>12}  results"]
    for name, marker in markers.items():
        values = [f"{key} {value:,}" for key, value in marker["counts"].items()]
        own = [one for one in marker["metrics"] if not (is_bound(one) or one.startswith(BASELINES))]
        values += [f"{one} {shown(marker['metrics'], one)}" for one in own]
        values = values[:6] + [f"{key} {text}" for key, text in notes(marker).items()]
        lines.append(f"{name:<15} {duration(marker['seconds']):>12}  {', '.join(values)}")
    folders = {p.step.name: p.folder for p in chosen}
    lines.append("")
    if "evaluate" in markers:
        lines.append(f"scores  {folders['evaluate']}")
    if "report" in markers:
        lines.append(f"report  {storage.join(folders['report'], 'report.html')}")
    lines.append(f"runs    {page or config.tracking.page_command(config.workspace)}")
    return "\n".join(lines) + "\n"
