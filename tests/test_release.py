"""A release is one commit, one tag and one wheel of the same version."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_has_the_packages_version_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])


@pytest.mark.long
def test_a_release_is_a_commit_a_tag_and_a_checked_wheel(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", *author, "-C", str(tmp_path / "tree"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(tmp_path / "tree")], check=True)
    git("config", "user.name", "a")
    git("config", "user.email", "a@b.c")
    done = subprocess.run(
        [tmp_path / "tree/.ci/release", "9.8.7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
    assert [path.name for path in (tmp_path / "tree/dist").iterdir()] == ["pixloom-9.8.7-py3-none-any.whl"]
    assert git("tag", "--points-at", "HEAD").split() == ["v9.8.7"]
    assert "## [Unreleased]\n\n## [9.8.7] - 20" in git("show", "HEAD:CHANGELOG.md")
    assert "version: 9.8.7" in git("show", "HEAD:CITATION.cff")
    assert not git("status", "--porcelain")
