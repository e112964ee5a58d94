"""What a run registers, estimates and prints, from markers alone: no Ray and no training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration, cost, session
from pipeline.config import PipelineConfig
from pipeline.dag import registration, steps
from pipeline.runner import PlannedStep
from stages.errors import UserError
from stages.training import execution
from stages.training.execution import Execution

YAML = str(Path(__file__).resolve().parents[2] / "pipeline.yaml")
SCORES = {"l1": 0.25, "mean_target_l1": 0.5, "psnr": 12.0, "ssim": 0.5}


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


def test_the_last_phases_model_is_registered_after_all_else_with_the_scores_of_its_own_images() -> None:
    (step,) = registration(configuration.load(YAML))
    assert step.needs == {"model": "train-joint", "shards": "shard", "metrics": "evaluate"}
    (step,) = registration(configuration.load(YAML, ["evaluate.images=/other"]))
    assert step.needs == {"model": "train-joint", "shards": "shard"}
    assert registration(configuration.load(YAML, ["tracking.enabled=false"])) == ()


def test_models_are_compared_by_images_of_one_size_only() -> None:
    jitter = ["shard.size=[286, 143]", "augment.crop=[256, 128]"]  # images are generated at the crop's size
    judged = []
    for settings in ([], jitter, [*jitter, "infer.size=[256, 128]"]):
        (step,) = registration(configuration.load(YAML, settings))
        judged.append(step.config.model_dump().get("judged_by", ""))
    assert judged[0] == ""
    assert judged[1] == judged[2] != ""


def test_a_password_of_the_tracking_server_is_in_no_marker() -> None:
    (step,) = registration(configuration.load(YAML, ["tracking.uri=https://me:secret@host/mlflow"]))
    assert "secret" not in step.config.model_dump_json()
    assert "host/mlflow" in step.config.model_dump_json()


def plan_table(config: PipelineConfig, steps_: list[PlannedStep] | None = None) -> dict[str, str]:
    """The plan's lines by step."""
    run = cost.PlannedRun(config=config, planned=planned(config) if steps_ is None else steps_)
    return {line.split()[0]: line for line in session.table(run).splitlines()}


def test_memory_is_estimated_for_every_phase_from_the_config_alone() -> None:
    def needed(config: PipelineConfig) -> dict[str, int]:
        run = cost.PlannedRun(config=config, planned=planned(config))
        return {job.phase.name: run.memory(job, 1) for job in run.jobs}

    config = configuration.load(YAML)
    whole = needed(config)
    assert list(whole) == ["global", "local", "joint"]
    accumulated = needed(configuration.load(YAML, ["resources.micro_batch=1"]))
    assert all(accumulated[name] < whole[name] for name in whole)
    lines = plan_table(config)
    assert [name for name in lines if "a training worker needs about" in lines[name]] == [
        f"train-{name}" for name in whole
    ]


def test_the_plan_shows_each_phases_precision_as_configured_as_begun_or_as_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXLOOM_BF16", "0")
    config = configuration.load(YAML)
    assert plan_table(config)["train-joint"].endswith("; precision: float32")
    assert "precision" not in plan_table(config)["infer"]
    config = configuration.load(YAML, ["train.precision=null", "resources.gpu=false"])
    steps_ = [replace(p, folder=str(tmp_path / p.step.name)) for p in planned(config)]
    execution.write(str(tmp_path / "train-global"), Execution(precision="bf16"))
    begun = [replace(p, resumes=p.step.name == "train-global") for p in steps_]
    lines = plan_table(config, begun)
    assert lines["train-global"].endswith("; precision: bf16")
    here = "; precision: float32 if it begins on a machine like this one"
    assert lines["train-local"].endswith(here)


def test_the_plan_refuses_weights_that_are_not_there(tmp_path: Path) -> None:
    for role in ("label", "photo", "instance"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "a.png").touch()
    places = [
        f"ingest.locations.{i}.uri={tmp_path}/{r}" for i, r in enumerate(("label", "photo", "instance"))
    ]
    lpips = "evaluate.lpips={backbone: /no.pth}"
    thread = "resources.threads_per_worker=1"
    config = configuration.load(YAML, [f"workspace={tmp_path}/w", lpips, thread, *places])
    with pytest.raises(UserError, match=r"evaluate.lpips.backbone: /no.pth: there is no such file"):
        session.run(config, path=YAML, command="", plan_only=True)
    assert "evaluate" in session.run(config, path=YAML, command="", plan_only=True, until="train")


def test_the_summary_has_times_results_and_where_the_report_is() -> None:
    config = configuration.load(YAML)
    text = session.summary(config, planned(config), {"evaluate": marker(**SCORES), "report": marker()})
    assert "images 1,200, l1 0.25, psnr 12, ssim 0.5\n" in text  # without the baseline's
    assert "report  /w/report-0/report.html" in text
    assert "mlflow ui --backend-store-uri sqlite:///" in text


def test_the_commit_of_a_job_comes_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXLOOM_COMMIT", "abc123")
    assert session.commit() == {"mlflow.source.git.commit": "abc123"}


def test_the_plan_compares_a_steps_memory_with_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration.load(YAML)
    monkeypatch.setattr(cost, "estimate_memory", lambda *_, **__: 90_000_000_000)
    monkeypatch.setattr(cost.PlannedRun, "gpu_memory", 141 * 10**9)
    assert "needs about 90.0 GB of the GPU's 141.0 GB" in plan_table(config)["train-global"]
    monkeypatch.setattr(cost.PlannedRun, "gpu_memory", 80 * 10**9)
    assert "needs about 90.0 GB, more than the GPU's 80.0 GB: lower " in plan_table(config)["train-global"]
    monkeypatch.setattr(cost.PlannedRun, "gpu_memory", None)
    assert "GPU" not in plan_table(config)["train-global"]
