"""The runs of docs/results.md, on real data: train, score on val and test, and draw generated images.

    python -m benchmarks.results --data DATA --output results                 all runs, one after another
    python -m benchmarks.results --data DATA --output results facades camvid
    python -m benchmarks.results --data DATA --output results --seeds 3       each with three seeds
    python -m benchmarks.results --data DATA --output results --commands      print the commands only

DATA holds a folder for each data set, laid out as the recipes' `data/` files say: facades, camvid,
edges2shoes, cityscapes_hd. Finished steps are not repeated. For each run the output gets NAME.md, the scores
of the model and of the baselines, and NAME.jpg, generated images. With several seeds a score of the trained
model is the mean over them with its interval (Student's t); with one, an interval is over the images. A data
set's own images are not shown: we may not publish them. (Images of `colour` and `inpainting` keep so much of
the photos that we may not either.)
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import config as configuration
from pipeline.config import PipelineConfig
from pipeline.dag import steps
from pipeline.runner import plan
from stages import storage
from stages.base import Split
from stages.images import pictures
from stages.scoring import metrics
from stages.scoring.intervals import interval
from stages.shards import dataset

KERNEL = "kernel_efficientnet_lite0"
SCORES = {"l1": "L1", "psnr": "PSNR, dB", "ssim": "SSIM", "sharpness": "sharpness", KERNEL: "kernel distance"}
SIDES = {
    "mean_target": "mean training target",
    "nearest": "nearest source's target",
    "untrained": "untrained",
}
SHOWN = (4, 3)  # columns and rows of a picture


@dataclass(frozen=True)
class DocumentedRun:
    """A recipe, settings with the folders `{data}` and `{output}`, splits to score (the last is shown)."""

    recipe: str
    settings: tuple[str, ...]
    splits: tuple[Split, ...] = ("val", "test")


def epochs(number: int, decay: int) -> tuple[str, str]:
    """Settings for so many epochs, the last of them at a falling rate."""
    return f"train.phases.0.epochs={number}", f"train.phases.0.decay_epochs={decay}"


RATE = "train.phases.0.learning_rate=1.0e-3"  # a few hundred steps of a small network bear a larger rate
PHOTOS = ("ingest.locations.0.uri={output}/photos", 'ingest.locations.0.pattern="{split}/{key}.png"')
RUNS = {
    "facades": DocumentedRun(
        "recipes/pix2pix/facades.yaml", ("ingest.locations.0.uri={data}/facades", *epochs(14, 6))
    ),
    "camvid": DocumentedRun(
        "recipes/pix2pix/camvid.yaml",
        (
            "ingest.locations.0.uri={data}/camvid",
            "ingest.locations.1.uri={data}/camvid",
            *epochs(12, 6),
            RATE,
        ),
        splits=("val",),
    ),
    "edges": DocumentedRun(
        "recipes/pix2pix/edges-to-shoes.yaml",
        (
            "ingest.locations.0.uri={data}/edges2shoes",
            'ingest.locations.0.pattern="{split}/{key}_AB.jpg"',
            "pair.max_reject_fraction=0.2",  # a folder that names no split, with the halves swapped
            *epochs(16, 8),
            RATE,
        ),
        splits=("val",),
    ),
    "colour": DocumentedRun("recipes/pix2pix/colorization.yaml", (*PHOTOS, *epochs(4, 2), RATE)),
    "inpainting": DocumentedRun("recipes/pix2pix/inpainting.yaml", (*PHOTOS, *epochs(4, 2), RATE)),
    "facades-hd": DocumentedRun("recipes/facades.yaml", ("ingest.locations.0.uri={data}/facades",)),
    # Eight scenes are too few to keep a test split: can it learn them by heart, and what does each phase add?
    "cityscapes-hd": DocumentedRun(
        "recipes/pix2pixhd/cityscapes-2048.yaml",
        (
            "ingest.locations.0={uri: {data}/cityscapes_hd/train_img, role: target, "
            'pattern: "{key}_leftImg8bit.png"}',
            "ingest.locations.1={uri: {data}/cityscapes_hd/train_label, role: source, "
            'pattern: "{key}_gtFine_labelIds.png"}',
            "ingest.locations.2={uri: {data}/cityscapes_hd/train_inst, role: instance, "
            'pattern: "{key}_gtFine_instanceIds.png"}',
            "pair.split={val: 0, test: 0}",
            "shard.size=[512, 256]",
            "augment.mirror=false",
            "train.phases.0.batch=1",
            "train.phases.0.epochs=100",
            "train.phases.0.decay_epochs=40",
            "train.phases.1.batch=1",
            "train.phases.1.epochs=15",
            "train.phases.1.decay_epochs=5",
            "train.phases.2.batch=1",
            "train.phases.2.epochs=50",
            "train.phases.2.decay_epochs=25",
        ),
        splits=("train",),
    ),
}


def settings(run: DocumentedRun, name: str, split: Split, data: Path, output: Path) -> list[str]:
    """The values of `--set`."""
    written = [f"workspace={output}/{name}", "evaluate.perceptual=efficientnet_lite0", *run.settings]
    written += [f"infer.split={split}", f"evaluate.split={split}"]
    return [one.replace("{data}", str(data)).replace("{output}", str(output)) for one in written]


def command(run: DocumentedRun, values: Sequence[str]) -> list[str]:
    """The arguments of `python -m pipeline.run`."""
    return ["-c", run.recipe, *(word for value in values for word in ("--set", value))]


def photos(data: Path, output: Path) -> None:
    """The left half of each of the facades' pairs, in a folder of its own, to derive sources from."""
    for path in sorted((data / "facades").glob("*/*.jpg")):
        photo = output / "photos" / path.parent.name / path.with_suffix(".png").name
        if not photo.exists():
            photo.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as pair:
                pair.crop((0, 0, pair.width // 2, pair.height)).save(photo)


def folders(config: PipelineConfig) -> dict[str, str]:
    """The folder of each step of a run."""
    return {p.step.name: p.folder for p in plan(steps(config), config.workspace)}


def cell(means: dict[str, Any], score: str) -> str:
    """A mean with its interval; "" if it was not measured."""
    if score not in means:
        return ""
    ends = means["intervals"].get(score)
    return f"{means[score]:.4g}" + (f" ({ends[0]:.4g} to {ends[1]:.4g})" if ends else "")


def over_seeds(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means of a run's scores over its seeds with their intervals; of one seed, as they are."""
    if len(summaries) == 1:
        return summaries[0]
    found = {score: interval(np.array([of[score] for of in summaries])) for score in SCORES}
    means = {score: one.mean for score, one in found.items() if one is not None}
    return means | {"intervals": {score: one[1:] for score, one in found.items() if one is not None}}


def rows(split: Split, summaries: Sequence[dict[str, Any]], mean_photo: dict[str, Any]) -> list[str]:
    """The table's lines for one split: the model's, then the baselines', which are the first seed's.

    mean_photo   the summary of the mean training target as another system; it has distances of the whole set
    """
    first = summaries[0]
    sides = {SIDES[side]: of for side, of in first["baselines"].items()}
    sides[SIDES["mean_target"]] |= {KERNEL: mean_photo[KERNEL]}
    return [
        f"| {split}, {first['num_images']} | {name} | "
        + " | ".join(cell(of, score) for score in SCORES)
        + " |"
        for name, of in {"**trained**": over_seeds(summaries), **sides}.items()
    ]


def score_mean_photo(words: Sequence[str], outputs: dict[str, str], folder: Path) -> dict[str, Any]:
    """The summary of evaluation over the mean training target as the answer to every source."""
    spec = dataset.load(outputs["shard"])
    mean = metrics.MeanImage()
    for sample in dataset.read_split(outputs["shard"], spec, "train"):
        mean.add(sample.picture(spec, "target"))
    images = Path(outputs["infer"]) / "images"
    for path in images.glob("**/*.png"):
        copy = folder / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mean.image()).save(copy)
    words = [*words, "--set", f"evaluate.images={folder}"]
    subprocess.run([sys.executable, "-m", "pipeline.run", *words, "--only", "evaluate"], check=True)
    config = configuration.load(words[1], words[3::2])
    summary: dict[str, Any] = storage.read_json(f"{folders(config)['evaluate']}/summary.json")
    return summary


def grid(folder: str, path: Path) -> None:
    """Some of the generated images, evenly taken, as one JPEG."""
    columns, lines = SHOWN
    files = sorted(Path(folder).glob("images/**/*.png"))
    chosen = np.linspace(0, len(files) - 1, min(len(files), columns * lines)).astype(int)
    images = [np.asarray(Image.open(files[i]).convert("RGB")) for i in chosen]
    grid_rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    Image.fromarray(pictures.sheet(grid_rows)).save(path, quality=85)


def main() -> int:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", choices=[*RUNS, []], help="which (default: all)")
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--seeds", type=int, default=1, help="train each run with so many seeds")
    p.add_argument("--commands", action="store_true", help="print the commands, run nothing")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    options = p.parse_args()
    data, output = options.data.absolute(), options.output.absolute()
    if not options.commands:
        photos(data, output)
    for name in options.runs or RUNS:
        run = RUNS[name]
        lines = [f"| {name} | | " + " | ".join(SCORES.values()) + " |", "|---" * (len(SCORES) + 2) + "|"]
        for split in run.splits:
            summaries = []
            for seed in range(options.seeds):
                values = [*settings(run, name, split, data, output), f"train.seed={seed}", *options.set]
                words = command(run, values)
                if options.commands:
                    sys.stdout.write(f"{name} {shlex.join(words)}\n")
                    continue
                subprocess.run([sys.executable, "-m", "pipeline.run", *words], check=True)
                outputs = folders(configuration.load(run.recipe, values))
                summaries.append(storage.read_json(f"{outputs['evaluate']}/summary.json"))
            if summaries:
                mean_photo = score_mean_photo(words, outputs, output / f"{name}-mean" / split)
                lines += rows(split, summaries, mean_photo)
                grid(outputs["infer"], output / f"{name}.jpg")
        if not options.commands:
            (output / f"{name}.md").write_text("\n".join(lines) + "\n")
            sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
