"""Evaluation: rules, and whole runs on what a small model generated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import nn

from stages import evaluate
from stages.base import Outcome, Resources
from stages.config.evaluate import EvaluateConfig, LpipsConfig
from stages.errors import StageError, UserError
from stages.evaluate import same_size
from stages.images import encode, geometry
from stages.inference import outputs
from stages.inference.translator import Translator
from stages.models.architecture import InputSpec, Picture, Pix2PixHD, Preprocessing
from stages.models.build import build_encoder, build_generator
from stages.models.files.saved import load_model, save_model
from stages.scoring import metrics
from stages.scoring.efficientnet import PerceptualFeatures
from stages.scoring.lpips import LpipsScorer, lpips_name
from stages.shards import dataset
from stages.tracking.run import Run
from tests.scoring.test_lpips import alexnet
from tests.scoring.test_networks import script
from tests.support.here import workers_here
from tests.support.models import CLASSES, make_model
from tests.support.shards import make_shards

ONE = Resources(infer_actors=1, io_threads=4, threads_per_worker=1, gpu=False)
TWO = Resources(infer_actors=2, io_threads=4, threads_per_worker=1, gpu=False)


def score(output: Path, resources: Resources, generated: str, shards: str, **config: Any) -> Outcome:
    return evaluate.run(
        EvaluateConfig(**config),
        resources,
        output=str(output),
        track=Run(),
        images=generated,
        shards=shards,
    )


# -- rules --------------------------------------------------------------------------------------------


def test_the_larger_picture_is_made_as_small_as_the_smaller() -> None:
    small, large = np.zeros((10, 12, 3), np.uint8), np.zeros((20, 24, 3), np.uint8)
    assert {x.shape for x in same_size(small, large)} == {(10, 12, 3)}
    assert {x.shape for x in same_size(large, small)} == {(10, 12, 3)}
    assert same_size(small, small)[0] is small


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"images": "/no"}, "images: /no"),
        ({"lpips": {"backbone": "/no.pth"}}, "lpips.backbone: /no.pth"),
        ({"lpips": {"backbone": "/", "linear": "/no.pth"}}, "lpips.linear: /no.pth"),
        ({"inception": {"weights": "/no.pt"}}, "inception.weights: /no.pt"),
        ({"segmenter": {"weights": "/no.pt", "classes": 2}}, "segmenter.weights: /no.pt"),
    ],
)
def test_what_is_not_there_is_named_before_training(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"evaluate.{named}: there is no such file or folder"):
        evaluate.check(EvaluateConfig(**config))


def test_the_digest_follows_the_images_of_another_system(tmp_path: Path) -> None:
    config, digests = EvaluateConfig(images=str(tmp_path)), set()
    for name, content in (("1.png", b"one"), ("2.png", b"two"), ("1.png", b"other")):
        (tmp_path / name).write_bytes(content)
        digests.add(evaluate.digest(config))
    assert len(digests) == 3
    assert evaluate.digest(EvaluateConfig()) == ""


@pytest.mark.parametrize("name", ["inception", "segmenter", "lpips"])
def test_the_digest_follows_weights_that_are_replaced(tmp_path: Path, name: str) -> None:
    (weights := tmp_path / "w.pt").write_bytes(b"one")
    settings: dict[str, Any] = {
        "inception": {"weights": str(weights)},
        "segmenter": {"weights": str(weights), "classes": 2},
        "lpips": {"backbone": str(weights)},
    }
    config = EvaluateConfig(**{name: settings[name]})
    before = evaluate.digest(config)
    assert evaluate.digest(config) == before != ""
    weights.write_bytes(b"another")
    assert evaluate.digest(config) != before
    weights.unlink()
    assert evaluate.digest(config) == ""  # for a run until training


# -- runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [6, 5], "test": [66, 5]})
    return str(folder)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory, shards: str) -> str:
    """What infer leaves of two samples a source; the second is the first, mirrored."""
    folder = tmp_path_factory.mktemp("generated")
    make_model(folder / "model")
    (folder / outputs.MANIFEST).write_text(json.dumps({"config": {"format": "png", "samples": 2}}))
    translator = Translator(load_model(folder / "model"))
    for sample in dataset.read_split(shards, dataset.load(shards), "test"):
        (image,) = translator.translate([sample.images["source"]])
        for number, picture in enumerate((image, image[:, ::-1].copy())):
            path = folder / outputs.output_name(sample.key, ".png", number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode.encode_png(picture))
    return str(folder)


@pytest.mark.ray
def test_scores_and_baselines_are_those_worked_out_here_on_one_worker_or_two(
    ray_local: None, tmp_path: Path, shards: str, generated: str
) -> None:
    outcome = score(tmp_path, TWO, generated, shards)
    assert outcome.counts == {"images": 71, "missing": 0}
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "metrics.parquet").to_pylist()}
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
        diversity = np.abs(fake - fake[:, ::-1]).mean() / 255
        assert rows[sample.key]["diversity"] == pytest.approx(diversity, abs=1e-6)
    assert summary["l1"] == pytest.approx(np.mean(sums["l1"]), abs=1e-6)
    assert summary["baselines"]["mean_target"]["l1"] == pytest.approx(np.mean(sums["mean_target"]), abs=1e-6)
    assert summary["baselines"]["nearest"]["num_images"] == 71
    assert summary["baselines"]["untrained"]["num_images"] == 64  # whole units, at least as many as asked for
    assert set(summary["groups"]) == {"test", "test/even", "test/odd"}

    (tmp_path / "table/part-00000.parquet").unlink()  # as a kill leaves it: 64 of the 71 images to do
    (tmp_path / "summary.json").unlink()
    score(tmp_path, ONE, generated, shards)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@pytest.fixture
def workers_in_process() -> Iterator[None]:
    with workers_here(evaluate):
        yield


@pytest.mark.ray
def test_an_encoder_of_grey_targets_has_an_untrained_baseline(
    ray_local: None, workers_in_process: None, tmp_path: Path
) -> None:
    folder, arch = tmp_path / "shards", Pix2PixHD(enhancers=0, width=4, downsamplings=2, feature_encoder=True)
    spec = make_shards(folder, {"test": [2]}, instances=True, target="grey")
    inputs = InputSpec(source="labels", classes=CLASSES, instances=True, target_channels=1)
    save_model(
        generated := tmp_path / "generated" / "model",
        build_generator(arch, inputs),
        architecture=arch,
        inputs=inputs,
        preprocessing=Preprocessing(pictures={"target": Picture(kind="grey")}),
        encoder=build_encoder(arch, inputs),
    )
    (generated.parent / outputs.MANIFEST).write_text(json.dumps({"config": {"format": "png", "samples": 1}}))
    for sample in dataset.read_split(str(folder), spec, "test"):
        path = generated.parent / outputs.output_name(sample.key, ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode.encode_png(sample.images["target"]))
    outcome = score(tmp_path / "out", ONE, str(generated.parent), str(folder))
    assert outcome.metrics["l1"] == 0 < outcome.metrics["untrained_l1"]


@pytest.mark.ray
def test_targets_that_would_be_compared_with_one_image_are_refused(
    ray_local: None, workers_in_process: None, tmp_path: Path
) -> None:
    make_shards(folder := tmp_path / "shards", {"test": [2]})
    table = pq.read_table(file := folder / "test-00000.parquet")
    pq.write_table(table.set_column(0, "key", pa.array(["a/1", "b/1"])), file)
    (tmp_path / "1.png").write_bytes(encode.encode_png(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(UserError, match=r"evaluate.names: {name}.png names 1 images for 2 targets"):
        score(tmp_path / "out", ONE, "", str(folder), images=str(tmp_path), names="{name}.png")


@pytest.mark.ray
def test_images_of_another_system_are_scored_by_their_names(
    ray_local: None, workers_in_process: None, tmp_path: Path, shards: str
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
    outcome = score(tmp_path / "out", ONE, "", shards, **settings)
    assert outcome.counts == {"images": 69, "missing": 2}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["l1"] == 0
    assert summary["psnr"] == metrics.PSNR_OF_IDENTICAL
    assert set(summary["baselines"]) == {"mean_target"}
    with pytest.raises(StageError, match="2 targets have no usable image"):
        score(tmp_path / "out", ONE, "", shards, max_missing_fraction=0, **settings)


def test_images_in_another_systems_folder_have_the_same_row_and_intervals_as_our_own(
    workers_in_process: None, tmp_path: Path, shards: str, generated: str
) -> None:
    plain: dict[str, Any] = {"baselines": {"mean_target": False, "untrained": 0, "nearest": 0}}
    own = score(tmp_path / "own", ONE, generated, shards, **plain)
    theirs = score(tmp_path / "theirs", ONE, "", shards, images=f"{generated}/images", **plain)
    assert theirs.metrics == {name: own.metrics[name] for name in theirs.metrics}
    assert {"l1", "l1_low", "l1_high"} <= set(theirs.metrics)
    assert set(own.metrics) - set(theirs.metrics) == {"diversity", "diversity_low", "diversity_high"}


def test_the_nearest_source_of_a_training_pair_is_another_pairs(
    workers_in_process: None, tmp_path: Path, shards: str
) -> None:
    train = list(dataset.read_split(shards, dataset.load(shards), "train"))
    (tmp_path / "theirs").mkdir()
    for sample in train:
        picture = encode.encode_png(sample.images["target"])
        (tmp_path / f"theirs/{sample.key.rpartition('/')[2]}.png").write_bytes(picture)
    settings: dict[str, Any] = {"split": "train", "images": str(tmp_path / "theirs"), "names": "{name}.png"}
    score(tmp_path / "out", ONE, "", shards, **settings)
    rows = pq.read_table(tmp_path / "out/metrics.parquet", columns=["l1", "nearest_l1"]).to_pylist()
    assert len(rows) == len(train)
    assert all(row["l1"] == 0 < row["nearest_l1"] for row in rows)


def test_images_too_small_for_lpips_have_none_and_without_weights_it_is_said(
    workers_in_process: None, tmp_path: Path, shards: str, generated: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name, side in (("small", 30), ("large", 31)):
        for sample in dataset.read_split(shards, dataset.load(shards), "test"):
            path = tmp_path / name / f"{sample.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode.encode_png(geometry.resize(sample.images["target"], (64, side), "rgb")))
    lpips = {"backbone": str(alexnet(tmp_path / "alex.safetensors"))}
    plain: dict[str, Any] = {
        "baselines": {"mean_target": False, "untrained": 0, "nearest": 0},
        "lpips": lpips,
    }
    found = [
        score(tmp_path / f"{name}-out", ONE, "", shards, images=str(tmp_path / name), **plain).metrics
        for name in ("small", "large")
    ]
    assert [lpips_name(LpipsConfig(**lpips)) in metrics_ for metrics_ in found] == [False, True]
    assert "l1" in found[0]
    assert "LPIPS" not in caplog.text
    score(tmp_path / "none", ONE, "", shards, images=str(tmp_path / "small"), **plain | {"lpips": None})
    assert caplog.text.count("leaves out LPIPS: evaluate.lpips.backbone names no weights") == 1


class Corner(nn.Module):
    """Two features: the means of red and blue in the corner that is at the top and at the left."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :16, :16].float().mean((2, 3))[:, [0, 2]]


