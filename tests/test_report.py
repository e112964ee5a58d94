"""The report stage: which images it picks, and the page it makes of small folders."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import report, storage
from stages.base import Outcome, Resources
from stages.config.report import ReportConfig
from stages.errors import UserError
from stages.images import encode
from stages.inference import outputs
from stages.report import curves, phase_name, pick, rejects
from stages.reporting.page import data_uri
from stages.scoring import metrics
from stages.scoring.table import summarise
from stages.shards import dataset, suspects
from stages.tracking.run import Run
from tests.support.shards import make_shards

HOSTILE = "<script>window.pwned=1</script>"


def rows(count: int) -> list[dict[str, Any]]:
    return [{"key": f"k{i:03d}", "l1": (i * 37 % 100) / 100, "psnr": float(i)} for i in range(count)]


def test_a_steps_notes_say_how_far_off_the_plan_was() -> None:
    marker = {"seconds": 80.0, "notes": {"precision": "bf16"}}
    assert report.notes(marker) == report.notes(marker | {"predicted": None}) == {"precision": "bf16"}
    assert report.notes(marker | {"predicted": 60.0})["expected"] == "1 min 00 s (-25%)"


def test_worst_best_and_a_sample_are_picked_each_once() -> None:
    found = pick(iter(rows(100)), most=12, metric="l1", seed=0)
    assert len(found) == 12
    values = {key: row["l1"] for key, (row, _) in found.items()}
    ranked = sorted((row["l1"] for row in rows(100)), reverse=True)
    assert sorted((values[k] for k, (_, why) in found.items() if "worst" in why), reverse=True) == ranked[:4]
    assert sorted(values[k] for k, (_, why) in found.items() if "best" in why) == ranked[:-5:-1]
    assert next(iter(found.values()))[1][0] == "worst"


def test_a_higher_metric_is_better_where_it_is() -> None:
    found = pick(iter(rows(30)), most=3, metric="psnr", seed=0)
    assert found["k000"][1][0] == "worst"
    assert found["k029"][1][0] == "best"


def test_the_sample_does_not_depend_on_the_order_of_rows() -> None:
    one = pick(iter(rows(50)), most=9, metric="l1", seed=1)
    other = pick(iter(reversed(rows(50))), most=9, metric="l1", seed=1)
    assert one == other
    assert set(one) != set(pick(iter(rows(50)), most=9, metric="l1", seed=2))


def test_rows_without_a_score_are_still_seen() -> None:
    found = pick(iter([{"key": "a", "l1": None}, {"key": "b", "l1": 0.5}]), most=5, metric="l1", seed=0)
    assert set(found) == {"a", "b"}
    assert found["a"][1] == ("sample",)


def test_curves_are_those_of_a_phase_without_its_single_layers() -> None:
    table = pa.table(
        {
            "step": [2, 1, 1],
            "name": pa.array(["loss", "loss", "fm/scale0/layer1"]).dictionary_encode(),
            "value": [1.0, 2.0, 3.0],
        }
    )
    (curve,) = curves(table, "global")
    assert (curve.name, list(curve.steps), list(curve.values)) == ("loss", [1, 2], [2.0, 1.0])
    assert phase_name("/w/train-local-2-0123456789ab") == "local-2"


def test_reasons_are_read_off_the_markers() -> None:
    steps = [
        {
            "step": "shard",
            "counts": {"pairs": 9, "rejected": 3, "rejected_empty": 1, "rejected_too_large": 2},
        },
        {"step": "pair", "counts": {"reject_no_target": 4}},
    ]
    found = rejects(steps, {"shard/empty": ["a"]})
    assert [(r.stage, r.reason, r.count, list(r.examples)) for r in found] == [
        ("pair", "no_target", 4, []),
        ("shard", "too_large", 2, []),
        ("shard", "empty", 1, ["a"]),
    ]


def judged(folder: Path, shards: str, count: int, noise: float = 2) -> tuple[str, str]:
    """Images and metrics folders as infer and evaluate leave them: targets with some noise."""
    spec = dataset.load(shards)
    found = []
    rng = np.random.default_rng(0)
    for index, sample in enumerate(dataset.read_split(shards, spec, "test")):
        added = rng.normal(0, noise + index, sample.images["target"].shape)
        fake = np.clip(sample.images["target"] + added, 0, 255).astype(np.uint8)
        name = outputs.output_name(sample.key, ".png")
        row = {
            "key": sample.key,
            "split": "test",
            "group": sample.group,
            "error": None,
            "file": "test-00000.parquet",
            "generated": name,
        }
        if index == count - 1:
            row["error"] = "missing"
        else:
            storage.write_bytes(f"{folder}/images/{name}", encode.encode_png(fake))
            row |= metrics.pixel_scores_of([fake], [sample.images["target"]])[0] | {"mean_target_l1": 0.3}
        found.append(row)
    storage.write_json(f"{folder}/images/model/model.json", {"architecture": {"kind": "pix2pixhd"}})
    names = ["l1", "psnr", "ssim", "ms_ssim"]
    table = pa.Table.from_pylist(
        [dict.fromkeys((*names, "mean_target_l1")) | row for row in found],
        schema=pa.schema(
            [*[(name, pa.string()) for name in ("key", "split", "group", "error", "file", "generated")]]
            + [(name, pa.float64()) for name in (*names, "mean_target_l1")]
        ),
    )
    summary = summarise(table, names) | {"images": f"{folder}/images", "model": "0123"}
    storage.write_json(f"{folder}/metrics/summary.json", summary)
    storage.write_parquet(f"{folder}/metrics/metrics.parquet", table)
    return f"{folder}/images", f"{folder}/metrics"


def test_the_worst_suspects_are_drawn_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SUSPECTS", 2)
    make_shards(tmp_path / "shards", {"train": [4]}, size=(64, 48))
    shards = str(tmp_path / "shards")
    uri_of = partial(data_uri, max_side=64, max_bytes=3000)
    assert report.draw_suspects(shards, uri_of) == {}
    spec = dataset.load(shards)
    file = next(iter(spec.splits["train"])).name
    keys = [sample.key for sample in dataset.read_split(shards, spec, "train")]
    found = suspects.Found()
    found.rank([suspects.Suspect("shifted", k, "train", n, f"by {n}", file) for n, k in enumerate(keys)])
    storage.write_bytes(f"{shards}/{suspects.NAME}", found.table())
    cards = report.draw_suspects(shards, uri_of)["shifted"]
    assert [(card.key, card.note) for card in cards] == [(keys[3], "by 3"), (keys[2], "by 2")]
    assert all(image.startswith("data:image/webp") for card in cards for image in card.images.values())


def reported(
    folder: Path, config: ReportConfig, images: str, metrics: str, **more: Any
) -> tuple[str, Outcome]:
    """The page of the shards in `folder`, and the stage's outcome."""
    outcome = report.run(
        config,
        Resources(io_threads=2),
        output=str(folder / "report"),
        track=Run(),
        shards=str(folder / "shards"),
        images=images,
        metrics=metrics,
        **more,
    )
    return (folder / "report/report.html").read_text(), outcome


