"""Sweeps: which trials a file makes, what they share, which is best, and one that really runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import JsonValue

from pipeline import sample
from pipeline.config import RECIPES
from pipeline.dag import steps
from pipeline.runner import PlannedStep, plan
from pipeline.sweep.config import Best, SweepConfig, load
from pipeline.sweep.run import configured, main, parser, table
from pipeline.sweep.trials import (
    State,
    Trial,
    TrialResult,
    best_of,
    check_curve,
    make_trials,
    reporting,
    shared,
    variants,
)
from stages import storage
from stages.base import Point, Seen
from stages.errors import UserError
from stages.models.architecture import InputSpec
from stages.models.gan import build_gan
from stages.models.step import Batch
from stages.tracking.run import Run
from stages.training import curves
from stages.training.curves import balance
from tests.support.steps import step

ROOT = Path(__file__).resolve().parents[2]
YAML = str(ROOT / "pipeline.yaml")


def config(**values: Any) -> SweepConfig:
    return SweepConfig.model_validate({"recipe": YAML, **values})


def trials(**values: Any) -> list[Trial]:
    return make_trials(config(**values), "sweep.yaml", YAML, [])


# -- from a file to trials ----------------------------------------------------


def test_settings_meet_every_combination_of_the_grid() -> None:
    found = variants(
        config(
            settings={"plain": {}, "l1": {"train.losses.l1": 1}},
            grid={"train.seed": [1, 2], "train.ema": [0.9, None]},
        )
    )
    assert [name for name, _ in found][:3] == [
        "plain, seed=1, ema=0.9",
        "plain, seed=1, ema=null",
        "plain, seed=2, ema=0.9",
    ]
    assert len(found) == 8
    assert found[-1][1] == {"train.losses.l1": 1, "train.seed": 2, "train.ema": None}


def test_draws_lie_between_their_ends_and_come_again_with_the_seed() -> None:
    space: dict[str, JsonValue] = {"a.rate": {"low": 1e-5, "high": 1e-2, "log": True}, "a.size": [8, 16]}
    found = variants(config(random=space, trials=50))
    assert found == variants(config(random=space, trials=50))
    assert found != variants(config(random=space, trials=50, seed=1))
    rates = [values["a.rate"] for _, values in found]
    assert all(isinstance(rate, float) and 1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 3e-4 for rate in rates) > 10, (
        "a logarithm drawn evenly lies below its middle half the time"
    )  # type: ignore[operator]
    assert {values["a.size"] for _, values in found} == {8, 16}


def test_trials_are_named_by_whole_keys_where_their_last_parts_are_alike() -> None:
    (name, _), *_ = variants(config(grid={"a.b": [1], "c.b": [2], "c.d": [3]}))
    assert name == "a.b=1, c.b=2, d=3"


def test_values_that_are_alike_in_short_have_names_of_their_own_and_repeats_are_one_trial() -> None:
    space: dict[str, JsonValue] = {"a.rate": {"low": 0.1, "high": 0.1001}, "a.b": [1, 1.0, "1", True]}
    found, more = (variants(config(random=space, trials=count)) for count in (20, 40))
    assert len(dict(found)) == len(found) == 20
    assert more[:20] == found  # further draws change no name
    assert found[0][0].startswith("rate=0.1, b=")
    names = [name for name, _ in variants(config(random={"a.b": [1, 1.0, "1"]}, trials=30))]
    assert len(names) == len(set(names)) == 3
    found = variants(config(grid={"a.b": [0.10004, 0.1, 0.1]}))
    assert [name for name, _ in found] == ["b=0.1", "b=0.1 (2)"]


def test_null_takes_a_phase_out() -> None:
    (trial,) = trials(settings={"no joint phase": {"train.phases.2": None}})
    assert [phase.name for phase in trial.config.train.phases] == ["global", "local"]


def test_trials_are_judged_on_val_so_that_test_stays_unseen() -> None:
    (trial,) = trials(settings={"as it is": {}})
    assert (trial.config.infer.split, trial.config.evaluate.split) == ("val", "val")


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({}, "nothing to vary"),
        ({"grid": {"train.seed": []}}, "train.seed: an empty list"),
        ({"random": {"train.seed": {"low": 2, "high": 1}}}, "low 2.0 is not below high 1.0"),
        ({"random": {"train.seed": {"low": 0, "high": 1, "log": True}}}, "low > 0"),
        ({"grid": {"train.seed": [1]}, "metrics": "l1"}, "metrics"),
    ],
)
def test_a_sweep_file_that_makes_no_sense_is_refused_in_one_line(
    values: Mapping[str, Any], messages: str, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({"recipe": YAML, **values}))
    with pytest.raises(UserError) as caught:
        load(str(file))
    assert messages in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_is_named_with_its_trial_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"sweep.yaml: sed=1: train.sed: there is no such key"):
        trials(grid={"train.sed": [1]})
    with pytest.raises(UserError, match=r"train.phases.9: 9 is not a place in a list of 3"):
        trials(settings={"bad": {"train.phases.9": None}})


def test_a_sweep_anywhere_varies_a_recipe_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{recipe: facades, grid: {train.seed: [1]}}")
    words = [str(tmp_path / "sweep.yaml")]
    assert configured(parser().parse_args(words))[1] == str(RECIPES / "facades.yaml")
    (tmp_path / "facades").write_text("")  # a file beside the sweep comes first
    assert configured(parser().parse_args(words))[1] == str(tmp_path / "facades")


# -- what trials share, and which is best -------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that read a few drawn pairs and write beside them."""
    assert sample.main([str(tmp_path / "sample"), "--pairs", "10", "--size", "64x32", "--seed", "0"]) == 0
    return [
        f"workspace={tmp_path}/workspace",
        *(
            f"ingest.locations.{place}.uri={tmp_path}/sample/{role}"
            for place, role in enumerate(("label", "photo", "instance"))
        ),
    ]


