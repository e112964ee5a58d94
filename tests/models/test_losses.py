"""Losses against their formulas."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.architecture import LossWeights, Pix2Pix, Pix2PixHD, paper_weights
from stages.models.losses import (
    discriminator_losses,
    feature_matching_losses,
    gan_loss,
    generator_gan_loss,
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


def test_every_scale_is_judged_by_its_last_map() -> None:
    scales = [[torch.zeros(1), LOGITS], [torch.zeros(1), 2 * LOGITS]]
    losses = discriminator_losses(scales, "least_squares", real=False)
    torch.testing.assert_close(losses[1], 4 * losses[0])


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
