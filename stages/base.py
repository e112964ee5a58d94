"""What every stage has in common: the base of all configuration, the resources a stage may use, its outcome.

A stage is a module with one function

    run(config, resources, *, output, track, **inputs) -> Outcome

where `config` is the stage's type in `stages.config`, `output` and every input are folder URIs (see
`stages.storage`) and `track` is the stage's MLflow run (see `stages.tracking.run`). The runner writes the
`_SUCCESS.json` marker after `run` returns; a folder without it is unfinished work, which the next run of the
same stage continues.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Role = Literal["source", "target", "label", "instance", "features"]
"""What an image is to its pair. `label` and `instance` are optional maps that belong to the source;
`features` are further channels of it."""

Kind = Literal["rgb", "grey", "labels", "instances", "grey16", "lab_l", "lab_ab", "channels"]
"""How an image's values are read: colours, lightness, class ids, instance ids (16 bit), 16-bit lightness,
the L and the ab of CIE Lab (colorization), any number of channels in [-1, 1]."""

Split = Literal["train", "val", "test"]

Encoding = Literal["raw", "png", "jpeg", "webp"]
"""How an image is stored in a shard. `raw` is the array itself, planar (C, H, W), little-endian."""

Format = Literal["png", "jpeg", "webp", "tiff"]
"""The file format of generated images."""

Precision = Literal["float32", "bf16"]

Fraction = Annotated[float, Field(ge=0, le=1)]

Level = Annotated[int, Field(ge=0, le=255)]

Palette = Annotated[tuple[Level | tuple[Level, Level, Level], ...], Field(min_length=2, max_length=256)]
"""The colours of a label map, one per class, in order: [red, green, blue], or one number for a grey."""


def _rising(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] < limits[1]:
        raise ValueError("the first value must be below the second")
    return limits


Finite = Annotated[float, Field(allow_inf_nan=False)]

Range = Literal["full", "percentile"] | Annotated[tuple[Finite, Finite], AfterValidator(_rising)]
"""Which values of a file are black and white: its number format's, the image's percentiles, or these two."""

MAX_PIXELS = 89_478_485
"""The largest image that is decoded: Pillow's limit, below which it gives no warning."""


class Config(BaseModel):
    """Base of all configuration: frozen, unknown keys refused, defaults read as values that are given."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Resources(Config):
    """How much of the cluster to use: part of no fingerprint.

    A phase records the device and, where they change its result, keeps the micro-batch and the number of
    workers that it began with (`stages.training.execution`).
    """

    train_workers: Annotated[
        int, Field(ge=1, description="Train with this many processes, each on one GPU if there are GPUs.")
    ] = 1
    train_workers_min: Annotated[
        int | None,
        Field(
            ge=1,
            description="Continue with as few as this many workers when nodes leave, and return to "
            "train_workers when nodes join. null: wait for all of them.",
        ),
    ] = None
    gpu: Annotated[
        bool | None,
        Field(description="Train, generate and evaluate on GPUs. null: if the cluster has any."),
    ] = None
    threads_per_worker: Annotated[
        int | None,
        Field(ge=1, description="Use this many torch threads in each process. null: its share of the cores."),
    ] = None
    io_threads: Annotated[int, Field(ge=1, description="Read this many objects at once in each task.")] = 16
    infer_actors: Annotated[
        int | None,
        Field(
            ge=1,
            description="Generate and evaluate with this many processes. null: one per GPU, or one per two "
            "cores without GPUs.",
        ),
    ] = None
    max_failures: Annotated[
        int, Field(ge=0, description="Restart training this many times before the phase fails.")
    ] = 3
    checkpoint_images: Annotated[
        int | None,
        Field(
            ge=1,
            description="Save a checkpoint after every this many images, as well as after every epoch. "
            "null: after every epoch only.",
        ),
    ] = None
    checkpoint_seconds: Annotated[
        float,
        Field(
            ge=0,
            description="Save a checkpoint no sooner than this many seconds after the last one. Epochs with "
            "sample images, the last one among them, always save one.",
        ),
    ] = 30.0
    keep_checkpoints: Annotated[
        int, Field(ge=1, description="Keep this many of a phase's newest checkpoints.")
    ] = 2
    micro_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Gradient accumulation: a training worker holds this many pairs in memory at a time. "
            "null: its whole part of the batch.",
        ),
    ] = None
    collective_timeout_s: Annotated[
        int, Field(ge=10, description="Restart a worker that makes no progress for this many seconds.")
    ] = 300
    checkpointing: Annotated[
        bool,
        Field(
            description="Recompute activations in the backward pass of a coarse-to-fine generator: less "
            "memory, slower steps."
        ),
    ] = False
    compile: Annotated[
        bool,
        Field(
            description="Compile the networks that train with torch.compile, and on a GPU a generator of "
            "images of one size. For GPUs; CPUs get slower."
        ),
    ] = False
    cuda_graph: Annotated[
        bool | None,
        Field(
            description="Record a training step as one CUDA graph and replay it: small steps wait less for "
            "the host. The same numbers; one worker on a GPU. null: no, until it was measured on a GPU."
        ),
    ] = None


def absolute(uri: str) -> str:
    """The same location, independent of the working directory (workers have another one).

    `~` and environment variables in a local path are expanded.
    """
    if "://" in uri or "::" in uri:
        return uri
    return str(Path(os.path.expanduser(os.path.expandvars(uri))).resolve())  # noqa: PTH111 - "~nobody" stays


class Point(NamedTuple):
    """One value of one curve after `step` steps and `images` images of a phase; in ms since 1970."""

    step: int
    images: int
    epoch: int
    name: str
    value: float
    time_ms: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What the planner saw of a step's inputs from outside: a digest, and how many there are."""

    digest: str
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The counts, metrics and notes of a finished stage, for its marker, MLflow and the report."""

    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    """How it was done where the config leaves that open."""
