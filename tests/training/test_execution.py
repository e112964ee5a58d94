"""How a phase is computed: decided when it begins, kept when it resumes, on any hardware."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.errors import UserError
from stages.training import execution
from stages.training.execution import Execution, Part
from tests.training.test_loop import Rows, assert_equal, losses, phase_jobs, task, train, weights


def job(batch: int = 4, **model: Any) -> PhaseJob:
    phase = {"name": "whole", "kind": "whole", "epochs": 1, "batch": batch}
    values = {"model": {"kind": "pix2pix", **model}, "phases": [phase]}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())[0]


PLAIN = {"norm": "instance", "dropout": "none"}
BEGUN = Execution(precision="bf16", micro_batch=2, parts=(Part(images=0, workers=2, device="cuda"),))


def resumed(job: PhaseJob, workers: int, images: int = 40) -> Execution:
    part = Part(images=images, workers=workers, device="cpu")
    return execution.decide(job, BEGUN, None, "float32", part)


def test_a_phase_begins_in_the_configured_precision_or_in_the_fastest_one() -> None:
    part = Part(images=0, workers=1, device="cpu")
    assert execution.decide(job(), None, None, "bf16", part).precision == "bf16"
    pinned = job().model_copy(update={"precision": "float32"})
    assert execution.decide(pinned, None, None, "bf16", part).precision == "float32"


def test_a_phase_keeps_its_precision_and_records_who_computed_which_part() -> None:
    decided = resumed(job(**PLAIN), workers=1)
    assert decided.precision == "bf16"
    assert decided.notes()["workers"] == "2 on cuda, 1 on cpu after 40 images"
    part = Part(images=40, workers=2, device="cuda")
    assert execution.decide(job(**PLAIN), BEGUN, 2, "float32", part) == BEGUN  # as before: no new part


def test_a_micro_batch_is_kept_where_pairs_that_are_in_memory_together_change_the_result() -> None:
    assert resumed(job(norm="batch"), workers=2).micro_batch == 2
    assert resumed(job(norm="instance", dropout="paper"), workers=2).micro_batch == 2
    assert resumed(job(**PLAIN), workers=2).micro_batch is None
    assert resumed(job(batch=1), workers=2).micro_batch is None


def test_other_workers_are_refused_where_batch_norm_depends_on_their_number() -> None:
    with pytest.raises(UserError, match=r"train_workers: 'whole' began with 2 and resumes with 1, .*; use 2"):
        resumed(job(norm="batch"), workers=1)
    resumed(job(norm="batch").model_copy(update={"synchronised_norms": True}), workers=1)
    resumed(job(norm="instance"), workers=1)


@pytest.mark.parametrize("first", ["bf16", "float32"])
def test_a_phase_that_resumes_on_other_hardware_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    open_job = phase_jobs(precision=None)[0]
    monkeypatch.setenv("PIXLOOM_BF16", "1" if first == "bf16" else "0")
    train(task(tmp_path / "whole", open_job), Rows(16))
    with pytest.raises(KeyboardInterrupt):
        train(task(tmp_path / "cut", open_job), Rows(16, cut=4))
    monkeypatch.setenv("PIXLOOM_BF16", "0" if first == "bf16" else "1")
    ending, _ = train(task(tmp_path / "cut", open_job), Rows(16))
    assert ending.notes == {"precision": first, "workers": "1 on cpu"}
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    model = json.loads((tmp_path / "cut" / "model" / "model.json").read_text())
    assert model["extra"]["precision"] == first


def test_what_began_without_a_checkpoint_is_decided_anew(tmp_path: Path) -> None:
    """A micro-batch that did not fit in memory can be lowered."""
    one, two = (task(tmp_path, phase_jobs()[0], micro_batch=size) for size in (None, 2))
    execution.write(str(tmp_path), Execution(precision="bf16"))
    with pytest.raises(KeyboardInterrupt):
        train(one, Rows(16, cut=0))
    train(two, Rows(16))
    assert execution.read(str(tmp_path)) == Execution(
        precision="float32", micro_batch=2, parts=(Part(images=0, workers=1, device="cpu"),)
    )
