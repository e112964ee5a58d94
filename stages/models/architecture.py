"""Which networks a model has, what goes into them and what they minimise, as frozen types without torch.

A saved model is its weights and the JSON of one `Architecture` and one `InputSpec`; nothing else is needed to
build it again (`stages.models.build`). What changes the image is here; what only changes speed or memory
(activation checkpointing, memory format, precision, compilation) is not. `stages.models.losses` computes what
`LossWeights` weigh.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from stages.base import Config, Kind, Palette, Range

Parts = Literal["all", "outermost"]
"""What a phase trains of the generator: all of it, or only the outermost enhancer (the local phase)."""

Upsampling = Literal["transpose", "resize"]
"""Transposed convolution, or nearest-neighbour resize and a convolution (no checkerboards)."""

Width = Annotated[int, Field(ge=1, le=2**16, description="Channels of the network's first layer.")]
"""Bounded: a model folder may come from anywhere."""

SpectralNorm = Annotated[
    bool,
    Field(
        description="Divide each weight of the discriminator by its largest singular value (Miyato et "
        "al. 2018), in addition to the norm layers."
    ),
]
Conditional = Annotated[bool, Field(description="Show the discriminator the source as well as the image.")]

UPSAMPLING = (
    "transpose: transposed convolution, as in the papers. resize: nearest-neighbour resize and a "
    "convolution, which avoids checkerboards."
)


class InputSpec(Config):
    """The part of a model's shape that the data decides."""

    source: Annotated[
        Literal["image", "labels"],
        Field(description="image: values in [-1, 1]. labels: class ids, made one-hot in the step."),
    ] = "image"
    channels: Annotated[int, Field(ge=1, description="Channels of an image source.")] = 3
    classes: Annotated[int | None, Field(ge=1, description="Number of class ids of a labels source.")] = None
    instances: Annotated[bool, Field(description="Whether pairs have a map of instance ids.")] = False
    target_channels: Annotated[int, Field(ge=1, description="Channels of the target.")] = 3

    @model_validator(mode="after")
    def _labels_need_classes(self) -> InputSpec:
        if self.source == "labels" and self.classes is None:
            raise ValueError("a labels source needs `classes`")
        return self

    @property
    def source_channels(self) -> int:
        """Channels of the source as the networks see it."""
        return self.classes if self.source == "labels" and self.classes is not None else self.channels


class Picture(Config):
    """How the images of a role are read: the rules of preparation, the same wherever the model is used."""

    kind: Annotated[Kind, Field(description="as in the shard stage: rgb, labels ...")]
    classes: Annotated[PositiveInt | None, Field(description="number of class ids, for kind labels")] = None
    ignore_label: Annotated[
        int | None, Field(ge=0, description="the label id that is read as `void_class`")
    ] = None
    void_class: Annotated[int | None, Field(ge=0, description="null: the last class")] = None
    palette: Annotated[
        Palette | None, Field(description="the colours that are read as label ids 0, 1, ...; null: ids")
    ] = None
    channel_count: Annotated[PositiveInt | None, Field(description="number, for kind channels")] = None
    range: Annotated[Range, Field(description="the values of the files that are black and white")] = "full"


class Preprocessing(Config):
    """How images were prepared for training, so that inference needs no flags."""

    size: Annotated[
        tuple[PositiveInt, PositiveInt] | None,
        Field(description="width and height trained on, after the crop"),
    ] = None
    pictures: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")], Picture] = Field(
        default_factory=dict, description="per role"
    )


class Pix2Pix(Config):
    """Isola et al. 2017. The defaults are the paper's U-Net-256 and 70x70 PatchGAN."""

    kind: Literal["pix2pix"] = "pix2pix"
    generator: Annotated[
        Literal["unet", "encoder_decoder"],
        Field(description="unet: with skip connections. encoder_decoder: the same network without them."),
    ] = "unet"
    levels: Annotated[
        int,
        Field(ge=2, le=12, description="Number of halvings of the image: 8 for 256 px, 7 for 128 px."),
    ] = 8
    width: Width = 64
    norm: Annotated[
        Literal["batch", "instance"], Field(description="The normalisation of both networks.")
    ] = "batch"
    dropout: Annotated[
        Literal["paper", "common", "none"],
        Field(
            description="Decoder levels with dropout of 0.5. paper: the three above the bottleneck. common: "
            "all 512-channel levels but the first. none: none."
        ),
    ] = "paper"
    upsampling: Annotated[Upsampling, Field(description=UPSAMPLING)] = "transpose"
    discriminator_layers: Annotated[
        int,
        Field(
            ge=0,
            le=6,
            description="Strided layers of the PatchGAN. 0 to 6 layers see 1, 16, 34, 70, 142, 286 and 574 "
            "pixels a side.",
        ),
    ] = 3
    discriminator_width: Width = 64
    discriminator_spectral_norm: SpectralNorm = False
    conditional: Conditional = True


