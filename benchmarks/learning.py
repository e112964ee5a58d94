"""Whether training learns: compare a recipe's model with controls that must do worse, on any shards folder.

    python -m benchmarks.learning -c recipes/pix2pix/facades.yaml --shards workspace/facades/shard-...

trained         the recipe's phases, as a worker runs them
again           the same, with the same seed: how much of the numbers is chance
shuffled        each source with another pair's target: how much is learnt without looking at the source
sign error      the generator's L1 with the wrong sign
untrained       initial weights
mean target     the mean training target for every source
nearest source  the target of the training pair whose source is the most similar (at 16x16 pixels)
source itself   if it is a picture, e.g. one to colour or to fill in

Every side generates all images of the split; each number is the mean over them (`stages.scoring.metrics`).

    python -m benchmarks.learning --shards .../shard-... --models .../train-{global,local,joint}-*/model

compares models instead: each generates at its own resolution, upsampled to the full one, which shows what
local and joint training add to global. `--crops FILE` draws a part of each model's images (a row a pair, a
column a model).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import config as configuration
from stages.base import Split
from stages.config.train import PhaseJob, check_size, full_size, jobs
from stages.images import geometry, pictures
from stages.images.kinds import Array
from stages.inference.translator import Translator
from stages.models import step
from stages.models.build import build_generator
from stages.models.fast.process import tune_process
from stages.models.files.saved import LoadedModel, load_model
from stages.scoring import metrics
from stages.scoring.baselines import nearest, thumbnail
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec, Sample
from stages.training.previews import Samples
from tests.support.undisturbed import train_here

Scores = dict[str, float]


def trained(jobs: Sequence[PhaseJob], shards: str, folder: Path) -> tuple[Path, int]:
    """Train all phases in this process, as a worker does. Returns the last model and the number of steps."""
    spec = dataset.load(shards)
    before, steps = "", 0
    for job in jobs:
        try:
            check_size(job.model, job.phase, full_size(spec.size, job.augment), key=f"--shards {shards}")
        except ValueError as error:
            sys.exit(str(error))
        output = str(folder / job.phase.name)
        samples = Samples(shards, spec, job, torch.device("cpu"))
        ending = train_here(
            job, shards, output, before=before, threads=torch.get_num_threads(), preview=samples
        )
        if ending.failure:
            raise RuntimeError(ending.failure)
        before, steps = output, steps + ending.position.steps
    return Path(before) / "model", steps


def shuffled(shards: str, folder: Path) -> str:
    """A copy of the shards in which every training source has the target of another pair of its file."""
    shutil.copytree(shards, folder)
    spec = dataset.load(shards)
    for file in spec.splits["train"]:
        table = pq.read_table(folder / file.name)
        shifted = np.roll(np.arange(table.num_rows), table.num_rows // 2 or 1)
        for name in table.column_names:
            if name.startswith("target"):
                column = table[name].take(pa.array(shifted))
                table = table.set_column(table.column_names.index(name), table.field(name), column)
        pq.write_table(table, folder / file.name, row_group_size=max(file.row_groups))
    return str(folder)


@contextmanager
def sign_error() -> Iterator[None]:
    """Within the context, the generator's L1 grows as its images get better."""
    right = step.mean_difference  # type: ignore[attr-defined]
    step.mean_difference = lambda x, y: 2 - right(x, y)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        step.mean_difference = right  # type: ignore[attr-defined]


def translated(model: LoadedModel, samples: Sequence[Sample], *, stochastic: bool = False) -> list[Array]:
    """The images that a model generates from the samples' sources, of the target's kind."""
    translator = Translator(model, stochastic=stochastic)
    images = []
    for sample in samples:
        instances = [sample.images["instance"]] if "instance" in sample.images else None
        images += translator.translate([sample.images["source"]], instances, seeds=[0])
    return images


def as_pictures(model: LoadedModel, samples: Sequence[Sample], spec: DatasetSpec) -> list[Array]:
    """Generated images as the targets are shown: colours of Lab need the pair's lightness."""
    return [
        replace(sample, images={**sample.images, "target": image}).picture(spec, "target")
        for sample, image in zip(samples, translated(model, samples), strict=True)
    ]


def untrained(path: Path) -> LoadedModel:
    """A trained model's network with other, initial weights."""
    model = load_model(path)
    arch, inputs = model.manifest.architecture, model.manifest.inputs
    generator = build_generator(arch, inputs, enhancers=model.manifest.enhancers, seed=1)
    model.generator.load_state_dict(generator.state_dict())
    return model


