"""The commands of every page run in their order, as they are written, with words added that make them small.

Benchmarks run in `tests/test_docs.py`, and the tutorial as a whole in `tests/recipes/test_tutorial.py`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import results
from pipeline import config as configuration, recipes, run as pipeline_run, sample
from pipeline.config import PipelineConfig
from pipeline.sweep import run as sweep
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files.nvidia_names import layer_names, renamed
from stages.models.files.saved import save_model
from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3
from tests.support.models import make_model
from tests.support.recipes import draw, tiny
from tests.test_docs import COMMANDS, MENTIONED, NOT_RUN, ROOT, TINY

JOBS = "cluster/test_jobs.py::test_"
ELSEWHERE = {
    "cluster/submit.sh --here --set train.seed=1": f"{JOBS}a_stopped_run_is_taken_up_by_the_next_job",
    "cluster/submit.sh --here": f"{JOBS}a_stopped_run_is_taken_up_by_the_next_job",
    "cluster/submit.sh -c run.yaml": f"{JOBS}a_stopped_run_is_taken_up_by_the_next_job",
    "python cluster/local.py start --workers 2": f"{JOBS}the_cluster_has_the_nodes_it_was_asked_for",
    "python cluster/local.py stop": f"{JOBS}stopping_ends_everything_the_cluster_started",
    "python -m benchmarks.gpu_check --device cpu --tiny": "test_gpu_check.py::"
    "test_every_part_runs_to_its_end_without_ray_and_the_data_libraries",
    "make docs": "test_site.py::test_every_page_is_there_and_for_programs_too",
}
"""Commands that another test runs: its file and name."""
REASONS = {
    "make run": "its two commands, pipeline.sample and pipeline.run, run here",
    "make schema": "its command, pipeline.run --schema, runs here",
    "make check": "CI's own command",
    "make test": "these tests",
    "make test-long": "these tests",
    "make format": "rewrites the code that is tested",
    "cluster/submit.sh -c recipes/pix2pix/facades.yaml": "needs a bucket that the nodes of a cluster reach; "
    "tests/cluster/test_jobs.py submits a run from a file",
    "python -m benchmarks.gpu_check": "needs a GPU",
    "python3 -m benchmarks.gpu_check": "needs a GPU",
    "python -m pytest": "these tests",
    "python3 -m pip": "installs packages",
    "python -m tests.support.pretended_gpu": "is large; tests/models/test_pretended_gpu.py runs it small",
    "python -m pipeline.run -c street.yaml --set train.start_from": "needs a model of the recipe's size; "
    "tests/training/test_start.py starts phases from small ones",
    "python -m chaos --seed 7 --minutes 60": "takes an hour; the same program runs with --count",
    "python -m chaos --seed 1,2,3 --epochs 60": "takes half an hour; the same program runs with --count",
}
"""Beginnings of commands that no test runs, and why; programs of others are in `test_docs.EXTERNAL`."""
LESS = {
    "pipeline.sample": ["--pairs", "20", "--size", "64x32"],
    "pipeline.sweep": ["--trials", "2", "--concurrent", "1"],
    "chaos": ["--count", "1", "--minutes", "0"],
    "benchmarks.losses": shlex.split("--epochs 1 --levels 2 --width 4 --seeds 1"),
    "benchmarks.results": ["--seeds", "1"],
}
"""Words for a program that make its work small."""


def ours(words: Sequence[str]) -> bool:
    """Whether a command of a page runs here."""
    text = " ".join(words)
    if words[0] != "python" or words[1] != "-m" or text in MENTIONED or text in ELSEWHERE:
        return False
    return not (text.startswith(tuple(REASONS)) or is_benchmark(words))


def is_benchmark(words: Sequence[str]) -> bool:
    """Whether `test_docs` runs a command, or says why it does not."""
    program, _, name = words[2].partition(".") if len(words) > 2 else ("", "", "")
    if program != "benchmarks":
        return False
    return name not in ("results", "learning", "losses") and (
        name in NOT_RUN or any(tiny_name.split()[0] == name for tiny_name in TINY)
    )


BY_PAGE: dict[str, list[list[str]]] = defaultdict(list)
for _page, _words in COMMANDS:
    if (
        ours(_words)
        and _page != "docs/tutorial.md"
        and not any(_words in found for found in BY_PAGE.values())
    ):
        BY_PAGE[_page].append(_words)


def test_every_command_is_run_or_has_a_reason() -> None:
    external = ("mlflow", "docker", "kubectl", "aws", "ray", "curl", "pip")
    for page, words in COMMANDS:
        text = " ".join(words)
        known = ours(words) or is_benchmark(words) or words[0] in external or page == "docs/tutorial.md"
        assert known or text in MENTIONED or text in ELSEWHERE or text.startswith(tuple(REASONS)), text
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test


# -- a folder to run them in ------------------------------------------------------


class Clone:
    """What a reader has after cloning, and the data, models and buckets that a page speaks of."""

    def __init__(self, folder: Path, store: SeaweedS3) -> None:
        self.folder, self.store = folder, store
        for path in ROOT.iterdir():
            if path.name == "docs":  # into which a command draws the pages' pictures
                shutil.copytree(path, folder / path.name)
            elif not path.name.startswith(".") and path.name not in ("workspace", "sample", "data", "mlflow"):
                (folder / path.name).symlink_to(path)
        for bucket in ("BUCKET", "maps", "images", "ckpt", "models"):
            store.client().call_s3("create_bucket", Bucket=self.bucket(bucket))
        sample.write(str(folder / "drawn"), pairs=20, width=64, height=32, seed=0)
        (folder / "path" / "to").mkdir(parents=True)
        for layer, name, other in (("label", "labels", "a"), ("photo", "photos", "b")):
            (folder / "path" / "to" / name).symlink_to(folder / "drawn" / layer)
            self.put(folder / "drawn" / layer, f"{self.bucket('BUCKET')}/pairs/{other}")
        self.put(folder / "drawn" / "photo", self.bucket("maps"))
        self.configs()
        make_model(folder / "M", source="rgb")

    def bucket(self, name: str) -> str:
        """The page's bucket, by a name of this test."""
        return f"{name.lower()}-{self.folder.name}-x".replace("_", "-")  # no name may end in -

    def put(self, folder: Path, there: str) -> None:
        self.store.client().put(f"{folder}/", there, recursive=True)

    def configs(self) -> None:
        """The config files that a page tells the reader to write."""
        readme = (ROOT / "README.md").read_text()
        (block,) = re.findall(r"^    extends: base/pix2pix[^\n]*\n(?:    [^\n]*\n)+", readme, re.MULTILINE)
        text = re.sub("^    ", "", block, flags=re.MULTILINE).replace("BUCKET", self.bucket("BUCKET"))
        for name in ("mine.yaml", "run.yaml"):
            (self.folder / name).write_text(text)

    def weights(self) -> None:
        """Published checkpoints in the folder and in a bucket, and a model that was imported."""
        unet = Pix2Pix(levels=3, width=4, dropout="common", discriminator_width=4)
        generator = build_generator(unet, InputSpec())
        torch.save(published(generator), self.folder / "latest_net_G.pth")
        save_model(self.folder / "imported", generator, architecture=unet, inputs=InputSpec())
        hd = Pix2PixHD(
            enhancers=0, width=4, downsamplings=1, blocks=1, discriminators=2, discriminator_width=4,
            feature_encoder=True, feature_width=4, feature_downsamplings=1,
        )  # fmt: skip
        labels = InputSpec(source="labels", classes=5, instances=True)
        ckpt = self.folder / "ckpt"
        ckpt.mkdir()
        torch.save(published(build_generator(hd, labels)), ckpt / "latest_net_G.pth")
        torch.save(published(build_discriminator(hd, labels)), ckpt / "latest_net_D.pth")
        encoder = build_encoder(hd, labels)
        assert encoder is not None
        torch.save(published(encoder), ckpt / "latest_net_E.pth")
        self.put(ckpt, self.bucket("ckpt"))

    def draw(self, config: PipelineConfig) -> None:
        """Images for every location of a config, also in a bucket, and for every split that is scored."""
        locations = []
        for location in config.ingest.locations:
            local = location.uri.replace("s3://", f"{self.folder}/s3/")
            locations.append(location.model_copy(update={"uri": str(self.folder / local)}))
        ingest = config.ingest.model_copy(update={"locations": tuple(locations)})
        for split in ("val", "test"):
            infer = config.infer.model_copy(update={"split": split, "input": None})
            draw(config.model_copy(update={"ingest": ingest, "infer": infer}))
        for bucket in (self.folder / "s3").glob("*"):
            self.put(bucket, bucket.name)

    def newest(self, word: str) -> str:
        """Of a pattern of shards, the newest: this test draws a set's images again for another command."""
        found = sorted(self.folder.glob(word), key=os.path.getmtime) if word.endswith("/shard-*") else []
        return str(found[-1].relative_to(self.folder)) if found else word

    def run(self, words: Sequence[str]) -> None:
        """Run a command of a page. Raises AssertionError with its output if it fails."""
        # Patterns of files are for the shell; those of keys are quoted.
        given = [self.newest(word) for word in words]
        text = " ".join(one if re.match(r"results/.*[*{]", one) else shlex.quote(one) for one in given)
        environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.store.url,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
        }
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=os.environ | environment,
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


