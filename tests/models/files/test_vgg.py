"""VGG19's feature maps against a plain sequence, and its weights in every layout people have them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stages.models.files.vgg import BLOCKS, VGG19Features, build_vgg, load_vgg


@pytest.fixture(scope="module")
def published() -> nn.Sequential:
    """VGG19's `features` as torchvision lays them out, cut after relu5_1, with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for index, block in enumerate(BLOCKS):
        if index:
            layers.append(nn.MaxPool2d(2))
        for width in block:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)


def test_the_convolutions_stand_where_torchvision_has_them() -> None:
    layers = VGG19Features().layers
    positions = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert positions == [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28]


@pytest.mark.parametrize("prefix", ["features.", "", "module.features."])
def test_features_equal_those_of_the_published_layout(
    published: nn.Sequential, tmp_path: Path, prefix: str
) -> None:
    weights = {prefix + name: tensor for name, tensor in published.state_dict().items()}
    weights["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(weights, tmp_path / "vgg19.pth")
    network = load_vgg(tmp_path / "vgg19.pth")
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    expected: list[Tensor] = []
    x = images
    for position, layer in enumerate(published):
        x = layer(x)
        if position in (1, 6, 11, 20, 29):
            expected.append(x)
    for feature, reference in zip(network(images), expected, strict=True):
        torch.testing.assert_close(feature, reference)


def test_a_safetensors_file_is_read_as_well(published: nn.Sequential, tmp_path: Path) -> None:
    save_file(published.state_dict(), tmp_path / "vgg.safetensors")
    network = load_vgg(tmp_path / "vgg.safetensors")
    assert not any(p.requires_grad for p in network.parameters())
    images = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(images)[-1].sum().backward()
    assert images.grad is not None


def test_a_lightness_picture_is_seen_as_grey(published: nn.Sequential) -> None:
    network = build_vgg(published.state_dict())
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0])


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vgg\.pth: no such file"):
        load_vgg(tmp_path / "vgg.pth")


def test_another_network_is_refused_with_the_tensor_named(published: nn.Sequential, tmp_path: Path) -> None:
    weights = published.state_dict()
    del weights["28.bias"]
    with pytest.raises(ValueError, match=r"features\.28\.bias"):
        build_vgg(weights)
    weights = published.state_dict()
    weights["5.weight"] = torch.zeros(128, 128, 3, 3)
    torch.save(weights, tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"vgg16\.pth: not VGG19: features\.5\.weight is \(128, 128, 3, 3\)"):
        load_vgg(tmp_path / "vgg16.pth")


def test_damaged_files_are_refused_in_one_line(published: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "vgg.pth"
    torch.save(published.state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a readable torch checkpoint") as caught:
        load_vgg(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "vgg.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_vgg(tmp_path / "vgg.safetensors")
