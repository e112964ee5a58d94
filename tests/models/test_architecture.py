"""Architectures: the papers' parameter counts, phases, and what is refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.models.architecture import (
    InputSpec,
    Pix2Pix,
    Pix2PixHD,
    condition_channels,
    discriminator_channels,
    generator_channels,
    size_multiple,
)
from stages.models.build import (
    build_discriminator,
    build_encoder,
    build_generator,
    grow_discriminator,
    grow_generator,
    trainable_parts,
)
from stages.models.pix2pixhd import CoarseToFineGenerator, MultiScaleDiscriminator

LABELS = InputSpec(source="labels", classes=35, instances=True)
SMALL = Pix2PixHD(
    enhancers=2,
    width=2,
    downsamplings=1,
    blocks=1,
    enhancer_blocks=1,
    discriminator_width=2,
    discriminators=3,
)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def small_generator(enhancers: int, seed: int = 0) -> CoarseToFineGenerator:
    network = build_generator(SMALL, InputSpec(), enhancers=enhancers, seed=seed)
    assert isinstance(network, CoarseToFineGenerator)
    return network


def small_scales(discriminators: int, seed: int = 0) -> MultiScaleDiscriminator:
    network = build_discriminator(SMALL, InputSpec(), discriminators=discriminators, seed=seed)
    assert isinstance(network, MultiScaleDiscriminator)
    return network


@pytest.mark.parametrize(("levels", "parameters"), [(8, 54_413_955), (7, 41_828_995)])
def test_unets_have_the_papers_parameters(levels: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build_generator(Pix2Pix(levels=levels), InputSpec())) == parameters


@pytest.mark.parametrize(
    ("layers", "parameters"),
    [(0, 9_024), (1, 139_585), (2, 666_433), (3, 2_768_705), (4, 6_964_033), (5, 11_159_361)],
)
def test_patch_discriminators_have_the_papers_parameters(layers: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build_discriminator(Pix2Pix(discriminator_layers=layers), InputSpec())) == parameters


@pytest.mark.parametrize(("enhancers", "parameters"), [(0, 182_546_755), (1, 182_857_059), (2, 182_947_699)])
def test_coarse_to_fine_generators_have_the_papers_parameters(enhancers: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build_generator(Pix2PixHD(enhancers=enhancers), LABELS)) == parameters


def test_each_scale_of_the_discriminator_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        assert count(build_discriminator(Pix2PixHD(), LABELS)) == 3 * 2_801_601


def test_channels_follow_the_inputs() -> None:
    styled = Pix2PixHD(feature_encoder=True)
    assert condition_channels(Pix2PixHD(), LABELS) == 36
    assert generator_channels(styled, LABELS) == 39  # features are the generator's alone
    assert discriminator_channels(styled, LABELS) == 39
    assert condition_channels(Pix2PixHD(instance_edges=False), LABELS) == 35
    assert condition_channels(Pix2Pix(), InputSpec(channels=1, target_channels=2)) == 1
    assert discriminator_channels(Pix2Pix(conditional=False), InputSpec(target_channels=2)) == 2


def test_sizes_are_multiples_of_what_the_network_halves() -> None:
    assert size_multiple(Pix2Pix()) == (256, 256)
    assert size_multiple(Pix2PixHD()) == (32, 64)
    assert size_multiple(Pix2PixHD(), enhancers=0) == (16, 32)


def test_wrong_architectures_are_refused() -> None:
    with pytest.raises(ValidationError, match="levles"):
        Pix2Pix(levles=8)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="classes"):
        InputSpec(source="labels")
    with pytest.raises(ValueError, match="the phase has 3 enhancers, but the model has 2"):
        build_generator(SMALL, InputSpec(), enhancers=3)
    with pytest.raises(ValueError, match="needs instance maps"):
        build_encoder(Pix2PixHD(feature_encoder=True), InputSpec())


def test_initial_weights_depend_on_the_seed_and_not_on_what_is_around() -> None:
    alone, inside = small_generator(0), small_generator(1)
    assert torch.equal(alone.coarse.stem.conv.weight, inside.coarse.stem.conv.weight)
    assert not torch.equal(alone.coarse.stem.conv.weight, small_generator(0, seed=1).coarse.stem.conv.weight)
    weight = build_generator(Pix2Pix(levels=6, width=16), InputSpec()).encoder[4].conv.weight
    assert weight.mean().abs() < 1e-3
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_growing_copies_g1_and_its_enhancers_and_leaves_the_new_part_new() -> None:
    before, grown, fresh = small_generator(1, seed=1), small_generator(2), small_generator(2)
    grow_generator(grown, before)
    trained, new, untouched = before.state_dict(), grown.state_dict(), fresh.state_dict()
    for name, value in new.items():
        if name.startswith(("enhancers.1", "head")):
            assert torch.equal(value, untouched[name]), name
        else:
            assert torch.equal(value, trained[name]), name


def test_a_phase_with_the_same_parts_takes_all_of_the_one_before() -> None:
    before, after = small_generator(1, seed=1), small_generator(1)
    grow_generator(after, before)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_trained_scales_keep_their_absolute_resolution() -> None:
    before, grown, fresh = small_scales(2, seed=1), small_scales(3), small_scales(3)
    grow_discriminator(grown, before)
    for scale in range(2):
        trained = before.scales[scale].state_dict()
        assert all(torch.equal(v, trained[n]) for n, v in grown.scales[scale + 1].state_dict().items())
    new = fresh.scales[0].state_dict()
    assert all(torch.equal(v, new[n]) for n, v in grown.scales[0].state_dict().items())


def test_phases_cannot_shrink() -> None:
    with pytest.raises(ValueError, match="fewer enhancers"):
        grow_generator(small_generator(0), small_generator(1))
    with pytest.raises(ValueError, match="fewer discriminators"):
        grow_discriminator(small_scales(1), small_scales(2))


def test_the_local_phase_trains_the_outermost_enhancer_only() -> None:
    generator = small_generator(2)
    trainable_parts(generator, "outermost")
    names = {name for name, parameter in generator.named_parameters() if parameter.requires_grad}
    assert names
    assert all(name.startswith(("enhancers.1.", "head.")) for name in names)
    with pytest.raises(ValueError, match="at least one enhancer"):
        trainable_parts(small_generator(0), "outermost")


def test_biases_in_front_of_instance_norms_are_kept_and_never_trained() -> None:
    generator = small_generator(1)
    trainable_parts(generator, "all")
    frozen = [name for name, parameter in generator.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.endswith("bias") and not name.startswith("head") for name in frozen)
