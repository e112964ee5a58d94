"""Recipes at the smallest sizes: settings that shrink one, and images of the kinds it reads."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import PipelineConfig
from stages.base import Kind
from stages.config.ingest import LocationConfig
from stages.config.pair import Region

WIDTH, HEIGHT = 96, 64


def picture(kind: Kind, role: str, seed: int, classes: int) -> Image.Image:
    """A small image as the role's kind wants to find it: smooth colours, ids in blocks."""
    random = np.random.default_rng(seed)
    size = (2 * WIDTH if role == "pair" else WIDTH, HEIGHT)
    if kind == "labels":
        return Image.fromarray(random.integers(0, classes, (4, 6), np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
    if kind == "instances":
        ids = np.kron(random.integers(24000, 24004, (4, 6)), np.ones((HEIGHT // 4, WIDTH // 6)))
        return Image.fromarray(ids.astype(np.uint16))
    # Kinds of CIE Lab are made of RGB.
    drawn = Image.fromarray(random.integers(0, 256, (4, 6, 3), np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    return drawn.convert("L") if kind == "grey" else drawn


def paths(location: LocationConfig, regions: tuple[Region, ...], judged: str) -> Iterator[str]:
    """Object names that fit a location's pattern: four to train on, two to judge; a few to be dealt."""
    splits = ["train"] * 4 + [judged] * 2 if "{split}" in location.pattern or regions else [""] * 10
    axis = next((name for name in ("x", "y") if any(getattr(region, name) for region in regions)), "")
    spans = {region.split: getattr(region, axis) for region in regions} if axis else {}
    for number, split in enumerate(splits):
        words = {"split": split, "group": "town", "key": f"k{number}", "x": str(number), "y": str(number)}
        if axis:  # inside the region of its split, or before all of them, and every position once
            words["x" if axis == "y" else "y"] = str(number)
            words[axis] = str(int(spans[split][0]) if split in spans else 1)
        name = re.sub(r"\.\*\Z", ".png", location.pattern.format(**words))
        yield name.replace("*", "any")


def draw(config: PipelineConfig) -> None:
    """Write images for every location of a config, where it says that they are, and its `infer.input`."""
    for location in config.ingest.locations:
        role = location.role
        assert role != "table"
        kind = config.shard.kinds.get(role, "rgb") if role != "pair" else "rgb"
        for seed, name in enumerate(paths(location, config.pair.split.regions, config.infer.split or "test")):
            file = Path(location.uri) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            form = "JPEG" if name.endswith("jpg") else "PNG"
            picture(kind, role, seed, config.shard.classes or 2).save(data, form)
            if not file.exists() or file.read_bytes() != data.getvalue():  # else it would be another version
                file.write_bytes(data.getvalue())
    if config.infer.input:
        Path(config.infer.input).mkdir(parents=True, exist_ok=True)
        picture("grey", "source", 0, 2).save(Path(config.infer.input) / "drawn.png")


def tiny(config: PipelineConfig) -> list[str]:
    """Settings that make networks, images and phases as small as can be; roles, kinds and parts stay."""
    hd = config.train.model.kind == "pix2pixhd"
    side, crop = 64 if hd else 32, config.augment.crop
    values: dict[str, object] = {
        "shard.size": [side + 4, side + 4] if crop else [side, side],
        "shard.min_side": 8,
        "augment.crop": [side, side] if crop else None,
        "train.model.width": 4,
        "train.model.discriminator_width": 4,
        "train.log_every": 1,
        "pair.split.val": 0.2,
        "pair.split.test": 0.2,
        "evaluate.baselines": {"untrained": 0, "nearest": 0},
    }
    if hd:
        values |= {f"train.model.{key}": 1 for key in ("blocks", "enhancer_blocks")}
        values |= {"train.model.downsamplings": 2, "train.model.feature_width": 4}
        values["train.model.feature_downsamplings"] = 2
    else:
        values["train.model.levels"] = 5
    short = {"epochs": 1, "decay_epochs": 0, "batch": 2}
    values["train.phases"] = [phase.model_dump(mode="json") | short for phase in config.train.phases]
    if config.infer.size:
        values["infer.size"] = [side, side]
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
