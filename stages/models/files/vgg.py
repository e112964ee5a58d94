"""VGG19 up to relu5_1, 13 convolutions: the features of the perceptual loss.

Simonyan & Zisserman 2014 (arXiv:1409.1556), configuration E. The weights are not part of Pixloom: they come
from a file in torchvision's layout (`features.0.weight` ...) or the plain one without prefix (`0.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.models.files.weights import read_tensors

BLOCKS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))
"""Output channels of each block's convolutions; a 2x2 max pool is between two blocks."""

_NAME = re.compile(r"(?:features\.|slice\d\.)?(\d+\.(?:weight|bias))")


class VGG19Features(nn.Module):
    """(N,3,H,W) images in [-1, 1] -> the five feature maps relu1_1 .. relu5_1.

    One lightness channel is repeated to three. Parameters are frozen; gradients still reach the images.
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


def build_vgg(tensors: Mapping[str, Tensor]) -> VGG19Features:
    """The network with the weights of a torchvision or plain VGG19 state dict; other tensors are ignored.

    Raises ValueError naming the first tensor that is missing or has another shape than VGG19's.
    """
    found = {match[1]: tensor for name, tensor in tensors.items() if (match := _NAME.fullmatch(name))}
    with torch.device("meta"):  # without initial weights: all of them are replaced
        network = VGG19Features()
    expected = network.layers.state_dict()
    for name, empty in expected.items():
        if name not in found:
            raise ValueError(f"not VGG19: no tensor features.{name} (or {name})")
        if found[name].shape != empty.shape:
            shapes = f"{tuple(found[name].shape)}, VGG19 has {tuple(empty.shape)}"
            raise ValueError(f"not VGG19: features.{name} is {shapes}")
    weights = {name: found[name].detach().to("cpu", torch.float32) for name in expected}
    network.layers.load_state_dict(weights, assign=True)
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
