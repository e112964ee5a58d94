"""What a run registers, estimates and prints, from markers alone: no Ray and no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline import session
from pipeline.config import PipelineConfig
from pipeline.dag import steps
from pipeline.runner import PlannedStep
from stages.errors import UserError
from stages.shards.dataset import DatasetSpec, ShardFile
from stages.tracking.run import NullRun
from stages.training import execution
from stages.training.execution import Execution

YAML = str(Path(__file__).resolve().parents[2] / "pipeline.yaml")
SCORES = {"l1": 0.25, "psnr": 12.0}


class Record(NullRun):
    """A run that keeps the models and metrics it is sent."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "models", [])
        object.__setattr__(self, "values", {})

    def model(self, folder: str, example: Any, **registration: Any) -> None:
        self.models.append({"folder": folder, **registration})  # type: ignore[attr-defined]

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        self.values.update(values)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are not written here; the example is theirs."""
    files = (ShardFile(name="test-0.parquet", rows=1, row_groups=(1,)),)
    spec = DatasetSpec(size=(64, 64), roles={}, splits={"test": files})
    monkeypatch.setattr("stages.shards.dataset.load", lambda folder: spec)
    monkeypatch.setattr("stages.shards.dataset.example", lambda folder, spec: {})


def planned(config: PipelineConfig) -> list[PlannedStep]:
    return [
        PlannedStep(
            step=step,
            fingerprint="0" * 12,
            folder=f"/w/{step.name}-0",
            inputs={name: f"/w/{source}-0" for name, source in step.needs.items()},
        )
        for step in steps(config)
    ]


def marker(**metrics: float) -> dict[str, Any]:
    return {"counts": {"images": 1200}, "metrics": metrics, "seconds": 61.0}


def registered(config: PipelineConfig, markers: session.Markers) -> list[dict[str, Any]]:
    run = Record()
    session.register_model(config, planned(config), markers, run)
    models: list[dict[str, Any]] = run.models  # type: ignore[attr-defined]
    return models


def test_the_last_phases_model_is_registered_with_its_score() -> None:
    config = configuration.load(YAML)
    (model,) = registered(
        config, {"train-local": marker(), "train-joint": marker(), "evaluate": marker(**SCORES)}
    )
    assert model == {
        "folder": "/w/train-joint-0/model",
        "name": "street-sample",
        "alias": "champion",
        "metric": "l1",
        "value": 0.25,
        "data": "shard-0 test",
    }


def test_nothing_is_registered_before_the_last_phase_is_done() -> None:
    assert registered(configuration.load(YAML), {"train-local": marker()}) == []


def test_scores_of_other_images_are_not_the_models() -> None:
    config = configuration.load(YAML, ["evaluate.images=/other"])
    (model,) = registered(config, {"train-joint": marker(), "evaluate": marker(**SCORES)})
    assert model["value"] is None


def test_a_metric_that_was_not_measured_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    config = configuration.load(YAML, ["tracking.metric=fid"])
    (model,) = registered(config, {"train-joint": marker(), "evaluate": marker(**SCORES)})
    assert model["value"] is None
    assert "tracking.metric: fid was not measured; there are l1, psnr" in caplog.text


def test_memory_is_estimated_for_every_phase_from_the_config_alone() -> None:
    config = configuration.load(YAML)
    whole = session.memory(config, planned(config))
    assert list(whole) == ["train-global", "train-local", "train-joint"]
    small = configuration.load(YAML, ["resources.micro_batch=1"])
    accumulated = session.memory(small, planned(small))
    assert all(accumulated[name] < whole[name] for name in whole)
    text = session.table(planned(config), whole)
    assert "a training worker needs about" in text.splitlines()[4]


def test_the_plan_shows_each_phases_precision_as_configured_as_begun_or_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXLOOM_BF16", "0")
    config = configuration.load(YAML)
    assert set(session.precisions(config, planned(config)).values()) == {"float32"}
    config = configuration.load(YAML, ["train.precision=null", "resources.gpu=false"])
    steps_ = [replace(p, folder=str(tmp_path / p.step.name)) for p in planned(config)]
    execution.write(str(tmp_path / "train-global"), Execution(precision="bf16"))
    precisions = session.precisions(config, steps_)
    assert precisions["train-global"] == "bf16"
    assert precisions["train-local"] == "float32 if it begins on a machine like this one"
    assert "precision: bf16" in session.table(steps_, {}, precision=precisions)


def test_the_plan_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    for role in ("label", "photo", "instance"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "a.png").touch()
    places = [
        f"ingest.locations.{i}.uri={tmp_path}/{r}" for i, r in enumerate(("label", "photo", "instance"))
    ]
    lpips = "evaluate.lpips={backbone: /no.pth}"
    config = configuration.load(YAML, [f"workspace={tmp_path}/w", lpips, *places])
    with pytest.raises(UserError, match=r"evaluate.lpips.backbone: /no.pth: there is no such file"):
        session.run(config, path=YAML, command="", plan_only=True)
    assert "evaluate" in session.run(config, path=YAML, command="", plan_only=True, until="train")


def test_the_summary_has_times_results_and_where_the_report_is() -> None:
    config = configuration.load(YAML)
    text = session.summary(config, planned(config), {"evaluate": marker(**SCORES), "report": marker()})
    assert "images 1,200, l1 0.25, psnr 12" in text
    assert "report  /w/report-0/report.html" in text
    assert "mlflow ui --backend-store-uri sqlite:///" in text


def test_the_commit_of_a_job_comes_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXLOOM_COMMIT", "abc123")
    assert session.commit() == {"mlflow.source.git.commit": "abc123"}


def test_the_plan_compares_a_steps_memory_with_the_gpus() -> None:
    config = configuration.load(YAML)
    needed = {"train-global": 90_000_000_000}
    assert "needs about 90.0 GB of the GPU's 141.0 GB" in session.table(planned(config), needed, 141 * 10**9)
    text = session.table(planned(config), needed, 80 * 10**9)
    assert "needs about 90.0 GB, more than the GPU's 80.0 GB: lower " in text
    assert "GPU" not in session.table(planned(config), needed)
