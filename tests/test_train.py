"""Training on a real local Ray: one and two workers, phases in turn, workers and drivers killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from stages import train
from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.evaluate import EvaluateConfig
from stages.config.tracking import TrackingConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.errors import StageError, UserError
from stages.models.files.saved import load_model
from stages.tracking.run import Run, open_parent
from stages.tracking.sender import connect
from stages.training import checkpoints
from tests.support.shards import make_shards
from tests.support.undisturbed import losses, undisturbed

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
    values = {"model": MODEL, "phases": PHASES, "log_every": 1, "precision": "float32", **changes}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [7, 4], "val": [2]}, instances=True)
    return str(folder)


@pytest.mark.ray
def test_two_workers_train_as_one(ray_local: None, shards: str, tmp_path: Path) -> None:
    """24 steps; the last batch of an epoch is short, so that the workers have different numbers of rows."""
    job = phase_jobs()[0]
    alone = undisturbed(job, shards, tmp_path / "alone")
    track = open_parent(TrackingConfig(), "test", None, str(tmp_path)).child("train-global")
    two = ONE.model_copy(update={"train_workers": 2})
    outcome = train.run(job, two, output=str(tmp_path / "two"), track=track, shards=shards)
    assert outcome.counts == {"images": 88, "steps": 24}
    together = losses(tmp_path / "two")
    assert alone.keys() == together.keys()
    assert {step for step, _ in alone} == set(range(1, 25))
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert load_model(tmp_path / "two" / "model").manifest.architecture == job.model
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 8
    assert track.flush()
    history = connect(track.uri).get_metric_history(track.run_id(), "generator/gan")
    assert sorted(m.step for m in history) == list(range(1, 25))


class Killer(threading.Thread):
    """Kills the training worker once a checkpoint beyond `images` is there; `killed` is its process id."""

    def __init__(self, output: Path, steps: int) -> None:
        super().__init__(daemon=True)
        self.output, self.steps, self.killed, self.over = output, steps, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            names = checkpoints.names(str(self.output / "checkpoints"))
            if names and int(names[-1].rpartition("-")[2]) >= self.steps:
                for process in psutil.Process().children(recursive=True):
                    if "RayTrainWorker" in process.name() + "".join(process.cmdline()[:1]):
                        process.kill()
                        self.killed = process.pid
                        return


@pytest.mark.ray
def test_a_killed_worker_changes_no_loss(
    ray_local: None, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    many = [{**PHASES[0], "epochs": 50}]
    job = phase_jobs(phases=many, model={**MODEL, "enhancers": 0})[0]
    expected = undisturbed(job, shards, tmp_path / "alone")
    output = tmp_path / "killed"
    killer = Killer(output, steps=30)
    killer.start()
    outcome = train.run(job, ONE, output=str(output), track=Run(), shards=shards)
    killer.over.set()
    assert killer.killed
    assert outcome.counts == {"images": 550, "steps": 150}
    assert losses(output) == expected
    assert "worker 0 was lost (" in caplog.text
    assert "restarting the group from its last checkpoint" in caplog.text
    assert "resumed from its checkpoint" in caplog.text


DRIVER = """
import sys
import ray
from stages import train
from stages.base import Resources
from stages.tracking.run import Run
from stages.config.train import PhaseJob

