"""Which networks to build: frozen architectures, their inputs, and the functions that build them.

A saved model is its weights and the JSON of one `Architecture` and one `InputSpec`. Settings that change the
image are here; those that only change speed or memory (activation checkpointing, memory format, precision,
compilation) are not.

    arch = Pix2PixHD(enhancers=1)
    inputs = InputSpec(source="labels", classes=35, instances=True)
    generator = build_generator(arch, inputs, enhancers=0)      # G1 alone, the global phase
    generator = build_generator(arch, inputs)                   # G1 inside one enhancer
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from stages.models.layers import Upsampling, initialise
from stages.models.pix2pix import PatchDiscriminator, PixelDiscriminator, UNet
from stages.models.pix2pixhd import CoarseToFineGenerator, FeatureEncoder, MultiScaleDiscriminator

__all__ = [
    "Architecture",
    "InputSpec",
    "Parts",
    "Pix2Pix",
    "Pix2PixHD",
    "build_discriminator",
    "build_encoder",
    "build_generator",
    "condition_channels",
    "discriminator_channels",
    "generator_channels",
    "grow_discriminator",
    "grow_generator",
    "size_multiple",
    "trainable_parts",
]

Parts = Literal["all", "outermost"]
"""What a phase trains of the generator: all of it, or only the outermost enhancer (the local phase)."""


class Frozen(BaseModel):
    """Frozen, unknown keys refused. (`stages.base` is above this package.)"""

    model_config = ConfigDict(frozen=True, extra="forbid")


Width = Annotated[int, Field(ge=1, le=2**16)]
"""Channels of a network's first layer. Bounded: a model folder may come from anywhere."""


class InputSpec(Frozen):
    """What a pair holds: the part of a model's shape that the data decides."""

    source: Annotated[
        Literal["image", "labels"], Field(description="values in [-1, 1], or class ids to be made one-hot")
    ] = "image"
    channels: Annotated[int, Field(ge=1, description="channels of an image source")] = 3
    classes: Annotated[int | None, Field(ge=1, description="number of class ids of a labels source")] = None
    instances: Annotated[bool, Field(description="pairs carry a map of instance ids")] = False
    target_channels: Annotated[int, Field(ge=1)] = 3

    @model_validator(mode="after")
    def _labels_need_classes(self) -> InputSpec:
        if self.source == "labels" and self.classes is None:
            raise ValueError("a labels source needs `classes`")
        return self

    @property
    def source_channels(self) -> int:
        """Channels of the source as the networks see it."""
        return self.classes if self.source == "labels" and self.classes is not None else self.channels


class Pix2Pix(Frozen):
    """Isola et al. 2017. The defaults are the paper's U-Net-256 and 70x70 PatchGAN."""

    kind: Literal["pix2pix"] = "pix2pix"
    generator: Annotated[
        Literal["unet", "encoder_decoder"], Field(description="encoder_decoder: the same without skips")
    ] = "unet"
    levels: Annotated[int, Field(ge=2, le=12, description="8 for 256 px, 7 for 128, 9 for 512")] = 8
    width: Width = 64
    norm: Literal["batch", "instance"] = "batch"
    dropout: Annotated[
        Literal["paper", "common", "none"],
        Field(description="the three levels above the bottleneck; or all 512-channel levels but the first"),
    ] = "paper"
    upsampling: Upsampling = "transpose"
    discriminator_layers: Annotated[
        int,
        Field(ge=0, le=6, description="receptive field: 0: 1, 1: 16, 2: 34, 3: 70, 4: 142, 5: 286 pixels"),
    ] = 3
    discriminator_width: Width = 64
    conditional: Annotated[bool, Field(description="false: the discriminator sees the output alone")] = True


class Pix2PixHD(Frozen):
    """Wang et al. 2018. The defaults are the paper's: G1 of width 64 inside one enhancer of width 32."""

    kind: Literal["pix2pixhd"] = "pix2pixhd"
    enhancers: Annotated[int, Field(ge=0, le=4)] = 1
    width: Annotated[
        int | None, Field(ge=1, le=2**16, description="of the outermost part; null: such that G1 has 64")
    ] = None
    downsamplings: Annotated[int, Field(ge=1, le=6)] = 4
    blocks: Annotated[int, Field(ge=0, le=64)] = 9
    enhancer_blocks: Annotated[int, Field(ge=0, le=64)] = 3
    upsampling: Upsampling = "transpose"
    discriminators: Annotated[int, Field(ge=1, le=5, description="scales of the last phase")] = 3
    discriminator_layers: Annotated[int, Field(ge=1, le=6)] = 3
    discriminator_width: Width = 64
    conditional: bool = True
    instance_edges: Annotated[bool, Field(description="add the edges, where pairs carry instances")] = True
    feature_encoder: Annotated[bool, Field(description="instance-wise style features; needs instances")] = (
        False
    )
    feature_channels: Width = 3
    feature_width: Width = 16
    feature_downsamplings: Annotated[int, Field(ge=1, le=6)] = 4

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


# -- building -----------------------------------------------------------------


