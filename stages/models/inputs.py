"""From what a pair holds to what the networks see: one-hot labels, instance edges, instance means, padding.

Everything here is vectorised and stays on the device it was given; nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def one_hot(labels: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class ids (N, 1, H, W), any integer dtype -> (N, classes, H, W) of zeros and ones.

    Ids outside [0, classes) become all zeros: no device-side assertion. (The shard stage refuses them.)
    """
    ids = torch.arange(classes, device=labels.device, dtype=torch.int32).view(1, classes, 1, 1)
    return (labels.to(torch.int32) == ids).to(dtype)


def instance_edges(instance: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ids (N, 1, H, W) -> (N, 1, H, W): 1 where any 4-neighbour has another id."""
    edges = torch.zeros(instance.shape, dtype=torch.bool, device=instance.device)
    beside = instance[..., 1:] != instance[..., :-1]
    edges[..., 1:] |= beside
    edges[..., :-1] |= beside
    below = instance[..., 1:, :] != instance[..., :-1, :]
    edges[..., 1:, :] |= below
    edges[..., :-1, :] |= below
    return edges.to(dtype)


def instance_mean(features: Tensor, instance: Tensor) -> Tensor:
    """Mean of features (N, C, H, W) over each instance (ids (N, 1, H, W), any integers), broadcast back.

    Ids are ranked first, so their size does not matter: Cityscapes has 33 000 and more.
    """
    samples, channels = features.shape[:2]
    segments = instance_segments(instance).view(-1)  # (N*H*W,)
    exact = torch.promote_types(features.dtype, torch.float32)  # sums over many pixels: never in bf16
    pixels = features.permute(0, 2, 3, 1).reshape(-1, channels).to(exact)
    # At most one segment per pixel: a bound that needs no look at the device's data.
    sums = pixels.new_zeros(segments.numel(), channels).index_add_(0, segments, pixels)
    counts = pixels.new_zeros(segments.numel()).index_add_(0, segments, torch.ones_like(pixels[:, 0]))
    means = (sums / counts.clamp(min=1).unsqueeze(1))[segments]
    height, width = features.shape[2:]
    return means.view(samples, height, width, channels).permute(0, 3, 1, 2).to(features.dtype)


def instance_segments(instance: Tensor) -> Tensor:
    """Ids (N, 1, H, W) -> (N, H*W) int64 numbers, equal for pixels of one instance of one sample, else not.

    Numbers lie in [0, N*H*W). Sorted ids change value at a segment's first pixel; the count of changes so far
    is its number.
    """
    samples = instance.shape[0]
    flat = instance.reshape(samples, -1).to(torch.int64)
    values, order = flat.sort(dim=1)
    starts = F.pad((values[:, 1:] != values[:, :-1]).to(torch.int64), (1, 0))
    rank = starts.cumsum(1) + torch.arange(samples, device=flat.device).unsqueeze(1) * flat.shape[1]
    return torch.empty_like(flat).scatter_(1, order, rank)


def padded_size(size: int, *, multiple: int, minimum: int) -> int:
    """The smallest side the generator takes that is not below `size`."""
    return max(-(-size // multiple) * multiple, minimum)


def reflect_to(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width) by reflecting the lower and right border, as often as it takes.

    Unlike `F.pad(mode="reflect")` it takes any integer dtype and any amount, down to images of one pixel.
    """
    for dim, side in ((2, height), (3, width)):
        if x.shape[dim] != side:
            period = max(2 * (x.shape[dim] - 1), 1)
            index = torch.arange(side, device=x.device) % period
            x = x.index_select(dim, torch.minimum(index, period - index))
    return x
