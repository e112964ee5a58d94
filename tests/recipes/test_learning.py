"""Training learns: a small model beats what needs no training, and controls with one thing wrong do worse."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import learning
from stages.config.shard import AugmentConfig
from stages.config.train import TrainConfig, jobs
from tests.support.small import make_shards

pytestmark = pytest.mark.usefixtures("one_thread")


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
    config = TrainConfig.model_validate({"model": UNET, "phases": [WHOLE], "precision": "float32"})
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
    {"name": "local", "kind": "local", "enhancers": 1, "epochs": 10, "batch": 4, "learning_rate": 2e-3},
    {"name": "joint", "kind": "joint", "enhancers": 1, "epochs": 8, "batch": 4, "learning_rate": 2e-3},
]


@pytest.mark.long
def test_local_and_joint_improve_on_what_global_gave(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    make_shards(shards, {"train": [16], "val": [2], "test": [8]}, size=(64, 64))
    values = {"model": HD, "losses": {"l1": 100}, "phases": COARSE_TO_FINE, "precision": "float32"}
    config = TrainConfig.model_validate(values)
    learning.trained(jobs(config, AugmentConfig()), str(shards), tmp_path)
    models = [str(tmp_path / phase / "model") for phase in ("global", "local", "joint")]
    scores, _ = learning.by_phase(models, str(shards), "test")
    print(learning.table(scores))
    coarse, local, joint = scores.values()
    assert joint["l1"] < local["l1"] < coarse["l1"]
    assert joint["ssim"] > coarse["ssim"]
