"""Sample pictures: the same pairs each time, at the phase's size, without a trace in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.augment import AugmentConfig
from stages.dataset import DatasetSpec
from stages.models.architecture import InputSpec, Pix2PixHD
from stages.models.losses import LossWeights
from stages.models.step import Translator, build_translator
from stages.phases import PhaseJob, TrainConfig, jobs
from stages.previews import Samples
from tests.small import make_shards

GAP = 4
MODEL = Pix2PixHD(
    width=2, downsamplings=1, blocks=1, enhancer_blocks=1, discriminator_width=2, discriminators=2
)


def job(index: int, crop: tuple[int, int] | None = None) -> PhaseJob:
    return jobs(TrainConfig.model_validate({"model": MODEL}), AugmentConfig(crop=crop))[index]


def translator(given: PhaseJob, inputs: InputSpec, ema: float | None = None) -> Translator:
    return build_translator(
        MODEL, inputs, weights=LossWeights(), enhancers=given.phase.enhancers, ema_decay=ema
    )


def samples(folder: Path, spec: DatasetSpec, given: PhaseJob) -> Samples:
    return Samples(str(folder), spec, given, torch.device("cpu"))


LABELS = InputSpec(source="labels", classes=4, instances=True)


@pytest.mark.parametrize(("index", "size"), [(0, 16), (1, 32)])
def test_a_grid_has_a_pair_a_row_at_the_phases_size(tmp_path: Path, index: int, size: int) -> None:
    spec = make_shards(tmp_path, {"train": [4], "val": [3]}, instances=True)
    given = job(index)
    grid = samples(tmp_path, spec, given)(translator(given, LABELS))
    assert grid is not None
    assert grid.shape == (3 * (size + GAP) + GAP, 3 * (size + GAP) + GAP, 3)
    assert grid.dtype == np.uint8


def test_a_crop_takes_the_middle(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"val": [1]}, instances=True)
    pair = samples(tmp_path, spec, job(1, crop=(16, 16))).pairs()[0]
    whole = samples(tmp_path, spec, job(1)).pairs()[0]
    assert np.array_equal(pair["target"], whole["target"][8:24, 8:24])


def test_without_a_validation_split_other_pairs_are_shown(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"train": [2]}, instances=True)
    assert len(samples(tmp_path, spec, job(1)).pairs()) == 2


def test_drawing_leaves_no_trace_in_training(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"val": [2]}, instances=True)
    given = job(1)
    gan = translator(given, LABELS, ema=0.9)
    before = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    drawn = samples(tmp_path, spec, given)
    first, again = drawn(gan), drawn(gan)
    assert np.array_equal(first, again)
    assert gan.generator.training
    assert not gan.ema.network.training
    assert all(before[name].equal(value) for name, value in gan.generator.state_dict().items())
