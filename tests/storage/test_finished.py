"""Finished work units, a thousand in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import storage
from stages.storage import list_names
from stages.storage.finished import Finished


def test_a_thousand_units_are_one_file_and_the_rest_are_left(tmp_path: Path) -> None:
    units = [*range(5, 1000, 5), *range(1000, 1500), 2700]
    finished = Finished(str(tmp_path), units)
    assert finished.read() == []
    assert finished.left == set(units)
    for unit in (*range(5, 1000, 5), 2700):
        if finished.finish(unit):
            finished.write(unit, {"last": unit})
    assert list_names(str(tmp_path)) == ["00000.json", "00002.json"]
    resumed = Finished(str(tmp_path), units)
    assert resumed.read() == [{"last": 995}, {"last": 2700}]
    assert resumed.left == set(range(1000, 1500)) == finished.left
    without = Finished(str(tmp_path), units)
    assert without.read(marked=set(units) - {5}) == [{"last": 2700}]
    assert 5 in without.left


def test_reading_takes_a_request_a_thousand_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = range(20_000)
    finished = Finished(str(tmp_path), units)
    for unit in units:
        if finished.finish(unit):
            finished.write(unit, unit)
    reads: list[str] = []
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: reads.append(uri) or read(uri))
    resumed = Finished(str(tmp_path), units)
    assert len(resumed.read()) == len(reads) == 20
    assert not resumed.left
