"""Exports give the model's own picture, at other sizes and batches than they were traced with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.models.architecture import Architecture, InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_generator
from stages.models.files.export import (
    Exported,
    ExportedTranslator,
    example,
    export_model,
    largest_difference,
    onnx_bytes,
    program_bytes,
)
from stages.models.files.saved import LoadedModel, load_model, save_model

UNET = Pix2Pix(levels=3, width=4)
HD = Pix2PixHD(enhancers=1, width=4, downsamplings=1, blocks=0, enhancer_blocks=0, feature_encoder=True)
LABELS = InputSpec(source="labels", classes=5, instances=True)


def saved(folder: Path, arch: Architecture, inputs: InputSpec) -> LoadedModel:
    generator = build_generator(arch, inputs, seed=3)
    for parameter in generator.parameters():
        parameter.data.mul_(8)  # as initialised, pictures are grey whatever goes in
    save_model(folder, generator, architecture=arch, inputs=inputs)
    return load_model(folder)


Run = Callable[[Mapping[str, Tensor]], Tensor]


def run_onnx(data: bytes) -> tuple[Run, Any]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(values: Mapping[str, Tensor]) -> Tensor:
        (image,) = session.run(["image"], {name: value.numpy() for name, value in values.items()})
        return torch.from_numpy(np.asarray(image))

    return run, session


def run_program(exported: Exported) -> Run:
    program = torch.export.load(io.BytesIO(program_bytes(exported)))
    module = program.module()
    return lambda values: module(**values)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((UNET, InputSpec()), id="pix2pix"),
        pytest.param((HD, LABELS), id="hd", marks=pytest.mark.slow),
    ],
)
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, Exported]:
    """A model of each paper and its trace: seconds each, so once for both formats."""
    model = saved(tmp_path_factory.mktemp("model"), *request.param)
    return model, export_model(model, width=20, height=12)


def test_onnx_gives_the_models_picture_at_any_size(traced: tuple[LoadedModel, Exported]) -> None:
    model, exported = traced
    assert exported.any_size
    run, session = run_onnx(onnx_bytes(exported))
    assert largest_difference(run, model, width=20, height=12, any_size=True) < 1e-3
    notice = json.loads(session.get_modelmeta().custom_metadata_map["pixloom"])
    assert notice["fingerprint"] == model.fingerprint
    assert [i.name for i in session.get_inputs()] == list(example(model, batch=1, width=9, height=9))


def test_a_torch_program_gives_the_models_picture_at_any_size(traced: tuple[LoadedModel, Exported]) -> None:
    model, exported = traced
    assert largest_difference(run_program(exported), model, width=20, height=12, any_size=True) < 1e-5


def test_a_size_below_the_networks_multiple_is_exported_as_that_size(tmp_path: Path) -> None:
    model = saved(tmp_path, UNET, InputSpec())
    exported = export_model(model, width=8, height=3)  # padded by reflecting more than once
    assert not exported.any_size
    assert largest_difference(run_program(exported), model, width=8, height=3, any_size=False) == 0


def test_both_ways_of_padding_give_the_same_picture(tmp_path: Path) -> None:
    model = saved(tmp_path, UNET, InputSpec(channels=1, target_channels=2))
    values = example(model, batch=1, width=17, height=9)
    plain, general = (ExportedTranslator(model, any_size=any_size)(**values) for any_size in (False, True))
    assert plain.shape == (1, 2, 9, 17)
    assert torch.equal(plain, general)


def test_an_export_that_differs_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path, UNET, InputSpec())
    network = ExportedTranslator(model)
    with pytest.raises(ValueError, match=r"differs by up to 0\.0100"):
        largest_difference(lambda values: network(**values) + 0.01, model, width=9, height=9, any_size=False)
    with pytest.raises(ValueError, match=r"the export gives \[1, 3, 8, 9\]"):
        largest_difference(
            lambda values: network(**values)[:, :, 1:], model, width=9, height=9, any_size=False
        )
    with pytest.raises(ValueError, match="differs by up to nan"):
        largest_difference(
            lambda values: network(**values) * float("nan"), model, width=9, height=9, any_size=False
        )
