"""A model as a function of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.images import decode, encode
from stages.images.kinds import ImageRejected
from stages.inference.translator import Translator, noise_seed
from stages.models.architecture import Picture, Preprocessing
from stages.models.files.export import ExportedTranslator
from stages.models.files.saved import LoadedModel, load_model
from tests.support.models import make_model, scene


def labels(width: int, height: int, index: int = 0) -> np.ndarray:
    return scene(index, width, height)["source"]


def test_the_picture_has_the_size_of_its_source_whatever_the_network_takes(tmp_path: Path) -> None:
    translator = Translator(load_model(make_model(tmp_path)))
    for width, height in ((32, 32), (33, 47), (5, 100), (1, 1)):
        (out,) = translator.translate([np.zeros((height, width, 1), np.uint8)])
        assert out.shape == (height, width, 3)
        assert out.dtype == np.uint8


def test_a_size_that_needs_no_padding_gets_the_networks_own_output(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path))
    source = labels(32, 32)
    (out,) = Translator(model).translate([source])
    condition = torch.nn.functional.one_hot(torch.from_numpy(source[..., 0]).long(), 4).permute(2, 0, 1)[None]
    expected = model.generator(condition.float())[0].permute(1, 2, 0)
    assert np.abs(out - ((expected.detach().numpy() + 1) * 127.5)).max() <= 0.5 + 1e-3


def test_a_batch_gives_what_its_pictures_give_alone(tmp_path: Path) -> None:
    translator = Translator(load_model(make_model(tmp_path)))
    sources = [labels(32, 32, index) for index in range(3)]
    together = translator.translate(sources)
    for source, out in zip(sources, together, strict=True):
        assert np.abs(translator.translate([source])[0].astype(int) - out).max() <= 1


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_noise_depends_on_the_seed_alone(tmp_path: Path, norm: str) -> None:
    model = load_model(make_model(tmp_path, dropout=True, norm=norm))
    before = {
        name: value.clone() for name, value in model.generator.state_dict().items() if "num" not in name
    }
    translator = Translator(model, stochastic=True)
    source, other = labels(64, 64), labels(64, 64, 1)
    alone = translator.translate([source], seeds=[5])[0]
    in_batch = translator.translate([other, source], seeds=[9, 5])[1]
    assert np.array_equal(alone, in_batch)
    assert not np.array_equal(alone, translator.translate([source], seeds=[6])[0])
    assert all(torch.equal(model.generator.state_dict()[name], value) for name, value in before.items())


def with_source(model: LoadedModel, changes: dict[str, object]) -> LoadedModel:
    """The model, as if its sources had been read so."""
    how: Picture = model.manifest.preprocessing.pictures["source"].model_copy(update=changes)
    preprocessing = Preprocessing(pictures={"source": how})
    return replace(model, manifest=model.manifest.model_copy(update={"preprocessing": preprocessing}))


def test_a_model_reads_ignored_labels_as_in_training_wherever_it_is_used(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, source="labels"))
    trained = with_source(model, {"ignore_label": 255, "void_class": 1})
    void = labels(64, 64)
    void[:20, :30] = 1
    unlabelled = void.copy()
    unlabelled[:20, :30] = 255
    (expected,) = Translator(model).translate([void])
    (image,) = Translator(trained).translate([unlabelled])
    assert np.array_equal(image, expected)
    with pytest.raises(ImageRejected, match="id 255, classes are"):
        Translator(model).translate([unlabelled])
    source = torch.from_numpy(unlabelled).permute(2, 0, 1)[None].long()
    plain = torch.from_numpy(void).permute(2, 0, 1)[None].long()
    with torch.no_grad():
        assert torch.equal(ExportedTranslator(trained)(source), ExportedTranslator(model)(plain))


def test_a_model_reads_the_colours_it_was_trained_on_wherever_it_is_used(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path, source="labels"))
    palette = ((0, 0, 0), 255, (200, 10, 10), (0, 0, 90))
    trained = with_source(model, {"palette": palette})
    ids = labels(64, 64)
    colours = np.array([(c, c, c) if isinstance(c, int) else c for c in palette], np.uint8)[ids[:, :, 0]]
    (expected,) = Translator(model).translate([ids])
    translator = Translator(trained)
    read = decode.decode_image(
        encode.encode_png(colours), translator.source
    )  # as infer and the served model do
    for source in (read, colours):
        assert np.array_equal(translator.translate([source])[0], expected)
    network, plain = ExportedTranslator(trained), ExportedTranslator(model)
    with torch.no_grad():
        generated = network(torch.from_numpy(colours).permute(2, 0, 1)[None])
        assert torch.equal(generated, plain(torch.from_numpy(ids).permute(2, 0, 1)[None]))


def test_seeds_differ_by_seed_key_and_sample() -> None:
    seeds = {noise_seed(s, k, n) for s in (0, 1) for k in ("a", "b", "0") for n in (0, 1)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(0, "a\udc80") != noise_seed(0, "a")


def far_apart(picture: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(picture.astype(int) - other).max())


@pytest.mark.parametrize(("width", "height"), [(150, 90), (40, 333)])
def test_a_tiled_picture_is_the_whole_picture(tmp_path: Path, width: int, height: int) -> None:
    model = load_model(make_model(tmp_path))
    source = labels(width, height)
    whole, tiled = (Translator(model, tile=tile).translate([source])[0] for tile in (None, 4))
    assert far_apart(whole, tiled) <= 1
    assert np.ptp(whole) > 50


def test_tiled_pictures_have_the_noise_edges_and_styles_of_whole_ones(tmp_path: Path) -> None:
    noisy = load_model(make_model(tmp_path / "noisy", dropout=True, norm="batch"))
    source, other = labels(70, 90), labels(70, 90, 1)
    whole, tiled = (
        Translator(noisy, stochastic=True, tile=tile).translate([source, other], seeds=[3, 4])
        for tile in (None, 4)
    )
    assert all(far_apart(one, same) <= 1 for one, same in zip(whole, tiled, strict=True))
    styled = load_model(make_model(tmp_path / "styled", styles=True))
    instances = [scene(index, 70, 90)["instance"] for index in (0, 1)]
    whole, tiled = (
        Translator(styled, tile=tile).translate([source, other], instances, seeds=[5, 6])
        for tile in (None, 4)
    )
    assert all(far_apart(one, same) <= 1 for one, same in zip(whole, tiled, strict=True))


def test_styles_are_drawn_chosen_or_taken_from_a_reference(tmp_path: Path) -> None:
    translator = Translator(load_model(make_model(tmp_path, styles=True)))
    drawn = scene(0, 32, 32)
    source, instance = drawn["source"], drawn["instance"]
    assert translator.needs_instances
    with pytest.raises(ValueError, match="not of its source's size, "):
        translator.translate([source], [instance[:-1]])
    with pytest.raises(ValueError, match="instance map"):
        translator.translate([source])

    def out(**options: object) -> np.ndarray:
        return translator.translate([source], [instance], **options)[0]

    assert np.array_equal(out(seeds=[1]), out(seeds=[1]))
    assert not np.array_equal(out(style="cluster", cluster=0), out(style="cluster", cluster=1))
    for width, height in ((48, 32), (49, 35)):  # an encoder's multiple, and not
        other = scene(1, width, height)
        reference = (other["target"], other["instance"], other["source"])
        assert out(style="reference", reference=reference).shape == (32, 32, 3)
