"""Build the networks of an architecture, choose what a phase trains, and start from an earlier phase.

arch = Pix2PixHD(enhancers=1)
inputs = InputSpec(source="labels", classes=35, instances=True)
generator = build_generator(arch, inputs, enhancers=0)      # G1 alone, the global phase
generator = build_generator(arch, inputs)                   # G1 inside one enhancer
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from stages import seeding
from stages.models.architecture import (
    InputSpec,
    Parts,
    Pix2Pix,
    Pix2PixHD,
    discriminator_channels,
    generator_channels,
)
from stages.models.layers import initialise
from stages.models.pix2pix import PatchDiscriminator, PixelDiscriminator, UNet
from stages.models.pix2pixhd import CoarseToFineGenerator, FeatureEncoder, MultiScaleDiscriminator


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
    enhancers around it. `checkpointing`: less memory, slower steps (Pix2PixHD).

    Raises ValueError where the phase asks for more enhancers than there are.
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
            raise ValueError(f"the phase has {active} enhancers, but the model has {arch.enhancers}")
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
    if arch.discriminator_spectral_norm:
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(f"{seed}/spectral_norm"))  # its first vectors are random
            for convolution in convolutions:  # whose vectors only `advance_spectral_norms` advances
                spectral_norm(convolution).get_submodule("parametrizations").eval()
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


def grow_generator(generator: nn.Module, before: nn.Module) -> None:
    """Copy what the phase before trained: G1 and its enhancers, or all. A new part around them stays new."""
    if not (isinstance(generator, CoarseToFineGenerator) and isinstance(before, CoarseToFineGenerator)):
        generator.load_state_dict(before.state_dict())
        return
    generator.coarse.load_state_dict(before.coarse.state_dict())
    if len(before.enhancers) > len(generator.enhancers):
        raise ValueError(
            f"a phase cannot have fewer enhancers ({len(generator.enhancers)}) than the one before it"
        )
    for enhancer, trained in zip(generator.enhancers, before.enhancers, strict=False):
        enhancer.load_state_dict(trained.state_dict())
    if len(before.enhancers) == len(generator.enhancers):
        generator.head.load_state_dict(before.head.state_dict())


def grow_discriminator(discriminator: nn.Module, before: nn.Module) -> None:
    """Copy the trained scales to their absolute resolution: added scales are the finest and start fresh."""
    if not (
        isinstance(discriminator, MultiScaleDiscriminator) and isinstance(before, MultiScaleDiscriminator)
    ):
        discriminator.load_state_dict(before.state_dict())
        return
    added = len(discriminator.scales) - len(before.scales)
    if added < 0:
        raise ValueError(
            f"a phase cannot have fewer discriminators ({len(discriminator.scales)}) than the one before it"
        )
    for scale, trained in zip(discriminator.scales[added:], before.scales, strict=True):
        scale.load_state_dict(trained.state_dict())
