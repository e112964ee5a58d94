"""A model takes the very files it was trained on: every stage, the served model and an export read them by
the rules in its `model.json`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from pipeline import config as configuration
from pipeline.dag import steps
from pipeline.runner import execute, plan, select
from pipeline.session import run_view
from stages import evaluate, infer
from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.evaluate import EvaluateConfig
from stages.config.infer import InferConfig
from stages.config.train import TrainConfig, jobs
from stages.images import kinds
from stages.images.kinds import Array
from stages.inference import outputs
from stages.inference.translator import Translator
from stages.models.files.export import ExportedTranslator
from stages.models.files.saved import load_model
from stages.scoring import baselines
from stages.shards import dataset
from stages.shards.feed import Feed
from stages.tracking.run import Run
from stages.tracking.served import Served
from stages.train import preprocessing
from stages.training.loop import Task, Worker, train_phase
from stages.training.news import Channel, Mailbox
from tests.images.test_formats import tiff
from tests.support.here import tasks_here, workers_here
from tests.support.models import scene

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE, PAIRS = 72, 2
HERE = Resources(infer_actors=1, io_threads=2, threads_per_worker=1, gpu=False)
UNET = {
    "kind": "pix2pix",
    "levels": 3,
    "width": 4,
    "norm": "instance",
    "dropout": "none",
    "discriminator_layers": 0,
}
EDGES = {"kind": "pix2pixhd", "width": 4, "enhancers": 0, "downsamplings": 1, "blocks": 1} | {
    "discriminator_width": 4, "discriminator_layers": 1, "discriminators": 1, "feature_encoder": False,
}  # fmt: skip

COLOURS = np.array([[0, 0, 0], [128, 64, 128], [70, 70, 70]], np.uint8)


def png(array: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def ids(index: int) -> Array:
    return scene(index, SIDE, SIDE)["source"][:, :, 0]


def void(index: int) -> Array:
    """Class ids 0 to 2, and a patch of 255."""
    drawn = ids(index)
    drawn[:8, :8] = 255
    return drawn


def deep(index: int, channels: int = 1) -> Array:
    """Values of 12 bits."""
    rng = np.random.default_rng(index)
    drawn = rng.integers(0, 4096, (SIDE, SIDE, channels), np.uint16)
    return drawn[:, :, 0] if channels == 1 else drawn


def shallow(index: int, channels: int) -> Array:
    return np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, channels), np.uint8)


LABELS = {"kinds": {"source": "labels"}, "classes": 4}
PALETTE = {"kinds": {"source": "labels"}, "classes": 3}
FOUR = {"kinds": {"source": "channels"}, "channels": 4}
GREY = {"source": "grey16", "target": "grey16"}
RULES: dict[str, tuple[dict[str, Any], str, Callable[[int], bytes]]] = {
    "ignore_label": ({**LABELS, "ignore_label": 255}, "png", lambda n: png(void(n))),
    "void_class": ({**LABELS, "ignore_label": 255, "void_class": 0}, "png", lambda n: png(void(n))),
    "palette": ({**PALETTE, "palette": COLOURS.tolist()}, "png", lambda n: png(COLOURS[ids(n)])),
    "palette of greys": (
        {**PALETTE, "palette": [0, 90, 255], "ignore_label": 1, "void_class": 2},
        "png",
        lambda n: png(np.array([0, 90, 255], np.uint8)[ids(n)]),
    ),
    "instances": (LABELS, "png", lambda n: png(ids(n))),
    "range": ({"kinds": {"source": "grey16"}, "range": {"source": [0, 4095]}}, "png", lambda n: png(deep(n))),
    "range in 8 bits": ({"range": {"source": [100, 4095]}}, "tif", lambda n: tiff(deep(n, 3))),
    "percentile": ({**FOUR, "range": {"source": "percentile"}}, "tif", lambda n: tiff(deep(n, 4))),
    "range of channels": ({**FOUR, "range": {"source": [-500, 4095]}}, "tif", lambda n: tiff(deep(n, 4))),
    "range of floats": (
        {"kinds": {"source": "grey"}, "range": {"source": [0, 9]}},
        "npy",
        lambda n: npy((deep(n) / 400).astype(np.float32)),
    ),
    "range of the target": ({"kinds": GREY, "range": [0, 4095]}, "png", lambda n: png(deep(n))),
    "white is zero": (
        {"kinds": {"source": "grey16"}},
        "tif",
        lambda n: tiff(deep(n) * 16, photometric="miniswhite"),
    ),
    "colour as grey": ({"kinds": {"source": "grey"}}, "png", lambda n: png(shallow(n, 3))),
    "alpha": ({}, "png", lambda n: png(shallow(n, 4))),
    "grey with alpha": ({"kinds": {"source": "grey"}}, "png", lambda n: png(shallow(n, 2))),
    "lightness": ({"kinds": {"source": "lab_l", "target": "lab_ab"}}, "png", lambda n: png(shallow(n, 3))),
}
"""Settings of the stage shard, and the source files that need them."""


def training(network: dict[str, Any]) -> dict[str, Any]:
    """The section `train`: one epoch."""
    kind = "whole" if network["kind"] == "pix2pix" else "global"
    phase = {"name": kind, "kind": kind, "epochs": 1, "batch": 1}
    return {"model": network, "losses": {}, "phases": [phase], "precision": "float32"}


def shards_of(folder: Path, settings: dict[str, Any], suffix: str, source: Callable[[int], bytes]) -> str:
    """The files of the pairs, and what ingest, pair and shard make of them."""
    roles = {"source": f"{{key}}.{suffix}", "target": "{key}.png", "instance": "{key}.png"}
    twelve_bits = settings.get("kinds", {}).get("target") == "grey16"
    for role in roles:
        (folder / role).mkdir(parents=True)
    for n in range(PAIRS):
        target = deep(n + 10) if twelve_bits else shallow(n + 10, 3)
        (folder / "source" / f"{n}.{suffix}").write_bytes(source(n))
        (folder / "target" / f"{n}.png").write_bytes(png(target))
        (folder / "instance" / f"{n}.png").write_bytes(png(scene(n, SIDE, SIDE)["instance"][:, :, 0]))
    file = folder / "c.yaml"
    used = roles if settings is LABELS else ("source", "target")
    locations = [{"uri": str(folder / role), "role": role, "pattern": roles[role]} for role in used]
    content = {
        "workspace": str(folder / "ws"),
        "ingest": {"locations": locations},
        "pair": {"split": {"val": 0, "test": 0}},
        "shard": {"size": [SIDE, SIDE], **settings},
        "train": training(UNET),
    }
    file.write_text(yaml.safe_dump(content))
    config = configuration.load(str(file), [], None)
    chosen = select(plan(steps(config), config.workspace), only=None, until="shard")
    with tasks_here():
        execute(chosen, config.resources, parent=Run(), view=run_view(config, chosen, ""))
    return str(chosen[-1].folder)


def trained(folder: Path, shards: str, network: dict[str, Any]) -> Path:
    """The model of one epoch, as a training worker leaves it."""
    spec = dataset.load(shards)
    (job,) = jobs(TrainConfig.model_validate(training(network)), AugmentConfig(mirror=False))
    inputs = spec.inputs()
    ready, rows = preprocessing(job, spec), spec.rows("train")
    task = Task(
        job=job,
        name="",
        resources=HERE,
        inputs=inputs,
        preprocessing=ready,
        rows=rows,
        output=str(folder),
        before="",
    )
    with Feed(shards, spec, threads=1, epochs=1) as feed:
        train_phase(task, Worker(), feed, Channel(Mailbox().post), lambda *_: (None, {}))
    return folder / "model"


@pytest.mark.parametrize("rule", RULES)
def test_every_stage_reads_a_file_as_training_did(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, suffix, source = RULES[rule]
    shards = shards_of(tmp_path, settings, suffix, source)
    spec = dataset.load(shards)
    folder = trained(tmp_path, shards, EDGES if rule == "instances" else UNET)
    model = load_model(folder)
    translator = Translator(model)
    samples = list(dataset.read_split(shards, spec, "train"))
    assert len(samples) == PAIRS
    instances = {s.key: [s.images["instance"]] if "instance" in s.images else None for s in samples}
    assert translator.needs_instances == (rule == "instances")
    wanted = {}
    for sample in samples:
        (image,) = translator.translate([sample.images["source"]], instances[sample.key])
        light = sample.images["source"]
        wanted[sample.key] = translator.output(image, light)
    assert all(len(np.unique(image)) > 2 for image in wanted.values())

    maps = "instance/{key}.png" if rule == "instances" else None
    files = {"input": str(tmp_path), "pattern": f"source/{{key}}.{suffix}", "instance_pattern": maps}
    for out, config in (
        ("shards", InferConfig(split="train")),
        ("files", InferConfig(**files)),
        ("rows", InferConfig(**files, tile=64, format="tiff")),
    ):
        with workers_here(infer):
            infer.run(config, HERE, output=str(tmp_path / out), track=Run(), model=str(folder), shards=shards)
        images = generated(tmp_path / out)
        assert images.keys() == wanted.keys()
        for key, image in images.items():
            assert np.array_equal(image, wanted[key]), (out, key)

    served = Served()
    served.load_context(SimpleNamespace(artifacts={"model": str(folder)}))
    for key, image in wanted.items():
        row = {"image": [(tmp_path / "source" / f"{key}.{suffix}").read_bytes()]}
        row["instance"] = [(tmp_path / "instance" / f"{key}.png").read_bytes()]
        (answer,) = served.predict(None, pd.DataFrame(row)).image
        assert np.array_equal(picture(answer), image)

    exported = ExportedTranslator(model)
    for sample in samples:
        given = raw(tmp_path / "source" / f"{sample.key}.{suffix}", sample.images["source"], translator)
        ids_of_pair = instances[sample.key]
        with torch.no_grad():
            values = exported(tensor(given), None if ids_of_pair is None else tensor(ids_of_pair[0]).int())
        made = kinds.restore(values[0].permute(1, 2, 0).numpy(), translator.target_kind)
        (image,) = translator.translate([sample.images["source"]], ids_of_pair)
        assert np.abs(made.astype(int) - image.astype(int)).max() <= 1

    monkeypatch.setattr(baselines, "untrained_model", lambda *_: model)
    scoring = EvaluateConfig.model_validate(
        {"split": "train", "baselines": {"mean_target": False, "nearest": 0, "untrained": PAIRS}}
    )
    with workers_here(evaluate):
        evaluate.run(
            scoring, HERE, output=str(tmp_path / "scores"), track=Run(),
            images=str(tmp_path / "shards"), shards=shards,
        )  # fmt: skip
    scores = pq.read_table(tmp_path / "scores" / "metrics.parquet").to_pylist()
    assert [row["l1"] for row in scores] == [row["untrained_l1"] for row in scores]
    assert all(row["l1"] > 0 for row in scores)


def generated(folder: Path) -> dict[str, Array]:
    """The images of an output folder by key."""
    rows = [row for uri in outputs.parts(str(folder)) for row in pq.read_table(uri).to_pylist()]
    assert not [row["error"] for row in rows if row["error"]]
    return {row["key"]: picture((folder / row["output"]).read_bytes()) for row in rows}


def picture(data: bytes) -> Array:
    with Image.open(io.BytesIO(data)) as image:
        array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def raw(file: Path, stored: Array, translator: Translator) -> Array:
    """What an exported model takes for a file: its pixels, or the amounts of the stored image."""
    if translator.source_kind != "labels":
        return kinds.normalise(stored, translator.source_kind)
    pixels = picture(file.read_bytes())
    return np.repeat(pixels, 3, axis=2) if translator.source.palette and pixels.shape[2] == 1 else pixels


def tensor(array: Array) -> torch.Tensor:
    array = array.astype(np.int32) if array.dtype == np.uint16 else array
    return torch.from_numpy(array.transpose(2, 0, 1).copy())[None]
