"""Curves: windows of steps become points; what is not finite stops training with its step named."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest
import torch

from stages.base import Point
from stages.training import curves
from stages.training.checkpoints import Position
from stages.training.curves import DivergedError, Window
from stages.training.gradients import Messages

ALONE = Messages(1, torch.device("cpu"), 60)


def test_a_point_is_the_mean_over_its_window() -> None:
    window = Window(ALONE)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        window.add(step, {"generator/gan": torch.tensor(value)}, 1.0)
    assert window.close(rate=0.1, norms={"norm": torch.tensor(0.5)}).means() == (
        {"generator/gan": 3.0},
        {"norm": 0.5},
    )


def test_workers_count_by_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with 3 and 1 rows: shares 1.5 and 0.5, so the mean is over rows."""
    messages = Messages(1, torch.device("cpu"), 60)
    messages.workers = 2
    monkeypatch.setattr(messages, "total", lambda table: table + 0.5 * 10.0)
    window = Window(messages)
    window.add(0, {"loss": torch.tensor(2.0)}, 1.5)
    assert window.close(rate=0.1).means()[0] == {"loss": (3 * 2.0 + 1 * 10.0) / 4}


def test_a_worker_without_rows_uses_the_names_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = Messages(1, torch.device("cpu"), 60)
    monkeypatch.setattr(messages, "broadcast", lambda _: ["a", "b"])
    window = Window(messages)
    window.add(0, {}, 0.0)
    assert window.close(rate=0.1).means()[0] == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_losses_and_rate(bad: float) -> None:
    window = Window(ALONE)
    window.add(41, {"generator/gan": torch.tensor(1.0)}, 1.0)
    window.add(42, {"generator/gan": torch.tensor(bad)}, 1.0)
    window.add(43, {"generator/gan": torch.tensor(bad)}, 1.0)
    with pytest.raises(DivergedError, match=rf"step 42: generator/gan {bad} at learning rate 0.0002"):
        window.close(rate=2e-4).means()


def test_points_survive_the_table() -> None:
    rows = curves.points(Position(steps=3, images=12), 1, {"a": 1.5, "b": -2.0})
    assert curves.from_table(curves.to_table(rows)) == rows
    assert curves.from_table(curves.to_table([])) == []


def test_the_note_of_a_progress_line_sums_each_networks_losses() -> None:
    losses = {"generator/gan": 1.0, "generator/l1": 0.25, "generator/gan/scale0": 9.0,
              "discriminator/real": 0.5, "discriminator/fake": 0.25}  # fmt: skip
    assert curves.note(losses) == "G 1.25 D 0.375"
    assert curves.note({"generator/l1": 0.25}) == "G 0.25"


def test_the_balance_compares_the_two_networks() -> None:
    losses = {"discriminator/real": 0.1, "discriminator/fake": 0.3, "generator/gan": 0.4}
    assert curves.balance(losses) == {"health/discriminator_over_generator": pytest.approx(0.5)}
    assert curves.balance({"generator/l1": 1.0}) == {}


def test_points_that_were_asked_for_are_not_converted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    to_table = curves.to_table

    def counted(rows: Sequence[Point]) -> pa.Table:
        sizes.append(len(rows))
        return to_table(rows)

    monkeypatch.setattr(curves, "to_table", counted)
    first, second = (curves.points(Position(steps=step), 0, {"a": step, "b": 2.0}) for step in (1, 2))
    points = curves.Curves(to_table(first))
    points.add(second)
    assert curves.from_table(points.table()) == [*first, *second]
    assert points.named("a") == [first[0], second[0]]
    assert sizes == [2]
