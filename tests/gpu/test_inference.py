"""Generating on a GPU gives the images of a CPU, whatever the batch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from stages.inference.translator import Translator
from stages.models.fast.process import set_tf32
from stages.models.files.saved import load_model
from tests.support.models import make_model, scene

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Without TF32, which the comparison with a CPU would have to allow for."""
    set_tf32(False)
    yield
    set_tf32(True)


def images(translator: Translator, count: int = 3, **options: Any) -> list[np.ndarray]:
    drawn = [scene(index, 48, 40) for index in range(count)]
    instances = [one["instance"] for one in drawn] if translator.needs_instances else None
    return translator.translate([one["source"] for one in drawn], instances, **options)


@pytest.mark.parametrize(("precision", "most"), [("float32", 1), ("bf16", 24)], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", ["unet", "batch-norm", "stochastic", "styles"])
def test_images_are_those_of_a_cpu(
    device: torch.device, tmp_path: Path, kind: str, precision: Literal["float32", "bf16"], most: int
) -> None:
    stochastic = kind == "stochastic"
    folder = make_model(
        tmp_path,
        styles=kind == "styles",
        dropout=stochastic,
        norm="batch" if kind in ("batch-norm", "stochastic") else "instance",
    )
    model = load_model(folder)
    seeds = [1, 2, 3]
    expected = images(Translator(model, stochastic=stochastic), seeds=seeds)
    on_gpu = Translator(load_model(folder, device=device), precision=precision, stochastic=stochastic)
    got = images(on_gpu, seeds=seeds)
    for one, other in zip(got, expected, strict=True):
        difference = np.abs(one.astype(np.int16) - other.astype(np.int16))
        assert difference.mean() < most
        assert np.quantile(difference, 0.99) <= 2 * most


@pytest.mark.parametrize("options", [{}, {"tile": 8}], ids=["whole", "tiled"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["plain", "stochastic"])
def test_generating_waits_for_its_images_alone(
    device: torch.device, tmp_path: Path, stochastic: bool, options: dict[str, int]
) -> None:
    """For an event after their copy; no other copy, nor an operator, has the host wait."""
    model = load_model(make_model(tmp_path, dropout=stochastic), device=device)
    translator = Translator(model, stochastic=stochastic, **options)
    expected = images(translator, seeds=[1, 2, 3])  # indices of padding are made once
    torch.cuda.set_sync_debug_mode("error")
    got = images(translator, seeds=[1, 2, 3])
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one.astype(np.int16) - other.astype(np.int16)).max() <= 1


def test_threads_with_a_stream_each_generate_side_by_side(device: torch.device, tmp_path: Path) -> None:
    """As batch inference does it: the images are those of one thread."""
    translator = Translator(load_model(make_model(tmp_path), device=device))
    sources = [[scene(index, 48, 40)["source"]] for index in range(12)]
    expected = [translator.translate(source)[0] for source in sources]

    def begin() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.Stream())

    with ThreadPoolExecutor(2, initializer=begin) as threads:
        got = list(threads.map(lambda source: translator.translate(source)[0], sources))
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one.astype(np.int16) - other.astype(np.int16)).max() <= 1


def test_a_compiled_generator_gives_the_same_images(cuda: torch.device, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    plain, compiled = (Translator(load_model(folder, device=cuda), compiled=c) for c in (False, True))
    for one, other in zip(images(compiled), images(plain), strict=True):
        assert np.abs(one.astype(np.int16) - other.astype(np.int16)).mean() < 1


def test_an_image_does_not_depend_on_its_batch(device: torch.device, tmp_path: Path) -> None:
    """To a rounding: another batch may choose another kernel."""
    model = load_model(make_model(tmp_path, norm="batch"), device=device)
    translator = Translator(model)
    together = images(translator)
    alone = [translator.translate([scene(index, 48, 40)["source"]])[0] for index in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.astype(np.int16) - other.astype(np.int16)).max() <= 1
