"""The `shard` section: how images are read and stored."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from stages.base import MAX_PIXELS, Config, Encoding, Fraction, Kind, Palette, Range, Role

Pixels = Annotated[int, Field(ge=1, le=16384)]


class ShardConfig(Config):
    """How images are read and stored."""

    size: Annotated[
        tuple[Pixels, Pixels], Field(description="Width and height of the stored images, in pixels.")
    ] = (286, 286)
    kinds: Annotated[
        dict[Role, Kind],
        Field(
            default_factory=dict,
            description="How a role's images are read. Roles that are left out have their usual kind: source "
            "and target rgb, label labels, instance instances.",
        ),
    ]
    classes: Annotated[
        int | None, Field(ge=1, le=256, description="Number of class ids; needed by the kind `labels`.")
    ] = None
    channels: Annotated[
        int | None, Field(ge=1, le=512, description="Number of channels; needed by the kind `channels`.")
    ] = None
    features: Annotated[
        int | None,
        Field(ge=1, le=512, description="Number of channels of the role `features`; needed by that role."),
    ] = None
    ignore_label: Annotated[
        int | None,
        Field(ge=0, le=255, description="A label id that is stored as void_class instead of being rejected."),
    ] = None
    void_class: Annotated[
        int | None,
        Field(ge=0, le=255, description="The class id that ignore_label becomes. null: the last class."),
    ] = None
    palette: Annotated[
        Palette | dict[Role, Palette] | None,
        Field(
            description="Read the kind `labels` from colours: class 0 is the first of these, and so on. A "
            "colour is [red, green, blue], or one number for a grey: [0, 255] reads black and white masks. A "
            "mapping gives each role its own. Colours of lossy files become the nearest; in other files, "
            "a colour that is not listed rejects the pair. null: files hold ids."
        ),
    ] = None
    range: Annotated[
        Range | dict[Role, Range],
        Field(
            description="Which values of a file are black and white, for deep, floating-point and scientific "
            "images: full: all values that the file's number format has (floats must be in [-1, 1], for kind "
            "channels). [low, high]: these two. percentile: the 0.5th and 99.5th percentile of each image, "
            "for kind channels of each of its channels. A mapping gives each role its own."
        ),
    ] = "full"
    fit: Annotated[
        Literal["same", "crop", "stretch"],
        Field(
            description="How images get the shape of `size`. same: the images of a pair must have one aspect "
            "ratio, within 2 %, and are resized. crop: the middle of each image in the shape of `size` is "
            "resized. stretch: each is resized, whatever its shape."
        ),
    ] = "same"
    downscale: Annotated[
        int, Field(ge=2, le=64, description="Factor by which `derive_source: downscale` shrinks the target.")
    ] = 4
    encoding: Annotated[
        Encoding,
        Field(
            description="How images are stored. raw is read fastest; png, jpeg and webp are smaller. Class "
            "and instance ids are always stored without loss."
        ),
    ] = "raw"
    quality: Annotated[int, Field(ge=1, le=100, description="Quality of jpeg and webp, 1 to 100.")] = 95
    row_group_rows: Annotated[
        PositiveInt | None,
        Field(description="Pairs per row group, which is read at once. null: as many as make about 8 MiB."),
    ] = None
    max_pixels: Annotated[
        int, Field(ge=1, le=MAX_PIXELS, description="Reject images with more pixels than this.")
    ] = MAX_PIXELS
    min_side: Annotated[
        int, Field(ge=1, description="Reject images with a side below this many pixels, as placeholders.")
    ] = 8
    max_reject_fraction: Annotated[
        Fraction, Field(description="Fail the stage if more than this share of the pairs is rejected.")
    ] = 0.01

    @model_validator(mode="after")
    def _numbers_are_complete(self) -> Self:
        kinds = set(self.kinds.values())
        if "labels" in kinds and self.classes is None:
            raise ValueError("kind labels needs shard.classes, the number of label ids")
        if "channels" in kinds and self.channels is None:
            raise ValueError("kind channels needs shard.channels, their number")
        if "features" in self.kinds:
            raise ValueError("features are always of kind channels")
        for role, kind in self.kinds.items():
            if role == "target" and kind in ("labels", "instances"):
                raise ValueError(
                    f"kinds.target: networks generate colours, not {kind}: draw the label maps in one colour "
                    "a class, take kind rgb, and set infer.palette to write ids again"
                )
            wanted = {"label": "labels", "instance": "instances"}.get(role)
            if (wanted or kind) != kind or (role == "source" and kind == "instances"):
                raise ValueError(f"kinds.{role}: {kind} is no kind of this role")
        if isinstance(self.palette, dict):
            for role in self.palette:
                if self.kinds.get(role, "labels" if role == "label" else "rgb") != "labels":
                    raise ValueError(
                        f"palette.{role}: only the kind labels has one; set kinds.{role}: labels"
                    )
        if self.void_class is not None and self.classes is not None and self.void_class >= self.classes:
            raise ValueError(f"void_class {self.void_class} is no class of {self.classes}")
        return self
