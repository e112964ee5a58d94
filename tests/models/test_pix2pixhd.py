"""Coarse-to-fine generators and the discriminators on a pyramid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.models.architecture import InputSpec, Pix2PixHD
from stages.models.build import build_discriminator, build_generator, trainable_parts
from stages.models.inputs import padded_size, reflect_to
from stages.models.pix2pixhd import CoarseToFineGenerator, FeatureEncoder, MultiScaleDiscriminator

SMALL = Pix2PixHD(enhancers=2, width=2, downsamplings=1, blocks=1, enhancer_blocks=1, discriminator_width=2)


def generator(**changes: object) -> CoarseToFineGenerator:
    network = build_generator(SMALL.model_copy(update=changes), InputSpec())
    assert isinstance(network, CoarseToFineGenerator)
    return network


@pytest.mark.parametrize("upsampling", ["transpose", "resize"])
def test_the_picture_has_the_inputs_size(upsampling: str) -> None:
    network = generator(upsampling=upsampling)
    for height, width in ((16, 16), (24, 40)):
        assert network(torch.rand(2, 3, height, width)).shape == (2, 3, height, width)


def test_odd_and_tiny_sizes_are_padded_and_cropped_back() -> None:
    network = generator().eval()
    for height, width in ((1, 1), (17, 33), (5, 50)):
        x = torch.rand(1, 3, height, width)
        size = [padded_size(side, multiple=8, minimum=16) for side in (height, width)]
        with torch.inference_mode():
            y = network(reflect_to(x, *size))[:, :, :height, :width]
        assert y.shape == x.shape
        assert y.isfinite().all()


def test_a_picture_does_not_depend_on_its_batch_or_layout() -> None:
    network, x = generator().eval(), torch.rand(3, 3, 16, 24)
    with torch.inference_mode():
        together = network(x)
        torch.testing.assert_close(together[1:2], network(x[1:2]))
        torch.testing.assert_close(together, network(x.contiguous(memory_format=torch.channels_last)))


def test_both_layouts_are_as_exact_as_float64_at_full_size() -> None:
    network = build_generator(Pix2PixHD(enhancers=0, width=16), InputSpec()).eval()
    x = torch.rand(1, 3, 256, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        contiguous = network(x)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        channels_last = network(x.contiguous(memory_format=torch.channels_last))
        exact = network.double()(x.double())
    torch.testing.assert_close(contiguous.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(channels_last.double(), exact, rtol=0, atol=1e-4)


def test_frozen_parts_record_no_graph() -> None:
    network, x = generator(), torch.rand(1, 3, 16, 16)
    trainable_parts(network, "outermost")
    assert not network.coarse(x, lambda layer, y: layer(y)).requires_grad
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    local = sum(tensor.numel() for tensor in saved)
    saved.clear()
    trainable_parts(network, "all")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(x)
    assert local < sum(tensor.numel() for tensor in saved)


def test_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    x = torch.rand(1, 3, 16, 16)
    gradients, kept = [], []
    for checkpointing in (False, True):
        network = build_generator(SMALL, InputSpec(), checkpointing=checkpointing)
        saved = list[int]()

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(x).square().mean()
        loss.backward()
        kept.append(sum(saved))
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert kept[1] < kept[0] / 2
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_scales_see_the_condition_pooled_as_the_whole_would_be() -> None:
    network = build_discriminator(SMALL, InputSpec())
    assert isinstance(network, MultiScaleDiscriminator)
    condition, image = torch.rand(1, 3, 32, 48), torch.rand(1, 3, 32, 48)
    whole = network(torch.cat([condition, image], 1))
    parts = network(image, network.pyramid(condition))
    for expected, scale in zip(whole, parts, strict=True):
        for theirs, ours in zip(expected, scale, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_encoders_features_are_constant_over_each_instance() -> None:
    encoder = FeatureEncoder(width=2, downsamplings=2)
    instance = torch.arange(4).view(1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3) * 40_000
    features = encoder(torch.rand(1, 3, 16, 16), instance)
    assert features.shape == (1, 3, 16, 16)
    blocks = features.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert (blocks.amax(-1) - blocks.amin(-1)).max() < 1e-6
