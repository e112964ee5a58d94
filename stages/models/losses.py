"""The losses of both papers, per scale and layer, and how they are weighted.

`real` and `fake` are a discriminator's features: per scale (finest first) all feature maps, the patch
predictions (logits) last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stages.models.architecture import GanKind
from stages.models.files.weights import read_tensors

Features = Sequence[Sequence[Tensor]]

PERCEPTUAL_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
PERCEPTUAL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


def gan_loss(logits: Tensor, kind: GanKind, *, real: bool) -> Tensor:
    """The discriminator's loss of logits (N, 1, h, w) whose patches are all real, or all fake."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    match kind:
        case "least_squares":  # Mao et al. 2017
            return ((logits - 1) if real else logits).square().mean()
        case "hinge":
            return F.relu(1 - logits if real else 1 + logits).mean()
        case "bce":  # log(1 + exp(-x)) for real, log(1 + exp(x)) for fake
            return F.softplus(-logits if real else logits).mean()


def generator_gan_loss(logits: Tensor, kind: GanKind) -> Tensor:
    """The generator's non-saturating loss: that of the fake's patches as if they were real."""
    if kind == "hinge":
        return -logits.mean(dtype=torch.promote_types(logits.dtype, torch.float32))
    return gan_loss(logits, kind, real=True)


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Half the mean squared norm of the gradient of a discriminator, at real images (Mescheder et al. 2018).

    logits   (N, 1, h, w) of images (N, C, H, W), with a graph; a patch discriminator is their mean
    """
    decisions = logits.mean((1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(decisions, images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean() / 2


def mean_difference(x: Tensor, y: Tensor) -> Tensor:
    """L1, averaged in no less than float32. Only `x` gets a gradient."""
    difference: Tensor = _MeanDifference.apply(x, y)  # type: ignore[no-untyped-call]
    return difference


class _MeanDifference(torch.autograd.Function):
    """The gradient has the layout of `x`; that of torch's mean is channels first, whatever its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        difference = x - y
        ctx.save_for_backward(difference)
        return difference.abs().mean(dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference.sgn().mul_((gradient / difference.numel()).to(difference.dtype)), None


def feature_matching_losses(fake: Features, real: Features) -> list[list[Tensor]]:
    """Per scale and layer: 1/num_D * 4/(n_layers+1) * L1 (Wang et al., eq. 4). `real` must be detached."""
    return [
        [
            mean_difference(x, y) * (4 / (len(fake_scale) - 1) / len(fake))
            for x, y in zip(fake_scale[:-1], real_scale[:-1], strict=True)
        ]
        for fake_scale, real_scale in zip(fake, real, strict=True)
    ]


def perceptual_losses(fake: Tensor, real: Tensor, vgg: nn.Module) -> list[Tensor]:
    """sum_i w_i * L1 of VGG19's relu1_1 ... relu5_1, both images in [-1, 1].

    `vgg` maps an image to those five feature maps; it is frozen.
    """
    with torch.no_grad():
        targets = vgg(real)
    return [
        mean_difference(x, y) * weight
        for x, y, weight in zip(vgg(fake), targets, PERCEPTUAL_WEIGHTS, strict=True)
    ]


# -- VGG19, for the perceptual loss --------------------------------------------

BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))
"""Output channels of each block's convolutions; a 2x2 max pool is between two blocks."""

_VGG_NAME = re.compile(r"(?:features\.|slice\d\.)?(\d+\.(?:weight|bias))")


class VGG19Features(nn.Module):
    """(N,3,H,W) images in [-1, 1] -> the five feature maps relu1_1 .. relu5_1.

    Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration E; its weights are not part of Pixloom. One
    lightness channel is repeated to three. Parameters are frozen; gradients still reach the images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential()  # numbered as torchvision's: conv, relu, ...
        self.taps = set[int]()
        channels = 3
        for block in BLOCKS:
            if len(self.layers):
                self.layers.append(nn.MaxPool2d(2))
            self.taps.add(len(self.layers) + 1)
            for width in block:
                self.layers.append(nn.Conv2d(channels, width, 3, padding=1))
                self.layers.append(nn.ReLU())
                channels = width
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of 64, 128, 256, 512 and 512 channels at 1, 1/2, 1/4, 1/8 and 1/16 of the size."""
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features = []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.taps:
                features.append(x)
        return features


def load_vgg(path: Path) -> VGG19Features:
    """The frozen network from a weights file: `.safetensors`, or torchvision's `vgg19-*.pth`.

    Tensors are named as torchvision's (`features.0.weight` ...) or plainly (`0.weight`); others are ignored.

    Raises ValueError naming the file and, unless it cannot be read, the first tensor that is missing or has
    another shape than VGG19's.
    """
    tensors = read_tensors(path)
    found = {match[1]: tensor for name, tensor in tensors.items() if (match := _VGG_NAME.fullmatch(name))}
    with torch.device("meta"):  # without initial weights: all of them are replaced
        network = VGG19Features()
    expected = network.layers.state_dict()
    for name, empty in expected.items():
        if name not in found:
            raise ValueError(f"{path}: not VGG19: no tensor features.{name} (or {name})")
        if found[name].shape != empty.shape:
            shapes = f"{tuple(found[name].shape)}, VGG19 has {tuple(empty.shape)}"
            raise ValueError(f"{path}: not VGG19: features.{name} is {shapes}")
    weights = {name: found[name].detach().to("cpu", torch.float32) for name in expected}
    network.layers.load_state_dict(weights, assign=True)
    return network.eval()
