"""Networks loaded with published weights give the published results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.fast import wide, winograd
from stages.models.fast.frozen import freeze
from stages.models.files.nvidia_names import layer_names, renamed
from stages.models.inputs import instance_edges
from tests.reference.tensors import TOLERANCE, Reference, relative_error


def frozen_image(generator: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The image by the frozen modules of CPU inference, with layers of any size prepared."""
    monkeypatch.setattr(wide, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 0)
    generator = freeze(generator, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        image: Tensor = generator(x)
    prepared = set().union(*map(vars, generator.modules()))
    assert {"_filter", "_matrix"} & prepared
    return image


@pytest.mark.parametrize("name", ["hd_global", "hd_local", "hd_local2"])
def test_generators_give_the_published_pictures(
    reference_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(reference_dir / f"{name}.safetensors")
    config = reference.config
    arch = Pix2PixHD(
        enhancers=config.get("n_enhancers", 0),
        width=config["ngf"],
        downsamplings=config["n_downsample"],
        blocks=config["n_blocks"],
        enhancer_blocks=config.get("n_blocks_local", 3),
    )
    generator = reference.load(build_generator(arch, InputSpec(channels=config["in"])))
    assert relative_error(generator(reference["input"]), reference["output"]) <= TOLERANCE
    image = frozen_image(generator, reference["input"], monkeypatch)
    assert relative_error(image, reference["output"]) <= TOLERANCE


def test_every_feature_of_every_scale_is_the_published_one(reference_dir: Path) -> None:
    reference = Reference(reference_dir / "hd_discriminator.safetensors")
    config = reference.config
    arch = Pix2PixHD(
        discriminators=config["num_d"],
        discriminator_width=config["ndf"],
        discriminator_layers=config["n_layers"],
    )
    network = reference.load(build_discriminator(arch, InputSpec(channels=config["in"] - 3)))
    for scale, features in enumerate(network(reference["input"])):
        for index, feature in enumerate(features):
            assert relative_error(feature, reference[f"scale{scale}.feature{index}"]) <= TOLERANCE


def test_the_feature_encoder_and_the_edges_are_the_published_ones(reference_dir: Path) -> None:
    reference = Reference(reference_dir / "hd_encoder.safetensors")
    config = reference.config
    arch = Pix2PixHD(
        feature_encoder=True,
        feature_channels=config["feat"],
        feature_width=config["nef"],
        feature_downsamplings=config["n_downsample"],
    )
    built = build_encoder(arch, InputSpec(instances=True))
    assert built is not None
    encoder = reference.load(built)
    output = encoder(reference["input"], reference["instance"])
    assert relative_error(output, reference["output"]) <= TOLERANCE
    assert torch.equal(instance_edges(reference["instance"]), reference["edges"])


def test_the_unet_on_batch_statistics_gives_the_published_picture(
    reference_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(reference_dir / "p2p_unet.safetensors")
    arch = Pix2Pix(levels=reference.config["num_downs"], width=reference.config["ngf"], dropout="none")
    generator = reference.load(build_generator(arch, InputSpec())).train()
    assert relative_error(generator(reference["input"]), reference["output"]) <= TOLERANCE
    image = frozen_image(generator, reference["input"], monkeypatch)
    assert relative_error(image, reference["output"]) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "layers"), [("pixel", 0), ("patch_n1", 1), ("patch_n3", 3), ("patch_n5", 5)]
)
def test_patch_and_pixel_discriminators_are_the_published_ones(
    reference_dir: Path, name: str, layers: int
) -> None:
    reference = Reference(reference_dir / f"p2p_{name}.safetensors")
    arch = Pix2Pix(discriminator_layers=layers, discriminator_width=reference.config["ndf"])
    network = reference.load(build_discriminator(arch, InputSpec())).train()
    assert relative_error(network(reference["input"])[-1], reference["output"]) <= TOLERANCE


def test_names_map_both_ways() -> None:
    with torch.device("meta"):
        networks = [
            build_generator(Pix2PixHD(enhancers=2), InputSpec()),
            build_generator(Pix2Pix(), InputSpec()),
            build_discriminator(Pix2PixHD(), InputSpec()),
            build_discriminator(Pix2Pix(), InputSpec()),
        ]
    for network in networks:
        state, names = network.state_dict(), layer_names(network)
        back = renamed(renamed(state, names), {theirs: ours for ours, theirs in names.items()})
        assert back.keys() == state.keys()


def test_scales_without_intermediate_features_are_one_sequence_each() -> None:
    network = build_discriminator(Pix2PixHD(discriminators=2), InputSpec())
    names = layer_names(network, intermediate_features=False)
    assert names["scales.0.blocks.0.conv"] == "layer1.0"
    assert names["scales.1.blocks.4.conv"] == "layer0.11"


def test_a_network_without_a_counterpart_is_refused() -> None:
    with pytest.raises(TypeError, match="Linear"):
        layer_names(torch.nn.Linear(1, 1))
