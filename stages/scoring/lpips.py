"""LPIPS v0.1 (Zhang et al. 2018): the learned perceptual distance of two images. The backbone is the user's.

`lpips_alex` and `lpips_vgg` name distances by the published weights only, which are known by their checksum.
The name of any other weights carries the first digits of theirs, as in `lpips_alex_1f3a9c02`, so that two
numbers of one name can always be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import resources

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.config.evaluate import LpipsConfig
from stages.errors import UserError, one_line
from stages.images.kinds import Array
from stages.models.files.weights import read_tensors
from stages.scoring.metrics import to_unit
from stages.scoring.networks import checksum, weights_file

PUBLISHED_BACKBONES = {"alex": "7be5be79", "vgg": "397923af"}
"""First digits of the SHA-256 of torchvision's files, as in their names (alexnet-owt-7be5be79.pth)."""

BACKBONE, LINEAR = "evaluate.lpips.backbone", "evaluate.lpips.linear"

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions
VGG = tuple(layer for channels, count in BLOCKS for layer in ("M2", *[(channels, 3, 1, 1)] * count))
LAYERS: dict[str, tuple[tuple[object, ...], tuple[int, ...]]] = {
    # convolution: (channels, kernel, stride, padding); "M2", "M3": max pooling; then the tapped activations
    "alex": (
        ((64, 11, 4, 2), "M3", (192, 5, 1, 2), "M3", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)),
        (1, 2, 3, 4, 5),
    ),
    "vgg": (VGG[1:], (2, 4, 7, 10, 13)),
}


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, v0.1): weighted squared differences of unit features.

    `backbone` holds torchvision's AlexNet or VGG16 weights (`features.N.weight` ...), `linear` the published
    weights (1, C, 1, 1) of the five tapped layers (`lin0.model.1.weight` ...). Raises KeyError for a missing
    tensor and RuntimeError for one of a wrong shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str, backbone: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> None:
        super().__init__()
        layers, self.taps = LAYERS[kind]
        self.features = nn.Sequential()
        channels = 3
        for layer in layers:
            if isinstance(layer, tuple):
                out, kernel, stride, padding = layer
                self.features.append(nn.Conv2d(channels, out, kernel, stride, padding))
                self.features.append(nn.ReLU())
                channels = out
            else:
                self.features.append(nn.MaxPool2d(int(str(layer)[1:]), 2))
        names = self.features.state_dict()
        self.features.load_state_dict({name: backbone[f"features.{name}"] for name in names})
        self.linear = nn.ParameterList(linear[f"lin{i}.model.1.weight"] for i in range(len(self.taps)))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(requires_grad=False)

    def tapped(self, image: Tensor) -> list[Tensor]:
        """Unit-length features after the tapped activations; `image` (N, 3, H, W) in [-1, 1]."""
        x, activations, features = (image - self.shift) / self.scale, 0, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations += 1
                if activations in self.taps:
                    # a norm's gradient at 0 is 0, a root's is not a number
                    features.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return features

    def forward(self, generated: Tensor, target: Tensor) -> Tensor:
        """(N,) distances of images (N, 3, H, W) in [-1, 1]."""
        distances = [
            F.conv2d((a - b).square(), weight).mean((1, 2, 3))
            for a, b, weight in zip(self.tapped(generated), self.tapped(target), self.linear, strict=True)
        ]
        return torch.stack(distances).sum(0)


def load_lpips(config: LpipsConfig, key: str = "evaluate.lpips") -> Lpips:
    """The network of a config at `key`. Raises UserError for weights that are absent or another network's."""
    with ExitStack() as stack:
        backbone = stack.enter_context(weights_file(config.backbone, f"{key}.backbone"))
        if config.linear is None:
            folder = resources.files("torchmetrics.functional.image") / "lpips_models"  # the published ones
            linear = stack.enter_context(resources.as_file(folder / f"{config.kind}.pth"))
        else:
            linear = stack.enter_context(weights_file(config.linear, f"{key}.linear"))
        try:
            return Lpips(config.kind, read_tensors(backbone), read_tensors(linear))
        except (ValueError, KeyError, RuntimeError) as error:
            reason = one_line(error, limit=200)
            raise UserError(f"{key}: these are no {config.kind} weights: {reason}") from error


class LpipsScorer:
    """LPIPS of uint8 images (H, W, 3). Raises UserError for weights that are absent or another network's."""

    def __init__(self, config: LpipsConfig, device: str) -> None:
        self.device = device
        self.network = load_lpips(config).to(device)

    def __call__(self, generated: Sequence[Array], targets: Sequence[Array]) -> list[float]:
        """The distance of each generated image to its target, all of one shape."""
        one, other = (to_unit(images, self.device) * 2 - 1 for images in (generated, targets))
        with torch.inference_mode():
            distances: list[float] = self.network(one, other).tolist()
        return distances


def lpips_name(config: LpipsConfig, digest: str = "") -> str:
    """The name of the distance with these weights. Raises UserError where weights are absent.

    digest   the first digits of their SHA-256, with `linear` four of each; "": the files are read
    """
    if not digest:
        digest = checksum(config.backbone, BACKBONE)
        digest = digest if config.linear is None else digest[:4] + checksum(config.linear, LINEAR)[:4]
    published = config.linear is None and digest.startswith(PUBLISHED_BACKBONES[config.kind])
    return f"lpips_{config.kind}" + ("" if published else f"_{digest[:8]}")
