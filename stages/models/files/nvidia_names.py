"""Our layer names and those of NVIDIA's and junyanz's checkpoints, both ways.

NVIDIA/pix2pixHD and junyanz/pytorch-CycleGAN-and-pix2pix number the entries of `nn.Sequential`; the tables
here follow their layout. Keys are our layers, values the published ones; parameters keep their last word
(weight, bias, running_mean ...). Instance norms have no parameters, so they are not in the tables.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stages.models.pix2pix import PatchDiscriminator, PixelDiscriminator, UNet
from stages.models.pix2pixhd import CoarseToFineGenerator, FeatureEncoder, MultiScaleDiscriminator


def global_generator_names(*, downsamplings: int, blocks: int, head: bool = True) -> dict[str, str]:
    """G1, in published order: pad, conv7, norm, ReLU; 3 entries a level; blocks; 3 a level; pad, conv7.

    The feature encoder is the same with no blocks.
    """
    names = {"stem.conv": "model.1"}
    entry = 4
    for level in range(downsamplings):
        names[f"down.{level}.conv"] = f"model.{entry}"
        entry += 3
    for block in range(blocks):
        names[f"blocks.{block}.conv1"] = f"model.{entry}.conv_block.1"
        names[f"blocks.{block}.conv2"] = f"model.{entry}.conv_block.5"
        entry += 1
    for level in range(downsamplings):
        names[f"up.{level}.conv"] = f"model.{entry}"
        entry += 3
    if head:
        names["head.conv"] = f"model.{entry + 1}"
    return names


def pix2pixhd_generator_names(
    *, downsamplings: int, blocks: int, enhancers: int, enhancer_blocks: int
) -> dict[str, str]:
    """G1 in `model`, enhancer n (1 = innermost) in `modeln_1` and `modeln_2`; the last one ends in conv7."""
    inner = global_generator_names(downsamplings=downsamplings, blocks=blocks, head=enhancers == 0)
    names = {ours if ours.startswith("head") else f"coarse.{ours}": theirs for ours, theirs in inner.items()}
    for index in range(enhancers):
        ours, theirs = f"enhancers.{index}", f"model{index + 1}"
        names[f"{ours}.stem.conv"] = f"{theirs}_1.1"
        names[f"{ours}.down.conv"] = f"{theirs}_1.4"
        for block in range(enhancer_blocks):
            names[f"{ours}.blocks.{block}.conv1"] = f"{theirs}_2.{block}.conv_block.1"
            names[f"{ours}.blocks.{block}.conv2"] = f"{theirs}_2.{block}.conv_block.5"
        names[f"{ours}.up.conv"] = f"{theirs}_2.{enhancer_blocks}"
    if enhancers:
        names["head.conv"] = f"model{enhancers}_2.{enhancer_blocks + 4}"
    return names


def pix2pixhd_discriminator_names(
    *, scales: int, layers: int, intermediate_features: bool = True
) -> dict[str, str]:
    """Our scale 0 is full resolution; in published names that one has the highest index.

    Discriminators trained without feature matching keep each scale as one sequence (`layerK.I`).
    """
    names = {}
    for scale in range(scales):
        theirs = scales - 1 - scale
        if intermediate_features:
            for block in range(layers + 2):
                names[f"scales.{scale}.blocks.{block}.conv"] = f"scale{theirs}_layer{block}.0"
        else:
            single = patch_discriminator_names(layers=layers)
            for ours, entry in single.items():
                if ours.endswith(".conv"):
                    names[f"scales.{scale}.{ours}"] = entry.replace("model", f"layer{theirs}", 1)
    return names


def patch_discriminator_names(*, layers: int) -> dict[str, str]:
    """PatchGAN: conv, LeakyReLU; conv, norm, LeakyReLU ...; conv. No layers: PixelGAN."""
    if layers == 0:
        return {
            "blocks.0.conv": "net.0",
            "blocks.1.conv": "net.2",
            "blocks.1.norm": "net.3",
            "blocks.2.conv": "net.5",
        }
    names = {"blocks.0.conv": "model.0"}
    for block in range(1, layers + 2):
        names[f"blocks.{block}.conv"] = f"model.{3 * block - 1}"
        if block <= layers:
            names[f"blocks.{block}.norm"] = f"model.{3 * block}"
    return names


def unet_names(*, levels: int) -> dict[str, str]:
    """The U-Net nests: each level holds the next one between its way down and its way up."""
    names = {"encoder.0.conv": "model.model.0", "decoder.0.conv": "model.model.3"}
    outer = "model.model.1.model"
    for level in range(1, levels):
        innermost = level == levels - 1
        names[f"encoder.{level}.conv"] = f"{outer}.1"
        if not innermost:
            names[f"encoder.{level}.norm"] = f"{outer}.2"
        names[f"decoder.{level}.conv"] = f"{outer}.{3 if innermost else 5}"
        names[f"decoder.{level}.norm"] = f"{outer}.{4 if innermost else 6}"
        outer += ".3.model"
    return names


def layer_names(network: nn.Module, *, intermediate_features: bool = True) -> dict[str, str]:
    """The table for one of our networks, by the functions above. Raises TypeError for anything else."""
    match network:
        case CoarseToFineGenerator():
            return pix2pixhd_generator_names(
                downsamplings=len(network.coarse.down),
                blocks=len(network.coarse.blocks),
                enhancers=len(network.enhancers),
                enhancer_blocks=network.enhancer_blocks,
            )
        case MultiScaleDiscriminator():
            return pix2pixhd_discriminator_names(
                scales=len(network.scales),
                layers=network.layers,
                intermediate_features=intermediate_features,
            )
        case FeatureEncoder():
            return global_generator_names(downsamplings=len(network.down), blocks=0)
        case UNet():
            return unet_names(levels=len(network.encoder))
        case PixelDiscriminator():
            return patch_discriminator_names(layers=0)
        case PatchDiscriminator():
            return patch_discriminator_names(layers=len(network.blocks) - 2)
        case _:
            raise TypeError(f"no published counterpart of {type(network).__name__}")


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict with its layers renamed. Parameters of layers not in the table are left out."""
    layers = ((name.rpartition("."), value) for name, value in state.items())
    return {f"{names[layer]}.{part}": value for (layer, _, part), value in layers if layer in names}
