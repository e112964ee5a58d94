"""What other losses change: a small Pix2Pix with each of them against the paper's, with the same seeds.

    python -m benchmarks.losses --shards workspace/facades/shard-... --output losses.jsonl

Each run trains on the shards and generates the split's images. The table has each score's mean over the seeds
and, in brackets, the 95 % interval of the difference from the paper's losses, seed by seed (Student's t): one
that holds 0 says nothing. Runs that are in the output file are not repeated, so `--seconds` may end it early.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learning import as_pictures, trained
from stages.base import Split
from stages.config.augment import AugmentConfig
from stages.config.train import TrainConfig, jobs
from stages.models.fast.process import tune_process
from stages.models.files.saved import load_model
from stages.scoring import metrics
from stages.scoring.efficientnet import PerceptualFeatures
from stages.scoring.intervals import interval
from stages.shards import dataset

SIDES: dict[str, dict[str, Any]] = {
    "paper (bce)": {},
    "least squares": {"losses": {"gan": "least_squares"}},
    "hinge": {"losses": {"gan": "hinge"}},
    "spectral norm": {"model": {"discriminator_spectral_norm": True}},
    "R1, gamma 10": {"losses": {"r1": 10}},
    "DiffAugment": {"losses": {"diff_augment": ["colour", "translation", "cutout"]}},
}
LPIPS = "LPIPS, weight 10"
SCORES = ("l1", "ssim", "kernel", "sharpness", "seconds")
"""`kernel` is the kernel distance over EfficientNet-Lite0, times 1,000."""


def config(side: Mapping[str, Any], options: argparse.Namespace, seed: int) -> TrainConfig:
    """The training of one run."""
    model = {
        "kind": "pix2pix",
        "levels": options.levels,
        "width": options.width,
        "norm": "instance",
        "discriminator_width": options.width,
        "discriminator_layers": 2,
    }
    phase = {
        "name": "whole",
        "kind": "whole",
        "epochs": options.epochs,
        "decay_epochs": options.epochs // 3,
        "batch": 4,
        "learning_rate": 4e-4,
    }
    values = {"model": model, "phases": [phase], "ema": 0.99, "seed": seed, "precision": "float32"}
    values |= {name: value for name, value in side.items() if name != "model"}
    values["model"] = model | side.get("model", {})
    return TrainConfig.model_validate(values)


def scores(side: Mapping[str, Any], options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train once and score the split's images."""
    split: Split = options.split
    spec = dataset.load(options.shards)
    samples = list(dataset.read_split(options.shards, spec, split))
    with tempfile.TemporaryDirectory(prefix="losses-") as folder:
        began = time.process_time()
        phases = jobs(config(side, options, seed), AugmentConfig(mirror=True))
        model, _ = trained(phases, options.shards, Path(folder))
        seconds = time.process_time() - began
        fakes = as_pictures(load_model(model), samples, spec)
    reals = [sample.picture(spec, "target") for sample in samples]
    rows = [metrics.pixel_scores_of([fake], [real])[0] for fake, real in zip(fakes, reals, strict=True)]
    features = PerceptualFeatures("cpu")
    distance = metrics.KernelDistance(features(fakes), features(reals))()
    return {
        **{name: float(np.mean([row[name] for row in rows])) for name in ("l1", "ssim")},
        "kernel": 1000 * distance,
        "sharpness": float(np.mean([metrics.sharpness(fake) for fake in fakes])),
        "seconds": seconds,
    }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The runs as a Markdown table, a row a side."""
    by_side: dict[str, dict[int, Mapping[str, float]]] = {}
    for run in runs:
        by_side.setdefault(run["side"], {})[run["seed"]] = run["scores"]
    base = by_side.get(next(iter(SIDES)), {})
    lines = ["| | seeds | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 2) + "|"]
    for side, of_seeds in by_side.items():
        cells = []
        for name in SCORES:
            cells.append(f"{np.mean([one[name] for one in of_seeds.values()]):.4g}")
            both = [seed for seed in of_seeds if seed in base]
            apart = interval(np.array([of_seeds[seed][name] - base[seed][name] for seed in both]))
            if of_seeds is not base and apart is not None:
                cells[-1] += f" ({apart.low:+.3g} to {apart.high:+.3g})"
        lines.append(f"| {side} | {len(of_seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shards", required=True, help="shards folder")
    p.add_argument("--split", default="test", choices=["train", "val", "test"])
    p.add_argument("--output", required=True, metavar="FILE", help="a line of JSON a run; runs in it stay")
    p.add_argument("--epochs", type=int, default=12)
    p.add_argument("--levels", type=int, default=6, help="halvings of the U-Net")
    p.add_argument("--width", type=int, default=16, help="of both networks")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long")
    p.add_argument("--lpips", metavar="FILE", help="AlexNet's weights, for LPIPS as a loss")
    options = p.parse_args()
    sides, output, began = dict(SIDES), Path(options.output), time.monotonic()
    if options.lpips:
        sides[LPIPS] = {"losses": {"lpips": 10}, "lpips": {"backbone": options.lpips}}
    tune_process(torch.device("cpu"))
    torch.set_num_threads(1)
    runs = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    finished = {(run["side"], run["seed"]) for run in runs}
    for seed in range(options.seeds):
        for side, changes in sides.items():
            if (side, seed) in finished or time.monotonic() - began > options.seconds:
                continue
            run = {"side": side, "seed": seed, "scores": scores(changes, options, seed)}
            runs.append(run)
            with output.open("a") as file:
                file.write(json.dumps(run) + "\n")
    sys.stdout.write(table(runs) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