def test_a_run_makes_one_page_within_its_size(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [4], "test": [12]}, size=(64, 48))
    generated, judged_folder = judged(tmp_path, str(tmp_path / "shards"), 12)
    phase = tmp_path / "train-global-0123456789ab"
    points = {"step": [1, 2], "name": ["loss", "loss"], "value": [2.0, 1.0]}
    storage.write_parquet(f"{phase}/metrics.parquet", pa.table(points))
    rejected = {"key": [HOSTILE], "role": ["source"], "uri": ["x"], "reason": ["empty"], "detail": [""]}
    pq.write_table(pa.table(rejected), tmp_path / "shards/quarantine-00000.parquet")
    made, outcome = reported(
        tmp_path,
        ReportConfig(max_images=9, max_megabytes=1),
        generated,
        judged_folder,
        phases=[str(phase), str(tmp_path / "train-none-0123456789ab")],
        steps=[{"step": "shard", "seconds": 3.0, "counts": {"pairs": 16, "rejected_empty": 1}}],
        config_text=f"note: {HOSTILE}",
        command="python -m pipeline.run",
    )
    assert outcome.counts["images"] == 9
    assert outcome.counts["bytes"] == len(made.encode()) < 1e6
    assert "Pix2PixHD: labels to photo" in made
    assert made.count('class="card"') == 9
    assert HOSTILE not in made
    assert "&lt;script&gt;window.pwned" in made
    assert "loss" in made
    assert json.dumps("missing")[1:-1] in made
    sizes = re.findall(r'width="(\d+)" height="(\d+)" src', made)
    assert set(sizes) == {("64", "48")}


def test_another_systems_pictures_and_its_difference_are_on_the_page(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [4], "test": [12]}, size=(64, 48))
    generated, own = judged(tmp_path, str(tmp_path / "shards"), 12)
    _, worse = judged(tmp_path / "worse", str(tmp_path / "shards"), 12, noise=9)
    config = ReportConfig(max_images=3, others={"theirs": worse})
    made, _ = reported(tmp_path, config, generated, own)
    assert made.count('data-role="theirs"') == made.count('data-role="generated"') > 0
    assert "This model minus another, image by image" in made
    assert re.search(r"theirs</td><td[^>]*>-0\.\d+ \(-0\.\d+ to -0\.\d+\) better", made)
    before = report.digest(config)
    storage.write_json(f"{worse}/summary.json", {"changed": True})
    assert report.digest(config) != before
    with pytest.raises(UserError, match=r"report\.others\.theirs: .*nowhere"):
        report.digest(ReportConfig(others={"theirs": f"{tmp_path}/nowhere"}))
    with pytest.raises(ValueError, match="target is what the report calls something of its own"):
        ReportConfig(others={"target": worse})


def test_another_systems_images_are_not_said_to_be_of_this_runs_model(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [4], "test": [12]}, size=(64, 48))
    generated, own = judged(tmp_path, str(tmp_path / "shards"), 12)
    summary = storage.read_json(f"{own}/summary.json")
    storage.write_json(f"{own}/summary.json", {n: v for n, v in summary.items() if n != "model"})
    made, _ = reported(
        tmp_path,
        ReportConfig(max_images=3),
        generated,
        own,
        phases=[str(tmp_path / "train-global-0123456789ab")],
    )
    assert "Image translation: labels to photo" in made
    assert "these images" in made
    assert not re.search("this model|a model trained|Pix2PixHD", made)


def test_a_run_that_was_not_evaluated_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no summary\.json"):
        report.run(
            ReportConfig(),
            Resources(),
            output=str(tmp_path),
            track=Run(),
            shards="",
            images="",
            metrics=str(tmp_path),
        )
