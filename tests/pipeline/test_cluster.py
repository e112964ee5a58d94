"""Where a run may write its results."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline.cluster import check_folders, result_folders
from stages.errors import UserError

YAML = str(Path(__file__).resolve().parents[2] / "pipeline.yaml")


def test_the_folders_of_this_machine_are_named_by_their_key(tmp_path: Path) -> None:
    config = configuration.load(YAML, [f"workspace={tmp_path}"])
    assert result_folders(config) == {
        "workspace": str(tmp_path),
        "tracking.uri": str(tmp_path / "mlflow" / "mlflow.db"),
    }


def test_stores_and_servers_are_no_folders_of_this_machine() -> None:
    words = ["workspace=memory://pixloom", "tracking.uri=http://mlflow:5000"]
    assert result_folders(configuration.load(YAML, words)) == {}


def test_results_in_a_jobs_uploaded_folder_are_refused() -> None:
    uploaded = "/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/workspace"
    with pytest.raises(UserError, match=r"run.yaml: workspace: .* name a bucket"):
        check_folders({"workspace": uploaded}, "run.yaml")
    check_folders({"workspace": "/data/workspace"}, "run.yaml")


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ws"
    file.touch()
    with pytest.raises(UserError, match=rf"^run.yaml: workspace: {file} is a file; name a folder$"):
        check_folders({"workspace": str(file)}, "run.yaml")
