"""A sweep file: which settings to vary, and which metric decides. Keys are dotted, as for `--set`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, JsonValue, PositiveInt, ValidationError, model_validator

from pipeline import config as configuration
from stages.base import Config, Split
from stages.errors import UserError, first_invalid
from stages.scoring.metrics import lower_is_better

Best = Literal["min", "max"]


class Range(Config):
    """A random number between two ends."""

    low: Annotated[FiniteFloat, Field(description="The smallest value.")]
    high: Annotated[FiniteFloat, Field(description="The largest value.")]
    log: Annotated[bool, Field(description="Draw the value's logarithm uniformly, not the value.")] = False

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("a logarithm needs low > 0")
        return self


def _better(data: dict[str, Any]) -> Best:
    """The better end of a score by its name; of a curve that is no score, the lower."""
    area, _, name = data.get("metric", "").rpartition("/")
    return "min" if area not in ("", "validation") or lower_is_better(name) else "max"


class EarlyStop(Config):
    """Asynchronous successive halving (ASHA): at each rung only the best trials continue."""

    metric: Annotated[str, Field(description="A training curve, e.g. validation/l1.")]
    best: Annotated[Best, Field(default_factory=_better, description="The better end. Default: by metric.")]
    grace_epochs: Annotated[PositiveInt, Field(description="Stop no trial before this many epochs.")] = 1
    factor: Annotated[
        int, Field(ge=2, description="Each rung keeps 1/factor of the trials, for factor times the epochs.")
    ] = 3


class SweepConfig(Config):
    """Which trials a sweep has, and which of them is the best."""

    recipe: Annotated[str, Field(description="The config to vary: a path from this file, or a recipe.")]
    profile: Annotated[str | None, Field(description="The recipe's profile. null: its own choice.")] = None
    settings: Annotated[
        dict[str, dict[str, JsonValue]],
        Field(default_factory=dict, description="Keys to set, by the trial's name."),
    ]
    grid: Annotated[
        dict[str, tuple[JsonValue, ...]],
        Field(default_factory=dict, description="Values of each key; every combination is a trial."),
    ]
    random: Annotated[
        dict[str, Range | tuple[JsonValue, ...]],
        Field(
            default_factory=dict,
            description="Values of each key, drawn for each of `trials` from a range or a list.",
        ),
    ]
    trials: Annotated[int, Field(ge=1, le=10_000, description="Number of random draws.")] = 10
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the random draws.")] = 0
    split: Annotated[
        Split, Field(description="The split that trials are evaluated on; keep test for the best one.")
    ] = "val"
    metric: Annotated[str, Field(description="The metric of evaluate that decides the best trial.")] = "l1"
    best: Annotated[Best, Field(default_factory=_better, description="The better end. Default: by metric.")]
    stop_early: Annotated[
        EarlyStop | None, Field(description="Stop bad trials early. null: run every trial to its end.")
    ] = None

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


def load(path: str, **options: Any) -> SweepConfig:
    """Read a sweep file; options replace its keys. Raises UserError with one line that names file and key."""
    values = configuration.parse(Path(path)) | options
    if "recipe" not in values:
        raise UserError(f"{path}: recipe: is required: a sweep names the config it varies")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        text = first_invalid(error)
        place = "--" if text.partition(":")[0] in options else f"{path}: "
        raise UserError(f"{place}{text}") from error
