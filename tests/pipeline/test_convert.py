"""The command that brings models in and out: what it writes, what it says, how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline import convert
from stages import storage
from stages.inference.translator import Translator
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_generator
from stages.models.files import saved
from stages.models.files.nvidia_names import layer_names, renamed
from stages.models.files.saved import load_discriminator, load_model, save_model

UNET = Pix2Pix(levels=3, width=4, dropout="common", discriminator_width=4)
HD = Pix2PixHD(enhancers=0, width=4, downsamplings=1, blocks=1, discriminators=2, discriminator_width=4)
LABELS = InputSpec(source="labels", classes=5, instances=True)


def published(network: torch.nn.Module) -> dict[str, Tensor]:
    return renamed(network.state_dict(), layer_names(network))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(published(build_generator(HD, LABELS, seed=5)), tmp_path / "latest_net_G.pth")
    torch.save(published(build_discriminator(HD, LABELS, seed=5)), tmp_path / "latest_net_D.pth")
    return tmp_path / "latest_net_G.pth"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_model(folder, build_generator(UNET, InputSpec(), seed=5), architecture=UNET, inputs=InputSpec())
    return folder


@pytest.fixture
def bucket() -> Iterator[str]:
    """A store that is no local disk."""
    fs = fsspec.filesystem("memory")
    fs.makedirs("/bucket", exist_ok=True)
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def ends(capsys: pytest.CaptureFixture[str], code: int, said: str, *arguments: Any) -> None:
    """The command ends with this code and one line on stderr that holds `said`."""
    assert convert.main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_import_writes_a_model_folder_and_says_what_it_assumed(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = checkpoint.with_name("latest_net_D.pth")
    output = tmp_path / "street"
    arguments = ["import", "--generator", checkpoint, "--discriminator", judge, "--output", output]
    assert convert.main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr().out
    assert "pix2pixhd: enhancers 0, width 4" in said
    assert "source labels, channels 3, classes 5, instances True" in said
    assert "note: " in said
    loaded = load_model(output)
    assert loaded.manifest.inputs == LABELS
    assert loaded.manifest.preprocessing.pictures["source"].kind == "labels"
    assert loaded.manifest.extra == {"imported_from": "latest_net_G.pth"}
    x = torch.rand(1, 6, 16, 16)
    assert torch.equal(loaded.generator(x), build_generator(HD, LABELS, seed=5).eval()(x))
    assert len(load_discriminator(output).scales) == 2  # type: ignore[union-attr, arg-type]


def test_locations_may_be_in_a_bucket(
    checkpoint: Path, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_bytes(f"{bucket}/G.pth", checkpoint.read_bytes())
    arguments = ["import", "--generator", f"{bucket}/G.pth", "--output", f"{bucket}/street"]
    assert convert.main(arguments) == 0
    assert storage.list_names(f"{bucket}/street") == ["model.json", "weights.safetensors"]
    ends(capsys, 2, "--overwrite replaces it", *arguments)
    assert convert.main([*arguments, "--overwrite", "--no-instances"]) == 0
    assert storage.read_json(f"{bucket}/street/model.json")["inputs"]["classes"] == 6
    exported = [
        *("export", "--model", f"{bucket}/street", "--format", "torch_export", "--size", "2x2"),
        *("--output", f"{bucket}/street.pt2"),
    ]
    assert convert.main(exported) == 0
    assert storage.exists(f"{bucket}/street.pt2")


def test_published_colorization_weights_are_lightness_to_colour(tmp_path: Path) -> None:
    inputs = InputSpec(channels=1, target_channels=2)
    torch.save(published(build_generator(UNET, inputs)), tmp_path / "G.pth")
    arguments = ["import", "--generator", tmp_path / "G.pth", "--output", tmp_path / "model"]
    assert convert.main([str(argument) for argument in arguments]) == 0
    pictures = load_model(tmp_path / "model").manifest.preprocessing.pictures
    assert {role: picture.kind for role, picture in pictures.items()} == {
        "source": "lab_l",
        "target": "lab_ab",
    }


def test_files_that_cannot_be_imported_are_named_and_nothing_is_written(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "victim",)

    output = tmp_path / "model"
    evil = tmp_path / "evil.pth"
    torch.save({"model.1.weight": Malice()}, evil)
    ends(
        capsys, 2, f"--generator: {evil}: holds more than", "import", "--generator", evil, "--output", output
    )
    assert not (tmp_path / "victim").exists()
    absent = tmp_path / "absent.pth"
    ends(
        capsys,
        2,
        f"{absent}: there is no such bucket, folder or file",
        "import",
        "--generator",
        absent,
        "--output",
        output,
    )
    ends(
        capsys,
        2,
        "--discriminator: memory://nowhere/D.pth",
        *(
            "import",
            "--generator",
            checkpoint,
            "--discriminator",
            "memory://nowhere/D.pth",
            "--output",
            output,
        ),
    )
    ends(
        capsys,
        2,
        "cannot be 9 classes",
        *("import", "--generator", checkpoint, "--classes", 9, "--output", output),
    )
    assert not output.exists()


@pytest.mark.parametrize("form", ["onnx", "torch_export"])
def test_an_exported_file_gives_the_picture_that_inference_gives(
    tmp_path: Path, model: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "model.bin"
    arguments = ["export", "--model", model, "--format", form, "--size", "7x8", "--output", output]
    assert convert.main([str(argument) for argument in arguments]) == 0
    assert "any batch, 7x8 only; largest difference" in capsys.readouterr().out
    run = convert.FORMATS[form][1](output.read_bytes())
    picture = np.random.default_rng(0).integers(0, 256, (8, 7, 3), dtype=np.uint8)
    loaded = load_model(model)
    source = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    image = ((run({"source": source.contiguous()}).detach() + 1) * 127.5).round()[0].permute(1, 2, 0)
    (expected,) = Translator(loaded).translate([picture])
    assert np.abs(image.numpy() - expected.astype(int)).max() <= 1


def test_an_export_that_fails_its_check_is_not_written(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        convert.FORMATS,
        "torch_export",
        (lambda _: b"x", lambda _: lambda values: torch.zeros_like(values["source"]) + 2),
    )
    output = tmp_path / "model.pt2"
    arguments = ("export", "--model", model, "--format", "torch_export", "--size", "8x8", "--output", output)
    ends(capsys, 1, "nothing was written", *arguments)
    assert not output.exists()


def test_an_export_into_a_folder_is_refused_before_the_work(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "weights.safetensors").write_bytes(b"damaged, and not looked at")
    for output in (tmp_path, f"{tmp_path}/new/"):
        arguments = ("--model", model, "--format", "onnx", "--size", "8x8", "--output", output)
        ends(capsys, 2, f"--output: {output} is a folder; name the file to write", "export", *arguments)


def test_a_folder_that_is_no_model_is_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    rest = ("--format", "onnx", "--size", "8x8", "--output", tmp_path / "x.onnx")
    ends(capsys, 2, f"--model: {nowhere}: there is no model.json", "export", "--model", nowhere, *rest)
    (model / "weights.safetensors").write_bytes(b"short")
    ends(capsys, 2, "weights.safetensors: 5 bytes", "export", "--model", model, *rest)


def test_a_full_disk_ends_an_import_in_a_line(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(saved, "save_file", full)
    ends(capsys, 2, "No space left", "import", "--generator", checkpoint, "--output", tmp_path / "m")


def test_a_size_beyond_the_memory_ends_in_a_line(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.empty(1 << 60))
    where = (
        "--model",
        model,
        "--format",
        "torch_export",
        "--size",
        "99999x99999",
        "--output",
        tmp_path / "o",
    )
    ends(capsys, 1, "allocate memory", "export", *where)


@pytest.mark.parametrize("size", ["8", "0x8", "8x", "axb", "999999x1"])
def test_a_size_that_is_none_is_refused_by_the_parser(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        convert.main(["export", "--model", "m", "--format", "onnx", "--output", "x", "--size", size])
    assert ended.value.code == 2
    assert "is not WIDTHxHEIGHT" in capsys.readouterr().err


def test_the_help_page_shows_commands_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["import", "--help"], ["export", "--help"]):
        with pytest.raises(SystemExit) as ended:
            convert.main(words)
        assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "exit codes:" in said
    assert "--no-instances" in said
