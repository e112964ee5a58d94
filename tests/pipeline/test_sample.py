"""Sample scenes: deterministic, consistent between their layers, learnable, laid out as Cityscapes is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import sample


def test_a_scene_is_a_function_of_seed_and_number() -> None:
    one, same = sample.draw(3, 5, 128, 64), sample.draw(3, 5, 128, 64)
    other, another = sample.draw(3, 6, 128, 64), sample.draw(4, 5, 128, 64)
    assert (one.photo == same.photo).all()
    assert (one.instance == same.instance).all()
    assert (one.label != other.label).any()
    assert (one.label != another.label).any()


def test_instances_agree_with_labels() -> None:
    scene = sample.draw(0, 0, 256, 128)
    things = scene.instance >= 1000
    assert (scene.instance[things] // 1000 == scene.label[things]).all()
    assert (scene.instance[~things] == scene.label[~things]).all()
    assert {sample.CAR, sample.PERSON} <= set(np.unique(scene.label[things]).tolist())


def test_a_class_has_its_look() -> None:
    """The photo follows from the label map: sky is bluer than road in every scene."""
    for number in range(8):
        scene = sample.draw(0, number, 128, 64)
        sky, road = (scene.photo[scene.label == klass].mean(0) for klass in (sample.SKY, sample.ROAD))
        assert sky[2] > road[2] + 60


def test_files_are_written_as_cityscapes_has_them(tmp_path: Path) -> None:
    assert sample.main([str(tmp_path / "s"), "--pairs", "3", "--size", "96x64", "--seed", "1"]) == 0
    for layer, mode in {"photo": "RGB", "label": "L", "instance": "I;16"}.items():
        files = sorted((tmp_path / "s" / layer).glob("*.png"))
        assert len(files) == 3
        with Image.open(files[0]) as image:
            assert (image.mode, image.size) == (mode, (96, 64))


def test_a_second_call_adds_what_is_missing_and_leaves_the_rest(tmp_path: Path) -> None:
    sample.write(str(tmp_path), pairs=2, width=64, height=32, seed=0)
    before = (tmp_path / "photo" / "scene_00000.png").stat().st_mtime_ns
    sample.write(str(tmp_path), pairs=3, width=64, height=32, seed=0)
    assert (tmp_path / "photo" / "scene_00000.png").stat().st_mtime_ns == before
    assert len(list((tmp_path / "instance").iterdir())) == 3


@pytest.mark.parametrize("size", ["256", "0x10", "axb", "100000x64"])
def test_a_senseless_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sample.main(["nowhere", "--size", size])
    assert caught.value.code == 2
    assert "size" in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--seed", "1"], ["--size", "64x64"]])
def test_other_scenes_are_not_mixed_with_those_of_an_earlier_call(
    change: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path), "--pairs", "1", "--size", "64x32"]
    assert sample.main(words) == 0
    assert sample.main([*words, "--pairs", "2", *change]) == 2
    assert "holds scenes of another --seed or --size" in capsys.readouterr().err
    assert len(list((tmp_path / "photo").iterdir())) == 1


def test_a_negative_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sample.main(["nowhere", "--seed", "-1"])
    assert "'-1' is not a whole number of at least 0" in capsys.readouterr().err
