"""Run the pipeline: from pairs of images in a bucket to a trained model, generated images and a report.

python -m pipeline.run                              pipeline.yaml, on this machine
ray job submit -- python -m pipeline.run            the same, on a cluster
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn, get_args

import ray
import yaml

from pipeline import config as configuration
from pipeline.cluster import check_folders, cluster, kept_in
from pipeline.config import PipelineConfig
from pipeline.dag import Step, needed, steps
from pipeline.runner import Planned, execute, plan, select
from stages import storage
from stages.base import Role
from stages.config.train import PhaseJob, full_size
from stages.errors import PixloomError, UserError
from stages.progress import duration
from stages.shard import role_specs
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.tracking.run import Run, open_parent
from stages.training import phases
from stages.training.memory import estimate_memory

logger = logging.getLogger(__name__)

HELP = """\
Run the pipeline: ingest -> pair -> shard -> train (phase by phase) -> infer -> evaluate -> report.

What is done is not done again: the same command after a crash, or with another setting, does only
what is missing. Every stage writes one folder in the workspace, named by a fingerprint of its config
and inputs; `--plan` shows them all, what is to do, and why."""

EXAMPLES = """\
examples:
  python -m pipeline.run                                   the run that pipeline.yaml describes
  python -m pipeline.run -c recipes/facades.yaml           another application
  python -m pipeline.run -c recipes/facades.yaml --profile paper       at the paper's size
  python -m pipeline.run --plan                            what would run, and why
  python -m pipeline.run --set train.seed=1 --set train.phases.0.epochs=20
  python -m pipeline.run --until shard                     prepare the data only
  python -m pipeline.run --only infer --set infer.model=s3://models/street --set infer.input=s3://maps
  ray job submit --working-dir . -- python -m pipeline.run   on a cluster

cluster:
  Inside a Ray job, or with RAY_ADDRESS set, the run joins that cluster; otherwise it starts Ray on this
  machine and stops it again. How much it may use is in the config's `resources`, which change no result.

