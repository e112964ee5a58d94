"""Every command of every page: parsed by its own program, and the benchmarks run at a tiny size.

`tests/test_commands.py` runs the other commands, `tests/recipes/test_tutorial.py` those of docs/tutorial.md.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel

from benchmarks import data
from pipeline import config
from pipeline.sweep import run as sweep
from pipeline.sweep.trials import make_trials

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
EXTERNAL = {
    "aws": "needs an account",
    "curl": "downloads a data set",
    "docker": "needs a Docker daemon; tests/cluster/test_cluster_files.py checks the Dockerfile",
    "kubectl": "needs a Kubernetes cluster; tests/cluster/test_cluster_files.py checks the manifests",
    "mlflow": "is MLflow's own; tests/tracking/test_served.py serves a model",
    "pip": "installs packages",
    "ray": "needs a cluster; tests/cluster/test_jobs.py submits jobs",
}
"""Commands that are not parsed here, and why."""
READERS_OWN = {"mine.yaml", "pixloom.yaml", "run.yaml", "street.yaml"}
"""Config files that the reader of a page writes."""
MENTIONED = {
    "python -m pipeline.convert export",
    "python -m pipeline.convert import",
    "python -m pipeline.infer",
}
"""Commands that a page names without their arguments."""
NO_ARGUMENTS = {"benchmarks.count_operations", "benchmarks.house"}


FILES = (".yaml", ".py", ".md", ".parquet", ".html", ".json", ".run")
"""Endings of names that are no keys, though they look like some."""
MAPPINGS = {"shard.kinds", "storage.s3", "storage"}
"""Keys that hold any keys."""


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command in a code block or between backticks, with its page; comments are cut off."""
    start = rf"(?:python3? (?:-m )?|pixloom |cluster/submit\.sh|make |(?:{'|'.join(EXTERNAL)}) )"
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        block = rf"^(?:    )?(?:\w+=\S+ )*({start}[^\n]*)$"
        inline = rf"`({start}[^`]*)`"
        for match in itertools.chain(re.finditer(block, text, re.MULTILINE), re.finditer(inline, text)):
            line = re.split(r"\s#|\s{3,}(?![\s-])|\s[>&|]", " ".join(match[1].split("\n")))[0]
            words = shlex.split(re.sub(r"\[.*?\]", "", line), comments=True)
            if words[0] == "pixloom":
                words = ["python", "-m", f"pipeline.{words[1]}", *words[2:]]
            yield str(page.relative_to(ROOT)), words


COMMANDS = list(commands())
PYTHON = {
    " ".join(words): (page, words[2], words[3:])
    for page, words in COMMANDS
    if words[0].startswith("python") and words[1] == "-m"
}
OURS = {
    name: rest for name, rest in PYTHON.items() if rest[1].startswith(("pipeline.", "benchmarks.", "chaos"))
}


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config; the items of lists without their numbers."""
    for name, info in model.model_fields.items():
        yield prefix + name
        waiting: list[Any] = [info.annotation]
        for kind in waiting:
            waiting += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, f"{prefix}{name}.")


def test_every_key_that_a_page_names_exists() -> None:
    known = set(keys(config.PipelineConfig))
    for page in PAGES:
        for text in re.findall(r"`([a-z]+(?:\.[a-z_0-9]+)+)(?:: [^`]*)?`", page.read_text()):
            key = re.sub(r"\.\d+", "", text)
            if key.partition(".")[0] in known and not key.endswith(FILES):
                assert key in known or key.rpartition(".")[0] in MAPPINGS, (page.name, text)


def test_every_module_that_a_text_names_exists() -> None:
    folders = ("benchmarks", "chaos", "pipeline", "stages")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in code}
    modules = {name.removesuffix(".__init__"): path.read_text() for name, path in names.items()}
    theirs = "test.py"
    files = [f"/{path.relative_to(ROOT)}" for path in (*code, *(ROOT / "tests").rglob("*.py"))]
    files += [f"/{path.relative_to(ROOT)}" for path in (*ROOT.glob("cluster/*.py"), *ROOT.glob("docs/*.py"))]
    for path in (*code, *PAGES):
        text = path.read_text()
        for name in re.findall(r"(?<![\w./-])stages(?:\.\w+)+", text):
            module = max((one for one in modules if f"{name}.".startswith(f"{one}.")), key=len)
            attribute = name.removeprefix(module).strip(".").partition(".")[0]
            assert re.search(rf"\b{attribute}\b", modules[module]), (path, name)
        for name in set(re.findall(r"`([\w/]+\.py)`", text)) - {theirs}:
            assert any(file.endswith(f"/{name}") for file in files), (path, name)


def test_configs_of_who_comes_from_elsewhere_are_valid(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "coming-from.md").read_text()
    for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        config.load(str(path), profile="paper")


class ParsedError(Exception):
    """A program has parsed its arguments."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs end when they have parsed their arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *values: Any, **named: Any) -> NoReturn:
        raise ParsedError(parse(self, *values, **named))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def parsed(monkeypatch: pytest.MonkeyPatch, module: str, words: Sequence[str]) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [module, *words])
    name = {"pipeline.sweep": "pipeline.sweep.run", "chaos": "chaos.__main__"}.get(module, module)
    with pytest.raises(ParsedError) as caught:
        importlib.import_module(name).main()
    options: argparse.Namespace = caught.value.args[0]
    return options


