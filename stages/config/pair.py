"""The `pair` section: what makes a pair, and how pairs are split."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from stages.base import Config, Fraction
from stages.config.locations import Location

Side = Literal["left", "right", "top", "bottom"]
"""A half of an image that holds both source and target."""

Derivation = Literal["grey", "lab_lightness", "edges", "sketch", "inpaint", "downscale"]
"""How a source is computed from its target."""


class Region(Config):
    """A part of a map or a video: positions from `x[0]` to `x[1]`, `y[0]` to `y[1]`, ends included."""

    split: Annotated[Literal["val", "test"], Field(description="The split of the pairs in this region.")]
    x: Annotated[
        tuple[float, float] | None, Field(description="First and last {x} of the region. null: any.")
    ] = None
    y: Annotated[
        tuple[float, float] | None, Field(description="First and last {y} of the region. null: any.")
    ] = None

    @model_validator(mode="after")
    def _spans_are_ordered(self) -> Self:
        if self.x is None and self.y is None:
            raise ValueError("a region needs x, y or both")
        for span in (self.x, self.y):
            if span and span[0] > span[1]:
                raise ValueError(f"{list(span)} ends before it starts")
        return self


class SplitConfig(Config):
    """How pairs are split whose path or table names no split."""

    val: Annotated[Fraction, Field(description="Share of the pairs for validation, 0 to 1.")] = 0.1
    test: Annotated[Fraction, Field(description="Share of the pairs for the test, 0 to 1.")] = 0.1
    seed: Annotated[int, Field(description="Seed of the split.")] = 0
    regions: Annotated[
        tuple[Region, ...],
        Field(description="Split by position instead of at random; pairs outside all regions are train."),
    ] = ()
    buffer: Annotated[
        NonNegativeFloat,
        Field(description="Leave out pairs at most this far from a region of another split, in {x}, {y}."),
    ] = 0.0

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.val + self.test > 1:
            raise ValueError("val and test together exceed 1")
        return self


class PairConfig(Config):
    """What makes a pair, and which split it belongs to."""

    source_half: Annotated[
        Side | None, Field(description="The half of a `pair` image that is the source; needed for `pair`.")
    ] = None
    derive_source: Annotated[
        Derivation | None, Field(description="Compute the source from the target. null: sources are listed.")
    ] = None
    reverse: Annotated[bool, Field(description="Swap source and target.")] = False
    optional: Annotated[
        tuple[Literal["label", "instance"], ...],
        Field(description="Roles that a pair may lack; a pair without any other role is rejected."),
    ] = ("instance",)
    exclude: Annotated[
        Location | None,
        Field(
            description="A CSV table with a column `key`: pairs with these keys are left out. Take the shard "
            "stage's `suspects.csv` and delete the rows of the pairs that are right. null: none."
        ),
    ] = None
    pairs_per_shard: Annotated[PositiveInt, Field(description="About how many pairs a shard holds.")] = 512
    split: Annotated[SplitConfig, Field(description="How pairs are split.")] = SplitConfig()
    max_reject_fraction: Annotated[
        Fraction, Field(description="Fail the stage if more than this share of the objects is rejected.")
    ] = 0.01