def build_generator(
    arch: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    *,
    enhancers: int | None = None,
    seed: int = 0,
    checkpointing: bool = False,
) -> UNet | CoarseToFineGenerator:
    """The generator, initialised. `enhancers`: how many of the architecture's a phase has (None: all).

    Every part's initial weights depend on the seed and its own name, so G1 starts the same with and without
    enhancers around it. Raises ValueError where the phase asks for more enhancers than there are.
    """
    channels = generator_channels(arch, inputs)
    network: UNet | CoarseToFineGenerator
    if isinstance(arch, Pix2Pix):
        network = UNet(
            channels,
            inputs.target_channels,
            levels=arch.levels,
            width=arch.width,
            norm=arch.norm,
            dropout=arch.dropout,
            skips=arch.generator == "unet",
            upsampling=arch.upsampling,
        )
    else:
        active = arch.enhancers if enhancers is None else enhancers
        if not 0 <= active <= arch.enhancers:
            raise ValueError(f"{active} enhancers asked for, the model has {arch.enhancers}")
        if arch.global_width % 2**active:
            raise ValueError(f"G1's width {arch.global_width} cannot be halved {active} times")
        network = CoarseToFineGenerator(
            channels,
            inputs.target_channels,
            global_width=arch.global_width,
            downsamplings=arch.downsamplings,
            blocks=arch.blocks,
            enhancers=active,
            enhancer_blocks=arch.enhancer_blocks,
            upsampling=arch.upsampling,
            checkpointing=checkpointing,
        )
    initialise(network, seed=seed, role="generator")
    return network


def build_discriminator(
    arch: Pix2Pix | Pix2PixHD, inputs: InputSpec, *, discriminators: int | None = None, seed: int = 0
) -> PatchDiscriminator | PixelDiscriminator | MultiScaleDiscriminator:
    """The discriminator, initialised. `discriminators`: number of scales of a phase (None: all)."""
    channels = discriminator_channels(arch, inputs)
    network: PatchDiscriminator | PixelDiscriminator | MultiScaleDiscriminator
    if isinstance(arch, Pix2PixHD):
        network = MultiScaleDiscriminator(
            channels,
            scales=arch.discriminators if discriminators is None else discriminators,
            width=arch.discriminator_width,
            layers=arch.discriminator_layers,
        )
    elif arch.discriminator_layers == 0:
        network = PixelDiscriminator(channels, width=arch.discriminator_width, norm=arch.norm)
    else:
        network = PatchDiscriminator(
            channels,
            width=arch.discriminator_width,
            layers=arch.discriminator_layers,
            norm=arch.norm,
            padding=1,
        )
    initialise(network, seed=seed, role="discriminator")
    return network


def build_encoder(arch: Pix2Pix | Pix2PixHD, inputs: InputSpec, *, seed: int = 0) -> FeatureEncoder | None:
    """The feature encoder, initialised, or None where the architecture has none."""
    if isinstance(arch, Pix2Pix) or not arch.feature_encoder:
        return None
    if not inputs.instances:
        raise ValueError("a feature encoder needs instance maps")
    network = FeatureEncoder(
        inputs.target_channels,
        arch.feature_channels,
        width=arch.feature_width,
        downsamplings=arch.feature_downsamplings,
        upsampling=arch.upsampling,
    )
    initialise(network, seed=seed, role="encoder")
    return network


# -- phases -------------------------------------------------------------------


def trainable_parts(generator: nn.Module, parts: Parts) -> list[nn.Parameter]:
    """Freeze all of the generator but `parts`; return the parameters that train, in a stable order.

    "outermost" is the outermost enhancer with its last convolution (Wang et al., section 3.1); a generator
    without enhancers has no such part: ValueError. A frozen part's parameters require no gradient, so
    autograd records nothing in it: it costs a forward pass and no memory.
    """
    generator.requires_grad_(requires_grad=parts == "all")
    if parts == "outermost":
        if not isinstance(generator, CoarseToFineGenerator) or not generator.enhancers:
            raise ValueError("a local phase needs at least one enhancer")
        generator.enhancers[-1].requires_grad_(requires_grad=True)
        generator.head.requires_grad_(requires_grad=True)
    for module in generator.modules():
        if getattr(module, "inert_bias", False) and isinstance(module.bias, nn.Parameter):
            module.bias.requires_grad_(False)
    return [parameter for parameter in generator.parameters() if parameter.requires_grad]


def grow_generator(generator: CoarseToFineGenerator, before: CoarseToFineGenerator) -> None:
    """Copy what the phase before trained: G1 and its enhancers. A new part around them stays new."""
    generator.coarse.load_state_dict(before.coarse.state_dict())
    if len(before.enhancers) > len(generator.enhancers):
        raise ValueError(
            f"a phase cannot have fewer enhancers ({len(generator.enhancers)}) than the one before it"
        )
    for enhancer, trained in zip(generator.enhancers, before.enhancers, strict=False):
        enhancer.load_state_dict(trained.state_dict())
    if len(before.enhancers) == len(generator.enhancers):
        generator.head.load_state_dict(before.head.state_dict())


def grow_discriminator(discriminator: MultiScaleDiscriminator, before: MultiScaleDiscriminator) -> None:
    """Copy the trained scales to their absolute resolution: added scales are the finest and start fresh."""
    added = len(discriminator.scales) - len(before.scales)
    if added < 0:
        raise ValueError(
            f"a phase cannot have fewer discriminators ({len(discriminator.scales)}) than the one before it"
        )
    for scale, trained in zip(discriminator.scales[added:], before.scales, strict=True):
        scale.load_state_dict(trained.state_dict())
