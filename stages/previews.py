"""Pictures of a phase's progress: the same few pairs every time, source | generated | target, a pair a row.

in:  the first pairs of the shards' validation split (else test, else train), at the phase's resolution
out: (H, W, 3) uint8 grids
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages import dataset, images, phases
from stages.base import Role, Split
from stages.dataset import DatasetSpec, Sample
from stages.images import Array
from stages.models.step import Translator, make_condition
from stages.phases import PhaseJob

PAIRS = 4
SPLITS: tuple[Split, ...] = ("val", "test", "train")


def fixed(sample: Sample, spec: DatasetSpec, job: PhaseJob) -> dict[Role, Array]:
    """A pair's images as the phase would see them without jitter: the middle, at the phase's resolution."""
    width, height = phases.full_size(spec.size, job.augment)
    left, top = (spec.size[0] - width) // 2, (spec.size[1] - height) // 2
    scale = phases.downscale(job.model, job.phase)
    return {
        role: images.shrink(image[top : top + height, left : left + width], scale, spec.roles[role].kind)
        for role, image in sample.images.items()
    }


def tensor(arrays: Sequence[Array], spec: DatasetSpec, role: Role) -> Tensor:
    """Images (H, W, C) of a role as the networks see them: (N, C, H, W), ids or float32."""
    kind = spec.roles[role].kind
    seen = [image if kind in images.IDS else images.normalise(image, kind) for image in arrays]
    stacked = np.stack(seen).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(stacked.astype(np.int32) if kind in images.IDS else stacked))


@dataclass
class Samples:
    """Reads its pairs when the first picture is drawn, and keeps them."""

    shards: str
    spec: DatasetSpec
    job: PhaseJob
    device: torch.device
    _pairs: list[dict[Role, Array]] | None = None

    def pairs(self) -> list[dict[Role, Array]]:
        """The same pairs every time: in the order they are stored."""
        if self._pairs is None:
            split: Split = next((split for split in SPLITS if self.spec.rows(split)), "train")
            found = dataset.read_split(self.shards, self.spec, split, limit=PAIRS)
            needed = {"source", "target"} | ({"instance"} if "instance" in self.spec.roles else set())
            pairs = [fixed(sample, self.spec, self.job) for sample in found]
            self._pairs = [pair for pair in pairs if needed <= pair.keys()]
        return self._pairs

    def __call__(self, gan: Translator) -> Array | None:
        """A grid drawn by the averaged weights, if there are any; None where no pair is whole."""
        pairs = self.pairs()
        if not pairs:
            return None
        source = tensor([pair["source"] for pair in pairs], self.spec, "source").to(self.device)
        target = tensor([pair["target"] for pair in pairs], self.spec, "target").to(self.device)
        instance = None
        if "instance" in self.spec.roles:
            instance = tensor([pair["instance"] for pair in pairs], self.spec, "instance").to(self.device)
        drawn = generate(gan, source, target, instance)
        kind = self.spec.roles["target"].kind
        values = drawn.float().permute(0, 2, 3, 1).cpu().numpy()
        rows = []
        for pair, value in zip(pairs, values, strict=True):
            shown = {**pair, "target": images.restore(value, kind)}
            rows.append(
                [
                    self._picture(pair, "source"),
                    self._picture(shown, "target"),
                    self._picture(pair, "target"),
                ]
            )
        return images.sheet(rows)

    def _picture(self, pair: dict[Role, Array], role: Role) -> Array:
        known = self.spec.roles[role]
        lightness = next((image for r, image in pair.items() if self.spec.roles[r].kind == "lab_l"), None)
        return images.picture(pair[role], known.kind, classes=known.classes, lightness=lightness)


def generate(gan: Translator, source: Tensor, target: Tensor, instance: Tensor | None) -> Tensor:
    """What the generator makes of sources now, by its averaged weights if it has any, without dropout.

    With a feature encoder the style is the target's own.
    """
    network = gan.ema.network if gan.ema is not None else gan.generator
    training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            condition = make_condition(source, instance, arch=gan.arch, inputs=gan.inputs)
            if gan.encoder is not None:
                assert instance is not None
                condition = torch.cat([condition, gan.encoder(target, instance)], 1)
            drawn: Tensor = network(condition)
    finally:
        network.train(training)
    return drawn
