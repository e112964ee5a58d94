"""Training that starts from a model that is already there: the same networks, or one line why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.errors import StageError, UserError
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files.saved import save_model
from stages.models.gan import GanState
from stages.training.loop import build
from stages.training.start import check_start, start_from

HD = Pix2PixHD(
    width=2,
    downsamplings=1,
    blocks=1,
    enhancer_blocks=1,
    discriminators=2,
    discriminator_width=2,
    discriminator_layers=1,
)
INSTANCES = InputSpec(source="labels", classes=3, instances=True)
UNET = Pix2Pix(levels=2, width=2, discriminator_width=2, discriminator_layers=1)
GLOBAL = {"kind": "global", "epochs": 1, "discriminators": 1}
LOCAL = {"kind": "local", "enhancers": 1, "epochs": 1}
JOINT = {"kind": "joint", "enhancers": 1, "epochs": 1}
WHOLE = {"kind": "whole", "epochs": 1}


def job(folder: Path, model: Pix2Pix | Pix2PixHD, *phases: dict[str, Any], **changes: Any) -> PhaseJob:
    named = [{"name": phase["kind"], **phase} for phase in phases]
    values = {"model": model.model_dump(), "phases": named, "start_from": str(folder), **changes}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())[0]


def saved(
    folder: Path, model: Pix2Pix | Pix2PixHD, *, enhancers: int | None = None, scales: int | None = None
) -> dict[str, Tensor]:
    """Save a model with weights of another seed; returns the generator's. scales=0: no discriminator."""
    generator = build_generator(model, InputSpec(), enhancers=enhancers, seed=9)
    discriminator = (
        None if scales == 0 else build_discriminator(model, InputSpec(), discriminators=scales, seed=9)
    )
    save_model(
        folder / "model", generator, architecture=model, inputs=InputSpec(), discriminator=discriminator
    )
    return generator.state_dict()


def started(config: PhaseJob, said: list[str]) -> GanState:
    device = torch.device("cpu")
    gan = build(config, InputSpec(), device, "float32")
    assert config.start_from is not None
    start_from(gan, config.start_from, device, said.append)
    return gan


@pytest.mark.parametrize(
    ("model", "phase", "parts"),
    [(UNET, WHOLE, {}), (HD, GLOBAL, {"enhancers": 0, "scales": 1}), (HD, JOINT, {"enhancers": 1})],
)
def test_a_phase_starts_with_the_models_weights(
    tmp_path: Path, model: Pix2Pix | Pix2PixHD, phase: dict[str, Any], parts: dict[str, int]
) -> None:
    weights = saved(tmp_path, model, **parts)
    first = [phase] if phase is not GLOBAL else [GLOBAL, LOCAL, JOINT]
    said: list[str] = []
    gan = started(job(tmp_path, model, *first, ema=0.9), said)
    assert not said
    assert all(weights[name].equal(value) for name, value in gan.generator.state_dict().items())
    assert gan.ema is not None
    assert all(weights[name].equal(value) for name, value in gan.ema.network.state_dict().items())
    judge = build_discriminator(model, InputSpec(), discriminators=parts.get("scales"), seed=9).state_dict()
    assert gan.discriminator is not None
    assert all(judge[name].equal(value) for name, value in gan.discriminator.state_dict().items())


def test_a_global_model_can_be_refined_alone(tmp_path: Path) -> None:
    weights = saved(tmp_path, HD, enhancers=0, scales=1)
    config = job(tmp_path, HD, LOCAL, JOINT)
    check_start(config)
    coarse = started(config, []).generator.coarse.state_dict()
    assert all(weights[f"coarse.{name}"].equal(value) for name, value in coarse.items())


def test_a_model_without_a_discriminator_gets_a_new_one_and_it_is_said(tmp_path: Path) -> None:
    weights = saved(tmp_path, UNET, scales=0)
    config = job(tmp_path, UNET, WHOLE)
    check_start(config)
    said: list[str] = []
    gan = started(config, said)
    assert said == [f"{tmp_path} has no discriminator: training starts with a new one"]
    assert all(weights[name].equal(value) for name, value in gan.generator.state_dict().items())


@pytest.mark.parametrize(
    ("model", "parts", "ours", "phases", "says"),
    [
        (UNET, {}, HD, [GLOBAL, JOINT], "the model is pix2pix, train.model.kind is pix2pixhd"),
        (
            HD,
            {"scales": 1},
            HD,
            [GLOBAL, JOINT],
            "the model has 1 enhancers, the phase 'global' starts from 0",
        ),
        (HD, {"scales": 1}, HD, [LOCAL], "the model has 1 enhancers, the phase 'local' starts from 0"),
        (
            HD.model_copy(update={"discriminators": 3}),
            {},
            HD,
            [JOINT],
            "the model has 3 discriminators, the phase 'joint' has 2",
        ),
        (
            UNET.model_copy(update={"width": 4, "dropout": "none"}),
            {},
            UNET,
            [WHOLE],
            "its networks have other shapes: width is 4, not 2, dropout is none, not paper",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_training(
    tmp_path: Path,
    model: Pix2Pix | Pix2PixHD,
    parts: dict[str, int],
    ours: Pix2Pix | Pix2PixHD,
    phases: list[dict[str, Any]],
    says: str,
) -> None:
    saved(tmp_path, model, **parts)
    with pytest.raises(UserError) as caught:
        check_start(job(tmp_path, ours, *phases))
    assert str(caught.value) == f"train.start_from: {tmp_path}: {says}"


@pytest.mark.parametrize("theirs", [{"feature_width": 4}, {"feature_encoder": False}])
def test_a_model_with_another_feature_encoder_is_refused(tmp_path: Path, theirs: dict[str, Any]) -> None:
    ours, inputs = HD.model_copy(update={"feature_encoder": True, "feature_width": 2}), INSTANCES
    other = ours.model_copy(update=theirs)
    generator, encoder = build_generator(other, inputs, enhancers=0), build_encoder(other, inputs)
    folder = tmp_path / "model"
    save_model(folder, generator, architecture=other, inputs=inputs, encoder=encoder)
    name, value = next(iter(theirs.items()))
    with pytest.raises(UserError, match=f"other shapes: {name} is {value}, not "):
        check_start(job(tmp_path, ours, GLOBAL, LOCAL, JOINT), inputs)


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, UNET)
    with pytest.raises(UserError, match=r"other shapes: channels is 3, not 1"):
        check_start(job(tmp_path, UNET, WHOLE), InputSpec(channels=1))


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    config = job(tmp_path, UNET, WHOLE)
    with pytest.raises(UserError, match=r"^train\.start_from: .*: there is no model\.json, so this is no m"):
        check_start(config)
    with pytest.raises(
        UserError, match=r"name a folder; first: mlflow artifacts download .* models:/street/1"
    ):
        check_start(config.model_copy(update={"start_from": "models:/street/1"}))
    saved(tmp_path, UNET)
    manifest = tmp_path / "model" / "model.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(whole), "format": "other"}))
    with pytest.raises(UserError, match=r"^train\.start_from: .*: model\.json: format: "):
        check_start(config)
    manifest.write_text(whole)
    weights = tmp_path / "model" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(StageError, match=r"the model to start from is damaged: .*weights\.safetensors"):
        started(config, [])


def test_another_model_is_another_start(tmp_path: Path) -> None:
    saved(tmp_path, UNET)
    config = job(tmp_path, UNET, WHOLE)
    first = check_start(config)
    saved(tmp_path, UNET, scales=0)
    assert check_start(config) != first