def score(images: Sequence[Array], samples: Sequence[Sample], spec: DatasetSpec) -> Scores:
    """Means of the scores over the samples."""
    rows = [
        metrics.pixel_scores_of([image], [sample.picture(spec, "target")])[0]
        | {"sharpness": metrics.sharpness(image)}
        for image, sample in zip(images, samples, strict=True)
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def by_phase(
    models: Sequence[str], shards: str, split: Split
) -> tuple[dict[str, Scores], dict[str, list[Array]]]:
    """Scores and images, by folder, of models of several resolutions on one split, all at its full size.

    A model of an earlier phase gets the sources at its own size, and its images are upsampled (bicubic).
    """
    spec = dataset.load(shards)
    samples = list(dataset.read_split(shards, spec, split))
    scores, images = {}, {}
    for path in models:
        model = load_model(Path(path))
        factor = spec.size[0] // model.manifest.preprocessing.size[0]
        small = [
            replace(
                sample,
                images={r: geometry.shrink(i, factor, spec.roles[r].kind) for r, i in sample.images.items()},
            )
            for sample in samples
        ]
        images[path] = [
            np.array(geometry.resize(image, spec.size, "rgb")) for image in translated(model, small)
        ]
        scores[path] = score(images[path], samples, spec)
    return scores, images


def baselines(shards: str, samples: Sequence[Sample], spec: DatasetSpec) -> dict[str, Scores]:
    """The scores of images that need no training."""
    mean = metrics.MeanImage()
    vectors, targets = [], []
    for sample in dataset.read_split(shards, spec, "train"):
        target = sample.picture(spec, "target")
        mean.add(target)
        vectors.append(thumbnail(sample.picture(spec, "source")))
        targets.append(target)
    candidates = np.stack(vectors)
    sources = [sample.picture(spec, "source") for sample in samples]
    nearest_targets = [targets[nearest(thumbnail(source), candidates)] for source in sources]
    sides = {"mean target": [mean.image()] * len(samples), "nearest source": nearest_targets}
    if spec.roles["source"].kind != "labels":
        sides["source itself"] = sources
    return {side: score(images, samples, spec) for side, images in sides.items()}


def compare(
    jobs: Sequence[PhaseJob], shards: str, split: Split, folder: Path, *, controls: bool = True
) -> dict[str, Scores]:
    """Scores on a split, by side (see the module). Without `controls`, no control is trained."""
    spec = dataset.load(shards)
    samples = list(dataset.read_split(shards, spec, split))

    def score_model(model: LoadedModel) -> Scores:
        return score(as_pictures(model, samples, spec), samples, spec)

    def train_and_score(name: str, from_shards: str) -> Scores:
        return score_model(load_model(trained(jobs, from_shards, folder / name)[0]))

    sides = {"trained": train_and_score("trained", shards)}
    if controls:
        sides["again"] = train_and_score("again", shards)
        sides["shuffled"] = train_and_score("shuffled", shuffled(shards, folder / "shuffled-shards"))
        with sign_error():
            sides["sign error"] = train_and_score("sign", shards)
    sides["untrained"] = score_model(untrained(folder / "trained" / jobs[-1].phase.name / "model"))
    return sides | baselines(shards, samples, spec)


def table(sides: Mapping[str, Scores]) -> str:
    """The scores as a Markdown table."""
    names = [name for name in next(iter(sides.values())) if name != "ms_ssim"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for side, scores in sides.items():
        lines.append(f"| {side} | " + " | ".join(f"{scores[name]:.4f}" for name in names) + " |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shards", required=True, help="shards folder")
    p.add_argument("--split", default="test", choices=["train", "val", "test"])
    p.add_argument("-c", "--config", help="the recipe to train")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting")
    p.add_argument("--models", nargs="+", default=[], metavar="FOLDER", help="compare these models instead")
    p.add_argument("--crops", metavar="FILE", help="with --models: draw their images into this file")
    options = p.parse_args()
    tune_process(torch.device("cpu"))
    began, cpu = time.time(), time.process_time()
    if options.models:
        sides, images = by_phase(options.models, options.shards, options.split)
        if options.crops:
            draw(list(images.values()), options.crops)
    elif options.config:
        config = configuration.load(options.config, options.set)
        with tempfile.TemporaryDirectory(prefix="learning-") as temp:
            phases = jobs(config.train, config.augment, config.evaluate)
            sides = compare(phases, options.shards, options.split, Path(temp))
    else:
        p.error("name a recipe (-c) or --models")
    sys.stdout.write(table(sides) + "\n")
    sys.stdout.write(f"{time.time() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU time\n")
    return 0


def draw(columns: Sequence[Sequence[Array]], path: str, rows: int = 4) -> None:
    """The middle of each image, a row a pair, a column a model; at most `rows` pairs."""
    grid = []
    for row in list(zip(*columns, strict=True))[:rows]:
        height, width = (side // 2 for side in row[0].shape[:2])
        part = (slice(height // 2, height // 2 + height), slice(width // 2, width // 2 + width))
        grid.append([image[part] for image in row])
    Image.fromarray(pictures.sheet(grid)).save(path, quality=88)


if __name__ == "__main__":
    sys.exit(main())
