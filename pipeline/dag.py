"""The pipeline as steps, and the fingerprint that says whether a step's output is the one wanted.

A step's fingerprint is a hash of its stage's code version, its config, the fingerprints of its inputs and a
digest of what it reads from elsewhere (ingest: the objects listed; infer: an input or model of its own), so
it moves exactly when its result may.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from pipeline.config import PipelineConfig
from stages import evaluate, infer, ingest, pair, report, shard, train
from stages.base import Config


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage with its config. `needs` maps the stage's input names to the steps they come from."""

    name: str
    stage: ModuleType
    config: Config
    needs: Mapping[str, str] = field(default_factory=dict)
    digest: Callable[[], str] | None = None
    """Of what lies outside the pipeline and is read by this step; asked at every plan."""

    @property
    def group(self) -> str:
        """The stage's name: `train` for every phase. What `--only` and `--until` take beside the name."""
        return self.stage.__name__.rpartition(".")[2]


def steps(config: PipelineConfig) -> tuple[Step, ...]:
    """The pipeline. Read it downwards: every name on the right was defined above."""
    jobs = train.jobs(config.train, config.augment)
    phases = [f"train-{job.phase.name}" for job in jobs]
    return (
        Step(name="ingest", stage=ingest, config=config.ingest, digest=lambda: ingest.digest(config.ingest)),
        Step(name="pair", stage=pair, config=config.pair, needs={"objects": "ingest"}),
        Step(name="shard", stage=shard, config=config.shard, needs={"pairs": "pair"}),
        *(
            Step(
                name=name,
                stage=train,
                config=job,
                needs={"shards": "shard"} | ({"before": before} if before else {}),
            )
            for name, job, before in zip(phases, jobs, ["", *phases], strict=False)
        ),
        Step(
            name="infer",
            stage=infer,
            config=config.infer,
            needs=({} if config.infer.model else {"model": phases[-1]})
            | ({} if config.infer.input else {"shards": "shard"}),
            digest=(lambda: infer.digest(config.infer, config.tracking.place(config.workspace)))
            if config.infer.input or config.infer.model
            else None,
        ),
        Step(
            name="evaluate",
            stage=evaluate,
            config=config.evaluate,
            needs={"shards": "shard"} | ({} if config.evaluate.images else {"images": "infer"}),
        ),
        Step(
            name="report",
            stage=report,
            config=config.report,
            needs={"shards": "shard", "images": "infer", "metrics": "evaluate"},
        ),
    )


def needed(steps: Sequence[Step], wanted: str) -> tuple[Step, ...]:
    """The steps of a stage and those that they come from; all, where there is no such stage.

    What a stage does not come from is not asked for: a model made elsewhere generates without training data.
    """
    names = {step.name for step in steps if wanted in (step.name, step.group)}
    if not names:
        return tuple(steps)
    for step in reversed(steps):  # every step stands after those it needs
        if step.name in names:
            names |= set(step.needs.values())
    return tuple(step for step in steps if step.name in names)


def fingerprint(step: Step, inputs: Mapping[str, str], digest: str | None) -> str:
    """Twelve hex digits that change when the step's result may. `inputs`: input name -> its fingerprint."""
    identity = {
        "stage": step.group,
        "version": step.stage.VERSION,
        "config": step.config.model_dump(mode="json"),
        "inputs": dict(inputs),
        "digest": digest,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
