"""Two runs of one experiment, beside each other: what differs, and what differs clearly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from pipeline import compare, config as configuration
from pipeline.session import as_yaml, log_results
from stages import storage
from stages.tracking.run import open_parent

KEYS = [f"image_{number}" for number in range(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two evaluated runs, `first` and `second`, and twice one called `twin`."""
    folder = tmp_path_factory.mktemp("compared")
    errors = np.random.default_rng(0).uniform(0.1, 0.3, len(KEYS))
    record(folder, "first", seed=1, digest="aa", l1=errors, ssim=errors)
    record(
        folder,
        "second",
        seed=2,
        digest="bb",
        l1=errors - 0.01,
        ssim=errors + np.linspace(-0.1, 0.1, len(KEYS)),
    )
    record(folder, "twin", seed=1, digest="aa", l1=errors, ssim=errors)
    record(folder, "twin", seed=1, digest="aa", l1=errors, ssim=errors)
    return folder


def record(folder: Path, name: str, *, seed: int, digest: str, l1: np.ndarray, ssim: np.ndarray) -> None:
    """What a pipeline run leaves in MLflow and in the workspace."""
    config = configuration.load(
        str(configuration.located("pipeline.yaml")),
        settings(folder, f"train.seed={seed}", f"train.phases.0.batch={seed}"),
    )
    folder_ = str(folder / f"evaluate-{name}-{digest}")
    with open_parent(config.tracking, name, {"pixloom.workspace": str(folder)}, str(folder)) as parent:
        parent.artifact("config.yaml", as_yaml(config).encode())
        parent.dataset("scenes", uri="s3://scenes", digest=digest, context="training", counts={"test": 40})
        parent.metrics({"l1": float(l1.mean()), "l1_low": 0.1, "l1_high": 0.3, "ssim": float(ssim.mean())})
        parent.metrics({"nearest_l1": float(l1.mean()), "sharpness": float(l1.mean())})
        step = SimpleNamespace(step=SimpleNamespace(name="evaluate"), folder=folder_)
        log_results(config, [step], {"evaluate": {"metrics": {}}}, parent)  # done now, or found done
    scores = {"l1": l1, "ssim": ssim, "nearest_l1": l1, "sharpness": l1}
    table = pa.table({"key": KEYS, "group": [""] * len(KEYS), **scores})
    storage.write_parquet(f"{folder_}/metrics.parquet", table)


def settings(folder: Path, *more: str) -> list[str]:
    return [f"workspace={folder}", "tracking.uri=null", *more]


def said(folder: Path, runs: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of the command."""
    code = compare.main([*runs, *(word for one in settings(folder) for word in ("--set", one))])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_settings_data_and_results_that_differ_are_shown(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(place, ["first", "second"], capsys)
    assert code == 0, text
    assert re.search(
        r"\nsettings\n  train\.phases\.0\.batch +1 +2\n  train\.seed +1 +2\n"
        r"\ndata\n  scenes +aa .* +bb .*\n\nresults\n",
        text,
    )
    assert re.search(
        r"\n  l1 +0\.2\d* \(0\.1 to 0\.3\) .* the second is better: -0\.01 \(-0\.01 to -0\.01\)\n", text
    )
    assert re.search(r"\n  ssim .* no clear difference: ", text)
    for name in ("nearest_l1", "sharpness"):  # a baseline, and noise is sharp: no scores of the model
        assert re.search(rf"\n  {name} .*", text)
        assert not re.search(rf"\n  {name} .*(better|difference)", text)


def test_a_run_is_found_behind_pages_of_newer_ones(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "PAGE", 3)  # of 8 runs: 4 and their steps
    assert said(place, ["first", "second"], capsys)[0] == 0
    assert "2 runs have this name" in said(place, ["first", "twin"], capsys)[1]


def test_of_long_values_both_ends_are_shown() -> None:
    first, second = (f"s3://{'x' * 90}/{name}" for name in ("a", "b"))
    assert compare.columns([("uri", first, second)]).endswith("x/b")
    assert "x/a " in compare.columns([("uri", first, second)])


def test_equal_runs_are_the_same_and_a_name_of_two_asks_for_an_id(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(place, ["first", "twin"], capsys)
    assert code == 2
    ids = re.findall(r"twin \((\w{32})\)", text)
    assert len(ids) == 2
    assert text.startswith("twin: 2 runs have this name, take an id; there are ")
    code, text = said(place, ids, capsys)
    assert code == 0, text
    assert text.count("  the same\n") == 3


def test_a_run_that_is_not_there_and_a_workspace_without_runs_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(place, ["first", "no such"], capsys)
    assert (code, text.partition(";")[0]) == (2, "no such: there is no such run")
    code, text = said(tmp_path, ["first", "second"], capsys)
    assert code == 2
    assert text == f"tracking.uri: there is no {tmp_path}/mlflow/mlflow.db: nothing ran in {tmp_path} yet\n"


def test_without_the_images_scores_nothing_is_called_better(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "evaluate-second-bb" / "metrics.parquet").rename(place / "moved")
    try:
        code, text = said(place, ["first", "second"], capsys)
    finally:
        (place / "moved").rename(place / "evaluate-second-bb" / "metrics.parquet")
    assert code == 0
    assert "better" not in text
