"""Checkpoints: what is written is read back whole or not at all, at any location."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from stages import storage
from stages.storage import retry
from stages.training import checkpoints, curves
from stages.training.checkpoints import Checkpoint, DamagedError, Position, Writer


def checkpoint(steps: int, value: float = 1.0) -> Checkpoint:
    moments = {0: {"step": torch.tensor(float(steps)), "m": torch.ones(2)}}
    state = {
        "generator": {"layer.weight": torch.full((3, 2), value)},
        "optimizer": {"state": moments, "groups": [{"lr": 0.1}]},
        "updates": steps,
    }
    points = curves.points(Position(steps=steps, images=steps), 0, {"loss": value})
    return Checkpoint("job", Position(steps=steps, step=steps), state, curves.to_table(points), "run")


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "local":
        return str(tmp_path / "checkpoints")
    return f"memory://{tmp_path.name}/checkpoints"


def test_a_state_is_split_into_tensors_and_json_and_joined_again() -> None:
    state = {"a": [1, {"b": torch.ones(2)}], 3: {"x": None}, "betas": (0.5, 0.9)}
    tensors, plain = checkpoints.split_state(state)
    assert set(tensors) == {"a.1.b"}
    again = checkpoints.join_state(tensors, plain)
    assert again["betas"] == [0.5, 0.9]
    assert again[3] == {"x": None}
    assert again["a"][1]["b"].equal(torch.ones(2))


def test_a_checkpoint_reads_back_equal(folder: str) -> None:
    written = checkpoint(7, 2.5)
    checkpoints.save(folder, written, keep=2)
    read = checkpoints.load_newest(folder, job="job")
    assert read is not None
    assert read.position == written.position
    assert read.run_id == "run"
    assert read.state["generator"]["layer.weight"].equal(written.state["generator"]["layer.weight"])
    assert read.state["optimizer"]["state"][0]["step"].item() == 7
    assert curves.from_table(read.curves) == curves.from_table(written.curves)


def test_only_the_newest_are_kept(folder: str) -> None:
    for steps in (1, 2, 3, 10):
        checkpoints.save(folder, checkpoint(steps), keep=2)
    assert checkpoints.names(folder) == ["step-00000003", "step-00000010"]


def test_checkpoints_are_in_the_order_of_their_steps_however_many(folder: str) -> None:
    many = [99_999_998, 99_999_999, 100_000_000, 100_000_001]
    for steps in many:
        checkpoints.save(folder, checkpoint(steps), keep=3)
    assert checkpoints.names(folder) == [f"step-{steps}" for steps in many[1:]]
    newest = checkpoints.load_newest(folder, job="job")
    assert newest is not None
    assert newest.position.steps == many[-1]


@pytest.mark.parametrize("keep", [1, 2])
def test_unfinished_ones_of_later_steps_take_no_place_of_usable_ones(folder: str, keep: int) -> None:
    checkpoints.save(folder, checkpoint(100), keep=keep)
    for steps in (150, 160):  # killed while they were written; a resumed run comes by other steps
        storage.write_bytes(storage.join(folder, f"step-{steps:08d}", checkpoints.TENSORS), b"half")
    for steps in (140, 145):
        checkpoints.save(folder, checkpoint(steps), keep=keep)
        newest = checkpoints.load_newest(folder, job="job")
        assert newest is not None
        assert newest.position.steps == steps
    assert checkpoints.names(folder) == ["step-00000140", "step-00000145"][-keep:]


@pytest.mark.parametrize("file", [checkpoints.TENSORS, checkpoints.CURVES, checkpoints.MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_taken(
    folder: str, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.save(folder, checkpoint(1, 1.0), keep=3)
    checkpoints.save(folder, checkpoint(2, 2.0), keep=3)
    uri = storage.join(folder, "step-00000002", file)
    data = bytearray(storage.read_bytes(uri))
    fs, path = storage.filesystem(uri)
    fs.rm_file(path)
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF
    if damage != "remove":
        storage.write_bytes(uri, bytes(data[: len(data) // 2] if damage == "truncate" else data))
    read = checkpoints.load_newest(folder, job="job")
    assert read is not None
    assert read.position.steps == 1
    assert "step-00000002" in caplog.text


def test_a_checkpoint_of_other_settings_is_not_taken(folder: str) -> None:
    checkpoints.save(folder, checkpoint(1), keep=1)
    assert checkpoints.load_newest(folder, job="other") is None


def test_a_folder_without_checkpoints_has_none(folder: str) -> None:
    assert checkpoints.load_newest(folder, job="job") is None


def test_writing_a_checkpoint_again_is_never_half_old_half_new(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(folder, checkpoint(1, 1.0), keep=1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(checkpoints.pq, "write_table", fail)
    with pytest.raises(OSError, match="killed here"):
        checkpoints.save(folder, checkpoint(1, 2.0), keep=1)
    place = storage.join(folder, "step-00000001")
    if storage.is_local(folder):  # written in place: the new files are begun, so it is no checkpoint any more
        with pytest.raises(DamagedError, match="not finished"):
            checkpoints.load(place, job="job")
    else:  # nothing is uploaded before all is written
        assert checkpoints.load(place, job="job").state["generator"]["layer.weight"][0, 0] == 1.0


def test_a_copy_does_not_follow_later_steps() -> None:
    layer = nn.Linear(2, 2)
    copy = checkpoints.copied({"layer": layer.state_dict()})
    with torch.no_grad():
        layer.weight.add_(1)
    assert not copy["layer"]["weight"].equal(layer.weight)


def test_an_optimizer_goes_on_from_a_checkpoint_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def train(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, betas=(0.5, 0.999), fused=True)
    train(layer, optimizer, 3)
    state = {"layer": layer.state_dict(), "optimizer": optimizer.state_dict()}
    saved = Checkpoint("job", Position(steps=3), checkpoints.copied(state), curves.to_table([]))
    checkpoints.save(str(tmp_path), saved, keep=1)
    train(layer, optimizer, 3)
    read = checkpoints.load_newest(str(tmp_path), job="job")
    assert read is not None
    again = nn.Linear(2, 2)
    fresh = torch.optim.Adam(again.parameters(), lr=1.0, fused=True)
    again.load_state_dict(read.state["layer"])
    fresh.load_state_dict(read.state["optimizer"])
    train(again, fresh, 3)
    assert again.weight.equal(layer.weight)


class FailingStore(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that raises the errors of a list, one for each upload, and then works."""

    protocol = "failing"
    cachable = False
    errors: ClassVar[list[OSError]] = []

    def _open(self, path: str, mode: str = "rb", **named: Any) -> Any:
        if "w" in mode and self.errors:
            raise self.errors.pop(0)
        return super()._open(path, mode, **named)


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in a store that fails."""
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    return f"failing://{tmp_path.name}"


def test_a_store_that_comes_back_gets_the_checkpoint(failing: str) -> None:
    FailingStore.errors[:] = [ConnectionError("away"), ConnectionError("away")]
    seconds: list[float] = []
    writer = Writer(failing, keep=1, saved=seconds.append)
    writer.submit(checkpoint(4))
    writer.finish()
    assert FailingStore.errors == []
    assert len(seconds) == 1
    read = checkpoints.load_newest(failing, job="job")
    assert read is not None
    assert read.position.steps == 4


def test_a_store_that_stays_away_fails_the_end_of_the_phase_and_no_step(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    FailingStore.errors[:] = [ConnectionError("away")] * retry.ATTEMPTS
    writer = Writer(failing, keep=1)
    writer.submit(checkpoint(4))
    writer.wait()
    assert "checkpoint step-00000004 not written" in caplog.text
    assert "training continues" in caplog.text
    with pytest.raises(OSError, match="away"):
        writer.finish()
    writer.submit(checkpoint(8))
    writer.finish()
    assert checkpoints.load_newest(failing, job="job") is not None


@pytest.mark.parametrize(("keeps_best", "steps"), [(True, [1, 2, 3]), (False, [1, 3])])
def test_the_best_checkpoint_is_written_also_when_a_newer_one_comes_before(
    tmp_path: Path, keeps_best: bool, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is written the second waits, which is the best when the third comes."""
    begun, go_on, save = threading.Event(), threading.Event(), checkpoints.save

    def slow(*args: Any, **named: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        save(*args, **named)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer = Writer(str(tmp_path), keep=9, keeps_best=keeps_best)
    writer.submit(checkpoint(1))
    assert begun.wait(30)
    writer.submit(checkpoint(2))
    third = threading.Thread(target=writer.submit, args=[replace(checkpoint(3), best=["step-00000002"])])
    third.start()
    third.join(0.2 if keeps_best else 30)
    assert third.is_alive() == keeps_best
    go_on.set()
    third.join(30)
    writer.finish()
    assert checkpoints.names(str(tmp_path)) == [checkpoints.folder_name(Position(steps=n)) for n in steps]


def test_of_the_best_the_first_that_was_written_whole_is_kept(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()  # begun, and never finished
    for steps in (1, 3, 4):
        best = ["step-00000002", "step-00000001"]
        checkpoints.save(str(tmp_path), replace(checkpoint(steps), best=best), keep=1)
    assert checkpoints.names(str(tmp_path)) == ["step-00000001", "step-00000004"]
