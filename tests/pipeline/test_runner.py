"""What runs, what does not, and why, shown on two tiny stages that really write files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.dag import RunView, Step, StepContext, needed
from pipeline.runner import MARKER, PREDICTED, PlannedStep, check, execute, plan, select
from stages import storage
from stages.base import Config, Outcome, Resources, Seen
from stages.errors import StageError, UserError
from stages.storage.local import alone
from stages.tracking.run import Run


class NumberConfig(Config):
    number: int = 1


class Line:
    """A pipeline of two stages: `make` writes a number, `double` reads it. Keeps what ran and was checked."""

    def __init__(self, workspace: Path) -> None:
        self.workspace, self.ran, self.fails = str(workspace), [], False
        self.checked: list[list[str]] = []
        self.listed = "objects-1"

    def make(self, config: NumberConfig, output: str) -> Outcome:
        self.ran.append("make")
        storage.write_json(storage.join(output, "number.json"), config.number)
        return Outcome(counts={"numbers": 1})

    def double(self, config: NumberConfig, numbers: str) -> Outcome:
        self.ran.append("double")
        if self.fails:
            raise RuntimeError("the disk is on fire")
        value = storage.read_json(storage.join(numbers, "number.json"))
        return Outcome(metrics={"value": float(2 * value * config.number)})

    def plan(self, make: int = 1, double: int = 1) -> tuple[PlannedStep, ...]:
        first, second = NumberConfig(number=make), NumberConfig(number=double)
        return plan(
            (
                Step(
                    name="make",
                    stage="make",
                    version=1,
                    config=first,
                    work=lambda at: self.make(first, at.output),
                    digest=lambda: Seen(self.listed),
                ),
                Step(
                    name="double",
                    stage="double",
                    version=1,
                    config=second,
                    work=lambda at: self.seen(at) or self.double(second, at.inputs["numbers"]),
                    needs={"numbers": "make"},
                    check=lambda inputs: self.checked.append(list(inputs)),
                ),
            ),
            self.workspace,
        )

    def seen(self, context: StepContext) -> None:
        self.context = context

    def run(self, planned: tuple[PlannedStep, ...]) -> dict[str, Any]:
        self.ran.clear()
        return execute(planned, Resources(), parent=Run(), view=RunView(command="run"))


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path / "workspace")


def test_steps_run_in_order_and_pass_their_folders_on(line: Line) -> None:
    finished = line.run(line.plan(make=4))
    assert line.ran == ["make", "double"]
    assert finished["double"]["metrics"] == {"value": 8.0}


def test_a_step_sees_the_markers_of_those_before_it(line: Line) -> None:
    line.run(line.plan())
    assert line.context.view.command == "run"
    assert [marker["step"] for marker in line.context.view.markers] == ["make"]


def test_a_digest_of_an_earlier_plan_is_not_computed_again(line: Line) -> None:
    steps, digests = [p.step for p in line.plan()], {}
    first = plan(steps, line.workspace, digests)
    line.listed = "objects-2"
    assert plan(steps, line.workspace, digests)[0].fingerprint == first[0].fingerprint
    assert plan(steps, line.workspace)[0].fingerprint != first[0].fingerprint


def test_a_step_is_checked_before_the_run_and_again_as_soon_as_its_inputs_are_done(line: Line) -> None:
    check(line.plan())
    assert line.checked == [[]]
    line.run(line.plan())
    assert line.checked == [[], ["numbers"]]
    check(line.plan())  # it is done
    assert line.checked == [[], ["numbers"]]


def test_a_rerun_does_nothing(line: Line) -> None:
    line.run(line.plan())
    again = line.plan()
    assert all(p.done for p in again)
    assert line.run(again)["double"]["metrics"] == {"value": 2.0}
    assert line.ran == []


def test_of_two_runs_at_once_one_does_a_step_and_the_other_waits_for_it(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    planned, others = line.plan(), line.plan()
    with ThreadPoolExecutor(1) as thread:
        with alone(planned[0].folder):
            other = thread.submit(line.run, others)
            while f"another run works in {planned[0].folder}" not in caplog.text:
                assert not other.done()
            storage.write_json(storage.join(planned[0].folder, "number.json"), 1)
            storage.write_json(storage.join(planned[0].folder, MARKER), {"counts": {"numbers": 1}})
        markers = other.result()
    assert line.ran == ["double"]
    assert markers["make"]["counts"] == {"numbers": 1}


def test_a_config_change_moves_only_what_is_downstream(line: Line) -> None:
    line.run(line.plan())
    planned = line.plan(double=5)
    assert [p.done for p in planned] == [True, False]
    assert planned[1].why == "changed: number"
    line.run(planned)
    assert line.ran == ["double"]


def test_a_change_upstream_moves_everything_after_it(line: Line) -> None:
    line.run(line.plan())
    planned = line.plan(make=2)
    assert [p.done for p in planned] == [False, False]
    assert planned[1].why == "after make"


def test_changed_objects_are_noticed_and_named_as_the_reason(line: Line) -> None:
    line.run(line.plan())
    line.listed = "objects-2"
    assert line.plan()[0].why == "the data it reads has changed"


def test_going_back_to_an_earlier_setting_finds_its_output(line: Line) -> None:
    line.run(line.plan(make=1))
    line.run(line.plan(make=2))
    assert all(p.done for p in line.plan(make=1))


def test_a_failed_stage_is_named_with_its_folder_and_cause_and_taken_up_again(line: Line) -> None:
    line.fails = True
    with pytest.raises(
        StageError, match=r"double failed: RuntimeError: the disk is on fire .*double-"
    ) as caught:
        line.run(line.plan())
    assert isinstance(caught.value.__cause__, RuntimeError)
    line.fails = False
    planned = line.plan()
    assert [p.done for p in planned] == [True, False]
    line.run(planned)
    assert line.ran == ["double"]


def test_a_folder_without_a_marker_is_unfinished_work(line: Line) -> None:
    line.run(line.plan())
    (Path(line.plan()[1].folder) / MARKER).unlink()
    storage.write_bytes(storage.join(line.plan()[1].folder, "half"), b"x")
    assert line.plan()[1].why == "unfinished, continues"


def test_a_marker_has_the_time_that_the_plan_expected_unless_the_step_resumed(line: Line) -> None:
    expected = {p.folder.rpartition("/")[2]: 12.5 for p in line.plan()}
    storage.write_json(storage.join(line.workspace, PREDICTED), expected)
    storage.write_bytes(storage.join(line.plan()[1].folder, "half"), b"x")
    markers = line.run(line.plan())
    assert (markers["make"]["predicted"], markers["make"]["resumed"]) == (12.5, False)
    assert (markers["double"]["predicted"], markers["double"]["resumed"]) == (None, True)


def test_a_torn_marker_counts_as_none(line: Line) -> None:
    line.run(line.plan())
    (Path(line.plan()[0].folder) / MARKER).write_text('{"step": "ma')
    assert not line.plan()[0].done


def test_until_and_only_choose_steps(line: Line) -> None:
    planned = line.plan()
    assert [p.step.name for p in select(planned, only=None, until="make")] == ["make"]
    with pytest.raises(UserError, match="comes from make, which is not done"):
        select(planned, only="double", until=None)
    with pytest.raises(UserError, match="no such stage; there are make, double"):
        select(planned, only="treble", until=None)


def test_a_stage_alone_asks_only_for_what_it_comes_from(line: Line) -> None:
    made = tuple(planned.step for planned in line.plan())
    assert needed(made, "double") == made
    assert [step.name for step in needed(made, "make")] == ["make"]
    assert needed(made, "nothing") == made
