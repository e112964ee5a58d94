"""Networks that score: what a number is called, and that absent or wrong weights give none."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.config.evaluate import InceptionConfig, SegmenterConfig
from stages.errors import UserError
from stages.scoring import networks
from stages.scoring.networks import Inception, Segmenter


def script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


class Means(nn.Module):
    """Two features: the mean of the first channel, and of the last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))[:, [0, 2]]


class Threshold(nn.Module):
    """Class 1 where the first channel is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x[:, :1] > 0).float()
        return torch.cat([1 - bright, bright], 1)


class Ids(Threshold):
    """The same as ids."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[:, :1] > 0).float()


def test_other_weights_than_the_published_give_distances_of_another_name(tmp_path: Path) -> None:
    weights = script(Means(), tmp_path / "means.pt")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    features = InceptionConfig(weights=str(weights))
    assert networks.feature_names(features) == (f"fid_{digest[:8]}", f"kid_{digest[:8]}")
    named = InceptionConfig(weights=str(weights), published=digest)
    assert networks.feature_names(named) == ("fid", "kid")
    resized = InceptionConfig(weights=str(weights), published=digest, size=299)
    assert networks.feature_names(resized) == ("fid_299px", "kid_299px")


def test_a_file_that_is_no_network_is_refused_by_key_and_reason(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"not a network")
    with pytest.raises(UserError, match=r"evaluate\.inception\.weights: .*neither TorchScript nor ONNX"):
        Inception(InceptionConfig(weights=str(tmp_path / "x.pt")), "cpu")
    torch.save({"Mixed_7c.branch_pool.conv.weight": torch.zeros(2)}, tmp_path / "pt_inception.pth")
    with pytest.raises(UserError, match="1 weights without the network they belong to: neither TorchScript"):
        Inception(InceptionConfig(weights=str(tmp_path / "pt_inception.pth")), "cpu")
    with pytest.raises(
        UserError, match=r"evaluate\.inception\.weights: gone\.pt: the weights cannot be read"
    ):
        networks.feature_names(InceptionConfig(weights="gone.pt"))


class ScoresOrFeatures(nn.Module):
    """As NVIDIA's Inception: class scores, or features on request."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = x.float().mean((2, 3))
        return means if return_features else means.softmax(1)


def test_features_are_requested_of_an_inception_that_else_gives_class_scores(tmp_path: Path) -> None:
    config = InceptionConfig(weights=str(script(ScoresOrFeatures(), tmp_path / "either.pt")))
    image = np.full((8, 8, 3), 50, np.uint8)
    assert Inception(config, "cpu")([image, image]).tolist() == [[50, 50, 50]] * 2


def test_features_and_classes_come_from_the_users_networks(tmp_path: Path) -> None:
    image = np.zeros((8, 10, 3), np.uint8)
    image[:, 5:, 0] = 255
    means = script(Means(), tmp_path / "means.pt")
    features = Inception(InceptionConfig(weights=str(means), size=None), "cpu")([image])
    assert features.tolist() == [[127.5, 0]]
    threshold = script(Threshold(), tmp_path / "threshold.pt")
    config = SegmenterConfig(weights=str(threshold), classes=2, train_ids={7: 0, 9: 1})
    segmenter = Segmenter(config, "cpu")
    ids = segmenter(image)
    assert ids.shape == (8, 10)
    assert (ids[:, 5:] == 1).all()
    assert (ids[:, :5] == 0).all()
    one_channel = script(Ids(), tmp_path / "ids.pt")  # ids as (N, 1, H, W)
    assert (Segmenter(config.model_copy(update={"weights": str(one_channel)}), "cpu")(image) == ids).all()
    labels = np.array([[[7], [9], [3]]], np.uint8)
    assert segmenter.actual(labels).tolist() == [[0, 1, -1]]


class Hundreds(Threshold):
    """300 where the first channel is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 300 * (x[:, :1] > 0).float()


def test_ids_beyond_a_byte_are_an_error_and_no_other_ids(tmp_path: Path) -> None:
    config = SegmenterConfig(weights=str(script(Hundreds(), tmp_path / "hundreds.pt")), classes=2)
    with pytest.raises(UserError, match=r"evaluate\.segmenter\.weights: it gives 0 to 300: no class ids"):
        Segmenter(config, "cpu")(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8))
    for wrong in ({"classes": 257}, {"train_ids": {256: 0}}, {"train_ids": {-1: 0}}, {"train_ids": {0: 256}}):
        with pytest.raises(ValidationError):
            SegmenterConfig(**{"weights": "w", "classes": 2} | wrong)
    outside = SegmenterConfig(weights=config.weights, classes=2, train_ids={7: -1, 9: 255})
    assert Segmenter(outside, "cpu").actual(np.array([[[7], [9]]], np.uint8)).tolist() == [[-1, 255]]


def test_a_segmenter_may_be_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "same",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, None, None])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3, None, None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "same.onnx").write_bytes(model.SerializeToString())
    config = SegmenterConfig(weights=str(tmp_path / "same.onnx"), classes=3, mean=(0, 0, 0), std=(1, 1, 1))
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, :, 2] = 200
    assert Segmenter(config, "cpu")(image).tolist() == [[2, 2], [0, 0]]
