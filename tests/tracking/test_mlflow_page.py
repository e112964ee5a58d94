"""MLflow's own page over runs of ours: two of them compared in a real browser, on a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.tracking import MlflowClient
from PIL import Image

from pipeline import sample
from stages.images import encode
from tests.support.mlflow_server import MlflowServer
from tests.support.models import scene

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),  # MLflow's own use of pandas
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real tracking server."""
    tracking = MlflowServer(tmp_path_factory.mktemp("server"))
    tracking.start()
    try:
        yield tracking.url
    finally:
        tracking.kill()


CONFIG = {
    "extends": str(ROOT / "pipeline.yaml"),
    "pair": {"split": {"val": 0.1, "test": 0.2, "seed": 0}, "pairs_per_shard": 20},
    "shard": {"size": [64, 64]},
    "train": {
        "model": None,
        "losses": None,
        "phases": [{"name": "whole", "kind": "whole", "epochs": 6, "batch": 2}],
    },
}
MODEL = {"kind": "pix2pix", "levels": 6, "width": 16, "discriminator_layers": 2, "discriminator_width": 16}


@pytest.fixture(scope="module")
def runs(server: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two runs of the pipeline that differ in one setting, as the server holds them."""
    folder = tmp_path_factory.mktemp("pipeline")
    sample.write(str(folder / "data"), pairs=60, width=64, height=64, seed=0)
    locations = [
        {"uri": str(folder / "data" / layer), "role": role, "pattern": "{key}.png"}
        for layer, role in {"label": "source", "photo": "target", "instance": "instance"}.items()
    ]
    config = {**CONFIG, "ingest": {"locations": locations}, "workspace": str(folder / "workspace")}
    (folder / "page.yaml").write_text(yaml.safe_dump(config))
    model = [f"train.model={json.dumps(MODEL)}", "tracking.promote=mean"]
    pages = []
    for weight in (100, 1):
        words = [sys.executable, "-m", "pipeline.run", "-c", str(folder / "page.yaml")]
        for setting in (*model, f"train.losses={{l1: {weight}}}", f"tracking.uri={server}"):
            words += ["--set", setting]
        text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=400)
        assert text.returncode == 0, text.stdout + text.stderr
        assert "View run" not in text.stdout + text.stderr
        pages.append(text.stdout.splitlines()[-1].rpartition(" ")[2])
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("street-sample").experiment_id
    found = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert pages == [f"{server}/#/experiments/{experiment}/runs/{run.info.run_id}" for run in parents]
    return parents


def test_two_runs_compared_tell_what_was_changed_and_what_it_did(
    server: str, browser: Any, runs: list[Any], tmp_path: Path
) -> None:
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 1250})
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    page.goto(f'{server}/#/compare-runs?runs=[{ids}]&experiments=["{runs[0].info.experiment_id}"]')
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    closing = page.locator("button[aria-label='Close']").first
    if closing.count():  # MLflow's assistant takes a third of the page
        closing.click()
    page.get_by_role("switch").first.click()  # of the parameters, only those that differ
    chart = page.locator(".js-plotly-plot")
    chart.wait_for()
    # the page chooses by itself what differs: one axis for what was changed, one for what it did
    assert "lambda_l1" in chart.inner_text()
    text = page.locator("body").inner_text()
    assert "lambda_l1" in text
    assert "learning_rate" not in text.partition("Parameters")[2].partition("Metrics")[0]
    for name in ("l1", "psnr", "ssim", "mean_target_l1"):
        page.get_by_text(name, exact=True).first.wait_for()
    target = Path(os.environ.get("PIXLOOM_PICTURES", tmp_path)) / "mlflow_compare.png"
    page.screenshot(path=target)
    assert target.stat().st_size > 20_000


def test_the_parent_run_has_few_numbers_its_data_set_and_the_champion(server: str, runs: list[Any]) -> None:
    client = MlflowClient(tracking_uri=server)
    for run in runs:
        assert run.info.status == "FINISHED"
        assert len(run.data.params) < 24
        assert len(run.data.metrics) < 24
        assert run.data.metrics["l1_low"] < run.data.metrics["l1"] < run.data.metrics["l1_high"]
        (data,) = run.inputs.dataset_inputs
        assert json.loads(data.dataset.profile)["num_train"] > 0
        assert {"pixloom.hosts", "pixloom.config", "pixloom.command"} <= run.data.tags.keys()
    versions = client.search_model_versions("name = 'street-sample'")
    assert len(versions) == 2
    champion = client.get_model_version_by_alias("street-sample", "champion")
    best = min(runs, key=lambda run: run.data.metrics["l1"])
    assert champion.run_id == best.info.run_id


def test_the_server_ranks_the_models_of_all_phases_and_shows_them(
    server: str, browser: Any, runs: list[Any], tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri=server)
    experiment = runs[0].info.experiment_id
    ranked = client.search_logged_models(
        [experiment],
        filter_string="tags.`pixloom.phase` = 'whole'",
        order_by=[{"field_name": "metrics.l1", "ascending": True}],
    )
    by_score = sorted(runs, key=lambda run: run.data.metrics["l1"])
    scores = [next(m.value for m in model.metrics if m.key == "l1") for model in ranked]
    assert scores == [run.data.metrics["l1"] for run in by_score]
    for model in ranked:
        loss = next(metric for metric in model.metrics if metric.key == "generator/gan")
        assert loss.step > 0
        assert loss.dataset_digest
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(f"{server}/#/experiments/{experiment}/models")
    page.get_by_text(ranked[0].name).first.wait_for()
    target = Path(os.environ.get("PIXLOOM_PICTURES", tmp_path)) / "mlflow_models.png"
    page.screenshot(path=target)
    assert target.stat().st_size > 20_000


def test_the_registered_champion_generates_by_its_name(server: str, runs: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode.encode_image(scene(0, 80, 64)["source"], "png"))
    words = [sys.executable, "-m", "pipeline.infer", "--model", "models:/street-sample@champion"]
    words += ["--input", str(folder), "--output", str(tmp_path / "out"), "--set", f"tracking.uri={server}"]
    text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert text.returncode == 0, text.stdout + text.stderr
    with Image.open(tmp_path / "out" / "images" / "a.png") as image:
        assert image.size == (80, 64)
