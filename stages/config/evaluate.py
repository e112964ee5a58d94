"""The `evaluate` section: the images to score, the metrics and the baselines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from stages.base import Config, Fraction, Level, Palette, Split
from stages.config.locations import Location

SMALLEST_SIDE = {"ssim": 6, "ms_ssim": 176, "lpips_alex": 31, "lpips_vgg": 16}
"""SSIM mirrors 5 pixels at each border; the five scales of an 11 pixel window need side // 16 > 10; each
pooling of a network needs a window of pixels."""


class BaselineConfig(Config):
    """Simple methods that any model has to beat."""

    mean_target: Annotated[
        bool, Field(description="Score the mean of all training targets as the answer to every source.")
    ] = True
    untrained: Annotated[
        int, Field(ge=0, description="Score the network with its initial weights on this many images.")
    ] = 64
    nearest: Annotated[
        int,
        Field(ge=0, description="Score the target of the nearest training source for this many images."),
    ] = 256
    nearest_candidates: Annotated[
        int, Field(ge=1, description="Search the nearest source among this many training sources.")
    ] = 20_000


class LpipsConfig(Config):
    """LPIPS v0.1. The five linear layers come with torchmetrics; the backbone is torchvision's."""

    kind: Annotated[Literal["alex", "vgg"], Field(description="The backbone network.")] = "alex"
    backbone: Annotated[
        Location,
        Field(description="Path or URI of the backbone, alexnet-owt-7be5be79.pth or vgg16-397923af.pth."),
    ]
    linear: Annotated[
        Location | None, Field(description="Path or URI of other linear layers. null: the published ones.")
    ] = None

    @property
    def smallest_side(self) -> int:
        """The smallest side of an image that the backbone takes, in pixels."""
        return SMALLEST_SIDE[f"lpips_{self.kind}"]


class InceptionConfig(Config):
    """The network whose features FID and KID compare."""

    weights: Annotated[
        Location,
        Field(
            description="Path or URI of TorchScript (NVIDIA's inception-2015-12-05.pt) or ONNX that maps "
            "uint8 (N, 3, H, W) to features (N, D)."
        ),
    ]
    size: Annotated[
        int | None,
        Field(ge=32, description="Resize images to this square first. null: the network does it itself."),
    ] = None
    published: Annotated[
        str | None,
        Field(
            pattern="^[0-9a-f]{64}$",
            description="SHA-256 of the published weights. Only with these are metrics called fid and kid.",
        ),
    ] = None


class SegmenterConfig(Config):
    """A network that segments the generated images; its classes are compared with the pair's label map."""

    weights: Annotated[
        Location,
        Field(description="Path or URI of TorchScript or ONNX: float (N, 3, H, W) to class scores or ids."),
    ]
    classes: Annotated[int, Field(ge=1, le=256, description="Number of classes of the segmenter.")]
    size: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(description="Resize images to this width and height first. null: keep their size."),
    ] = None
    mean: Annotated[
        tuple[float, float, float], Field(description="Mean of each channel, on a scale from 0 to 1.")
    ] = (0.485, 0.456, 0.406)
    std: Annotated[
        tuple[float, float, float], Field(description="Deviation of each channel, on a scale from 0 to 1.")
    ] = (0.229, 0.224, 0.225)
    ignore: Annotated[int | None, Field(description="Leave pixels with this label id out. null: none.")] = 255
    train_ids: Annotated[
        dict[Level, Annotated[int, Field(ge=-1, le=255)]],
        Field(
            default_factory=dict,
            description="The segmenter's class of each label id; other ids are left out, and those of class "
            "-1. Empty: as they are.",
        ),
    ]


class EvaluateConfig(Config):
    """Which images to score, and by what."""

    split: Annotated[
        Split | None,
        Field(description="The split whose targets are compared. null: infer.split."),
    ] = None
    images: Annotated[
        Location | None,
        Field(description="A folder of another system's images. null: the images that infer generated."),
    ] = None
    names: Annotated[
        str,
        Field(description="The path of an image below `images`, by {key} or by {name}, its last segment."),
    ] = "{key}.png"
    baselines: Annotated[BaselineConfig, Field(description="Baselines to score as well.")] = BaselineConfig()
    lpips: Annotated[LpipsConfig | None, Field(description="Compute LPIPS. null: do not.")] = None
    inception: Annotated[InceptionConfig | None, Field(description="Compute FID and KID. null: do not.")] = (
        None
    )
    perceptual: Annotated[
        Literal["efficientnet_lite0"] | None,
        Field(
            description="Compute the Frechet and the kernel distance of this network's features; its weights "
            "come with the extra `perceptual`. null: do not."
        ),
    ] = None
    segmenter: Annotated[
        SegmenterConfig | None, Field(description="Score images by a segmentation network. null: do not.")
    ] = None
    palette: Annotated[
        Palette | None,
        Field(
            description="Score generated label pictures by class: each pixel's class is the one with the "
            "nearest of these colours. null: do not."
        ),
    ] = None
    ignore_class: Annotated[
        int | None, Field(description="Leave pixels of this class of `palette` out. null: none.")
    ] = None
    max_missing_fraction: Annotated[
        Fraction, Field(description="Fail the stage if more than this share of the targets has no image.")
    ] = 0.1

    @field_validator("names")
    @classmethod
    def _names_the_key(cls, text: str) -> str:
        if "{key}" not in text and "{name}" not in text:
            raise ValueError("name {key} or {name} in it")
        return text
