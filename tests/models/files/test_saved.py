"""Model folders: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from stages.models.architecture import InputSpec, Picture, Pix2Pix, Pix2PixHD, Preprocessing
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files.saved import (
    Manifest,
    load_discriminator,
    load_model,
    read_manifest,
    save_model,
)
from stages.models.styles import Styles

HD = Pix2PixHD(
    enhancers=1,
    width=4,
    downsamplings=2,
    blocks=1,
    enhancer_blocks=1,
    discriminators=3,
    discriminator_width=4,
    feature_encoder=True,
    feature_width=4,
    feature_downsamplings=2,
)
LABELS = InputSpec(source="labels", classes=5, instances=True)
UNET = Pix2Pix(levels=3, width=4, discriminator_width=4)
IMAGES = InputSpec()


def save_unet(folder: Path, **options: Any) -> torch.nn.Module:
    generator = build_generator(UNET, IMAGES, seed=1)
    save_model(folder, generator, architecture=UNET, inputs=IMAGES, **options)
    return generator


def rewrite(folder: Path, **changes: Any) -> None:
    """Change fields of model.json; a dotted key reaches inside, None removes."""
    path = folder / "model.json"
    value = json.loads(path.read_text())
    for key, change in changes.items():
        *parents, last = key.split("__")
        inner = value
        for parent in parents:
            inner = inner[parent]
        if change is None:
            del inner[last]
        else:
            inner[last] = change
    path.write_text(json.dumps(value))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_saved_model_gives_the_same_picture(tmp_path: Path) -> None:
    generator = save_unet(tmp_path / "model").eval()
    loaded = load_model(tmp_path / "model")
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(loaded.generator(x), generator(x))
    assert loaded.manifest.architecture == UNET
    assert loaded.manifest.inputs == IMAGES
    assert not loaded.generator.training


def test_every_part_of_a_coarse_to_fine_model_comes_back(tmp_path: Path) -> None:
    generator = build_generator(HD, LABELS, enhancers=0, seed=1)  # the global phase: no enhancer yet
    discriminator = build_discriminator(HD, LABELS, discriminators=2, seed=1)
    encoder = build_encoder(HD, LABELS, seed=1)
    assert encoder is not None
    styles = Styles(centers=torch.rand(5, 2, 3), counts=torch.ones(5, 2, dtype=torch.int64))
    preprocessing = Preprocessing(
        size=(64, 32),
        pictures={
            "source": Picture(kind="labels", classes=5, ignore_label=255, palette=(0, (1, 2, 3))),
            "target": Picture(kind="grey16", range=(0, 4095)),
        },
    )
    manifest = save_model(
        tmp_path,
        generator,
        architecture=HD,
        inputs=LABELS,
        preprocessing=preprocessing,
        discriminator=discriminator,
        encoder=encoder,
        styles=styles,
        extra={"phase": "global", "epoch": 8},
    )
    assert read_manifest(tmp_path) == manifest
    loaded = load_model(tmp_path)
    assert loaded.manifest == manifest
    assert loaded.encoder is not None
    assert loaded.styles is not None
    assert torch.equal(loaded.styles.centers, styles.centers)
    again = load_discriminator(tmp_path)
    for module, other in ((generator, loaded.generator), (encoder, loaded.encoder), (discriminator, again)):
        for (name, a), (_, b) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_the_average_is_saved_beside_the_raw_weights(tmp_path: Path) -> None:
    generator = build_generator(UNET, IMAGES)
    ema = {name: p.detach() * 0.5 for name, p in generator.named_parameters() if "encoder" in name}
    save_model(tmp_path, generator, architecture=UNET, inputs=IMAGES, ema=ema)
    averaged, raw = load_model(tmp_path), load_model(tmp_path, weights="raw")
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    assert averaged.fingerprint == raw.fingerprint  # of the folder: both are in it
    name = "encoder.0.conv.weight"
    assert torch.equal(averaged.generator.get_parameter(name), ema[name])
    assert torch.equal(raw.generator.get_parameter(name), generator.get_parameter(name))
    frozen = "decoder.0.conv.weight"  # not averaged: as it is in the generator
    assert torch.equal(averaged.generator.get_parameter(frozen), generator.get_parameter(frozen))


def test_without_an_average_the_raw_weights_are_taken_and_named(tmp_path: Path) -> None:
    save_unet(tmp_path)
    assert load_model(tmp_path, weights="ema").weights == "raw"


def test_the_same_model_has_the_same_bytes_and_fingerprint(tmp_path: Path) -> None:
    save_unet(tmp_path / "a")
    save_unet(tmp_path / "b")
    assert load_model(tmp_path / "a").fingerprint == load_model(tmp_path / "b").fingerprint
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == (
        tmp_path / "b" / "weights.safetensors"
    ).read_bytes()
    save_unet(tmp_path / "b", extra={"epoch": 2})
    assert load_model(tmp_path / "a").fingerprint != load_model(tmp_path / "b").fingerprint


def test_channels_last_weights_are_saved_like_any(tmp_path: Path) -> None:
    generator = build_generator(UNET, IMAGES).to(memory_format=torch.channels_last)
    save_model(tmp_path, generator, architecture=UNET, inputs=IMAGES)
    for name, tensor in load_model(tmp_path).generator.state_dict().items():
        assert torch.equal(tensor, generator.state_dict()[name]), name


def test_saving_over_a_model_replaces_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_unet(tmp_path, ema={})
    save_unet(tmp_path)
    assert load_model(tmp_path).weights == "raw"
    assert not list(tmp_path.glob(".*"))


def test_a_generator_of_another_architecture_is_not_saved(tmp_path: Path) -> None:
    generator = build_generator(UNET, IMAGES)
    with pytest.raises(
        ValueError, match=r"encoder\.0\.conv\.weight is \[4, 3, 4, 4\], the architecture says"
    ):
        save_model(tmp_path, generator, architecture=UNET, inputs=InputSpec(channels=1))
    with pytest.raises(ValueError, match="which the generator lacks"):
        save_model(tmp_path, generator, architecture=UNET, inputs=IMAGES, ema={"module.x": torch.zeros(1)})
    assert not (tmp_path / "model.json").exists()


def test_a_folder_without_model_json_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a model folder")
    save_unet(tmp_path)
    (tmp_path / "model.json").unlink()
    refused(tmp_path, "not a model folder")


def test_truncated_and_altered_weights_are_refused(tmp_path: Path) -> None:
    save_unet(tmp_path)
    path = tmp_path / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    refused(tmp_path, "truncated")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(tmp_path, "SHA-256")
    path.unlink()
    refused(tmp_path, "missing, though model.json lists it")


def test_another_networks_tensors_are_refused_even_with_the_right_checksum(tmp_path: Path) -> None:
    save_unet(tmp_path)
    rewrite(tmp_path, architecture__width=8)
    refused(tmp_path, "the architecture says")
    rewrite(tmp_path, architecture__width=4, architecture__levels=4)
    refused(tmp_path, "is missing, which the architecture has|the architecture says")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"surprise": 1}, "surprise"),
        ({"architecture__surprise": 1}, "surprise"),
        ({"files__passwd": {"size": 8, "sha256": "0" * 64}}, "files.passwd"),
        ({"files__../../etc/passwd": {"size": 8, "sha256": "0" * 64}}, "files"),
        ({"format": "other"}, "format"),
        ({"version": 2}, "version"),
        ({"architecture__width": 10**30}, "architecture.*width"),
        ({"architecture__width": 10**9}, "architecture.*width"),
        ({"inputs__channels": 10**12}, "weights.safetensors"),
        ({"enhancers": 10**9}, "enhancers"),
        ({"files__weights.safetensors": None}, "weights.safetensors is missing"),
        ({"files__weights.safetensors__size": 10**15}, "size"),
        ({"architecture": {"kind": "pix2pixhd", "blocks": 10**9}}, "architecture.*blocks"),
        ({"architecture": {"kind": "os.system"}}, "architecture"),
        ({"extra": {"a": {"b": 1}}}, "extra"),
    ],
)
def test_a_hostile_manifest_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    save_unet(tmp_path)
    rewrite(tmp_path, **changes)
    refused(tmp_path, match)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"x" * (2 << 20)])
def test_a_manifest_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    save_unet(tmp_path)
    (tmp_path / "model.json").write_bytes(text)
    refused(tmp_path, r"model\.json")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_unet(folder)
    (folder / "weights.safetensors").rename(tmp_path / "elsewhere")
    (folder / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(folder, "leads out of its folder")


def test_weights_that_are_no_safetensors_or_of_another_type_are_refused(tmp_path: Path) -> None:
    import hashlib

    save_unet(tmp_path)
    path = tmp_path / "weights.safetensors"
    tensors = load(path.read_bytes())  # a copy: load_file maps the file that is overwritten below

    def replace(data: bytes) -> None:
        path.write_bytes(data)
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        rewrite(tmp_path, **{"files__weights.safetensors": entry})

    replace((1 << 62).to_bytes(8, "little") + b"{}" * 50)  # a header longer than the file
    refused(tmp_path, "not a safetensors file")
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    replace(path.read_bytes())
    refused(tmp_path, "is F64, not F32 or I64")


def test_styles_of_the_wrong_form_are_refused(tmp_path: Path) -> None:
    import hashlib

    save_unet(tmp_path, styles=Styles(centers=torch.rand(2, 2, 3), counts=torch.ones(2, 2).long()))
    save_file({"centers": torch.zeros(1)}, tmp_path / "styles.safetensors")
    data = (tmp_path / "styles.safetensors").read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(tmp_path, **{"files__styles.safetensors": entry})
    refused(tmp_path, "styles are the tensors")


def test_a_model_without_a_discriminator_says_so(tmp_path: Path) -> None:
    save_unet(tmp_path)
    with pytest.raises(ValueError, match="saved without its discriminator"):
        load_discriminator(tmp_path)


def test_the_manifest_reads_back_as_written(tmp_path: Path) -> None:
    save_unet(tmp_path)
    text = (tmp_path / "model.json").read_text()
    assert Manifest.model_validate_json(text) == read_manifest(tmp_path)
    assert json.loads(text)["format"] == "pixloom-model"
