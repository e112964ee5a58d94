"""Training on a real local Ray: one and two workers, phases in turn, workers and drivers killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stages import curves, train
from stages.augment import AugmentConfig
from stages.base import Resources
from stages.errors import StageError, UserError
from stages.models.saved import load_model, read_manifest
from stages.phases import PhaseJob, TrainConfig, jobs
from stages.tracking import NullRun, TrackingConfig, open_parent
from stages.tracking import _client as mlflow_client
from tests.small import make_shards

MODEL = {
    "kind": "pix2pixhd",
    "width": 4,
    "enhancers": 1,
    "downsamplings": 1,
    "blocks": 1,
    "enhancer_blocks": 1,
    "discriminator_width": 4,
    "discriminator_layers": 1,
    "discriminators": 2,
}
PHASES = [
    {"name": "global", "kind": "global", "epochs": 8, "decay_epochs": 2, "batch": 4},
    {"name": "local", "kind": "local", "enhancers": 1, "epochs": 1, "batch": 4},
    {"name": "joint", "kind": "joint", "enhancers": 1, "epochs": 1, "batch": 4},
]


ONE = Resources(threads_per_worker=1)
"""One worker with one thread: networks this small only lose by more."""


def phase_jobs(**changes: Any) -> tuple[PhaseJob, ...]:
    values = {"model": MODEL, "phases": PHASES, "log_every": 1, **changes}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [7, 4], "val": [2]}, instances=True)
    return str(folder)


def losses(output: Path) -> dict[tuple[int, str], float]:
    rows = curves.from_table(pq.read_table(output / "metrics.parquet"))
    kept = ("generator/", "discriminator/", "learning_rate/", "gradient_norm/")
    return {(row.step, row.name): row.value for row in rows if row.name.startswith(kept)}


@pytest.mark.ray
def test_two_workers_train_as_one_and_a_second_phase_goes_on_from_the_first(
    ray_local: None, shards: str, tmp_path: Path
) -> None:
    """24 steps; the last batch of an epoch is short, so that the workers have different numbers of rows."""
    first, second, _ = phase_jobs()
    track = open_parent(TrackingConfig(), "test", None, str(tmp_path))
    one, two, local = tmp_path / "one", tmp_path / "two", tmp_path / "local"
    outcome = train.run(first, ONE, output=str(one), track=track.child("one"), shards=shards)
    child = track.child("two")
    train.run(first, ONE.model_copy(update={"train_workers": 2}), output=str(two), track=child, shards=shards)
    assert outcome.counts == {"images": 88, "steps": 24}
    alone, together = losses(one), losses(two)
    assert alone.keys() == together.keys()
    assert {step for step, _ in alone} == set(range(1, 25))
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert load_model(one / "model").architecture == first.model
    assert len(list((one / "samples").iterdir())) == 8

    assert child.flush()
    history = mlflow_client(child.uri).get_metric_history(child.run_id(), "generator/gan")
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(1, 25))

    train.run(second, ONE, output=str(local), track=NullRun(), shards=shards, before=str(one))
    g1 = load_model(one / "model", weights="raw").generator.state_dict()
    inner = load_model(local / "model", weights="raw").generator.state_dict()
    frozen = [name for name in g1 if name.startswith("coarse.")]
    assert frozen
    assert all(g1[name].equal(inner[name]) for name in frozen)
    assert read_manifest(local / "model").enhancers == 1


@pytest.mark.ray
def test_a_phase_that_diverges_fails_at_once_naming_step_and_rate(
    ray_local: None, shards: str, tmp_path: Path
) -> None:
    job = phase_jobs(losses={"l1": 1e38, "feature_matching": 1e38})[0]
    with pytest.raises(StageError, match=r"train-global: training diverged at step \d+: .*learning rate"):
        train.run(job, ONE, output=str(tmp_path / "out"), track=NullRun(), shards=shards)


def test_a_split_without_pairs_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, {"val": [2]}, instances=True)
    with pytest.raises(UserError, match="no pair is in the train split"):
        train.run(phase_jobs()[0], ONE, output=str(tmp_path / "o"), track=NullRun(), shards=str(tmp_path))


def test_workers_that_cannot_share_a_batch_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 workers"):
        train.run(
            phase_jobs()[0],
            ONE.model_copy(update={"train_workers": 3}),
            output=str(tmp_path / "o"),
            track=NullRun(),
            shards=shards,
        )


def test_threads_are_a_workers_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert train.threads(Resources(), workers_here=2, gpu=False) == 4
    assert train.threads(Resources(), workers_here=16, gpu=False) == 1
    assert train.threads(Resources(threads_per_worker=3), workers_here=2, gpu=False) == 3
    assert train.threads(Resources(), workers_here=2, gpu=True) == 1


def test_another_config_or_input_has_another_name() -> None:
    first, second, _ = phase_jobs()
    names = {
        train.job_name(first, "shards", ""),
        train.job_name(second, "shards", ""),
        train.job_name(first, "others", ""),
        train.job_name(first, "shards", "before"),
        train.job_name(first, "shards/", ""),
    }
    assert len(names) == 4
