"""Training learns: a small model beats what needs no training, and controls with one thing wrong do worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import learning, losses
from stages.config.augment import AugmentConfig
from stages.config.train import TrainConfig, jobs
from tests.support.shards import make_shards

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


@pytest.mark.long
def test_losses_are_compared_by_the_same_seeds_and_finished_runs_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "shards", {"train": [4], "val": [2], "test": [3]})
    output = tmp_path / "losses.jsonl"
    size = ["--epochs", "1", "--levels", "3", "--width", "2"]
    words = ["losses", "--shards", str(tmp_path / "shards"), "--output", str(output), *size]
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "1"])
    losses.main()
    before = output.read_text()
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "2"])
    losses.main()
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_text().startswith(before)
    assert [(run["side"], run["seed"]) for run in runs] == [(s, n) for n in range(2) for s in losses.SIDES]
    assert capsys.readouterr().out.count("| 2 |") == len(losses.SIDES)
