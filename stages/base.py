"""What every stage has in common: a frozen config, the resources it may use, the outcome it returns.

A stage is a module with one config type, pure rules, and one function

    run(config, resources, *, output, track, **inputs) -> Outcome

where `output` and every input are folder URIs (see `stages.storage`) and `track` is the stage's MLflow run
(see `stages.tracking.run`). The runner writes the `_SUCCESS.json` marker after `run` returns; until then the
folder is unfinished work that the next run of the same stage takes up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Role = Literal["source", "target", "label", "instance", "features"]
"""What an image is to its pair. `label` and `instance` are optional maps that ride along with the source;
`features` are further channels of it."""

Kind = Literal["rgb", "grey", "labels", "instances", "grey16", "lab_l", "lab_ab", "channels"]
"""How an image's values are to be read: colours, lightness, class ids, instance ids (16 bit), 16-bit
lightness, the L and the ab of CIE Lab (colorization), any number of channels in [-1, 1]."""

Split = Literal["train", "val", "test"]

Fraction = Annotated[float, Field(ge=0, le=1)]

Level = Annotated[int, Field(ge=0, le=255)]

Colors = Annotated[tuple[tuple[Level, Level, Level], ...], Field(min_length=2, max_length=256)]
"""A label picture's colours, one per class, in order."""


class Config(BaseModel):
    """Base of all configuration: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Resources(Config):
    """How much to use, never what to compute: nothing here changes a result or a fingerprint."""

    train_workers: Annotated[
        int, Field(ge=1, description="training processes, one GPU each if there are GPUs")
    ] = 1
    train_workers_min: Annotated[
        int | None,
        Field(
            ge=1, description="go on with as few as these when nodes leave, up to train_workers; null: wait"
        ),
    ] = None
    gpu: Annotated[
        bool | None, Field(description="train, infer and evaluate on GPUs; null: if the cluster has any")
    ] = None
    threads_per_worker: Annotated[
        int | None,
        Field(ge=1, description="torch threads of a process; null: its share of the cores"),
    ] = None
    io_threads: Annotated[int, Field(ge=1, description="objects read at once by one task")] = 16
    infer_actors: Annotated[
        int | None,
        Field(ge=1, description="processes that generate or judge; null: one a GPU, or for every two cores"),
    ] = None
    max_failures: Annotated[int, Field(ge=0, description="training restarts before a phase fails")] = 3
    checkpoint_images: Annotated[
        int | None,
        Field(ge=1, description="also checkpoint after every so many images; null: after every epoch only"),
    ] = None
    keep_checkpoints: Annotated[int, Field(ge=1, description="newest checkpoints kept of a phase")] = 2
    pairs_at_once: Annotated[
        int | None,
        Field(
            ge=1,
            description="pairs a training worker has in memory; more in a step are done in turns; null: all",
        ),
    ] = None
    collective_timeout_s: Annotated[
        int, Field(ge=10, description="a training worker that does nothing for so long is started again")
    ] = 300
    checkpointing: Annotated[
        bool, Field(description="coarse-to-fine training in less memory and a longer step")
    ] = False
    compile: Annotated[
        bool, Field(description="torch.compile the networks that train, for GPUs; CPUs are slower with it")
    ] = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished stage says of itself, in its marker, in MLflow and in the report."""

    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


__all__ = ["Colors", "Config", "Fraction", "Kind", "Outcome", "PositiveInt", "Resources", "Role", "Split"]