def planned(found: list[Trial]) -> list[tuple[PlannedStep, ...]]:
    digests: dict[str, Seen] = {}
    return [plan(steps(trial.config), trial.config.workspace, digests) for trial in found]


def test_what_several_trials_need_is_done_once(data: list[str]) -> None:
    found = make_trials(
        config(
            settings={"complete": {}, "no joint phase": {"train.phases.2": None}, "other": {"train.seed": 9}}
        ),
        "sweep.yaml",
        YAML,
        data,
    )
    names = [p.step.name for p in shared(planned(found))]
    assert names == ["ingest", "pair", "shard", "train-global", "train-local"]


def result(name: str, state: State, **metrics: float) -> TrialResult:
    return TrialResult(
        trial=Trial(name=name, values={}, config=trials(grid={"train.seed": [1]})[0].config),
        state=state,
        metrics=metrics,
    )


def test_the_best_trial_is_the_best_of_those_that_were_judged() -> None:
    results = [
        result("a", "done", l1=0.3, psnr=9),
        result("b", "done", l1=0.2, psnr=8),
        result("c", "failed"),
    ]
    assert best_of(results, "l1", "min") is results[1]
    assert best_of(results, "psnr", "max") is results[0]
    assert best_of(results, "fid", "min") is None


@pytest.mark.parametrize(("best", "first", "second"), [("min", "b", "c"), ("max", "c", "b")])
def test_a_trial_whose_value_is_no_number_is_not_the_best(best: Best, first: str, second: str) -> None:
    values = {"nan": math.nan, "b": 0.2, "inf": math.inf, "c": 0.3, "minus": -math.inf}
    results = [result(name, "done", l1=value) for name, value in values.items()]
    chosen = best_of(results, "l1", best)
    assert chosen is not None
    assert chosen.trial.name == first
    lines = table(results, chosen, config(grid={"train.seed": [1]}, best=best)).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == [first, second]
    assert best_of(results[::2][:2], "l1", best) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--trials", "10001"], "^--trials: .*10000, got 10001"), ([], "^sweep.yaml: trials: ")],
)
def test_a_number_of_trials_has_the_files_limits_on_the_command_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"low": 0.0, "high": 1.0}
    file = {"recipe": YAML, "random": {"train.ema": space}, "trials": 3 if words else 10_001}
    Path("sweep.yaml").write_text(json.dumps(file))
    with pytest.raises(UserError, match=said):
        configured(parser().parse_args(["sweep.yaml", *words]))


