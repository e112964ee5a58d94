"""The notebooks run from their first cell to their last, and what they show is kept with them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.stores.seaweed import SeaweedS3
from tests.support.notebooks import NOTEBOOKS, execute

LONG = {"from_a_bucket_to_the_champion"}
RUNS = [
    pytest.param(path, marks=[pytest.mark.long] if path.stem in LONG else [], id=path.stem)
    for path in NOTEBOOKS
]


def pictures(notebook: Any) -> int:
    """How many pictures its outputs show."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.parametrize("notebook", RUNS)
def test_a_notebook_runs_in_an_empty_folder(notebook: Path, s3_store: SeaweedS3, s3_bucket: str) -> None:
    with tempfile.TemporaryDirectory(prefix="nb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = execute(notebook, Path(folder), s3_store, s3_bucket)
    assert pictures(done) == pictures(nbformat.read(notebook, as_version=4))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept_without_places_of_a_machine(notebook: Path) -> None:
    kept = nbformat.read(notebook, as_version=4)
    assert pictures(kept) >= 3
    assert all(cell.outputs for cell in kept.cells if cell.cell_type == "code" and "!" in cell.source)
    text = notebook.read_text(encoding="utf-8")
    assert not re.search(r"\b(tmp|root|work)/", text)
    assert "Traceback" not in text
