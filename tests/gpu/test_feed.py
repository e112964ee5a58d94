"""The training input of a GPU: the batches of a CPU, on the device before the step needs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pyarrow", reason="NOT RUN: shards are Parquet files")

from stages.config.augment import AugmentConfig
from stages.shards.feed import Feed
from tests.support.shards import make_shards

pytestmark = pytest.mark.gpu


def test_batches_are_those_of_a_cpu(device: torch.device, tmp_path: Path) -> None:
    spec = make_shards(tmp_path, {"train": [7, 4]}, instances=True)
    crop = AugmentConfig(crop=(24, 16))

    def feed(on: torch.device | str) -> Feed:
        return Feed(str(tmp_path), spec, batch=4, augment=crop, device=on, epochs=3)

    with feed("cpu") as expected, feed(device) as got:
        for epoch in range(3):
            for one, other in zip(expected.epoch(epoch), got.epoch(epoch), strict=True):
                assert other.keys == one.keys
                assert other.share == one.share
                assert other.source.device == device
                torch.cuda._sleep(10_000_000)  # the copy stream is ahead of the step
                assert other.source.cpu().equal(one.source)
                assert other.target.cpu().equal(one.target)
                assert one.instance is not None
                assert other.instance is not None
                assert other.instance.cpu().equal(one.instance)