@pytest.mark.parametrize(
    ("metric", "better"),
    [("l1", "min"), ("lpips_alex", "min"), ("psnr", "max"), ("ms_ssim", "max"), ("mean_iou", "max")],
)
def test_whether_more_is_better_follows_from_the_metric_if_the_file_does_not_say(
    metric: str, better: str
) -> None:
    grid = {"train.seed": [1, 2]}
    stop_early = {"metric": f"validation/{metric}"}
    sweep = config(grid=grid, metric=metric, stop_early=stop_early)
    assert sweep.stop_early is not None
    assert (sweep.best, sweep.stop_early.best) == (better, better)
    assert config(grid=grid, metric=metric, best="min").best == "min"


def test_the_table_begins_with_the_best_and_says_why_one_failed() -> None:
    results = [
        result("worse", "done", l1=0.3),
        result("better", "done", l1=0.2),
        TrialResult(trial=result("x", "failed").trial, state="failed", reason="out of memory"),
    ]
    messages = table(results, results[1], config(grid={"train.seed": [1]}))
    assert messages.index("better") < messages.index("worse") < messages.index("failed: out of memory")
    assert "best by l1 on val: better" in messages


def test_the_table_says_which_trials_are_not_clearly_worse_than_the_best(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 30)
    found = []
    for name, values in (("best", noise), ("as good", noise[::-1] + 0.001), ("worse", noise + 0.1)):
        (tmp_path / name).mkdir()
        keys = [f"k{i}" for i in range(30)]
        table_ = pa.table({"key": keys, "group": [""] * 30, "l1": 0.2 + values})
        pq.write_table(table_, tmp_path / name / "metrics.parquet")
        one = result(name, "done", l1=0.2 + values.mean(), l1_low=0.1, l1_high=0.4)
        found.append(replace(one, folder=str(tmp_path / name)))
    messages = table(found, found[0], config(grid={"train.seed": [1]}))
    assert "(0.1 to 0.4)" in messages
    assert "no clear difference from it: as good (0.001, " in messages
    assert "from it: worse" not in messages


class Record(Run):
    """A run that keeps the points it is sent."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "kept", [])

    def points(self, points: Sequence[Point]) -> None:
        self.kept.extend(points)  # type: ignore[attr-defined]


def points(epoch: int, values: Mapping[int, float], name: str = "loss") -> list[Point]:
    return [Point(step, 4 * step, epoch, name, value, 0) for step, value in values.items()]


def test_a_curve_reaches_tune_as_its_mean_when_an_epoch_is_over() -> None:
    (trial,) = trials(settings={"a": {"train.phases.0.epochs": 10}})
    reports: list[dict[str, Any]] = []
    run = Record()
    track = reporting(run, "train-local", trial.config, "loss", reports.append)
    track.points(points(0, {1: 1.0, 2: 3.0}))
    assert reports == []
    track.points(points(1, {3: 5.0}) + points(1, {3: 99.0}, "other"))
    assert reports == [{"loss": 2.0, "epoch": 11}]
    track.points(points(0, {1: 1.0, 2: 3.0}) + points(1, {3: 5.0}))  # after a restart
    track.points(points(1, {4: 7.0}) + points(2, {5: 1.0}))
    assert reports[1:] == [{"loss": 6.0, "epoch": 12}]
    assert len(run.kept) == 9  # type: ignore[attr-defined]  MLflow gets every point


def test_a_phase_that_resumes_reports_the_epochs_before(tmp_path: Path) -> None:
    (trial,) = trials(settings={"as it is": {}})
    before = [*points(0, {1: 1.0, 2: 3.0}), *points(1, {3: 5.0})]
    place = f"{tmp_path}/checkpoints/step-00000003/curves.parquet"
    storage.write_parquet(place, curves.to_table(before))
    reports: list[dict[str, Any]] = []
    track = reporting(Record(), "train-global", trial.config, "loss", reports.append)
    track.curves(str(tmp_path))
    track.points(points(1, {4: 7.0}) + points(2, {5: 1.0}))
    assert reports == [{"loss": 2.0, "epoch": 1}, {"loss": 6.0, "epoch": 2}]


def test_only_training_phases_report_epochs() -> None:
    (trial,) = trials(settings={"as it is": {}})
    run = Run()
    assert reporting(run, "evaluate", trial.config, "loss", lambda report: None) is run


def test_every_loss_of_a_step_is_a_curve_that_may_stop_a_trial() -> None:
    terms = {"l1": 10, "feature_matching": 10, "r1": 1}
    model = {"kind": "pix2pixhd", "width": 4, "downsamplings": 1, "blocks": 1, "discriminator_width": 4}
    (trial,) = trials(settings={"one": {"train.losses": terms, "train.model": model}})
    train = trial.config.train
    gan = build_gan(train.model, InputSpec(), weights=train.losses, discriminators=2)
    pair = Batch(source=torch.zeros(1, 3, 64, 64), target=torch.ones(1, 3, 64, 64))
    losses = step(gan, pair, weights=train.losses)
    assert "discriminator/r1" in losses
    assert "generator/feature_matching/scale1" in losses
    for name in [*losses, *balance({name: loss.item() for name, loss in losses.items()})]:
        check_curve(trial.config, name, "metric")


# -- one that runs ------------------------------------------------------------

SMALL = """
recipe: {recipe}
settings:
  first: {{train.losses.l1: 10}}
  second: {{train.losses.l1: 1}}
  broken: {{train.losses.l1: 1.0e+39}}
