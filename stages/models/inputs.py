"""From what a pair holds to what the networks see: [-1, 1], one-hot labels, instance edges, padding.

Everything here is vectorised and stays on the device of its arguments; nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stages.base import Kind
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD, uses_edges
from stages.models.layers import Noise


def unit_range(image: Tensor, dtype: torch.dtype = torch.float32, *, kind: Kind = "rgb") -> Tensor:
    """Stored integer amounts (N, C, H, W) of a kind -> [-1, 1], as `stages.images.kinds.normalise` on arrays.

    Floating images are in that range already.
    """
    values = image.to(dtype)
    if image.is_floating_point():
        return values
    match kind:
        case "grey16":
            return values / 32767.5 - 1
        case "lab_ab":
            return (values - 128) / 110
        case _:
            return values / 127.5 - 1


def make_condition(
    source: Tensor,
    instance: Tensor | None,
    *,
    arch: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    dtype: torch.dtype = torch.float32,
    kind: Kind = "rgb",
) -> Tensor:
    """The condition (N, condition_channels, H, W) of a source: the image, or one-hot labels; then edges.

    source     (N, C, H, W) image of a kind, or (N, 1, H, W) integer class ids
    instance   (N, 1, H, W) integer ids, where the architecture uses their edges
    """
    if inputs.source == "labels":
        assert inputs.classes is not None
        condition = one_hot(source, inputs.classes, dtype)
    else:
        condition = unit_range(source, dtype, kind=kind)
    if uses_edges(arch, inputs):
        assert instance is not None, "the input spec says that pairs carry instances"
        condition = torch.cat([condition, instance_edges(instance, dtype)], 1)
    return condition


def translate(
    generator: nn.Module, condition: Tensor, style: Tensor | None = None, noise: Noise | None = None
) -> Tensor:
    """Condition (N, C, H, W) and style features (N, F, H, W) -> generated images (N, C_out, H, W) in [-1, 1].

    `noise`: one random source per sample for dropout, in any mode; None: dropout in training mode only.
    """
    image: Tensor = generator(condition if style is None else torch.cat([condition, style], 1), noise)
    return image


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class ids (N, 1, H, W), any integer dtype -> (N, classes, H, W) of zeros and ones.

    Ids outside [0, classes) become all zeros: no device-side assertion. (The shard stage refuses them.)
    """
    ids = torch.arange(classes, device=labels.device, dtype=torch.int32).view(1, classes, 1, 1)
    return (labels.to(torch.int32) == ids).to(dtype)


def instance_edges(instance: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ids (N, 1, H, W) -> (N, 1, H, W): 1 where any 4-neighbour has another id."""
    edges = torch.zeros(instance.shape, dtype=torch.bool, device=instance.device)
    across = instance[..., 1:] != instance[..., :-1]
    edges[..., 1:] |= across
    edges[..., :-1] |= across
    below = instance[..., 1:, :] != instance[..., :-1, :]
    edges[..., 1:, :] |= below
    edges[..., :-1, :] |= below
    return edges.to(dtype)


def padded_size(size: int, *, multiple: int, minimum: int) -> int:
    """The smallest side the generator takes that is not below `size`."""
    return max(-(-size // multiple) * multiple, minimum)


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width) by reflecting the lower and right border, as often as it takes.

    Unlike `F.pad(mode="reflect")` it takes any integer dtype and any amount, down to images of one pixel.
    """
    for dim, side in ((2, height), (3, width)):
        if x.shape[dim] != side:
            x = x.index_select(dim, reflected(torch.arange(side, device=x.device), x.shape[dim]))
    return x


def reflected(index: Tensor, side: int) -> Tensor:
    """The places, on a side of so many pixels, of the pixels that reflection puts at these places."""
    period = max(2 * (side - 1), 1)
    index = index % period
    return torch.minimum(index, period - index)
