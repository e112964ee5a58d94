"""The U-Net and the PatchGAN: sizes, noise, variants."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.models.architecture import InputSpec, Pix2Pix
from stages.models.build import build_discriminator, build_generator
from stages.models.inputs import padded_size, reflect_to
from stages.models.layers import noise_sources
from stages.models.pix2pix import UNet

SMALL = Pix2Pix(levels=5, width=2)


@pytest.mark.parametrize(("layers", "side"), [(0, 256), (1, 126), (2, 62), (3, 30), (4, 14), (5, 6)])
def test_the_map_of_predictions_has_the_papers_size(layers: int, side: int) -> None:
    network = build_discriminator(Pix2Pix(discriminator_layers=layers, discriminator_width=1), InputSpec())
    features = network(torch.zeros(1, 6, 256, 256))
    assert features[-1].shape == (1, 1, side, side)
    assert len(features) == max(layers, 1) + 2


@pytest.mark.parametrize(("levels", "side"), [(7, 128), (8, 256), (9, 512)])
@pytest.mark.parametrize("generator", ["unet", "encoder_decoder"])
def test_any_depth_gives_the_size_it_got(levels: int, side: int, generator: str) -> None:
    arch = Pix2Pix(levels=levels, generator=generator, width=1)  # type: ignore[arg-type]
    network = build_generator(arch, InputSpec(channels=1, target_channels=2))
    assert network(torch.zeros(1, 1, side, 2 * side)).shape == (1, 2, side, 2 * side)


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("upsampling", ["transpose", "resize"])
def test_variants_train_in_both_layouts(norm: str, upsampling: str) -> None:
    arch = SMALL.model_copy(update={"norm": norm, "upsampling": upsampling, "dropout": "none"})
    network, x = build_generator(arch, InputSpec()).train(), torch.rand(2, 3, 32, 64)
    y = network(x)
    torch.testing.assert_close(network(x.contiguous(memory_format=torch.channels_last)), y)
    y.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("placement", "levels", "noisy"),
    [
        ("paper", 8, {7, 6, 5}),
        ("common", 8, {6, 5, 4}),
        ("common", 7, {5, 4}),
        ("paper", 9, {8, 7, 6}),
        ("none", 8, set()),
        ("paper", 4, set()),
    ],
)
def test_dropout_is_where_the_paper_or_the_code_has_it(placement: str, levels: int, noisy: set[int]) -> None:
    with torch.device("meta"):
        network = build_generator(Pix2Pix(levels=levels, dropout=placement), InputSpec())  # type: ignore[arg-type]
    assert isinstance(network, UNet)
    found = {level for level in range(levels) if network.decoder[level].dropout is not None}
    assert found == noisy


def test_a_stochastic_picture_depends_on_its_seed_and_not_on_its_batch() -> None:
    network, x = build_generator(SMALL, InputSpec()).eval(), torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        together = network(x, noise_sources([1, 2, 3]))
        alone = torch.cat([network(x[i : i + 1], noise_sources([i + 1])) for i in range(3)])
        torch.testing.assert_close(together, alone)
        assert torch.equal(network(x[:1], noise_sources([1])), network(x[:1], noise_sources([1])))
        assert not torch.allclose(network(x[:1], noise_sources([1])), network(x[:1], noise_sources([4])))
        torch.testing.assert_close(network(x)[:1], network(x[:1]))  # deterministic


def test_dropout_is_the_noise_of_training() -> None:
    network, x = build_generator(SMALL, InputSpec()).train(), torch.rand(1, 3, 32, 32)
    torch.manual_seed(0)
    first = network(x)
    assert not torch.equal(network(x), first)
    torch.manual_seed(0)
    torch.testing.assert_close(network(x), first)


def test_any_size_is_padded_by_reflection_and_cropped_back() -> None:
    network = build_generator(SMALL, InputSpec()).eval()
    for height, width in ((1, 1), (31, 33), (45, 7)):
        x = torch.rand(1, 3, height, width)
        size = [padded_size(side, multiple=32, minimum=32) for side in (height, width)]
        with torch.inference_mode():
            y = network(reflect_to(x, *size))[:, :, :height, :width]
        assert y.shape == x.shape
        assert y.isfinite().all()


def test_convolutions_in_front_of_batch_norm_have_no_bias() -> None:
    network = build_generator(SMALL, InputSpec())
    biases = [
        name
        for name, m in network.named_modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.bias is not None
    ]
    assert biases == ["decoder.0.conv"]