class ClassScores(nn.Module):
    """Scores of the classes of `scene`: sky is blue, houses are red, the street is neither."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        red, blue = x[:, 0], x[:, 2]
        return torch.stack([blue, torch.full_like(red, 0.6), red, torch.full_like(red, -1.0)], 1)


@pytest.mark.ray
def test_networks_score_the_images_as_they_do_one_by_one(
    ray_local: None, workers_in_process: None, tmp_path: Path, shards: str
) -> None:
    """Mirrored targets: distances, and the segmenter's and the palette's classes, worked out here."""
    spec = dataset.load(shards)
    samples = list(dataset.read_split(shards, spec, "test"))
    for sample in samples:
        path = tmp_path / "theirs" / f"{sample.key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode.encode_png(sample.images["target"][:, ::-1].copy()))
    features = script(Corner(), tmp_path / "features.pt")
    lpips = {"backbone": str(alexnet(tmp_path / "alex.safetensors"))}
    inception = {
        "weights": str(features),
        "published": hashlib.sha256(features.read_bytes()).hexdigest(),
    }
    colors = [(120, 170, 230), (90, 90, 95), (200, 60, 40)]
    segmenter = {
        "weights": str(script(ClassScores(), tmp_path / "classes.pt")),
        "classes": 4,
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
    }
    outcome = score(
        tmp_path / "out",
        TWO,
        "",
        shards,
        images=str(tmp_path / "theirs"),
        lpips=lpips,
        inception=inception,
        segmenter=segmenter,
        palette=colors,
        perceptual="efficientnet_lite0",
        baselines={"untrained": 0, "nearest": 0},
    )
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    scorer, name = LpipsScorer(LpipsConfig(**lpips), "cpu"), lpips_name(LpipsConfig(**lpips))
    targets = [sample.images["target"] for sample in samples]
    mirrored = [target[:, ::-1] for target in targets]
    distances = scorer(mirrored, targets)
    assert summary[name] == pytest.approx(np.mean(distances), rel=1e-4)

    real, fake = (
        np.array([x[:16, :16, [0, 2]].mean((0, 1), np.float64) for x in images])
        for images in (targets, mirrored)
    )
    covariances = np.cov(fake.T), np.cov(real.T)
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    fid = ((fake.mean(0) - real.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root
    assert summary["fid"] == pytest.approx(fid, rel=1e-3)
    assert summary["kid"] == pytest.approx(metrics.KernelDistance(fake, real)(), rel=1e-3)
    assert summary["feature_images"] == 71
    features_of = PerceptualFeatures("cpu")
    kernel = metrics.KernelDistance(features_of(mirrored), features_of(targets))()
    assert summary["kernel_efficientnet_lite0"] == pytest.approx(kernel, rel=1e-2, abs=1e-6)
    assert 0 < summary["frechet_efficientnet_lite0"] < 50

    expected = np.zeros((4, 4), np.int64)
    for sample in samples:
        labels = sample.images["source"][:, :, 0].astype(int)
        np.add.at(expected, (labels, labels[:, ::-1]), 1)
    matrices = json.loads((tmp_path / "out/confusion.json").read_text())
    assert matrices["generated"] == expected.tolist()
    assert matrices["palette"] == expected[:3, :3].tolist()
    assert matrices["target"] == np.diag(expected.sum(1)).tolist()
    assert outcome.metrics["target_pixel_accuracy"] == 1
    for matrix, prefix in (("generated", ""), ("palette", "palette_")):  # neither hides the other
        scores = summary["segmentation"][matrix]
        assert {name: outcome.metrics[f"{prefix}{name}"] for name in scores} == scores
        assert all(f"{prefix}{name}" in summary["intervals"] for name in scores)
    accuracy = pytest.approx(np.trace(expected) / expected.sum())
    assert summary["segmentation"]["generated"]["pixel_accuracy"] == accuracy
    assert summary["segmentation"]["palette"]["pixel_accuracy"] == accuracy
    assert outcome.metrics["fid"] == summary["fid"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"lpips": {"backbone": "gone.pth"}},
            "evaluate.lpips.backbone: gone.pth: the weights cannot be read",
        ),
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
        score(tmp_path / "out", ONE, "", shards, **config)
    assert not (tmp_path / "out/summary.json").exists()


@pytest.mark.parametrize(
    ("name", "run", "values", "known"),
    [
        ("l1", {"of_images": True}, {}, True),
        ("lpips", {}, {}, False),
        ("mean_iou", {}, {}, False),
        ("mean_iou", {}, {"palette": [0, 255]}, True),
        ("mean_iou", {"of_images": True}, {"palette": [0, 255]}, False),
        ("palette_mean_iou", {}, {"palette": [0, 255]}, False),
        ("palette_mean_iou", {}, {"palette": [0, 255], "segmenter": {"weights": "/no", "classes": 2}}, True),
        ("fid", {}, {"inception": {"weights": "/no", "published": "0" * 64}}, True),  # no weights are read
        ("fid", {}, {"inception": {"weights": "/no"}}, False),
        ("kid_0123abcd_64px", {}, {"inception": {"weights": "/no", "size": 64}}, True),
        ("lpips_alex", {"of_images": True}, {"lpips": {"backbone": "/no"}}, True),
        ("lpips_alex", {"side": 30}, {"lpips": {"backbone": "/no"}}, False),
        ("lpips_alex", {}, {"lpips": {"backbone": "/no", "linear": "/no"}}, False),
        ("diversity_lpips_vgg_0123abcd", {"samples": 2}, {"lpips": {"kind": "vgg", "backbone": "/no"}}, True),
        ("diversity", {}, {}, False),
        ("diversity", {"samples": 2}, {}, True),
        ("ms_ssim", {"side": 175}, {}, False),
        ("ms_ssim", {"side": 176}, {}, True),
    ],
)
def test_a_metric_that_is_not_measured_is_named(
    name: str, run: dict[str, Any], values: dict[str, Any], known: bool
) -> None:
    of_run = {"samples": 1, "side": 64} | run
    with nullcontext() if known else pytest.raises(UserError, match=f"order_by: {name} is not measured"):
        evaluate.check_metric(EvaluateConfig(**values), name, "order_by", **of_run)