@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("command", OURS)
def test_a_command_is_one_that_its_program_takes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, module, words = OURS[command]
    monkeypatch.chdir(ROOT)
    if module in NO_ARGUMENTS:
        assert not words
        return
    if command in MENTIONED or {"--help", "--schema"} & set(words):
        return
    options = parsed(monkeypatch, module, words)
    if module == "pipeline.run" and options.config not in READERS_OWN:
        config.load(options.config, [text for text in options.set if "..." not in text], options.profile)
    if module == "pipeline.sweep":
        settings, recipe = sweep.configured(options)
        assert make_trials(settings, options.sweep, recipe, options.set)


def test_the_other_commands_are_known() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, words in COMMANDS:
        if words[0] == "make":
            assert words[1] in targets, (page, words)
        elif words[1:3] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[3:] if "/" in word), (page, words)
        elif words[0].startswith("python") and words[1] != "-m":
            assert words[1] == "-" or (ROOT / words[1]).exists(), (page, words)
        elif words[0].startswith("python"):
            ours = " ".join(words) in OURS or (ROOT / f"{words[2].replace('.', '/')}.py").exists()
            assert ours or words[2] == "pip", (page, words)
        else:
            assert words[0] in (*EXTERNAL, "cluster/submit.sh"), (page, words)


@pytest.mark.usefixtures("parse_only")
def test_submitted_jobs_and_the_local_cluster_take_their_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for page, words in COMMANDS:
        if words[0] == "cluster/submit.sh":
            rest = [word for word in words[1:] if word not in ("--here", "--pip", "--no-wait")]
            parsed(monkeypatch, "pipeline.run", rest)
        elif words[:2] == ["python", "cluster/local.py"]:
            monkeypatch.setattr(sys, "argv", words[1:])
            with pytest.raises(ParsedError):
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert page


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A few photos beside their label pictures."""
    folder = tmp_path / "halves"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3), np.uint8)
    for n, array in enumerate(pixels):
        Image.fromarray(array).resize((512, 256)).save(folder / f"{n}.jpg")
    return folder


def test_a_benchmark_of_data_runs(halves: Path) -> None:
    run_benchmark("benchmarks.data", "png", "--turns", "1", "--seconds", "0.1", "--data", str(halves))


def test_a_fresh_clone_has_pictures_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "__file__", str(tmp_path / "clone" / "benchmarks" / "data.py"))
    monkeypatch.setattr(data, "SCENES", 2)
    assert len(data.side_by_side(None, tmp_path)) == 2


TINY = {
    "data input": ["--turns", "1", "--seconds", "0.1"],
    "data encodings": ["--turns", "1", "--seconds", "0.1"],
    "data wait": ["--turns", "1", "--seconds", "0.1"],
    "data objects": ["--turns", "1", "--seconds", "0.1"],
    "data reading": ["--turns", "1", "--seconds", "0.1"],
    "data shard": ["--turns", "1", "--seconds", "0.1", "--pairs", "16"],
    "ceiling": ["--repeats", "1", "--shrink", "16"],
    "cost": ["pix2pix/facades", "--pairs", "20", "--epochs", "1"],
    "count_operations": [],
    "distributed": shlex.split("--turns 1 --epochs 2 --size 64x32 --seconds 1"),
    "house": [],
    "listing": ["--sizes", "200,400"],
    "scale": ["--shards", "100,200"],
    "suspects": ["--turns", "1", "--pairs", "30", "--sets", "sample"],
    "suspects --cost": ["--turns", "1", "--pairs", "4", "--sets", "sample"],
    "inference": shlex.split("--turns 1 --images 4 --size 64 --width 8 --store local --memory 0 --rerun 8"),
    "inference_model": ["--network", "unet", "--turns", "1", "--settings", "frozen"],
    "tiled": shlex.split("--size 96x64 --width 8 --tile 32 --sides tiled tiles whole"),
    "train_step": ["unet", "--turns", "1", "--no-memory", "--precision", "float32"],
}
NOT_RUN = {
    "gpu_check": "tests/test_gpu_check.py runs it",
    "learning": "tests/test_commands.py runs it",
    "losses": "tests/test_commands.py runs it",
    "nightly": "runs train_step, data input and data png, which run here, at full size",
    "results": "tests/test_commands.py runs it",
}


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", TINY)
def test_every_benchmark_runs_at_a_tiny_size(name: str, halves: Path) -> None:
    module, *words = name.split()
    pictures = ["--data", str(halves)] if module == "data" else []
    run_benchmark(f"benchmarks.{module}", *words, *TINY[name], *pictures)


def test_every_benchmark_is_run_or_has_a_reason() -> None:
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert modules == {name.split()[0] for name in TINY} | set(NOT_RUN)
    assert {f"data {what}" for what in data.MEASURES} - {"data png"} <= set(TINY)


def run_benchmark(module: str, *words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
