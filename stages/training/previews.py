"""A phase's progress on pairs it does not train on: sample pictures and the validation L1.

in:  the first pairs of the shards' validation split (else test, else train), at the phase's resolution
out: (H, W, 3) uint8 grids, source | generated | target, a pair a row; `validation/l1`, the mean absolute
     difference in [0, 1], over the first validation pairs; with `train.select` that metric too, of the
     pictures, as evaluation computes it (`stages.scoring`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stages.base import Role, Split
from stages.config.evaluate import InceptionConfig, LpipsConfig
from stages.config.train import PhaseJob
from stages.images import geometry, kinds, pictures
from stages.images.augment import apply, centre
from stages.images.kinds import Array
from stages.models.gan import GanState
from stages.models.inputs import make_condition, translate
from stages.scoring.efficientnet import PerceptualFeatures
from stages.scoring.lpips import LpipsScorer
from stages.scoring.metrics import Distances, frechet_distance_of, pixel_scores_of
from stages.scoring.networks import Inception
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample

SHOWN = 4
MEASURED, CHOOSING, CHOOSING_BY_SET = 16, 64, 256
"""Validation pairs that are measured: to see how it goes, and to choose a model by (`train.select`)."""
SMALLEST_SET = 50
"""Validation pairs that a distance of sets needs at least: that of fewer says little."""
SPLITS: tuple[Split, ...] = ("val", "test", "train")


def fixed(sample: Sample, spec: DatasetSpec, job: PhaseJob) -> dict[Role, Array]:
    """A pair's images as the phase would see them without jitter: the middle, at the phase's resolution."""
    crop = job.augment.crop
    middle = centre(spec.size, crop)
    return {
        role: geometry.shrink(apply(image, middle, spec.size, crop), job.scale, spec.roles[role].kind)
        for role, image in sample.images.items()
    }


def tensor(arrays: Sequence[Array], spec: DatasetSpec, role: Role) -> Tensor:
    """Images (H, W, C) of a role as network inputs: (N, C, H, W), ids or float32."""
    kind = spec.roles[role].kind
    values = [image if kind in kinds.IDS else kinds.normalise(image, kind) for image in arrays]
    stacked = np.stack(values).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(stacked.astype(np.int32) if kind in kinds.IDS else stacked))


def pairs_to_choose_by(job: PhaseJob) -> tuple[int, int]:
    """The least and the most validation pairs that `train.select` measures."""
    of_set = job.select in ("fid", "frechet:efficientnet_lite0")
    return (SMALLEST_SET, CHOOSING_BY_SET) if of_set else (1, CHOOSING)


Features = Callable[[Sequence[Array]], np.ndarray]


def scorers(job: PhaseJob, device: str) -> tuple[Distances | None, Features | None]:
    """The metric of `train.select` for single pairs, or the features whose sets it compares.

    Raises UserError for weights.
    """
    match job.select:
        case "psnr" | "ssim" | "ms_ssim" as name:

            def scores(fakes: Sequence[Array], reals: Sequence[Array]) -> list[float]:
                return [row[name] for row in pixel_scores_of(fakes, reals, device) if name in row]

            return scores, None
        case "lpips":
            assert isinstance(job.scorer, LpipsConfig)
            return LpipsScorer(job.scorer, device), None
        case "fid":
            assert isinstance(job.scorer, InceptionConfig)
            return None, Inception(job.scorer, device)
        case "frechet:efficientnet_lite0":
            return None, PerceptualFeatures(device)
    return None, None


@dataclass
class Samples:
    """Generates and measures with the averaged weights if there are any. UserError for weights of scorers."""

    shards: str
    spec: DatasetSpec
    job: PhaseJob
    device: torch.device
    _scores: Distances | None = field(init=False)
    _features: Features | None = field(init=False)
    _target_features: dict[int, np.ndarray] = field(init=False, default_factory=dict)
    """By the number of their group: the targets are the same each time."""

    def __post_init__(self) -> None:
        self._scores, self._features = scorers(self.job, self.device.type)

    def __call__(self, gan: GanState, measure: bool = True) -> tuple[Array | None, dict[str, float]]:
        """A grid, None where no pair is whole; if `measure`, numbers, none without a validation split."""
        split: Split = next((split for split in SPLITS if self.spec.rows(split)), "train")
        measured = split == "val" and measure
        limit = MEASURED if self.job.select is None else pairs_to_choose_by(self.job)[1]
        rows: list[list[Array]] = []
        differences, scores, features = list[float](), list[float](), list[tuple[np.ndarray, np.ndarray]]()
        for number, group in enumerate(self._groups(split, limit if measured else SHOWN)):
            generated = self._generate(gan, group)
            differences += [
                float((image.float() - truth.float()).abs().mean()) / 2
                for image, truth in zip(generated, self._stack(group, "target"), strict=True)
            ]
            if rows and self._scores is None and self._features is None:
                continue
            kind = self.spec.roles["target"].kind
            values = generated.float().permute(0, 2, 3, 1).cpu().numpy()
            fakes = [
                self._picture({**pair, "target": kinds.restore(value, kind)}, "target")
                for pair, value in zip(group, values, strict=True)
            ]
            reals = [self._picture(pair, "target") for pair in group]
            rows = rows or [
                [self._picture(pair, "source"), fake, real]
                for pair, fake, real in zip(group, fakes, reals, strict=True)
            ]
            if measured and self._scores is not None:
                scores += self._scores(fakes, reals)
            if measured and self._features is not None:
                if number not in self._target_features:
                    self._target_features[number] = self._features(reals)
                features.append((self._features(fakes), self._target_features[number]))
        numbers = {"l1": float(np.mean(differences))} if measured and differences else {}
        if scores:
            numbers[str(self.job.select)] = float(np.mean(scores))
        if features:
            sides = (np.concatenate(side) for side in zip(*features, strict=True))
            numbers[str(self.job.select)] = frechet_distance_of(*sides)
        named = {f"validation/{name.replace(':', '_')}": value for name, value in numbers.items()}
        return pictures.sheet(rows) if rows else None, named

    def _groups(self, split: Split, limit: int) -> Iterator[list[dict[Role, Array]]]:
        """The first whole pairs of a split, in the order they are stored, a few at a time."""
        needed = {"source", "target"} | ({"instance"} if "instance" in self.spec.roles else set())
        group: list[dict[Role, Array]] = []
        for sample in dataset.read_split(self.shards, self.spec, split, limit=limit):
            if needed <= sample.images.keys():
                group.append(fixed(sample, self.spec, self.job))
            if len(group) == SHOWN:
                yield group
                group = []
        if group:
            yield group

    def _stack(self, group: Sequence[dict[Role, Array]], role: Role) -> Tensor:
        return tensor([pair[role] for pair in group], self.spec, role).to(self.device)

    def _generate(self, gan: GanState, group: Sequence[dict[Role, Array]]) -> Tensor:
        instance = self._stack(group, "instance") if "instance" in self.spec.roles else None
        return generate(gan, self._stack(group, "source"), self._stack(group, "target"), instance)

    def _picture(self, pair: dict[Role, Array], role: Role) -> Array:
        spec = self.spec.roles[role]
        lightness = next((image for r, image in pair.items() if self.spec.roles[r].kind == "lab_l"), None)
        return pictures.picture(pair[role], spec.kind, classes=spec.classes, lightness=lightness)


def generate(gan: GanState, source: Tensor, target: Tensor, instance: Tensor | None) -> Tensor:
    """The generator's images of sources, with averaged weights if there are any, without dropout.

    With a feature encoder the style is that of the target.
    """
    network = gan.ema.network if gan.ema is not None else gan.generator
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            condition = make_condition(source, instance, arch=gan.arch, inputs=gan.inputs)
            style = None if gan.encoder is None else gan.encoder(target, instance)
            return translate(network, condition, style)
    finally:
        network.train(training)
