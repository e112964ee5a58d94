"""LPIPS: the distance itself, its name, and that absent or wrong weights give none."""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages.config.evaluate import LpipsConfig
from stages.errors import UserError
from stages.scoring import lpips
from stages.scoring.lpips import LpipsScorer
from stages.scoring.metrics import diversity
from tests.scoring.test_metrics import pictures


def alexnet(path: Path) -> Path:
    """Random weights in the shapes of torchvision's AlexNet."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for index, (out, into, kernel) in {
        0: (64, 3, 11),
        3: (192, 64, 5),
        6: (384, 192, 3),
        8: (256, 384, 3),
        10: (256, 256, 3),
    }.items():
        tensors[f"features.{index}.weight"] = (
            torch.randn(out, into, kernel, kernel, generator=generator) * 0.05
        )
        tensors[f"features.{index}.bias"] = torch.zeros(out)
    save_file(tensors, path)
    return path


def test_a_scorer_has_the_name_of_its_weights(tmp_path: Path) -> None:
    weights = alexnet(tmp_path / "alex.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    config = LpipsConfig(backbone=str(weights))
    assert lpips.lpips_name(config) == f"lpips_alex_{digest[:8]}"
    scorer = LpipsScorer(config, "cpu")
    one, other = pictures(64)
    assert scorer([one], [one]) == [0]
    assert scorer([one], [other])[0] > 0


def test_diversity_is_the_mean_distance_of_all_pairs_of_samples(tmp_path: Path) -> None:
    scorer = LpipsScorer(LpipsConfig(backbone=str(alexnet(tmp_path / "alex.safetensors"))), "cpu")
    samples = [pictures(64, seed)[0] for seed in range(3)]
    distances = [scorer([one], [other])[0] for one, other in combinations(samples, 2)]
    assert min(distances) > 0
    assert diversity(samples, scorer) == pytest.approx(np.mean(distances))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"evaluate\.lpips: these are no alex weights"):
        LpipsScorer(LpipsConfig(backbone=str(tmp_path / "x.safetensors")), "cpu")
    with pytest.raises(UserError, match=r"evaluate\.lpips\.backbone: gone\.pth: the weights cannot be read"):
        LpipsScorer(LpipsConfig(backbone="gone.pth"), "cpu")


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_is_the_weighted_distance_of_unit_features(kind: str) -> None:
    layers, taps = lpips.LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    backbone, index, channels, widths = {}, 0, 3, []
    for layer in layers:
        if isinstance(layer, tuple):
            out, kernel = int(layer[0]), int(layer[1])
            backbone[f"features.{index}.weight"] = (
                torch.randn(out, channels, kernel, kernel, generator=generator) * 0.05
            )
            backbone[f"features.{index}.bias"] = torch.zeros(out)
            widths.append(out)
            channels, index = out, index + 2
        else:
            index += 1
    linear = {f"lin{i}.model.1.weight": torch.ones(1, widths[t - 1], 1, 1) for i, t in enumerate(taps)}
    model = lpips.Lpips(kind, backbone, linear)
    a, b = torch.rand(2, 3, 64, 64, generator=generator).mul(2).sub(1).split(1)
    assert float(model(a, a)[0]) == 0
    expected = sum(
        float((x - y).square().sum(1).mean()) for x, y in zip(model.tapped(a), model.tapped(b), strict=True)
    )
    assert float(model(a, b)[0]) == pytest.approx(expected, rel=1e-4)
