"""The pipeline as steps, and the fingerprint that says whether a step's output is the one wanted.

A step's fingerprint is a hash of its stage's code version, its config, the fingerprints of its inputs and a
digest of what it reads from elsewhere (ingest: the objects listed; infer: an input or model from outside), so
it changes exactly when its result may.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from pipeline.config import PipelineConfig
from stages import evaluate, infer, ingest, pair, report, shard, train
from stages.base import Config, Outcome, Resources, Seen
from stages.config.train import PhaseJob, full_size, jobs
from stages.scoring.metrics import SEGMENTATION_SCORES
from stages.tracking.run import Run

GENERATING = {"weights", "format", "quality", "palette", "stochastic", "samples", "style", "precision"}
SEGMENTING = {"segmenter", "palette", "ignore_class"}
"""Settings of `infer` and `evaluate` that must be the same where models are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What the report shows of the run: part of no fingerprint."""

    command: str = ""
    config_text: str = ""
    phases: Sequence[str] = ()
    """Folders of the training phases, in order."""
    markers: Sequence[Mapping[str, Any]] = ()
    """The markers of the steps that are finished, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What the runner gives a step besides its config."""

    resources: Resources
    output: str
    track: Run
    parent: Run
    """The run that `track` belongs to."""
    inputs: Mapping[str, str]
    """Input name -> folder URI."""
    view: RunView


Work = Callable[[StepContext], Outcome]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage with its config. `needs` maps the stage's input names to the steps they come from."""

    name: str
    stage: str
    """The stage's name: `train` for every phase. `--only` and `--until` take it, or the step's name."""
    version: int
    config: Config
    work: Work
    needs: Mapping[str, str] = field(default_factory=dict)
    digest: Callable[[], Seen] | None = None
    """Looks at what the step reads from outside the pipeline; called at every plan."""
    check: Callable[[Mapping[str, str]], None] | None = None
    """Raises UserError for what the step would refuse. Takes the folders of its inputs that are done."""


def steps(config: PipelineConfig) -> tuple[Step, ...]:
    """The pipeline. Read it downwards: every step needs only steps above it."""
    phases = jobs(config.train, config.augment, config.evaluate)
    last = f"train-{phases[-1].phase.name}"
    scored = config.evaluate.model_copy(update={"split": config.evaluate.split or config.infer.split})
    return (
        _step(ingest, config.ingest, digest=lambda: ingest.survey(config.ingest)),
        _step(
            pair,
            config.pair,
            needs={"objects": "ingest"},
            digest=(lambda: Seen(pair.digest(config.pair))) if config.pair.exclude else None,
        ),
        _step(shard, config.shard, needs={"pairs": "pair"}),
        *(_phase(job, before) for job, before in zip(phases, [None, *phases], strict=False)),
        _step(
            infer,
            config.infer,
            needs=({} if config.infer.model else {"model": last})
            | ({} if config.infer.input else {"shards": "shard"}),
            digest=lambda: Seen(infer.digest(config.infer, config.tracking.place(config.workspace))),
            check=lambda inputs: infer.check(config.infer, inputs.get("shards", "")),
        ),
        _step(
            evaluate,
            scored,
            needs={"shards": "shard"} | ({} if config.evaluate.images else {"images": "infer"}),
            digest=lambda: Seen(evaluate.digest(scored)),
            check=lambda inputs: evaluate.check(scored, inputs.get("shards", "")),
        ),
        Step(
            name="report",
            stage="report",
            version=report.VERSION,
            config=config.report,
            needs={"shards": "shard", "images": "infer", "metrics": "evaluate"},
            digest=(lambda: Seen(report.digest(config.report))) if config.report.others else None,
            check=lambda _: check_metric(config, config.report.order_by, "report.order_by", of_images=True),
            work=lambda at: report.run(
                config.report,
                at.resources,
                output=at.output,
                track=at.parent,
                **at.inputs,
                phases=at.view.phases,
                steps=at.view.markers,
                config_text=at.view.config_text,
                command=at.view.command,
            ),
        ),
    )


