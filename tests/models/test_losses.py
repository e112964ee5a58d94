"""Losses against their formulas; VGG19 against a plain sequence, and its weights in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.architecture import LossWeights, Pix2Pix, Pix2PixHD, paper_weights
from stages.models.losses import (
    BLOCKS,
    VGG19Features,
    feature_matching_losses,
    gan_loss,
    generator_gan_loss,
    load_vgg,
    mean_difference,
    perceptual_losses,
    r1_penalty,
)

LOGITS = torch.linspace(-3, 3, 12).view(1, 1, 3, 4)


def test_gan_losses_are_the_textbooks() -> None:
    ones, zeros = torch.ones_like(LOGITS), torch.zeros_like(LOGITS)
    for real, goal in ((True, ones), (False, zeros)):
        torch.testing.assert_close(gan_loss(LOGITS, "least_squares", real=real), F.mse_loss(LOGITS, goal))
        expected = F.binary_cross_entropy_with_logits(LOGITS, goal)
        torch.testing.assert_close(gan_loss(LOGITS, "bce", real=real), expected)
    torch.testing.assert_close(gan_loss(LOGITS, "hinge", real=True), F.relu(1 - LOGITS).mean())
    torch.testing.assert_close(gan_loss(LOGITS, "hinge", real=False), F.relu(1 + LOGITS).mean())


def test_the_generators_loss_does_not_saturate() -> None:
    torch.testing.assert_close(generator_gan_loss(LOGITS, "hinge"), -LOGITS.mean())
    torch.testing.assert_close(generator_gan_loss(LOGITS, "bce"), F.softplus(-LOGITS).mean())
    surely_fake = torch.full((1, 1, 1, 1), -20.0, requires_grad=True)
    generator_gan_loss(surely_fake, "bce").backward()
    assert surely_fake.grad is not None
    assert surely_fake.grad.abs().item() == pytest.approx(1)


def test_feature_matching_is_weighted_by_scales_and_layers() -> None:
    fake = [[torch.full((1, 2, 2, 2), float(layer)) for layer in range(5)] for _ in range(2)]
    real = [[torch.zeros(1, 2, 2, 2) for _ in range(5)] for _ in range(2)]
    losses = feature_matching_losses(fake, real)
    assert [[value.item() for value in scale] for scale in losses] == [[0, 0.5, 1, 1.5]] * 2  # 1/2 * 4/4


def test_the_perceptual_loss_weighs_five_layers_and_leaves_the_target_alone() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x * 2**index for index in range(5)]

    fake = torch.ones(1, 3, 2, 2, requires_grad=True)
    losses = perceptual_losses(fake, torch.zeros(1, 3, 2, 2), Doubling())
    assert [value.item() for value in losses] == [1 / 32, 2 / 16, 4 / 8, 8 / 4, 16]


def test_r1_is_half_gamma_one_times_the_squared_norm_of_each_images_gradient() -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 6 * 6, dtype=torch.float64).view(2, 3, 6, 6).requires_grad_()
    weight = torch.linspace(-1, 2, 12, dtype=torch.float64).view(1, 3, 2, 2).requires_grad_()

    def logits(x: Tensor) -> Tensor:
        return F.conv2d(x.tanh(), weight, stride=2)

    norms = []
    for image in images.detach():
        of_one = torch.autograd.functional.jacobian(lambda x: logits(x[None]).mean(), image)
        norms.append(sum(float(value) ** 2 for value in of_one.flatten()))
    assert r1_penalty(logits(images), images).item() == pytest.approx(sum(norms) / 2 / 2)
    assert torch.autograd.gradcheck(lambda w: r1_penalty(F.conv2d(images.tanh(), w), images), (weight,))


def test_small_differences_survive_bf16() -> None:
    x = torch.full((1, 8, 64, 64), 1e-3, dtype=torch.bfloat16)
    difference = mean_difference(x, torch.zeros_like(x))
    assert difference.dtype == torch.float32
    assert difference.item() == pytest.approx(1e-3, rel=1e-2)


def test_the_papers_weights_differ() -> None:
    assert paper_weights(Pix2Pix()) == LossWeights(gan="bce", feature_matching=0, l1=100)
    assert paper_weights(Pix2PixHD()) == LossWeights(feature_matching=10, l1=0)
    assert not LossWeights(gan_weight=0, feature_matching=0, l1=1).uses_discriminator


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValidationError):
        LossWeights(l1=weight)


# -- VGG19 ----------------------------------------------------------------------


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


def test_a_lightness_picture_is_seen_as_grey(published: nn.Sequential, tmp_path: Path) -> None:
    torch.save(published.state_dict(), tmp_path / "vgg19.pth")
    network = load_vgg(tmp_path / "vgg19.pth")
    grey = torch.rand(1, 1, 16, 16)
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0])


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vgg\.pth: no such file"):
        load_vgg(tmp_path / "vgg.pth")


def test_another_network_is_refused_with_the_tensor_named(published: nn.Sequential, tmp_path: Path) -> None:
    weights = published.state_dict()
    del weights["28.bias"]
    torch.save(weights, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"short\.pth: not VGG19: no tensor features\.28\.bias"):
        load_vgg(tmp_path / "short.pth")
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