job, shards, output = sys.argv[1:]
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
one = Resources(threads_per_worker=1)
train.run(PhaseJob.model_validate_json(job), one, output=output, track=Run(), shards=shards)
"""


@pytest.mark.long
def test_a_killed_driver_run_again_changes_no_loss(shards: str, tmp_path: Path) -> None:
    job = phase_jobs(phases=[{**PHASES[0], "epochs": 100}], model={**MODEL, "enhancers": 0})[0]
    expected = undisturbed(job, shards, tmp_path / "alone")
    output = tmp_path / "killed"
    command = [sys.executable, "-c", DRIVER, job.model_dump_json(), shards, str(output)]
    root = Path(__file__).resolve().parents[1]
    driver = subprocess.Popen(command, cwd=root, start_new_session=True)
    try:
        until = time.monotonic() + 200
        while not any(name >= "step-00000060" for name in checkpoints.names(str(output / "checkpoints"))):
            assert driver.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (output / "model").exists()
    subprocess.run(command, cwd=root, check=True, timeout=300)
    assert losses(output) == expected


@pytest.mark.ray
def test_a_phase_that_diverges_fails_at_once_naming_step_and_rate(
    ray_local: None, shards: str, tmp_path: Path
) -> None:
    job = phase_jobs(losses={"l1": 1e39})[0]
    with pytest.raises(StageError, match=r"train-global: training diverged at step \d+: .*learning rate"):
        train.run(job, ONE, output=str(tmp_path / "out"), track=Run(), shards=shards)


def test_a_split_without_pairs_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path, {"val": [2]}, instances=True)
    with pytest.raises(UserError, match="no pair is in the train split"):
        train.run(phase_jobs()[0], ONE, output=str(tmp_path / "o"), track=Run(), shards=str(tmp_path))


def test_weights_that_are_not_there_are_named_before_training() -> None:
    losses = {"gan": "least_squares", "perceptual": 10.0}
    job = phase_jobs(losses=losses, vgg_weights="/no.pth")[0]
    with pytest.raises(UserError, match=r"train.vgg_weights: /no.pth: there is no such file or folder"):
        train.check(job)
    with pytest.raises(UserError, match=r"train.start_from: /no: there is no model.json"):
        train.check(phase_jobs(start_from="/no")[0])


def test_the_digest_follows_weights_that_are_replaced_and_no_copy_of_them(tmp_path: Path) -> None:
    (weights := tmp_path / "w.pt").write_bytes(b"one")
    network, losses = {"backbone": str(weights)}, {"gan": "least_squares"}
    changes: list[dict[str, Any]] = [
        {"losses": losses | {"perceptual": 10.0}, "vgg_weights": str(weights)},
        {"losses": losses | {"lpips": 1}, "lpips": network},
        {"losses": losses | {"lpips": 1}, "lpips": network | {"backbone": "/no", "linear": str(weights)}},
    ]
    every = [phase_jobs(**change)[0] for change in changes]
    config = TrainConfig.model_validate({"model": MODEL, "phases": PHASES, "select": "lpips"})
    every += jobs(config, AugmentConfig(), EvaluateConfig.model_validate({"lpips": network}))[-1:]
    before = [train.digest(job) for job in every]
    os.utime(weights, (1, 1))
    assert [train.digest(job) for job in every] == before
    weights.write_bytes(b"two")
    assert not {train.digest(job) for job in every} & {*before}
    assert train.digest(phase_jobs()[0]) == ""


def test_what_cannot_choose_a_model_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train\.select: lpips needs weights; name them in evaluate\.lpips\.b"
    ):
        phase_jobs(select="lpips")
    with pytest.raises(
        ValueError, match=r"train\.select: fid needs weights; name them in evaluate\.inception"
    ):
        phase_jobs(select="fid")
    with pytest.raises(
        ValueError, match=r"losses\.lpips: needs lpips\.backbone, the location of its network"
    ):
        phase_jobs(losses={"lpips": 1})
    job = phase_jobs(losses={"lpips": 1}, lpips={"backbone": "/no.pth"})[0]
    with pytest.raises(UserError, match=r"train\.lpips\.backbone: /no.pth: there is no such file or folder"):
        train.check(job)
    evaluate = EvaluateConfig.model_validate({"lpips": {"backbone": "/no.pth"}})
    config = TrainConfig.model_validate({"model": MODEL, "phases": PHASES, "select": "lpips"})
    with pytest.raises(
        UserError, match=r"evaluate\.lpips\.backbone: /no.pth: there is no such file or folder"
    ):
        train.check(jobs(config, AugmentConfig(), evaluate)[0])
    make_shards(tmp_path, {"train": [4], "val": [9]})
    job = phase_jobs(select="frechet:efficientnet_lite0")[0]
    with pytest.raises(
        UserError, match=r"train\.select: frechet:efficientnet_lite0 needs 50 pairs .* has 9; r"
    ):
        train.run(job, ONE, output=str(tmp_path / "o"), track=Run(), shards=str(tmp_path))


def test_threads_are_a_workers_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert train.threads(None, workers_here=2, gpu=False) == 4
    assert train.threads(None, workers_here=16, gpu=False) == 1
    assert train.threads(3, workers_here=2, gpu=False) == 3
    assert train.threads(None, workers_here=2, gpu=True) == 1


def test_another_config_or_input_has_another_name() -> None:
    first, second, _ = phase_jobs()
    names = {
        train.job_name(first, "shards", ""),
        train.job_name(second, "shards", ""),
        train.job_name(first, "others", ""),
        train.job_name(first, "shards", "before"),
        train.job_name(first, "shards/", ""),
        train.job_name(first, "s3://moved/shards", ""),
    }
    assert len(names) == 4


def test_a_worker_decodes_with_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "own_cores", lambda: 24)
    assert [train.decode_threads(workers, gpu=True) for workers in (1, 2, 8, 48)] == [16, 12, 3, 1]
    assert [train.decode_threads(workers, gpu=False) for workers in (1, 8)] == [4, 3]


def test_the_machines_load_has_the_names_mlflow_shows() -> None:
    values = train.machine_metrics(torch.device("cpu"))
    assert all(name.startswith("system/") for name in values)
    assert 0 < values["system/system_memory_usage_percentage"] <= 100


def test_each_of_several_workers_has_names_of_its_own() -> None:
    device = torch.device("cpu")
    assert set(train.machine_metrics(device, 2)) == {
        name.replace("system/", "system/worker_2/") for name in train.machine_metrics(device)
    }


WATCHED = """
import sys, time
from stages import train
from stages.training.news import Channel

channel = Channel(lambda news: None)
with train._watched(channel, 0, 0.5):
    if sys.argv[1] == "stores":
        with channel.storing():
            time.sleep(2)
    else:
        time.sleep(20)
"""


@pytest.mark.parametrize(("does", "code"), [("stores", 0), ("hangs", -signal.SIGKILL)])
def test_a_worker_that_waits_for_a_store_is_not_taken_for_a_hung_one(does: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, does], check=False, capture_output=True, timeout=60)
    assert done.returncode == code
