"""Sample pictures: the same pairs each time, at the phase's size, without a trace in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.config.augment import AugmentConfig
from stages.config.evaluate import EvaluateConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.images import kinds
from stages.models.architecture import InputSpec, LossWeights, Pix2PixHD
from stages.models.gan import GanState, build_gan
from stages.scoring.efficientnet import PerceptualFeatures
from stages.scoring.lpips import LpipsScorer
from stages.scoring.metrics import frechet_distance_of, pixel_scores_of
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample
from stages.training import previews
from stages.training.previews import Samples
from tests.scoring.test_lpips import alexnet
from tests.scoring.test_networks import script
from tests.support.shards import make_shards

GAP = 4
MODEL = Pix2PixHD(
    width=2, downsamplings=1, blocks=1, enhancer_blocks=1, discriminator_width=2, discriminators=2
)


def job(index: int, crop: tuple[int, int] | None = None) -> PhaseJob:
    return jobs(TrainConfig.model_validate({"model": MODEL}), AugmentConfig(crop=crop))[index]


def translator(phase_job: PhaseJob, inputs: InputSpec, ema: float | None = None) -> GanState:
    return build_gan(MODEL, inputs, weights=LossWeights(), enhancers=phase_job.phase.enhancers, ema_decay=ema)


def samples(folder: Path, spec: DatasetSpec, phase_job: PhaseJob) -> Samples:
    return Samples(str(folder), spec, phase_job, torch.device("cpu"))


LABELS = InputSpec(source="labels", classes=4, instances=True)


@pytest.mark.parametrize(("index", "size"), [(0, 16), (1, 32)])
def test_a_grid_has_a_pair_a_row_at_the_phases_size(tmp_path: Path, index: int, size: int) -> None:
    spec = make_shards(tmp_path, {"train": [4], "val": [3]}, instances=True)
    phase_job = job(index)
    grid, values = samples(tmp_path, spec, phase_job)(translator(phase_job, LABELS))
    assert 0 < values["validation/l1"] < 1
    assert grid is not None
    assert grid.shape == (3 * (size + GAP) + GAP, 3 * (size + GAP) + GAP, 3)
    assert grid.dtype == np.uint8


def test_a_crop_takes_the_middle(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"val": [1]}, instances=True)
    sample = next(dataset.read_split(str(tmp_path), spec, "val"))
    pair = previews.fixed(sample, spec, job(1, crop=(16, 16)))
    assert np.array_equal(pair["target"], sample.images["target"][8:24, 8:24])


def test_without_a_validation_split_other_pairs_are_shown_and_nothing_is_measured(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"train": [9]}, instances=True)
    phase_job = job(1)
    grid, values = samples(tmp_path, spec, phase_job)(translator(phase_job, LABELS))
    assert grid is not None
    assert grid.shape[0] == previews.SHOWN * (32 + GAP) + GAP
    assert values == {}


def drawn_singly(folder: Path, spec: DatasetSpec, gan: GanState) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Each validation pair with its generated image and its target, (1, C, H, W) in [-1, 1]."""
    for sample in dataset.read_split(str(folder), spec, "val"):
        one = {role: previews.tensor([image], spec, role) for role, image in sample.images.items()}
        yield sample, previews.generate(gan, one["source"], one["target"], one["instance"]), one["target"]


def test_the_number_is_the_mean_over_all_measured_pairs(tmp_path: Path) -> None:
    """The same pairs one at a time and together."""
    spec = make_shards(tmp_path, {"val": [6]}, instances=True)
    phase_job = job(1)
    gan = translator(phase_job, LABELS)
    _, values = samples(tmp_path, spec, phase_job)(gan)
    each = []
    for _, drawn, target in drawn_singly(tmp_path, spec, gan):
        each.append(float((drawn - target).abs().mean()) / 2)
    assert values["validation/l1"] == pytest.approx(np.mean(each), rel=1e-5)


def test_the_metric_that_chooses_is_evaluations_own_of_the_pictures(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"val": [6]}, instances=True)
    chosen = job(1).model_copy(update={"select": "ssim"})
    gan = translator(chosen, LABELS)
    _, values = samples(tmp_path, spec, chosen)(gan)
    each = []
    for sample, drawn, _ in drawn_singly(tmp_path, spec, gan):
        picture = kinds.restore(drawn[0].permute(1, 2, 0).numpy(), "rgb")
        each.append(pixel_scores_of([picture], [sample.images["target"]])[0]["ssim"])
    assert values["validation/ssim"] == pytest.approx(np.mean(each), rel=1e-3)
    too_small = chosen.model_copy(update={"select": "ms_ssim"})
    assert set(samples(tmp_path, spec, too_small)(gan)[1]) == {"validation/l1"}
    assert samples(tmp_path, spec, chosen)(gan, measure=False)[1] == {}


class MeanColour(nn.Module):
    """A stand-in for Inception: three features, an image's mean colour."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


def test_networks_of_evaluation_choose_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "CHOOSING", 6)
    spec = make_shards(tmp_path / "shards", {"val": [9]}, instances=True)
    lpips = {"backbone": str(alexnet(tmp_path / "alex.safetensors"))}
    inception = {"weights": str(script(MeanColour(), tmp_path / "inception.pt"))}
    evaluate = EvaluateConfig.model_validate({"lpips": lpips, "inception": inception})

    def chosen(select: str) -> PhaseJob:
        config = TrainConfig.model_validate({"model": MODEL, "select": select})
        return jobs(config, AugmentConfig(), evaluate)[1]

    gan = translator(chosen("lpips"), LABELS)
    every = list(drawn_singly(tmp_path / "shards", spec, gan))
    fakes = [kinds.restore(drawn[0].permute(1, 2, 0).numpy(), "rgb") for _, drawn, _ in every]
    reals = [sample.images["target"] for sample, _, _ in every]
    means = [np.stack([image.mean((0, 1)) for image in side]) for side in (fakes, reals)]
    network = PerceptualFeatures("cpu")
    assert evaluate.lpips is not None
    expected = {
        "lpips": np.mean(LpipsScorer(evaluate.lpips, "cpu")(fakes[:6], reals[:6])),
        "fid": frechet_distance_of(*means),
        "frechet:efficientnet_lite0": frechet_distance_of(network(fakes), network(reals)),
    }
    for select, value in expected.items():
        name = f"validation/{select.replace(':', '_')}"
        drawn = samples(tmp_path / "shards", spec, chosen(select))
        _, numbers = drawn(gan)
        assert numbers == drawn(gan)[1]
        assert set(numbers) == {"validation/l1", name}
        assert numbers[name] == pytest.approx(value, rel=1e-2), select


def test_drawing_leaves_no_trace_in_training(tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"val": [2]}, instances=True)
    phase_job = job(1)
    gan = translator(phase_job, LABELS, ema=0.9)
    before = {name: value.clone() for name, value in gan.generator.state_dict().items()}
    drawn = samples(tmp_path, spec, phase_job)
    (first, one), (again, two) = drawn(gan), drawn(gan)
    assert one == two
    assert np.array_equal(first, again)
    assert gan.generator.training
    assert not gan.ema.network.training
    assert all(before[name].equal(value) for name, value in gan.generator.state_dict().items())
