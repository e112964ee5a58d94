"""VGG19 up to relu5_1, 13 convolutions: the features of the perceptual loss.

Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration E. The weights are not part of Pixloom: they come
from a file in torchvision's layout (`features.0.weight` ...) or the plain one without prefix (`0.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.files.weights import read_tensors

BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))
"""Output channels of each block's convolutions; a 2x2 max pool is between two blocks."""

_NAME = re.compile(r"(?:features\.|slice\d\.)?(\d+)\.(weight|bias)")


def _positions() -> list[int]:
    """Where VGG19's sequence of conv, relu and pool holds the convolutions: 0, 2, 5, 7, ... 28."""
    positions, here = [], 0
    for block in BLOCKS:
        for _ in block:
            positions.append(here)
            here += 2
        here += 1
    return positions


POSITIONS = _positions()


class VGG19Features(nn.Module):
    """(N,3,H,W) images in [-1, 1] -> the five feature maps relu1_1 .. relu5_1.

    One lightness channel is repeated to three. Parameters are frozen; gradients still reach the images.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        channels = 3
        for block in BLOCKS:
            convs = nn.ModuleList()
            for width in block:
                convs.append(nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.blocks.append(convs)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps of 64, 128, 256, 512 and 512 channels at 1, 1/2, 1/4, 1/8 and 1/16 of the size."""
        x = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features = []
        for index, convs in enumerate(self.blocks):
            if index:
                x = F.max_pool2d(x, 2)
            assert isinstance(convs, nn.ModuleList)
            for position, conv in enumerate(convs):
                x = F.relu(conv(x))
                if position == 0:
                    features.append(x)
        return features


def build_vgg(tensors: Mapping[str, Tensor]) -> VGG19Features:
    """The network with the weights of a torchvision or plain VGG19 state dict; other tensors are ignored.

    Raises ValueError naming the first tensor that is missing or has another shape than VGG19's.
    """
    parameters: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            parameters[int(match[1]), match[2]] = tensor
    with torch.device("meta"):  # without initial weights: all of them are replaced
        network = VGG19Features()
    convs = [conv for block in network.blocks for conv in block.children()]
    for position, conv in zip(POSITIONS, convs, strict=True):
        assert isinstance(conv, nn.Conv2d)
        for part in ("weight", "bias"):
            target = conv.get_parameter(part)
            if (position, part) not in parameters:
                raise ValueError(f"not VGG19: no tensor features.{position}.{part} (or {position}.{part})")
            tensor = parameters[position, part]
            if tensor.shape != target.shape:
                raise ValueError(
                    f"not VGG19: features.{position}.{part} is {tuple(tensor.shape)}, "
                    f"VGG19 has {tuple(target.shape)}"
                )
            setattr(conv, part, nn.Parameter(tensor.detach().to("cpu", torch.float32), requires_grad=False))
    return network.eval()


def load_vgg(path: Path) -> VGG19Features:
    """The frozen network from a weights file (`.safetensors`, or torchvision's `vgg19-*.pth`).

    Raises ValueError naming the file and what is wrong.
    """
    tensors = read_tensors(path)
    try:
        return build_vgg(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
