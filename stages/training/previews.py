"""A phase's progress on pairs it does not train on: sample pictures and the validation L1.

in:  the first pairs of the shards' validation split (else test, else train), at the phase's resolution
out: (H, W, 3) uint8 grids, source | generated | target, a pair a row; `validation/l1`, the mean absolute
     difference in [0, 1], over the first validation pairs; with `train.select` that metric too, of the
     pictures, as evaluation computes it (`stages.scoring.metrics`)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.base import Role, Split
from stages.config.train import PhaseJob, downscale
from stages.images import geometry, kinds, pictures
from stages.images.augment import apply, centre
from stages.images.kinds import Array
from stages.models.gan import GanState
from stages.models.inputs import make_condition, translate
from stages.scoring.metrics import pixel_scores_of
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample

SHOWN = 4
MEASURED, CHOOSING = 16, 64
"""Validation pairs that are measured: to see how it goes, and to choose a model by (`train.select`)."""
SPLITS: tuple[Split, ...] = ("val", "test", "train")


def fixed(sample: Sample, spec: DatasetSpec, job: PhaseJob) -> dict[Role, Array]:
    """A pair's images as the phase would see them without jitter: the middle, at the phase's resolution."""
    crop = job.augment.crop
    middle = centre(spec.size, crop)
    scale = downscale(job.model, job.phase)
    return {
        role: geometry.shrink(apply(image, middle, spec.size, crop), scale, spec.roles[role].kind)
        for role, image in sample.images.items()
    }


def tensor(arrays: Sequence[Array], spec: DatasetSpec, role: Role) -> Tensor:
    """Images (H, W, C) of a role as network inputs: (N, C, H, W), ids or float32."""
    kind = spec.roles[role].kind
    values = [image if kind in kinds.IDS else kinds.normalise(image, kind) for image in arrays]
    stacked = np.stack(values).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(stacked.astype(np.int32) if kind in kinds.IDS else stacked))


@dataclass
class Samples:
    """Generates and measures with the averaged weights if there are any."""

    shards: str
    spec: DatasetSpec
    job: PhaseJob
    device: torch.device

    def __call__(self, gan: GanState) -> tuple[Array | None, dict[str, float]]:
        """A grid (None where no pair is whole) and the numbers (none without a validation split)."""
        split: Split = next((split for split in SPLITS if self.spec.rows(split)), "train")
        rows: list[list[Array]] = []
        differences: list[float] = []
        scores: list[float] = []
        chosen = None if self.job.select == "l1" else self.job.select
        limit = SHOWN if split != "val" else MEASURED if self.job.select is None else CHOOSING
        for group in self._groups(split, limit):
            generated = self._generate(gan, group)
            differences += [
                float((image.float() - truth.float()).abs().mean()) / 2
                for image, truth in zip(generated, self._stack(group, "target"), strict=True)
            ]
            if rows and chosen is None:
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
            if chosen is not None:
                found = pixel_scores_of(fakes, reals, self.device.type)
                scores += [row[chosen] for row in found if chosen in row]
        measured = {"l1": differences, chosen: scores} if split == "val" else {}
        numbers = {f"validation/{name}": float(np.mean(each)) for name, each in measured.items() if each}
        return pictures.sheet(rows) if rows else None, numbers

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
