"""Published checkpoints: architecture read off the tensors, published pictures reproduced, malice refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files.checkpoint_import import import_checkpoint
from stages.models.files.nvidia_names import layer_names, renamed
from stages.models.files.saved import load_discriminator, load_model, save_model
from stages.models.files.weights import read_tensors
from stages.models.pix2pixhd import MultiScaleDiscriminator
from tests.reference.published_step import PlainMultiScale


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def as_checkpoint(
    state: dict[str, Tensor], path: Path, *, legacy: bool = False, parallel: bool = False
) -> Path:
    """Save as the published code does."""
    named = {("module." if parallel else "") + name: value for name, value in state.items()}
    torch.save(named, path, _use_new_zipfile_serialization=not legacy)
    return path


def close(output: Tensor, reference: Tensor) -> None:
    assert output.shape == reference.shape
    assert (output - reference).abs().max() <= 1e-4 * reference.abs().max()


# -- parity with the published outputs, through files, import and the model folder ---------------------


@pytest.mark.parametrize("name", ["hd_global", "hd_local", "hd_local2"])
@pytest.mark.parametrize("legacy", [False, True])
def test_published_coarse_to_fine_generators_give_the_published_picture(
    reference_dir: Path, tmp_path: Path, name: str, legacy: bool
) -> None:
    config, tensors = read(reference_dir / f"{name}.safetensors")
    path = as_checkpoint(part(tensors, "weights."), tmp_path / "latest_net_G.pth", legacy=legacy)
    imported = import_checkpoint(read_tensors(path))
    arch = imported.architecture
    assert isinstance(arch, Pix2PixHD)
    assert (arch.width, arch.downsamplings, arch.blocks, arch.enhancers) == (
        config["ngf"],
        config["n_downsample"],
        config["n_blocks"],
        config.get("n_enhancers", 0),
    )
    if "n_blocks_local" in config:
        assert arch.enhancer_blocks == config["n_blocks_local"]
    save_model(tmp_path / "m", imported.generator, architecture=arch, inputs=imported.inputs)
    close(load_model(tmp_path / "m").generator(tensors["input"]), tensors["output"])


def test_the_published_unet_gives_the_published_picture(reference_dir: Path, tmp_path: Path) -> None:
    config, tensors = read(reference_dir / "p2p_unet.safetensors")
    path = as_checkpoint(part(tensors, "weights."), tmp_path / "latest_net_G.pth", parallel=True)
    imported = import_checkpoint(read_tensors(path))
    assert imported.architecture == Pix2Pix(levels=config["num_downs"], width=config["ngf"], dropout="common")
    assert imported.inputs == InputSpec()
    assert any("dropout" in note for note in imported.notes)
    save_model(tmp_path / "m", imported.generator, architecture=imported.architecture, inputs=imported.inputs)
    loaded = load_model(tmp_path / "m").generator.train()  # the reference took statistics over its batch
    for module in loaded.modules():
        if type(module).__name__ == "Dropout":
            module.eval()
    close(loaded(tensors["input"]), tensors["output"])


def test_the_published_multi_scale_discriminator_judges_the_same(reference_dir: Path, tmp_path: Path) -> None:
    config, tensors = read(reference_dir / "hd_discriminator.safetensors")
    _, other = read(reference_dir / "hd_global.safetensors")
    imported = import_checkpoint(part(other, "weights."), discriminator=part(tensors, "weights."))
    arch = imported.architecture
    assert isinstance(arch, Pix2PixHD)
    assert (arch.discriminators, arch.discriminator_layers, arch.discriminator_width) == (
        config["num_d"],
        config["n_layers"],
        config["ndf"],
    )
    save_model(
        tmp_path,
        imported.generator,
        architecture=arch,
        inputs=imported.inputs,
        discriminator=imported.discriminator,
    )
    for scale, features in enumerate(load_discriminator(tmp_path)(tensors["input"])):
        for index, feature in enumerate(features):
            close(feature, tensors[f"scale{scale}.feature{index}"])


@pytest.mark.parametrize("name", ["p2p_patch_n1", "p2p_patch_n3", "p2p_patch_n5", "p2p_pixel"])
def test_published_patch_discriminators_judge_the_same(
    reference_dir: Path, tmp_path: Path, name: str
) -> None:
    config, tensors = read(reference_dir / f"{name}.safetensors")
    _, other = read(reference_dir / "p2p_unet.safetensors")
    imported = import_checkpoint(part(other, "weights."), discriminator=part(tensors, "weights."))
    arch = imported.architecture
    assert isinstance(arch, Pix2Pix)
    assert (arch.discriminator_layers, arch.conditional) == (config.get("n_layers", 0), True)
    save_model(
        tmp_path,
        imported.generator,
        architecture=arch,
        inputs=imported.inputs,
        discriminator=imported.discriminator,
    )
    if "output" in tensors:
        predictions = load_discriminator(tmp_path).train()(tensors["input"])[-1]
        close(predictions, tensors["output"])


def test_the_published_feature_encoder_comes_along(reference_dir: Path, tmp_path: Path) -> None:
    config, tensors = read(reference_dir / "hd_encoder.safetensors")
    arch = Pix2PixHD(enhancers=0, width=4, downsamplings=1, blocks=1, feature_encoder=True)
    inputs = InputSpec(source="labels", classes=5, instances=True)
    generator = build_generator(arch, inputs)
    state = renamed(generator.state_dict(), layer_names(generator))
    imported = import_checkpoint(state, encoder=part(tensors, "weights."))
    assert imported.inputs == inputs  # 9 channels: 5 classes, edges, 3 features
    assert isinstance(imported.architecture, Pix2PixHD)
    assert imported.architecture.feature_downsamplings == config["n_downsample"]
    save_model(
        tmp_path,
        imported.generator,
        architecture=imported.architecture,
        inputs=imported.inputs,
        encoder=imported.encoder,
    )
    encoder = load_model(tmp_path).encoder
    assert encoder is not None
    close(encoder(tensors["input"], tensors["instance"]), tensors["output"])


def test_networks_in_the_middle_of_training_are_imported_whole(reference_dir: Path) -> None:
    for name in ("hd_step", "hd_step_local", "p2p_step"):
        config, tensors = read(reference_dir / f"{name}.safetensors")
        imported = import_checkpoint(part(tensors, "before.G."), discriminator=part(tensors, "before.D."))
        assert imported.discriminator is not None
        if name.startswith("hd"):
            assert imported.inputs == InputSpec(source="labels", classes=config["labels"], instances=True)


# -- what has no reference file ------------------------------------------------------------------------


def test_missing_weights_mean_instance_norm() -> None:
    arch = Pix2Pix(
        generator="unet", levels=5, width=4, norm="instance", dropout="common", discriminator_width=4
    )
    inputs = InputSpec(channels=1, target_channels=2)
    network, discriminator = build_generator(arch, inputs), build_discriminator(arch, inputs)
    state = renamed(network.state_dict(), layer_names(network))
    # versions of torch before 0.4 saved statistics for instance norms too
    state["model.model.1.model.2.running_mean"] = torch.zeros(8)
    state["model.model.1.model.2.running_var"] = torch.ones(8)
    of_discriminator = renamed(discriminator.state_dict(), layer_names(discriminator))
    imported = import_checkpoint(state, discriminator=of_discriminator)
    assert (imported.architecture, imported.inputs) == (arch, inputs)
    x = torch.rand(1, 1, 32, 64)
    assert torch.equal(imported.generator(x), network.eval()(x))


def test_the_channels_of_a_discriminator_say_whether_it_is_conditional() -> None:
    arch = Pix2Pix(levels=3, width=4, dropout="common", discriminator_width=4, conditional=False)
    network, discriminator = build_generator(arch, InputSpec()), build_discriminator(arch, InputSpec())
    state = renamed(network.state_dict(), layer_names(network))
    del state["model.model.1.model.2.num_batches_tracked"]  # torch before 0.4.1
    of_discriminator = renamed(discriminator.state_dict(), layer_names(discriminator))
    imported = import_checkpoint(state, discriminator=of_discriminator)
    assert imported.architecture == arch


HD = Pix2PixHD(enhancers=0, width=4, downsamplings=1, blocks=1, discriminators=2, discriminator_width=4)


def published_hd(inputs: InputSpec) -> dict[str, Tensor]:
    network = build_generator(HD, inputs)
    return renamed(network.state_dict(), layer_names(network))


def test_the_meaning_of_channels_is_assumed_or_given() -> None:
    state = published_hd(InputSpec(channels=36))
    assumed = import_checkpoint(state)
    assert assumed.inputs == InputSpec(source="labels", classes=35, instances=True)
    assert any("instance edges" in note for note in assumed.notes)
    imported = import_checkpoint(state, classes=36)
    assert imported.inputs == InputSpec(source="labels", classes=36)
    assert import_checkpoint(state, source="image", instances=False).inputs == InputSpec(channels=36)
    with pytest.raises(ValueError, match="36 input channels cannot be 12 classes"):
        import_checkpoint(state, classes=12)


def test_a_discriminator_without_intermediate_features_is_read_too() -> None:
    inputs = InputSpec(source="labels", classes=5, instances=True)
    network = build_discriminator(HD, inputs)
    state = renamed(network.state_dict(), layer_names(network, intermediate_features=False))
    assert "layer0.0.weight" in state
    imported = import_checkpoint(published_hd(inputs), discriminator=state)
    assert imported.discriminator is not None
    for name, tensor in imported.discriminator.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


@pytest.mark.parametrize(("width", "layers"), [(32, 5), (128, 3), (16, 3), (64, 4)])
def test_discriminators_of_other_widths_and_depths_have_at_most_512_channels(width: int, layers: int) -> None:
    """pix2pixHD's code caps channels at 512, pix2pix's at 8 times the width: the default cannot tell."""
    inputs = InputSpec(source="labels", classes=5, instances=True)
    network = PlainMultiScale(5 + 1 + 3, scales=2, width=width, layers=layers)
    imported = import_checkpoint(published_hd(inputs), discriminator=network.state_dict())
    assert isinstance(imported.discriminator, MultiScaleDiscriminator)
    image = torch.rand(1, 9, 96, 96)
    for ours, plain in zip(imported.discriminator(image), network(image), strict=True):
        for feature, expected in zip(ours, plain, strict=True):
            close(feature, expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model.99.weight": torch.zeros(4, 4, 3, 3)}, "model.99.weight"),
        ({"model.2.weight": torch.zeros(4)}, "batch norm in a pix2pixHD network is not supported"),
        (
            {"model.4.weight": torch.zeros(9, 4, 3, 3)},
            r"model\.4\.weight is \[9, 4, 3, 3\], the other tensors",
        ),
        ({"model.4.weight": None}, "the tensors give downsamplings: .*, got 0"),
        ({"model.1.weight": torch.zeros(4)}, "not a convolution's"),
        ({"model.1.weight": torch.zeros(4, 3, 3, 3)}, "no 7x7"),
        ({"model.1.weight": None}, "neither a pix2pix U-Net"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor | None], match: str) -> None:
    state = published_hd(InputSpec())
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    with pytest.raises(ValueError, match=match) as caught:
        import_checkpoint(state)
    assert "\n" not in str(caught.value)


def test_a_discriminator_of_another_model_is_refused() -> None:
    network = build_discriminator(HD, InputSpec(channels=7))
    state = renamed(network.state_dict(), layer_names(network))
    with pytest.raises(ValueError, match=r"the discriminator takes 10 channels, not 6 .*feature encoder"):
        import_checkpoint(published_hd(InputSpec()), discriminator=state)


# -- files that are not what they say --------------------------------------------------------------------


class Malice:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "module"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, victim = tmp_path / "latest_net_G.pth", tmp_path / "victim"
    state: Any = {"model.1.weight": torch.zeros(4, 3, 7, 7), "x": Malice(victim)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state))
    elif form == "module":
        torch.save(torch.nn.Conv2d(1, 1, 1), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="refused") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "not a dict of named tensors"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "not a named tensor"),
        ({1: torch.zeros(1)}, "not a named tensor"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "more data than the file holds"),
        ({"a": torch.tensor([float("nan")])}, "NaN or infinity"),
        ({"a": torch.tensor([1e300], dtype=torch.float64)}, "NaN or infinity"),  # in float32
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64, not real numbers"),
        ({"a": torch.eye(3).to_sparse()}, "more data than the file holds|refused|checkpoint"),
    ],
)
def test_files_without_named_tensors_are_refused(tmp_path: Path, content: Any, match: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=match):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["G.safetensors", "G.safetensors?download=true"])
def test_safetensors_of_any_float_are_read(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(2, dtype=torch.float8_e4m3fn)}, tmp_path / name)
    assert read_tensors(tmp_path / name)["a"].dtype == torch.float8_e4m3fn


def test_tensors_of_no_network_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"the first tensor is a\.running_mean"):
        import_checkpoint({"a.running_mean": torch.ones(3)})


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path: Path, legacy: bool) -> None:
    path = as_checkpoint(published_hd(InputSpec()), tmp_path / "G.pth", legacy=legacy)
    whole = path.read_bytes()
    for data in (b"", b"PK", b"\x80", whole[: len(whole) // 2], whole[: len(whole) - 10], b"\0" * 4096):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"G\.pth: ") as caught:
            read_tensors(path)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_unfolds_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    with pytest.raises(ValueError, match="unfold to more than the file"):
        read_tensors(tmp_path / "bomb.pth")


def test_a_wrapped_state_dict_is_unwrapped(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(1)}}, tmp_path / "x.pth")
    assert list(read_tensors(tmp_path / "x.pth")) == ["a"]


def test_an_encoder_that_does_not_go_with_the_generator_is_refused() -> None:
    encoder = build_encoder(
        Pix2PixHD(feature_encoder=True, feature_width=4), InputSpec(instances=True, target_channels=1)
    )
    assert encoder is not None
    state = renamed(encoder.state_dict(), layer_names(encoder))
    with pytest.raises(ValueError, match="does not go with a generator"):
        import_checkpoint(published_hd(InputSpec(channels=9)), encoder=state)
