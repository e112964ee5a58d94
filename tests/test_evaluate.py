"""Evaluation: rules, and whole runs on what a small model generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages import evaluate, infer
from stages.base import Outcome, Resources
from stages.config.evaluate import EvaluateConfig
from stages.config.infer import InferConfig
from stages.errors import StageError, UserError
from stages.evaluate import is_candidate, nearest, same_size, summarise
from stages.images import encode, geometry
from stages.scoring import metrics
from stages.shards import dataset
from stages.tracking.run import NullRun
from tests.support.small import make_model, make_shards

ONE = Resources(infer_actors=1, io_threads=4, threads_per_worker=1, gpu=False)
TWO = Resources(infer_actors=2, io_threads=4, threads_per_worker=1, gpu=False)


def judge(output: Path, resources: Resources, generated: str, shards: str, **config: Any) -> Outcome:
    return evaluate.run(
        EvaluateConfig(**config),
        resources,
        output=str(output),
        track=NullRun(),
        images=generated,
        shards=shards,
    )


# -- rules --------------------------------------------------------------------------------------------


def test_the_larger_picture_is_made_as_small_as_the_smaller() -> None:
    small, large = np.zeros((10, 12, 3), np.uint8), np.zeros((20, 24, 3), np.uint8)
    assert {x.shape for x in same_size(small, large)} == {(10, 12, 3)}
    assert {x.shape for x in same_size(large, small)} == {(10, 12, 3)}
    assert same_size(small, small)[0] is small


def test_the_nearest_candidate_is_the_first_of_the_closest() -> None:
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, 256, (5000, 12), np.uint8)
    candidates[4500] = candidates[17]
    assert nearest(candidates[4500], candidates) == 17
    for _ in range(5):
        vector = rng.integers(0, 256, 12, np.uint8)
        distances = ((candidates.astype(float) - vector) ** 2).sum(1)
        assert nearest(vector, candidates) == distances.argmin()


def test_candidates_are_a_share_of_the_keys_whoever_asks() -> None:
    keys = [f"train/{i}" for i in range(4000)]
    chosen = {key for key in keys if is_candidate(key, 0.25)}
    assert 800 < len(chosen) < 1200
    assert chosen <= {key for key in keys if is_candidate(key, 0.5)}
    assert all(is_candidate(key, 1.0) for key in keys)


def test_a_summary_counts_what_is_missing_and_means_what_is_there() -> None:
    def row(group: str, l1: float | None, base: float | None = None) -> dict[str, Any]:
        return {
            "split": "test",
            "group": group,
            "error": None if l1 is not None else "missing",
            "l1": l1,
            "mean_target_l1": base,
        }

    summary = summarise(iter([row("a", 0.1, 0.4), row("b", 0.3, 0.2), row("b", None), row("", 0.2)]), ["l1"])
    assert summary["l1"] == pytest.approx(0.2)
    assert (summary["num_images"], summary["num_missing"]) == (3, 1)
    assert summary["baselines"] == {"mean_target": {"l1": pytest.approx(0.3), "num_images": 2}}
    assert summary["groups"]["test"]["num_images"] == 3
    assert summary["groups"]["test/b"]["l1"] == 0.3


# -- runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [6, 5], "test": [66, 5]})
    return str(folder)


@pytest.fixture(scope="module")
def generated(ray_local: None, tmp_path_factory: pytest.TempPathFactory, shards: str) -> str:
    folder = tmp_path_factory.mktemp("generated")
    model = str(make_model(tmp_path_factory.mktemp("model")))
    infer.run(InferConfig(), ONE, output=str(folder), track=NullRun(), model=model, shards=shards)
    return str(folder)


@pytest.mark.ray
def test_scores_and_baselines_are_those_worked_out_here_on_one_worker_or_two(
    tmp_path: Path, shards: str, generated: str
) -> None:
    outcome = judge(tmp_path / "one", ONE, generated, shards)
    assert outcome.counts == {"images": 71, "missing": 0}
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "one/metrics.parquet").to_pylist()}
    assert len(rows) == 71

    spec = dataset.load(shards)
    train = list(dataset.read_split(shards, spec, "train"))
    mean = np.floor(np.mean([s.images["target"] for s in train], axis=0) + 0.5).astype(np.uint8)
    small = [geometry.resize(s.picture(spec, "source"), (16, 16), "rgb").astype(int) for s in train]
    sums: dict[str, list[float]] = {"l1": [], "mean_target": [], "nearest": []}
    for sample in dataset.read_split(shards, spec, "test"):
        with Image.open(Path(generated) / "images" / f"{sample.key}.png") as image:
            fake = np.asarray(image).astype(float)
        real = sample.images["target"].astype(float)
        own = geometry.resize(sample.picture(spec, "source"), (16, 16), "rgb").astype(int)
        closest = train[int(np.argmin([((s - own) ** 2).sum() for s in small]))]
        for name, image in (("l1", fake), ("mean_target", mean), ("nearest", closest.images["target"])):
            sums[name].append(float(np.abs(image - real).mean() / 255))
        assert rows[sample.key]["l1"] == pytest.approx(sums["l1"][-1], abs=1e-6)
        assert rows[sample.key]["nearest_l1"] == pytest.approx(sums["nearest"][-1], abs=1e-6)
    assert summary["l1"] == pytest.approx(np.mean(sums["l1"]), abs=1e-6)
    assert summary["baselines"]["mean_target"]["l1"] == pytest.approx(np.mean(sums["mean_target"]), abs=1e-6)
    assert summary["baselines"]["nearest"]["num_images"] == 71
    assert summary["baselines"]["untrained"]["num_images"] == 64  # whole units, at least as many as asked for
    assert set(summary["groups"]) == {"test", "test/even", "test/odd"}

    judge(tmp_path / "two", TWO, generated, shards)
    assert json.loads((tmp_path / "two/summary.json").read_text()) == summary
    (tmp_path / "two/parts/part-00001.parquet").unlink()  # as a kill leaves it
    (tmp_path / "two/summary.json").unlink()
    judge(tmp_path / "two", ONE, generated, shards)
    assert json.loads((tmp_path / "two/summary.json").read_text()) == summary


@pytest.mark.ray
def test_images_of_another_system_are_judged_by_their_names(
    ray_local: None, tmp_path: Path, shards: str
) -> None:
    """Half as large and named its own way; two are not there."""
    spec = dataset.load(shards)
    folder = tmp_path / "theirs"
    folder.mkdir()
    for index, sample in enumerate(dataset.read_split(shards, spec, "test")):
        if index > 1:
            picture = geometry.resize(sample.images["target"], (16, 16), "rgb")
            (folder / f"{sample.key.rpartition('/')[2]}_fake.png").write_bytes(encode.encode_png(picture))
    settings: dict[str, Any] = {
        "images": str(folder),
        "names": "{name}_fake.png",
        "baselines": {"untrained": 0, "nearest": 0},
    }
    outcome = judge(tmp_path / "out", ONE, "", shards, **settings)
    assert outcome.counts == {"images": 69, "missing": 2}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["l1"] == 0
    assert summary["psnr"] == metrics.PSNR_OF_IDENTICAL
    assert set(summary["baselines"]) == {"mean_target"}
    with pytest.raises(StageError, match="2 targets have no usable image"):
        judge(tmp_path / "strict", ONE, "", shards, max_missing_fraction=0, **settings)


@pytest.mark.ray
def test_label_pictures_are_scored_by_the_palette(ray_local: None, tmp_path: Path, shards: str) -> None:
    spec = dataset.load(shards)
    colors = [(120, 170, 230), (90, 90, 95), (200, 60, 40)]
    folder = tmp_path / "theirs"
    for sample in dataset.read_split(shards, spec, "test"):
        exact = np.array(colors, np.uint8)[np.minimum(sample.images["source"][..., 0], 2)]
        exact[:, :4] = colors[0]
        path = folder / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode.encode_png(exact))
    judge(
        tmp_path / "out",
        ONE,
        "",
        shards,
        images=str(folder),
        palette={"colors": colors},
        baselines={"untrained": 0, "nearest": 0},
    )
    scores = json.loads((tmp_path / "out/summary.json").read_text())["segmentation"]["palette"]
    matrix = np.array(json.loads((tmp_path / "out/confusion.json").read_text())["palette"])
    assert matrix.sum() == 71 * 32 * 32
    assert scores["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
    assert 0.9 < scores["pixel_accuracy"] < 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"lpips": {"backbone": "gone.pth"}},
            "evaluate.lpips.backbone: gone.pth: the weights cannot be read",
        ),
        ({"images": "nowhere"}, "evaluate.images: .*nowhere: there is no such folder"),
        ({}, "evaluate.images: name a folder"),
        ({"split": "val"}, "evaluate.split: the shards hold no pair"),
    ],
)
@pytest.mark.ray
def test_what_is_absent_is_named_and_gives_no_number(
    ray_local: None, tmp_path: Path, shards: str, config: dict[str, Any], message: str
) -> None:
    if "lpips" in config:
        config = {**config, "images": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        judge(tmp_path / "out", ONE, "", shards, **config)
    assert not (tmp_path / "out/summary.json").exists()
