"""The `report` section."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, FiniteFloat, field_validator

from stages.base import Config
from stages.config.locations import Location

TAKEN = {
    *("source", "generated", "target"),
    *("this model", "these images", "untrained", "mean target", "nearest target"),
}
"""What the report calls its own pictures and rows."""


class ReportConfig(Config):
    """What the report's page shows."""

    title: Annotated[
        str | None, Field(description="The page's title. null: the model and the kinds of images.")
    ] = None
    max_images: Annotated[
        int,
        Field(ge=1, le=2000, description="Show at most this many images: the worst, the best, random ones."),
    ] = 100
    order_by: Annotated[str, Field(description="The metric that ranks images from best to worst.")] = "l1"
    max_side: Annotated[
        int, Field(ge=32, description="Shrink images in the page to this many pixels a side.")
    ] = 1024
    max_megabytes: Annotated[
        FiniteFloat, Field(ge=1, description="Shrink images until the page is below this many MB.")
    ] = 18
    others: dict[str, Location] = Field(
        default_factory=dict,
        description="Other systems by name: the folders of their evaluations on the same images. Their "
        "pictures, and the differences from this model, are shown beside its own.",
    )
    seed: Annotated[int, Field(description="Seed of the random images.")] = 0

    @field_validator("others")
    @classmethod
    def _names_are_free(cls, others: dict[str, str]) -> dict[str, str]:
        if taken := TAKEN & set(others):
            raise ValueError(f"{min(taken)} is what the report calls something of its own; take another name")
        return others