class Pix2PixHD(Config):
    """Wang et al. 2018. The defaults are the paper's: G1 of width 64 inside one enhancer of width 32."""

    kind: Literal["pix2pixhd"] = "pix2pixhd"
    enhancers: Annotated[
        int,
        Field(ge=0, le=4, description="Number of local enhancers around G1; each doubles the resolution."),
    ] = 1
    width: Annotated[
        int | None,
        Field(ge=1, le=2**16, description="Width of the outermost part. null: the one that gives G1 64."),
    ] = None
    downsamplings: Annotated[int, Field(ge=1, le=6, description="Number of halvings of the image in G1.")] = 4
    blocks: Annotated[int, Field(ge=0, le=64, description="Number of residual blocks of G1.")] = 9
    enhancer_blocks: Annotated[
        int, Field(ge=0, le=64, description="Number of residual blocks of each enhancer.")
    ] = 3
    upsampling: Annotated[Upsampling, Field(description=UPSAMPLING)] = "transpose"
    discriminators: Annotated[
        int, Field(ge=1, le=5, description="Number of discriminator scales in the last phase.")
    ] = 3
    discriminator_layers: Annotated[
        int, Field(ge=1, le=6, description="Strided layers of each discriminator.")
    ] = 3
    discriminator_width: Width = 64
    discriminator_spectral_norm: SpectralNorm = False
    conditional: Conditional = True
    instance_edges: Annotated[
        bool, Field(description="Add the edges of instances to the source, where pairs have instance maps.")
    ] = True
    feature_encoder: Annotated[
        bool, Field(description="Train an encoder of instance-wise style features; needs instance maps.")
    ] = False
    feature_channels: Annotated[Width, Field(description="Number of style features.")] = 3
    feature_width: Annotated[Width, Field(description="Channels of the encoder's first layer.")] = 16
    feature_downsamplings: Annotated[
        int, Field(ge=1, le=6, description="Number of halvings of the image in the encoder.")
    ] = 4

    @property
    def global_width(self) -> int:
        """Width of G1."""
        return 64 if self.width is None else self.width * 2**self.enhancers


Architecture = Annotated[Pix2Pix | Pix2PixHD, Field(discriminator="kind")]


# -- channels -----------------------------------------------------------------


def uses_edges(arch: Pix2Pix | Pix2PixHD, inputs: InputSpec) -> bool:
    """Whether instance edges are a channel of the condition."""
    return isinstance(arch, Pix2PixHD) and arch.instance_edges and inputs.instances


def condition_channels(arch: Pix2Pix | Pix2PixHD, inputs: InputSpec) -> int:
    """Channels of the condition: source (one-hot), then instance edges."""
    return inputs.source_channels + uses_edges(arch, inputs)


def generator_channels(arch: Pix2Pix | Pix2PixHD, inputs: InputSpec) -> int:
    """Channels into the generator: the condition, then the style features."""
    features = arch.feature_channels if isinstance(arch, Pix2PixHD) and arch.feature_encoder else 0
    return condition_channels(arch, inputs) + features


def discriminator_channels(arch: Pix2Pix | Pix2PixHD, inputs: InputSpec) -> int:
    """Channels into the discriminator: the condition (if conditional), then the image."""
    return (condition_channels(arch, inputs) if arch.conditional else 0) + inputs.target_channels


def size_multiple(arch: Pix2Pix | Pix2PixHD, *, enhancers: int | None = None) -> tuple[int, int]:
    """(multiple, minimum): sides a generator takes are multiples of the first and no less than the second.

    A residual block reflects its border, so the smallest map needs two pixels a side; the U-Net's may be one.
    """
    if isinstance(arch, Pix2Pix):
        return 2**arch.levels, 2**arch.levels
    multiple = 2 ** (arch.downsamplings + (arch.enhancers if enhancers is None else enhancers))
    return multiple, 2 * multiple


# -- losses --------------------------------------------------------------------

GanKind = Literal["least_squares", "hinge", "bce"]
DiffAugmentKind = Literal["colour", "translation", "cutout"]

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossWeights(Config):
    """What the generator minimises. A weight of 0 leaves the term out, and its cost too.

    The pix2pix ablations: L1 only (gan_weight 0), GAN or cGAN alone (l1 0), L1+GAN, L1+cGAN; whether the
    discriminator sees the source is the architecture's `conditional`.
    """

    gan: Annotated[
        GanKind,
        Field(description="The adversarial loss; bce is the non-saturating one of Goodfellow et al."),
    ] = "least_squares"
    gan_weight: Annotated[Weight, Field(description="Weight of the adversarial loss.")] = 1.0
    feature_matching: Annotated[
        Weight, Field(description="Weight of the feature matching loss (Wang et al., equation 4).")
    ] = 10.0
    l1: Annotated[Weight, Field(description="Weight of the L1 loss (Isola et al., equation 3).")] = 0.0
    perceptual: Annotated[
        Weight, Field(description="Weight of the VGG19 perceptual loss; needs train.vgg_weights.")
    ] = 0.0

    lpips: Annotated[Weight, Field(description="Weight of LPIPS as a loss; needs train.lpips.")] = 0.0
    r1: Annotated[
        Weight,
        Field(
            description="Gamma of the R1 penalty on the discriminator's gradients at real images (Mescheder "
            "et al. 2018). Steps take longer."
        ),
    ] = 0.0
    diff_augment: Annotated[
        tuple[DiffAugmentKind, ...],
        Field(
            description="Augment what the discriminator sees, real and generated (Zhao et al. 2020): any of "
            "colour, translation, cutout. For few pairs."
        ),
    ] = ()

    @property
    def uses_discriminator(self) -> bool:
        """Whether any term needs a discriminator."""
        return self.gan_weight > 0 or self.feature_matching > 0


def paper_weights(arch: Pix2Pix | Pix2PixHD) -> LossWeights:
    """Isola et al.: L1 (100) + cGAN with BCE. Wang et al.: least squares + feature matching (10)."""
    if isinstance(arch, Pix2Pix):
        return LossWeights(gan="bce", feature_matching=0, l1=100)
    return LossWeights()
