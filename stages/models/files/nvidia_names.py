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


def layer_names(network: nn.Module, *, intermediate_features: bool = True) -> dict[str, str]:
    """The table for one of our networks. Raises TypeError for anything else.

    intermediate_features   of a pix2pixHD discriminator: whether it was trained with feature matching
    """
    match network:
        case CoarseToFineGenerator():
            return _coarse_to_fine(network)
        case MultiScaleDiscriminator():
            return _scales(network, intermediate_features)
        case FeatureEncoder():
            return _sequence(downsamplings=len(network.down), blocks=0)
        case UNet():
            return _unet(levels=len(network.encoder))
        case PixelDiscriminator():
            entries = {"0.conv": 0, "1.conv": 2, "1.norm": 3, "2.conv": 5}
            return {f"blocks.{ours}": f"net.{entry}" for ours, entry in entries.items()}
        case PatchDiscriminator():
            return _patch(layers=len(network.blocks) - 2)
        case _:
            raise TypeError(f"no published counterpart of {type(network).__name__}")


def _sequence(*, downsamplings: int, blocks: int) -> dict[str, str]:
    """G1, in published order: pad, conv7, norm, ReLU; 3 entries a level; blocks; 3 a level; pad, conv7.

    The feature encoder is the same with no blocks.
    """
    names = {"stem.conv": "model.1"}
    entry = 4
    for level in range(downsamplings):
        names[f"down.{level}.conv"] = f"model.{entry}"
        entry += 3
    for block in range(blocks):
        names |= _block(f"blocks.{block}", f"model.{entry}")
        entry += 1
    for level in range(downsamplings):
        names[f"up.{level}.conv"] = f"model.{entry}"
        entry += 3
    return names | {"head.conv": f"model.{entry + 1}"}


def _block(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.conv1": f"{theirs}.conv_block.1", f"{ours}.conv2": f"{theirs}.conv_block.5"}


def _coarse_to_fine(network: CoarseToFineGenerator) -> dict[str, str]:
    """G1 in `model`, enhancer n (1 = innermost) in `modeln_1` and `modeln_2`; the last one ends in conv7."""
    inner = _sequence(downsamplings=len(network.coarse.down), blocks=len(network.coarse.blocks))
    names = {ours if ours.startswith("head") else f"coarse.{ours}": theirs for ours, theirs in inner.items()}
    blocks = network.enhancer_blocks
    for index in range(len(network.enhancers)):
        ours, theirs = f"enhancers.{index}", f"model{index + 1}"
        names |= {f"{ours}.stem.conv": f"{theirs}_1.1", f"{ours}.down.conv": f"{theirs}_1.4"}
        for block in range(blocks):
            names |= _block(f"{ours}.blocks.{block}", f"{theirs}_2.{block}")
        names |= {f"{ours}.up.conv": f"{theirs}_2.{blocks}", "head.conv": f"{theirs}_2.{blocks + 4}"}
    return names


def _scales(network: MultiScaleDiscriminator, intermediate_features: bool) -> dict[str, str]:
    """Our scale 0 is full resolution; in published names that one has the highest index.

    Discriminators trained without feature matching keep each scale as one sequence (`layerK.I`).
    """
    names = {}
    for scale in range(len(network.scales)):
        theirs = len(network.scales) - 1 - scale
        for block in range(network.layers + 2):
            entry = (
                f"scale{theirs}_layer{block}.0" if intermediate_features else f"layer{theirs}.{_entry(block)}"
            )
            names[f"scales.{scale}.blocks.{block}.conv"] = entry
    return names


def _patch(*, layers: int) -> dict[str, str]:
    """PatchGAN: conv, LeakyReLU; conv, norm, LeakyReLU ...; conv."""
    names = {f"blocks.{block}.conv": f"model.{_entry(block)}" for block in range(layers + 2)}
    return names | {f"blocks.{block}.norm": f"model.{_entry(block) + 1}" for block in range(1, layers + 1)}


def _entry(block: int) -> int:
    """The place of a PatchGAN's convolution in its sequence."""
    return max(0, 3 * block - 1)


def _unet(*, levels: int) -> dict[str, str]:
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


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A state dict with its layers renamed. Parameters of layers not in the table are left out."""
    layers = ((name.rpartition("."), value) for name, value in state.items())
    return {f"{names[layer]}.{part}": value for (layer, _, part), value in layers if layer in names}
