"""The `infer` section: what to generate, from what, with which model."""

from __future__ import annotations

from collections.abc import Mapping
from operator import not_
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from stages.base import Config, Format, Fraction, Palette, Precision, Split
from stages.config.locations import Column, KeyPattern, Location


class StyleConfig(Config):
    """How a model with a feature encoder chooses the style of each instance."""

    kind: Annotated[
        Literal["random", "cluster", "reference"],
        Field(
            description="random: a random cluster of the instance's class. cluster: the cluster named below. "
            "reference: the style of a given image."
        ),
    ] = "random"
    cluster: Annotated[
        int, Field(ge=0, description="kind `cluster`: the number of the cluster that every instance gets.")
    ] = 0
    picture: Annotated[Location | None, Field(description="kind `reference`: URI of a target image.")] = None
    instances: Annotated[Location | None, Field(description="kind `reference`: URI of its instance map.")] = (
        None
    )
    labels: Annotated[Location | None, Field(description="kind `reference`: URI of its label map.")] = None

    @model_validator(mode="after")
    def _reference_is_whole(self) -> StyleConfig:
        if self.kind == "reference" and not (self.picture and self.instances and self.labels):
            raise ValueError("a reference style needs `picture`, `instances` and `labels`")
        return self


class InferConfig(Config):
    """What to generate, from what, with which model."""

    input: Annotated[
        Location | None,
        Field(
            description="A folder, bucket, image, archive, shards folder or .parquet table of sources. "
            "null: the run's own shards."
        ),
    ] = None
    split: Annotated[
        Split | None,
        Field(description="The split to read where the input is shards. null: test, or val without test."),
    ] = None
    pattern: Annotated[
        KeyPattern, Field(description="The path of a source below `input`, with its variable part as {key}.")
    ] = "{key}.*"
    columns: dict[Column, str | None] = Field(
        default_factory=dict,
        exclude_if=not_,  # so that a config without it keeps its fingerprint
        description="The names of the columns in an input table that holds images: {source: photo, key: id}. "
        "`key: null` numbers the rows. Empty: source, or the only column of images, and key, instance.",
    )
    instance: Annotated[
        Location | None, Field(description="The folder of the instance maps. null: the same as `input`.")
    ] = None
    instance_pattern: Annotated[
        str | None,
        Field(description="The path of a source's instance map, with its {key}. null: there are no maps."),
    ] = None
    model: Annotated[
        Location | None,
        Field(
            description="A model folder or URI, models:/name@alias or runs:/id. null: the run's own model."
        ),
    ] = None
    weights: Annotated[
        Literal["ema", "raw"],
        Field(description="ema: use the moving average of the weights if the model has one."),
    ] = "ema"
    precision: Annotated[Precision, Field(description="Number format of the computation.")] = "float32"
    size: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(
            description="Resize sources to this width and height first. null: keep their size, except that "
            "shards whose training crop covers nearly all of the image are resized to the crop."
        ),
    ] = None
    tile: Annotated[
        int | None,
        Field(
            ge=64,
            description="Generate images with more pixels than a square of this side layer by layer, in "
            "bands of as many pixels: the same image in bounded memory, with temporary files. null: never.",
        ),
    ] = None
    max_pixels: Annotated[
        int, Field(ge=1, description="Refuse sources with more pixels than this, unless `tile` is set.")
    ] = 1 << 24
    format: Annotated[
        Format,
        Field(description="File format of the generated images. tiff keeps a source's place on Earth."),
    ] = "png"
    quality: Annotated[int, Field(ge=1, le=100, description="Quality of jpeg and webp, 1 to 100.")] = 95
    palette: Annotated[
        Palette | None,
        Field(
            description="For a model that generates label colours: write PNGs of class ids with these "
            "colours, one a class; each pixel gets the class of the nearest colour. null: write "
            "what the model generates.",
        ),
    ] = None
    stochastic: Annotated[
        bool, Field(description="Keep dropout as a source of noise, as the Pix2Pix paper generates.")
    ] = False
    samples: Annotated[
        int, Field(ge=1, description="Generate this many images per source, each with its own noise.")
    ] = 1
    seed: Annotated[int, Field(description="Seed of noise and random styles.")] = 0
    style: Annotated[StyleConfig, Field(description="Style of instances, with a feature encoder.")] = (
        StyleConfig()
    )
    overwrite: Annotated[
        bool, Field(description="Ignore what the output folder holds and generate every image again.")
    ] = False
    max_reject_fraction: Annotated[
        Fraction,
        Field(description="Fail the stage at its end if more than this share of the sources is rejected."),
    ] = 0.1

    @field_validator("instance_pattern")
    @classmethod
    def _names_the_key(cls, text: str | None) -> str | None:
        if text is not None and "{key}" not in text:
            raise ValueError("name the {key} in it")
        return text

    @model_validator(mode="after")
    def _ids_are_exact(self) -> InferConfig:
        if self.palette is not None and self.format != "png":
            raise ValueError(f"palette: class ids are written as png, not {self.format}")
        return self

    def check_model(self, architecture: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the key, for a style or samples that such a model cannot have."""
        kind, encoder = self.style.kind, architecture.get("feature_encoder", False)
        if kind != "random" and not encoder:
            raise ValueError(f"infer.style.kind: {kind} needs a model with a feature encoder")
        noisy = self.stochastic and architecture.get("dropout", "none") != "none"
        if self.samples > 1 and not noisy and not (encoder and kind == "random"):
            raise ValueError("infer.samples: all are the same without `stochastic` dropout or random styles")
