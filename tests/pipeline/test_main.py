"""All commands under one name, the recipes by theirs, and the wheel that carries both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from pipeline import __main__ as pixloom, config as configuration
from stages.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_every_verb_has_its_line_and_its_parser() -> None:
    text = pixloom.parser().format_help()
    for verb, line in pixloom.VERBS.items():
        assert f"  {verb:<12}{line}\n" in text
        assert pixloom.module(verb).parser().description


def test_plan_is_run_with_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pixloom.main(["plan", "-c", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: no such config file" in capsys.readouterr().err


def test_the_installed_command_names_itself_in_its_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "python -m pipeline.run --plan" in pixloom.module("run").parser().format_help()
    monkeypatch.setattr(sys, "argv", ["/env/bin/pixloom"])
    assert pixloom.parser().prog == "pixloom"
    assert "pixloom run --plan" in pixloom.module("run").parser().format_help()


def test_the_shell_completes_verbs_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert pixloom.main(["completion", "bash"]) == 0
    words = "COMP_WORDS=(pixloom {}); COMP_CWORD={}; _shtab_pixloom; echo ${{COMPREPLY[@]}}\n"
    asked = words.format("sw", 1) + words.format("run --prof", 2) + words.format("convert import --gen", 3)
    done = subprocess.run(
        ["bash"], input=capsys.readouterr().out + "\n" + asked, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["sweep", "--profile", "--generator"]


# -- recipes by name -----------------------------------------------------------


def test_the_list_has_every_recipe_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pixloom.main(["recipes"]) == 0
    recipes = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"facades", "pix2pix/camvid", "sample", "sweeps/losses"} <= set(recipes)
    assert recipes["pix2pix/aerial-to-maps"] == "Aerial photo -> map: the reverse of maps-to-aerial\n".strip()
    assert all(Path(configuration.located(name)).is_file() for name in recipes)


def test_a_recipe_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = pixloom.module("run").parser().parse_args(["-c", "pix2pix/camvid"])
    by_name = configuration.load(options.config, profile="paper")
    assert by_name == configuration.load(str(ROOT / "recipes/pix2pix/camvid.yaml"), profile="paper")
    (tmp_path / "mine.yaml").write_text("extends: pix2pix/camvid\n")
    assert configuration.load("mine.yaml", profile="paper") == by_name


def test_a_file_here_comes_before_a_recipe_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facades.yaml").write_text("extends: facades\ntrain: {seed: 9}\n")
    assert configuration.load(configuration.located("facades.yaml")).train.seed == 9


@pytest.mark.parametrize("name", ["facades", "pix2pix/aerial-to-maps", "pix2pixhd/cityscapes-1024-features"])
def test_a_copied_recipe_is_the_same_run_and_is_never_overwritten(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pixloom.main(["recipes", "copy", name]) == 0
    file = capsys.readouterr().out.strip()
    assert configuration.load(file) == configuration.load(str(ROOT / "recipes" / f"{name}.yaml"))
    schema = Path(file).read_text().partition("\n")[0].partition("$schema=")[2]
    assert "properties" in yaml.safe_load(Path(schema).read_text())
    assert pixloom.main(["recipes", "copy", name]) == 2
    assert f"{file}: exists" in capsys.readouterr().err


def test_a_recipe_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pixloom.main(["recipes", "copy", "facades", "/proc/none.yaml"]) == 2
    assert "/proc/none.yaml: it cannot be made" in capsys.readouterr().err


def test_a_name_that_is_no_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="nosuch: no such recipe"):
        pixloom.module("recipes").copy("nosuch", None)


# -- the wheel -----------------------------------------------------------------


@pytest.mark.long
def test_the_wheel_runs_the_sample_pipeline_from_any_folder(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("pipeline", "stages", "recipes"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(tree)], check=True
    )
    (wheel,) = tmp_path.glob("pixloom-*.whl")
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    site.joinpath("dependencies.pth").write_text(
        sysconfig.get_path("purelib")
    )  # a full install takes minutes
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(python.with_name("pixloom")), *words],
            cwd=work, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "pix2pix/camvid" in run("recipes")
    run("recipes", "copy", "sample", "pipeline.yaml")
    run("sample", "sample", "--pairs", "16", "--size", "64x64")
    tiny = ["shard.size=[64, 64]", "pair.split.val=0.2", "train.model.width=4", "train.model.enhancers=0",
            "train.phases.0.epochs=1", "train.phases.0.decay_epochs=0",
            "train.phases.2=null", "train.phases.1=null"]  # fmt: skip
    sets = [word for text in tiny for word in ("--set", text)]
    assert "train" in run("plan", *sets)
    text = run("run", *sets)
    (page,) = work.glob("workspace/report-*/report.html")
    assert str(page) in text
    assert "<style>" in page.read_text()
