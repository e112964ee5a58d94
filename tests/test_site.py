"""The docs as a site: built without a warning, with every page, key, command and link."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.__main__ import VERBS
from pipeline.config import load
from pipeline.dag import registration, steps
from tests.test_docs import ROOT, config, keys

hooks = pytest.importorskip("docs.hooks", reason="the docs are not built: MkDocs is missing (extra docs)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def words(page: Path) -> str:
    """The text of a page."""
    article = re.search(r"<article.*</article>", page.read_text(), re.DOTALL)
    assert article, page
    return html.unescape(re.sub(r"<[^>]+>", "", article[0]))


def test_every_page_is_there_and_for_programs_too(site: Path) -> None:
    whole = (site / "llms-full.txt").read_text()
    for page in [*map(ROOT.joinpath, hooks.PAGES), *ROOT.glob("docs/*.md")]:
        title = page.read_text().splitlines()[0].removeprefix("# ")
        assert f"[{title}](" in (site / "llms.txt").read_text()
        assert f"# {title}\n" in whole


def test_the_references_have_every_key_command_and_name(site: Path) -> None:
    text = words(site / "reference" / "config" / "index.html")
    for key in keys(config.PipelineConfig):
        section, _, name = key.rpartition(".")
        assert f"\n{section}" in text, section
        assert re.search(rf"\n{name}\n", text), key
    commands = words(site / "reference" / "commands" / "index.html")
    for verb in VERBS:
        assert f"usage: pixloom {verb}" in commands or f"the same as pixloom run --{verb}" in commands
    assert "--generator FILE" in commands
    python = words(site / "reference" / "python" / "index.html")
    assert "Raises" in python
    assert ":::" not in python


def test_every_page_of_the_docs_has_a_picture() -> None:
    without = [page.name for page in ROOT.glob("docs/*.md") if "\n![" not in page.read_text()]
    assert without == []


def test_the_diagrams_show_every_step_and_every_package() -> None:
    shipped = load(str(ROOT / "pipeline.yaml"))
    drawn = (ROOT / "docs" / "steps.svg").read_text()
    assert [
        step.name for step in (*steps(shipped), *registration(shipped)) if f">{step.name}<" not in drawn
    ] == []
    drawn = (ROOT / "docs" / "layers.svg").read_text()
    packages = {path.stem for path in ROOT.glob("stages/*") if path.stem[0] not in "_."}
    assert sorted(name for name in packages if f">{name}<" not in drawn) == []


def test_markdown_is_as_on_github(site: Path) -> None:
    for page in site.rglob("index.html"):
        article = re.search(r"<article.*</article>", page.read_text(), re.DOTALL)
        assert article
        prose = re.sub(r"<(pre|code|script).*?</\1>", "", article[0], flags=re.DOTALL)
        assert not re.search(r"<p>[^<]*\n(?:- |\| )", prose), f"{page}: a list needs an empty line before it"
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"#?]+)', prose):
            target = page.parent / link
            assert target.exists(), f"{page}: {link}"