"""
NETWORKS = [
    "pair.split.val=0.3",
    "shard.size=[64, 32]",
    "train.model={kind: pix2pix, levels: 4, width: 4, discriminator_width: 4, discriminator_layers: 1}",
    "train.losses={}",
    "train.phases=[{name: whole, kind: whole, epochs: 1, batch: 4}]",
    "evaluate.baselines={untrained: 0, nearest: 0}",
]


@pytest.mark.long
def test_a_sweep_runs_its_trials_names_the_best_and_does_nothing_twice(
    data: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(SMALL.format(recipe=YAML))
    words = [part for text in (*data, *NETWORKS) for part in ("--set", text)]
    command = [sys.executable, "-m", "pipeline.sweep", str(file), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "best by l1 on val: " in done.stdout
    assert "broken" in done.stdout
    assert "Last result" not in done.stdout  # Tune's own line
    assert "1 of 3 trials failed" in done.stderr
    assert re.search(r"second: train-whole +done in", done.stdout)

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/workspace/mlflow/mlflow.db")
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert isinstance(runs, list)
    by_trial = {run.data.tags["pixloom.trial"]: run for run in runs if "pixloom.trial" in run.data.tags}
    assert {name: run.info.status for name, run in by_trial.items()} == {
        "first": "FINISHED",
        "second": "FINISHED",
        "broken": "FAILED",
    }
    assert by_trial["second"].data.params["train.losses.l1"] == "1.0"
    assert "l1" in by_trial["second"].data.metrics
    (parent,) = [run for run in runs if "pixloom.sweep" in run.data.tags]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in by_trial.values())
    best = parent.data.tags["pixloom.best"]
    assert by_trial[best].data.metrics["l1"] == min(
        run.data.metrics["l1"] for run in by_trial.values() if "l1" in run.data.metrics
    )

    folders = {path.name for path in (tmp_path / "workspace").iterdir()}
    assert len([name for name in folders if name.startswith("shard-")]) == 1
    plan = subprocess.run(
        [*command, "--plan"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
    )
    assert plan.stdout.count("all done") == 3, plan.stdout


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"metric": "lq"}, "metric: lq is not measured; evaluate measures l1,"),
        ({"metric": "diversity"}, "metric: diversity is not measured"),
        ({"metric": "ms_ssim"}, "metric: ms_ssim is not measured"),
        (
            {"stop_early": {"metric": "validation/lq"}},
            "seed=0: stop_early.metric: validation/lq is no curve of its training; there are validation/l1,",
        ),
        ({"stop_early": {"metric": "generator/lpips"}}, "generator/lpips is no curve"),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_anything_runs(
    choice: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, workspace = tmp_path / "sweep.yaml", tmp_path / "workspace"
    file.write_text(json.dumps({"recipe": YAML, "grid": {"train.seed": [0, 1]}} | choice))
    sample.main([str(tmp_path / "sample"), "--pairs", "2", "--size", "32x32"])
    found = [
        f"ingest.locations.{n}.uri={tmp_path}/sample/{r}"
        for n, r in enumerate(("label", "photo", "instance"))
    ]
    sets = [word for text in [f"workspace={workspace}", *found] for word in ("--set", text)]
    assert main([str(file), *sets]) == 2
    assert message in capsys.readouterr().err
    assert not workspace.exists()
