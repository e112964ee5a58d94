"""The `augment` section: what is drawn at random in each epoch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from stages.base import Config


class AugmentConfig(Config):
    """Random changes to a pair, drawn again in each epoch; the same for all images of the pair."""

    crop: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(description="Width and height of a random crop of the stored image. null: the whole image."),
    ] = None
    mirror: Annotated[bool, Field(description="Mirror with probability 0.5.")] = True
