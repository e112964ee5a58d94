"""Drawn scenes and untrained models of a few kilobytes. They need torch alone, as a bare GPU machine does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from stages.base import Kind, Role
from stages.models.architecture import InputSpec, Picture, Pix2Pix, Pix2PixHD, Preprocessing
from stages.models.build import build_encoder, build_generator
from stages.models.files.saved import save_model
from stages.models.styles import Styles

CLASSES = 4


def scene(index: int, width: int, height: int) -> dict[Role, np.ndarray]:
    """A label map of two regions and a street, the picture it stands for, and instances."""
    rng = np.random.default_rng(index)
    labels = np.zeros((height, width, 1), np.uint8)
    labels[height // 2 :] = 1
    left = int(rng.integers(0, width // 2))
    labels[height // 4 : height * 3 // 4, left : left + width // 4] = 2
    colours = np.array([[120, 170, 230], [90, 90, 95], [200, 60, 40], [0, 0, 0]], np.uint8)
    photo = colours[labels[..., 0]].astype(np.int16) + rng.integers(-12, 12, (height, width, 1))
    return {
        "source": labels,
        "target": np.clip(photo, 0, 255).astype(np.uint8),
        "instance": (labels.astype(np.uint16) * 1000 + index).astype(np.uint16),
    }


def make_model(
    folder: Path,
    *,
    source: Kind = "labels",
    dropout: bool = False,
    norm: str = "instance",
    styles: bool = False,
    trained: tuple[int, int] = (32, 32),
) -> Path:
    """An untrained model: a U-Net of four levels, or with `styles` a coarse-to-fine one with an encoder."""
    if styles:
        arch: Pix2Pix | Pix2PixHD = Pix2PixHD(
            enhancers=0, width=8, downsamplings=2, blocks=1, feature_encoder=True, feature_width=4
        )
    else:
        arch = Pix2Pix(levels=5, width=8, norm=norm, dropout="paper" if dropout else "none")
    labels = source == "labels"
    inputs = InputSpec(
        source="labels" if labels else "image", classes=CLASSES if labels else None, instances=styles
    )
    generator = build_generator(arch, inputs, seed=1)
    with torch.no_grad():  # untrained weights give flat grey pictures
        for parameter in generator.parameters():
            parameter.mul_(3)
    centers = torch.randn(CLASSES, 3, 3, generator=torch.Generator().manual_seed(0))
    save_model(
        folder,
        generator,
        architecture=arch,
        inputs=inputs,
        preprocessing=Preprocessing(
            size=trained,
            pictures={
                "source": Picture(kind=source, classes=CLASSES if labels else None),
                "target": Picture(kind="rgb"),
            },
        ),
        encoder=build_encoder(arch, inputs),
        styles=Styles(centers=centers, counts=torch.ones(CLASSES, 3, dtype=torch.int64)) if styles else None,
    )
    return folder