def published(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by NVIDIA's names."""
    return renamed(network.state_dict(), layer_names(network))


PLACES = {
    "KEY=VALUE": "train.seed=1",
    "SHARDS": "results/camvid/shard-*",
    "infer.input=URI": "infer.input=drawn/photo",
    "models/street": "imported",
}
"""What stands for a word of the reader's own, or for what another page made."""


def filled(clone: Clone, words: Sequence[str]) -> list[str]:
    """A command with this test's places for the reader's."""
    given = [PLACES.get(word, word).replace("DATA/", "data/") for word in words if word != "..."]
    for number, word in enumerate(given):
        before = given[number - 1]
        if word == "URI":
            given[number] = "out" if before == "--output" else "drawn/photo"
        elif word == "DATA":
            given[number] = "data"
        elif word == "imported" and before == "--output":
            given[number] = "models/street"
        given[number] = re.sub(r"s3://(\w+)", lambda match: f"s3://{clone.bucket(match[1])}", given[number])
    return given[:-1] if given[-1] == "--set" else given


def small(clone: Clone, words: Sequence[str]) -> list[str]:
    """A command with words that make it small; draws the images that it reads."""
    module, rest = words[2], words[3:]
    if {"--help", "--schema"} & set(rest):
        return list(words)
    settings: list[str] = []
    if module == "pipeline.init":
        for path in clone.folder.glob("pixloom.*"):  # the page shows two ways to make it
            path.unlink()
    elif module == "pipeline.run":
        options = pipeline_run.parser().parse_args(rest)
        settings = shrunk(clone, options.config, options.set, options.profile)
    elif module == "pipeline.sweep":
        options = sweep.parser().parse_args(rest)
        chosen, recipe = sweep.configured(options)
        settings = shrunk(clone, recipe, options.set, chosen.profile)
    elif module == "benchmarks.learning" and "-c" in words:
        settings = tiny(configuration.load(results.RUNS["camvid"].recipe))  # of which the shards are
    elif module == "benchmarks.results":
        names = [word for word in rest if word in results.RUNS] or ["facades", "camvid", "edges"]
        words = [*words, *names] if rest[-1] not in results.RUNS else words
        for name in {"facades", *names} - {"colour", "inpainting"}:
            run = results.RUNS[name]
            values = results.settings(
                run, name, run.splits[0], clone.folder / "data", clone.folder / "results"
            )
            config = configuration.load(run.recipe, values)
            clone.draw(config)
        settings = tiny(configuration.load(results.RUNS[names[0]].recipe))
        settings = [one for one in settings if names[0] != "cityscapes-hd" or not one.startswith("pair.")]
    return [*words, *LESS.get(module, []), *(word for one in settings for word in ("--set", one))]


def shrunk(clone: Clone, path: str, given: Sequence[str], profile: str | None) -> list[str]:
    """Settings that make a config small; draws its images, which are not downloaded."""
    if path == "street.yaml" and not Path(path).exists():
        recipes.copy("pix2pix/camvid", Path(path))
    config = configuration.load(path, given, profile)
    local = [
        f"ingest.locations.{number}.uri=data/{number}"
        for number, location in enumerate(config.ingest.locations)
        if "http" in location.uri
    ]
    if path != "pixloom.yaml":
        clone.draw(configuration.load(path, [*given, *local], profile))
    return [*local, *tiny(config)]


@pytest.fixture
def clone(s3_store: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clone]:
    with tempfile.TemporaryDirectory(prefix="page", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.chdir(folder)
        yield Clone(Path(folder), s3_store)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", BY_PAGE)
def test_the_commands_of_a_page_run(page: str, clone: Clone) -> None:
    if "convert" in str(BY_PAGE[page]):
        clone.weights()
    for words in BY_PAGE[page]:
        clone.run(small(clone, filled(clone, words)))