def check_metric(config: PipelineConfig, name: str, key: str, *, of_images: bool = False) -> None:
    """Raise UserError, naming the setting, for a metric that evaluation does not measure in such a run."""
    size, other = config.shard.size, config.evaluate.images
    samples = 1 if other else config.infer.samples
    side = min(*size, *(size if other else generated_size(config) or size))
    evaluate.check_metric(config.evaluate, name, key, samples=samples, side=side, of_images=of_images)


def generated_size(config: PipelineConfig) -> tuple[int, int] | None:
    """Width and height of the images that infer generates of the shards; None: as they are stored."""
    own = not (config.infer.model or config.infer.input)
    trained = full_size(config.shard.size, config.augment) if own else None
    return infer.source_size(config.shard.size, trained, config.infer.size)


def _phase(job: PhaseJob, before: PhaseJob | None) -> Step:
    """The step of one training phase, which starts from the networks of the phase before it."""
    return _step(
        train,
        job,
        name=f"train-{job.phase.name}",
        needs={"shards": "shard"} | ({"before": f"train-{before.phase.name}"} if before else {}),
        digest=lambda: Seen(train.digest(job)),
        check=lambda _: train.check(job),
    )


def _step(stage: ModuleType, config: Config, *, name: str = "", **more: Any) -> Step:
    """A step of a stage whose inputs are called as in `needs`."""
    title = stage.__name__.rpartition(".")[2]

    def work(at: StepContext) -> Outcome:
        outcome: Outcome = stage.run(config, at.resources, output=at.output, track=at.track, **at.inputs)
        return outcome

    return Step(name=name or title, stage=title, version=stage.VERSION, config=config, work=work, **more)


def registration(config: PipelineConfig) -> tuple[Step, ...]:
    """The step after all others, which gives the model to MLflow; none if runs are not tracked."""
    if not config.tracking.enabled:
        return ()
    own_images = not (config.infer.model or config.infer.input or config.evaluate.images)
    split = config.evaluate.split or config.infer.split
    settings = config.tracking.registration(config.workspace, split, judged_by(config))

    def work(at: StepContext) -> Outcome:
        from stages.tracking import registry  # noqa: PLC0415 - imports all of MLflow, which takes 2-3 s

        return registry.register_model(settings, parent=at.parent, **at.inputs)

    model = {"model": f"train-{config.train.phases[-1].name}", "shards": "shard"}
    return (
        Step(
            name="register",
            stage="register",
            version=1,
            config=settings,
            needs=model | ({"metrics": "evaluate"} if own_images else {}),
            check=lambda _: check_metric(config, settings.metric, "tracking.metric"),
            work=work,
        ),
    )


def judged_by(config: PipelineConfig) -> str:
    """A digest of how images are generated and segmented to be scored; "" where all is as by default."""
    made = config.infer.model_dump(mode="json", include=GENERATING, exclude_defaults=True)
    made |= {"size": size} if (size := generated_size(config)) else {}
    if config.tracking.metric.endswith(SEGMENTATION_SCORES):
        made |= {"segmented": config.evaluate.model_dump(mode="json", include=SEGMENTING)}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8] if made else ""


def needed(steps: Sequence[Step], name: str) -> tuple[Step, ...]:
    """The steps of a stage or with a name, and those they depend on; all steps if there is no such name.

    The others are not planned: a model from elsewhere generates without training data.
    """
    names = {step.name for step in steps if name in (step.name, step.stage)}
    if not names:
        return tuple(steps)
    for step in reversed(steps):  # every step comes after those it needs
        if step.name in names:
            names |= set(step.needs.values())
    return tuple(step for step in steps if step.name in names)


def fingerprint(step: Step, inputs: Mapping[str, str], digest: str | None) -> str:
    """Twelve hex digits that change when the step's result may. `inputs`: input name -> its fingerprint."""
    identity = {
        "stage": step.stage,
        "version": step.version,
        "config": step.config.model_dump(mode="json"),
        "inputs": dict(inputs),
        "digest": digest,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
