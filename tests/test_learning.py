"""Training learns: a small model beats what needs no training, and controls with one thing wrong do worse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import learning, results
from pipeline import config as configuration
from pipeline.config import PipelineConfig
from stages import ingest, pair, shard
from stages.augment import AugmentConfig
from stages.base import Resources
from stages.tracking import NullRun
from stages.train import TrainConfig, jobs
from tests.small import make_shards

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more by waiting for a second thread than it does for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


UNET = {"kind": "pix2pix", "levels": 5, "width": 8, "norm": "instance", "discriminator_width": 8}
WHOLE = {
    "name": "whole",
    "kind": "whole",
    "epochs": 16,
    "decay_epochs": 6,
    "batch": 4,
    "learning_rate": 2e-3,
}


@pytest.mark.long
def test_the_right_pairs_and_the_right_loss_make_the_difference(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, {"train": [32], "val": [2], "test": [8]})
    config = TrainConfig.model_validate({"model": UNET, "phases": [WHOLE]})
    sides = learning.compare(jobs(config, AugmentConfig()), str(shards), "test", tmp_path)
    print(learning.table(sides))
    for side in ("shuffled", "sign error", "untrained", "mean target"):
        assert sides["trained"]["l1"] < 0.8 * sides[side]["l1"], side
        assert sides["trained"]["psnr"] > sides[side]["psnr"] + 1, side
    assert sides["trained"]["l1"] < sides["nearest source"]["l1"]  # these scenes are much alike
    assert sides["again"] == sides["trained"]


HD = {
    "kind": "pix2pixhd",
    "width": 8,
    "enhancers": 1,
    "downsamplings": 2,
    "blocks": 1,
    "enhancer_blocks": 1,
    "discriminator_width": 8,
    "discriminators": 2,
}
COARSE_TO_FINE = [
    {"name": "global", "kind": "global", "epochs": 15, "batch": 4, "learning_rate": 2e-3},
    {"name": "local", "kind": "local", "enhancers": 1, "epochs": 5, "batch": 4, "learning_rate": 2e-3},
    {"name": "joint", "kind": "joint", "enhancers": 1, "epochs": 8, "batch": 4, "learning_rate": 2e-3},
]


@pytest.mark.long
def test_local_and_joint_improve_on_what_global_gave(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, {"train": [16], "val": [2], "test": [8]}, size=(64, 64))
    config = TrainConfig.model_validate({"model": HD, "losses": {"l1": 100}, "phases": COARSE_TO_FINE})
    learning.trained(jobs(config, AugmentConfig()), str(shards), tmp_path)
    models = [str(tmp_path / phase / "model") for phase in ("global", "local", "joint")]
    scores, _ = learning.by_phase(models, str(shards), "test")
    print(learning.table(scores))
    coarse, local, joint = scores.values()
    assert joint["l1"] < local["l1"] < coarse["l1"]
    assert joint["ssim"] > coarse["ssim"]


# -- on real data, as small as can be ---------------------------------------------------------


def small(name: str, data: Path, folder: Path, *changes: str) -> PipelineConfig:
    """A run of docs/results.md at 64 pixels, for some hundred steps."""
    run = results.RUNS[name]
    jitter = name in ("facades", "camvid")
    values = [
        *results.settings(run, name, run.splits[-1], data, folder),
        f"shard.size={[72, 72] if jitter else [64, 64]}",
        *(["augment.crop=[64, 64]"] if jitter else []),
        "train.model.levels=6",
        "train.ema=0.99",
        "train.phases.0.batch=8",
        "train.phases.0.learning_rate=1.0e-3",
        *changes,
    ]
    return configuration.load(str(ROOT / run.recipe), values)


def sharded(config: PipelineConfig, folder: Path) -> str:
    """The run's shards."""
    objects, pairs, shards = (str(folder / name) for name in ("objects", "pairs", "shards"))
    ingest.run(config.ingest, Resources(), output=objects, track=NullRun())
    pair.run(config.pair, Resources(), output=pairs, track=NullRun(), objects=objects)
    shard.run(config.shard, Resources(), output=shards, track=NullRun(), pairs=pairs)
    return shards


@pytest.mark.long
@pytest.mark.ray
def test_held_out_facades_are_painted_better_than_by_controls(
    ray_local: None, shared_data: Path, tmp_path: Path
) -> None:
    epochs = ("train.phases.0.epochs=5", "train.phases.0.decay_epochs=2")
    config = small("facades", shared_data, tmp_path, *epochs)
    shards = sharded(config, tmp_path)
    sides = learning.compare(jobs(config.train, config.augment), shards, "test", tmp_path)
    print(learning.table(sides))
    for side in ("shuffled", "sign error", "untrained", "mean target", "nearest source"):
        assert sides["trained"]["l1"] < sides[side]["l1"], side
        assert sides["trained"]["ssim"] > sides[side]["ssim"], side
    assert abs(sides["again"]["l1"] - sides["trained"]["l1"]) < 1e-4


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "epochs"), [("camvid", 20), ("edges", 24), ("colour", 6), ("inpainting", 6)]
)
def test_held_out_pairs_are_painted_better_than_without_learning(
    name: str, epochs: int, ray_local: None, shared_data: Path, tmp_path: Path
) -> None:
    times = (f"train.phases.0.epochs={epochs}", f"train.phases.0.decay_epochs={epochs // 2}")
    results.photos(shared_data, tmp_path)
    config = small(name, shared_data, tmp_path, *times)
    shards = sharded(config, tmp_path)
    split = results.RUNS[name].splits[-1]
    sides = learning.compare(jobs(config.train, config.augment), shards, split, tmp_path, controls=False)
    print(learning.table(sides))
    for side in ("untrained", "mean target", "nearest source"):
        assert sides["trained"]["l1"] < sides[side]["l1"], side
        assert sides["trained"]["psnr"] > sides[side]["psnr"], side


@pytest.mark.long
@pytest.mark.ray
def test_local_and_joint_sharpen_street_scenes(ray_local: None, shared_data: Path, tmp_path: Path) -> None:
    run = results.RUNS["cityscapes-hd"]
    values = [
        *results.settings(run, "cityscapes-hd", "train", shared_data, tmp_path),
        "shard.size=[256, 128]",
        "train.model.width=8",
        "train.losses.l1=100",
        *(f"train.phases.{phase}.learning_rate=1.0e-3" for phase in range(3)),
        *(f"train.phases.{phase}.epochs={n}" for phase, n in enumerate((40, 12, 24))),
        *(f"train.phases.{phase}.decay_epochs={n}" for phase, n in enumerate((10, 4, 12))),
    ]
    config = configuration.load(str(ROOT / run.recipe), values)
    shards = sharded(config, tmp_path)
    learning.trained(jobs(config.train, config.augment), shards, tmp_path)
    models = [str(tmp_path / phase / "model") for phase in ("global", "local", "joint")]
    scores, made = learning.by_phase(models, shards, "train")
    learning.draw(list(made.values()), str(tmp_path / "phases.jpg"))
    print(learning.table(scores))
    coarse, local, joint = scores.values()
    assert joint["l1"] < coarse["l1"]
    assert local["sharpness"] > coarse["sharpness"]
    assert joint["sharpness"] > coarse["sharpness"]
