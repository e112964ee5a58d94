"""What any model has to beat: the mean training target, the nearest training source's target, no training.

thumbnail, nearest    which training source is the most similar
BaselineData          what the first two baselines keep of the training split
untrained_model       the evaluated model's network with initial weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages import seeding
from stages.images import geometry
from stages.images.kinds import Array
from stages.models.build import build_encoder, build_generator
from stages.models.files.saved import LoadedModel, Manifest
from stages.scoring.metrics import MeanImage

THUMBNAIL = 16  # side of the pictures by which the nearest training source is found
THUMBNAIL_SIZE = THUMBNAIL * THUMBNAIL * 3

Place = tuple[str, int, int]
"""Where a pair is stored: file, row group, row in it."""


@dataclass(slots=True, kw_only=True)
class BaselineData:
    """What the baselines keep of the training split, or of a part of it."""

    mean: MeanImage
    vectors: np.ndarray
    """(N, D) uint8 thumbnails of candidates."""
    places: list[Place]
    """Of each candidate."""


def merge(parts: Sequence[BaselineData]) -> BaselineData:
    """The parts as one, in their order."""
    mean = MeanImage()
    for part in parts:
        mean.merge(part.mean)
    vectors = [np.zeros((0, THUMBNAIL_SIZE), np.uint8), *(part.vectors for part in parts)]
    places = [place for part in parts for place in part.places]
    return BaselineData(mean=mean, vectors=np.concatenate(vectors), places=places)


def thumbnail(source: Array) -> np.ndarray:
    """A source picture (H, W, 3) as the vector by which the nearest one is found, uint8."""
    return geometry.resize(source, (THUMBNAIL, THUMBNAIL), "rgb").reshape(-1)


def is_candidate(key: str, share: float) -> bool:
    """Whether a training pair belongs to the share that is compared; a function of its key."""
    return seeding.share(key) < share


def nearest(vector: np.ndarray, candidates: np.ndarray) -> int:
    """Index of the candidate (N, D) uint8 with the least squared distance; the first of equals."""
    wide = vector.astype(np.int32)
    best, least = 0, np.iinfo(np.int64).max
    for start in range(0, len(candidates), 4096):
        distances = ((candidates[start : start + 4096].astype(np.int32) - wide) ** 2).sum(1)
        index = int(distances.argmin())
        if distances[index] < least:
            best, least = start + index, int(distances[index])
    return best


def untrained_model(manifest: str, device: str) -> LoadedModel:
    """The network of a `model.json` with initial weights."""
    model = Manifest.model_validate_json(manifest)
    generator = build_generator(model.architecture, model.inputs, enhancers=model.enhancers)
    encoder = build_encoder(model.architecture, model.inputs)
    return LoadedModel(
        generator=generator.eval().to(device),
        encoder=None if encoder is None else encoder.eval().to(device),
        styles=None,
        manifest=model,
        weights="raw",
        fingerprint="untrained",
    )
