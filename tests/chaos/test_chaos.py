"""The schedule is a function of its seed, and the checker finds what is planted."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest

from chaos import schedule
from chaos.catalogue import CATALOGUE
from chaos.check import Remains, differences
from chaos.schedule import MOMENTS

KINDS = list(CATALOGUE)


def test_a_seed_gives_the_same_faults_in_the_order_of_their_moments() -> None:
    faults = schedule.draw(7, KINDS, 8)
    assert faults == schedule.draw(7, KINDS, 8)
    assert faults != schedule.draw(8, KINDS, 8)
    places = [MOMENTS.index(fault.moment) for fault in faults]
    assert places == sorted(places)


def test_every_kind_comes_up_as_often_as_any_other() -> None:
    dealt = Counter(fault.kind for seed in range(len(KINDS)) for fault in schedule.draw(seed, KINDS, 8))
    assert dealt == dict.fromkeys(KINDS, 8)


def test_every_moment_is_drawn() -> None:
    assert {fault.moment for seed in range(40) for fault in schedule.draw(seed, KINDS, 8)} == set(MOMENTS)


def test_smaller_schedules_are_halves_and_all_but_one() -> None:
    assert schedule.halves([4]) == []
    assert schedule.halves([1, 2]) == [[1], [2]]
    assert schedule.halves([1, 2, 3]) == [[1], [2, 3], [2, 3], [1, 3], [1, 2]]


@pytest.fixture
def calm() -> Remains:
    steps = [1, 2, 3]
    return Remains(
        pairs=Counter({"a in train": 1, "b in test": 1, "c in quarantine for not_an_image": 1}),
        files={"infer-1/images/b.png": b"picture", "train-global-1/model/generator.safetensors": b"weights"},
        tables={"evaluate-1/metrics.parquet": ['{"key": "b", "l1": 0.5}']},
        curves={"train-global-1": {(step, "generator/gan"): 1.0 / step for step in steps}},
        tracked={"train-global": {"generator/gan": steps}},
        names={"shard-1/train-0.parquet", "train-global-1/model/model.json"},
        versions=1,
    )


def test_the_same_remains_have_no_differences(calm: Remains) -> None:
    assert differences(calm, deepcopy(calm)) == []


def test_what_another_config_and_checkpoints_left_does_not_count(calm: Remains) -> None:
    found = deepcopy(calm)
    found.names |= {
        "train-global-2/model/model.json",
        "train-global-1/checkpoints/step-1/tensors.safetensors",
    }
    assert differences(calm, found) == []


PLANTED = {
    "a pair lost": (lambda r: r.pairs.pop("a in train"), "pair a in train: 0 times"),
    "a pair twice": (lambda r: r.pairs.update(["b in test"]), "pair b in test: 2 times"),
    "a wrong reason": (
        lambda r: r.pairs.update({"c in quarantine for not_an_image": -1, "c in quarantine for missing": 1}),
        "c in quarantine for missing: 1 times, 0 in a calm run",
    ),
    "a flipped byte": (lambda r: r.files.update({"infer-1/images/b.png": b"pictUre"}), "b.png: another one"),
    "weights lost": (
        lambda r: r.files.pop("train-global-1/model/generator.safetensors"),
        "generator.safetensors: missing",
    ),
    "another score": (
        lambda r: r.tables.update({"evaluate-1/metrics.parquet": ['{"key": "b", "l1": 0.6}']}),
        "table evaluate-1/metrics.parquet: another one",
    ),
    "a bit of a curve": (
        lambda r: r.curves["train-global-1"].update({(2, "generator/gan"): 0.5000000001}),
        "curves of train-global-1: another one",
    ),
    "a step twice in MLflow": (
        lambda r: r.tracked["train-global"].update({"generator/gan": [1, 2, 2, 3]}),
        "MLflow, train-global, generator/gan: steps [] missing, [2] too many",
    ),
    "a phase lost in MLflow": (
        lambda r: r.tracked.clear(),
        "MLflow, train-global, generator/gan: steps [1, 2, 3] missing",
    ),
    "a half-written file": (
        lambda r: r.names.add("shard-1/train-0.parquet.part"),
        "left behind: shard-1/train-0.parquet.part",
    ),
    "a model registered twice": (lambda r: setattr(r, "versions", 2), "the model is registered 2 times"),
    "an upload not finished": (lambda r: r.unfinished_uploads.append("x"), "an upload that was not finished"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(calm: Remains, name: str) -> None:
    plant, line = PLANTED[name]
    found = deepcopy(calm)
    plant(found)
    problems = differences(calm, found)
    assert any(line in problem for problem in problems), problems