exit codes:
  0    everything asked for is done
  1    a stage failed; what it did so far is kept
  2    yours to mend: one line names the file and the key, or the object
  130  stopped by Ctrl-C or SIGTERM; what was done is kept, the same command goes on
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description=HELP,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "-c", "--config", default="pipeline.yaml", metavar="FILE", help="the run (default: pipeline.yaml)"
    )
    p.add_argument(
        "--profile", metavar="NAME", help="one of the config's profiles (recipes have cpu and paper)"
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, e.g. train.seed=7",
    )
    which = p.add_mutually_exclusive_group()
    which.add_argument("--until", metavar="STAGE", help="stop after this stage")
    which.add_argument("--only", metavar="STAGE", help="run this stage alone; its inputs must be done")
    p.add_argument(
        "--plan", action="store_true", help="print each step, its fingerprint, and what is to do; run nothing"
    )
    p.add_argument(
        "--schema", action="store_true", help="print the config's JSON schema (for editors) and exit"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    log_to_stdout()
    if options.schema:
        sys.stdout.write(configuration.schema())
        return 0
    return exit_code(lambda: run(options, command=shlex.join(["python", "-m", "pipeline.run", *words])))


def log_to_stdout() -> None:
    """Our own log lines with the time; of others' only warnings."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s  %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    for name in ("pipeline", "stages", "pixloom", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)


def exit_code(work: Callable[[], None]) -> int:
    """Do the work of a command; what stops it becomes a line on stderr and the exit code."""
    stop_on_sigterm()
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except PixloomError as error:
        logger.error("%s", error, exc_info=error.__cause__ if error.__cause__ is not None else None)
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what was done is kept: the same command goes on from here\n")
        return 130
    return 0


def run(options: argparse.Namespace, *, command: str) -> None:
    """Plan, then run what is to do, then tell what came of it."""
    config = configuration.load(options.config, options.set, options.profile)
    check_folders(kept_in(config), options.config)
    storage.configure(config.storage)
    asked = needed(steps(config), options.only) if options.only else steps(config)
    planned = plan(asked, config.workspace)
    if options.plan:
        sys.stdout.write(table(planned, memory(config, planned)))
        return
    chosen = select(planned, only=options.only, until=options.until)
    finished: dict[str, dict[str, Any]] = {}
    if all(p.done for p in chosen):
        logger.info("nothing to do: every step is done")
        finished.update({p.step.name: dict(p.marker) for p in chosen if p.marker is not None})
    else:
        _run(config, planned, chosen, finished, command, options.config)
    sys.stdout.write(summary(config, chosen, finished))


def _run(
    config: PipelineConfig,
    planned: Sequence[Planned],
    chosen: Sequence[Planned],
    finished: dict[str, dict[str, Any]],
    command: str,
    path: str,
) -> None:
    tags = {"pixloom.command": command, "pixloom.workspace": config.workspace}
    tags |= config.about.tags() | commit() | {"pixloom.config": path}
    with open_parent(config.tracking, time.strftime("%Y-%m-%d %H:%M"), tags, config.workspace) as parent:
        parent.artifact("config.yaml", as_yaml(config).encode())
        size = full_size(config.shard.size, config.augment)
        parent.params(phases.compared(config.train, config.train.phases, size))
        with cluster(config.resources, config.storage, kept_in(config)):
            parent.tags({"pixloom.hosts": hosts()})
            stop_on_sigterm()
            extra = extra_arguments(config, planned, finished, command)
            execute(chosen, config.resources, parent=parent, extra=extra, finished=finished)
        _log_results(config, planned, finished, parent)
        publish_model(config, planned, finished, parent)


def as_yaml(config: PipelineConfig) -> str:
    """The whole config, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def extra_arguments(
    config: PipelineConfig,
    planned: Sequence[Planned],
    finished: Mapping[str, Mapping[str, Any]],
    command: str,
) -> Callable[[Step], Mapping[str, Any]]:
    """What each step is told beside its inputs; none of it changes its result."""

    def extra(step: Step) -> Mapping[str, Any]:
        if step.group == "train" and "before" not in step.needs:
            return {"before": ""}
        if step.group == "report":
            return {
                "phases": [p.folder for p in planned if p.step.group == "train"],
                "steps": list(finished.values()),
                "config_text": as_yaml(config),
                "command": command,
            }
        return {}

    return extra


def _log_results(
    config: PipelineConfig,
    planned: Sequence[Planned],
    finished: Mapping[str, Mapping[str, Any]],
    parent: Run,
) -> None:
    """The data set and the few numbers by which runs are compared, on the parent run."""
    if "shard" in finished:
        folder = next(p.folder for p in planned if p.step.name == "shard")
        spec, (source, *_) = dataset.load(folder), config.ingest.locations
        parent.dataset(
            config.about.title or config.tracking.experiment,
            uri=source.uri,
            digest=spec.digest(),
            context="training",
            counts=spec.counts(),
        )
    if "evaluate" in finished:
        parent.metrics(finished["evaluate"]["metrics"], step=0)


def publish_model(
    config: PipelineConfig,
    planned: Sequence[Planned],
    finished: Mapping[str, Mapping[str, Any]],
    parent: Run,
) -> None:
    """Log and register the model of the last phase, and what evaluation measured of it, if it did."""
    trained = [p for p in planned if p.step.group == "train" and p.step.name in finished][-1:]
    if not trained or trained[0].step.name != f"train-{config.train.phases[-1].name}":
        return
    ours = not (config.infer.model or config.infer.input or config.evaluate.images)
    measured = finished.get("evaluate", {}).get("metrics", {}) if ours else {}
    metric = config.tracking.metric
    if measured and metric not in measured:
        logger.warning("tracking.metric: %s was not measured; there are %s", metric, ", ".join(measured))
    shards = trained[0].inputs["shards"]
    parent.model(
        storage.join(trained[0].folder, "model"),
        dataset.example(shards, dataset.load(shards)),
        name=config.tracking.model or config.tracking.experiment,
        alias=config.tracking.alias,
        metric=metric,
        value=measured.get(metric),
        data=f"{shards.rpartition('/')[2]} {config.evaluate.split}",
    )


def stop_on_sigterm() -> None:
    """`ray job stop` and a scheduler send SIGTERM: end as Ctrl-C. Set again after ray.init, which has one."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def commit() -> dict[str, str]:
    """The code's git commit, as a tag, where one is known: a job's folder has none, `submit.sh` tells it."""
    if told_commit := os.environ.get("PIXLOOM_COMMIT"):
        return {"mlflow.source.git.commit": told_commit}
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": told.stdout.strip()}


def hosts() -> str:
    """The machines of the cluster and what of them Ray may use, as a tag: `2 x 8 CPU, 1 GPU`."""
    kinds = Counter(
        ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        for node in ray.nodes()
        if node["Alive"]
    )
    return "; ".join(f"{count} x {told}" for told, count in kinds.most_common())


def memory(config: PipelineConfig, planned: Sequence[Planned]) -> dict[str, int]:
    """Bytes that a training worker needs, by step, from the shards' description or what they will be."""
    done = next((p for p in planned if p.step.name == "shard" and p.done), None)
    if done is not None:
        spec = dataset.load(done.folder)
    else:
        roles: set[Role] = {"source", "target", *config.shard.kinds}
        listed = {location.role for location in config.ingest.locations}
        roles |= {role for role in get_args(Role) if role in listed}
        spec = DatasetSpec(size=config.shard.size, roles=role_specs(config.shard, roles), splits={})
    return {
        p.step.name: estimate_memory(
            p.step.config,
            spec,
            workers=config.resources.train_workers,
            at_once=config.resources.micro_batch,
        )
        for p in planned
        if p.step.group == "train" and isinstance(p.step.config, PhaseJob) and not p.done
    }


def table(planned: Sequence[Planned], bytes_: Mapping[str, int]) -> str:
    """The plan as a table: step, done or to do, why; `bytes_` of memory by step."""
    lines = [f"{'step':<15} {'fingerprint':<13} {'':<6} why"]
    for p in planned:
        told = f"{p.step.name:<15} {p.fingerprint:<13} {'done' if p.done else 'to do':<6} {p.why}"
        if p.step.name in bytes_:
            told += f"; a training worker needs about {bytes_[p.step.name] / 1e9:.1f} GB"
        lines.append(told)
    return "\n".join(lines) + "\n"


def summary(
    config: PipelineConfig, chosen: Sequence[Planned], finished: Mapping[str, Mapping[str, Any]]
) -> str:
    """What a person wants to know at the end: the results, the report, the command that opens MLflow."""
    lines = [""]
    lines += [f"{'step':<15} {'time':>12}  results"]
    for name, marker in finished.items():
        values = [f"{key} {value:,}" for key, value in marker["counts"].items()]
        values += [f"{key} {value:.4g}" for key, value in marker["metrics"].items()]
        lines.append(f"{name:<15} {duration(marker['seconds']):>12}  {', '.join(values[:6])}")
    report = next((p for p in chosen if p.step.name == "report" and "report" in finished), None)
    lines.append("")
    if report is not None:
        lines.append(f"report  {storage.join(report.folder, 'report.html')}")
    lines.append(f"runs    {config.tracking.page_command(config.workspace)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
