"""Draw the pictures of the docs from what the program does.

    python -m docs.pictures pages [FOLDER]      diagrams, pairs, a phase that was killed (two minutes)
    python -m docs.pictures cluster [FOLDER]    a local cluster while it runs: Ray's dashboard, Prometheus

`cluster` needs Chromium, playwright and `prometheus` (Debian has it). It asks Prometheus every query of the
Grafana dashboard and prints which had an answer. FOLDER is docs/ unless it is named.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pipeline import sample
from pipeline.cli import stop_on_sigterm
from pipeline.config import load
from pipeline.dag import registration, steps
from stages import storage

ROOT = Path(__file__).resolve().parents[1]
BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#dde5ea"
LAYERS = {"label": "source", "photo": "target", "instance": "instance"}
MODEL = {
    "kind": "pix2pixhd", "width": 4, "enhancers": 0, "downsamplings": 1, "blocks": 1,
    "discriminator_width": 4, "discriminators": 1,
}  # fmt: skip
PHASE = {"name": "global", "kind": "global", "enhancers": 0, "discriminators": 1, "batch": 2}

mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pixloom", "font.size": 10})


def config(folder: Path, *, pairs: int, epochs: int) -> Path:
    """The config file of a small run on drawn scenes."""
    sample.write(str(folder / "data"), pairs=pairs, width=64, height=32, seed=0)
    locations = [
        {"uri": str(folder / "data" / layer), "role": role, "pattern": "{key}.png"}
        for layer, role in LAYERS.items()
    ]
    settings = {
        "extends": str(ROOT / "pipeline.yaml"),
        "workspace": str(folder / "workspace"),
        "ingest": {"locations": locations},
        "pair": {"split": {"val": 0.1, "test": 0.2, "seed": 0}, "pairs_per_shard": 8},
        "shard": {"size": [64, 32]},
        "train": {"model": MODEL, "phases": [PHASE | {"epochs": epochs}]},
        "resources": {"checkpoint_seconds": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty page without axes, in units of its own size."""
    drawn = Figure((width, height), layout="constrained", facecolor="white")
    axes = drawn.add_subplot()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return drawn, axes


def box(axes: Axes, x: float, y: float, text: str, *, color: str = GREY, width: float = 1.5) -> None:
    """A word in a box, centred at (x, y)."""
    axes.add_patch(
        mpl.patches.FancyBboxPatch(
            (x - width / 2, y - 0.17), width, 0.34, "round,pad=0.03", fc=color, ec=BLUE
        )
    )
    axes.text(x, y, text, ha="center", va="center")


# -- diagrams -----------------------------------------------------------------


def draw_steps(folder: Path) -> None:
    """The steps of pipeline.yaml and what each reads, as `pipeline.dag` has them."""
    shipped = load(str(ROOT / "pipeline.yaml"))
    dag = (*steps(shipped), *registration(shipped))
    places = {step.name: 0.55 + place for place, step in enumerate(dag)}
    drawn, axes = figure(len(dag) + 0.1, 2.6)
    for step in dag:
        for source in step.needs.values():
            start, end = places[source], places[step.name]
            line: dict[str, Any] = {"arrowstyle": "-|>", "color": BLUE, "shrinkA": 0, "shrinkB": 0}
            if round(end - start) == 1:
                axes.annotate("", (end - 0.46, 0.4), (start + 0.46, 0.4), arrowprops=line)
            else:
                line["connectionstyle"] = "arc3,rad=-0.4"
                axes.annotate("", (end - 0.1, 0.63), (start + 0.1, 0.63), arrowprops=line)
    for name, x in places.items():
        box(axes, x, 0.4, name, width=0.82)
    drawn.savefig(folder / "steps.svg", metadata={"Date": None})


def draw_layers(folder: Path) -> None:
    """The layers of packages, as the contract of import-linter has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = ["pipeline", *contracts[0]["layers"]]
    drawn, axes = figure(8.0, 0.5 * len(layers) + 0.2)
    for row, layer in enumerate(reversed(layers)):
        names = layer.split(" | ")
        for place, name in enumerate(names):
            width = 7.4 / len(names)
            box(axes, 0.3 + width * (place + 0.5), 0.35 + 0.5 * row, name, width=width - 0.15)
    drawn.savefig(folder / "layers.svg", metadata={"Date": None})


def draw_pairs(folder: Path) -> None:
    """Three scenes of the sample data: the objects, and the key that makes a pair of them."""
    with tempfile.TemporaryDirectory() as temp:
        sample.write(temp, pairs=3, width=128, height=64, seed=0)
        drawn = Figure((8, 4.2), layout="constrained", facecolor="white")
        grid = drawn.subplots(3, len(LAYERS))
        for row, photo in enumerate(sorted(Path(temp, "photo").iterdir())):
            for axes, (layer, role) in zip(grid[row], LAYERS.items(), strict=True):
                with Image.open(Path(temp, layer, photo.name)) as image:
                    axes.imshow(image, cmap="nipy_spectral", interpolation="nearest")
                axes.set(xticks=[], yticks=[], xlabel=f"{layer}/{photo.name}")
                if row == 0:
                    axes.set_title(f"role: {role}", color=BLUE)
            grid[row][0].set_ylabel(f"key: {photo.stem}", color=ORANGE)
        save_small(drawn, folder / "pairs.png")


def draw_launches(folder: Path) -> None:
    """The table of launches in gpu.md: each step against the same of the first edition."""
    rows = re.findall(
        r"(?m)^\| (\w.*?, batch \d+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (ROOT / "docs/gpu.md").read_text(),
    )
    drawn = Figure((8, 2.6), layout="constrained", facecolor="white")
    for axes, title, now, before in zip(
        drawn.subplots(1, 2, sharey=True), ("launches", "GB read and written"), (1, 3), (2, 4), strict=True
    ):
        for offset, column, color, name in ((0.2, before, GREY, "first edition"), (-0.2, now, BLUE, "now")):
            values = [float(row[column].replace(",", "")) for row in rows]
            axes.barh([place + offset for place in range(len(rows))], values, 0.4, color=color, label=name)
        axes.set(title=title, yticks=range(len(rows)), yticklabels=[row[0] for row in rows])
        axes.invert_yaxis()
    axes.legend()
    drawn.savefig(folder / "launches.svg", metadata={"Date": None})


def draw_efficiency(folder: Path) -> None:
    """The arithmetic of scale.md: efficiency by the network between machines."""
    drawn = Figure((7, 3.4), layout="constrained", facecolor="white")
    axes = drawn.add_subplot()
    gigabits = [10 * 1.1**n for n in range(64)]
    seconds, hidden = 6.8 / 200, 1.95 / 200  # S = 200 TFLOP/s
    for pairs, size, style, name in (
        (1, 1.0, "-", "1 pair a GPU, float32 gradients"), (1, 0.5, "--", "1 pair, bf16 gradients"),
        (4, 1.0, "-", "4 pairs, float32"), (4, 0.5, "--", "4 pairs, bf16"),
    ):  # fmt: skip
        shares = []
        for rate in gigabits:
            exchange = size * 2 * 0.765 * (7 / 8 / 200 + 7 / 8 / (rate / 8))
            shares.append(min(0.99, pairs * seconds / (pairs * seconds + max(0.0, exchange - hidden))))
        axes.semilogx(
            gigabits,
            [100 * share for share in shares],
            style,
            color=BLUE if pairs == 1 else ORANGE,
            label=name,
        )
    axes.set(
        xlabel="network of a machine of 8 GPUs, Gbit/s (64 GPUs, S = 200)",
        ylabel="efficiency, %",
        ylim=(0, 100),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(folder / "efficiency.svg", metadata={"Date": None})


# -- a phase that is killed ---------------------------------------------------


def draw_killed(folder: Path) -> None:
    """Losses of a phase that was killed and resumed, over those of one that was not. They must be equal."""
    curves = {}
    for name in ("undisturbed", "killed"):
        with tempfile.TemporaryDirectory() as temp:
            path = config(Path(temp), pairs=16, epochs=40)
            words = [sys.executable, "-m", "pipeline.run", "-c", str(path), "--until", "train"]
            words += ["--set", "tracking.enabled=false"]
            resumed = 0
            if name == "killed":
                with (Path(temp) / "log").open("wb") as log:
                    process = subprocess.Popen(
                        words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
                    )
                wait(lambda: checkpoint(Path(temp)) > 60, process)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                resumed = checkpoint(Path(temp))
            subprocess.run(words, cwd=ROOT, check=True)
            (table,) = Path(temp, "workspace").glob("train-*/metrics.parquet")
            points = storage.read_parquet(str(table)).to_pylist()
            curves[name] = [(p["step"], p["value"]) for p in points if p["name"] == "generator/gan"], resumed
    undisturbed, (losses, resumed) = curves["undisturbed"][0], curves["killed"]
    if losses != undisturbed:
        raise SystemExit("the losses differ")
    drawn = Figure((7, 3), layout="constrained", facecolor="white")
    axes = drawn.add_subplot()
    axes.plot(*zip(*undisturbed, strict=True), color=GREY, lw=6, label="a run that was not interrupted")
    axes.plot(
        *zip(*losses, strict=True), color=BLUE, lw=1.2, label="killed (SIGKILL), and the same command again"
    )
    axes.axvline(resumed, color=ORANGE, ls="--", label=f"resumed from the checkpoint of step {resumed}")
    axes.set(xlabel="step", ylabel="generator/gan")
    axes.legend()
    drawn.savefig(folder / "killed.svg", metadata={"Date": None})


def checkpoint(folder: Path) -> int:
    """The step of the newest finished checkpoint."""
    whole = folder.glob("workspace/train-*/checkpoints/step-*/checkpoint.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in whole), default=0)


def wait(ready: Any, process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    """What is ready, as soon as it is; the process must live so long."""
    until = time.monotonic() + seconds
    while not (result := ready()):
        if process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{process.args!r} ended, or was not ready in {seconds:.0f} s")
        time.sleep(0.2)
    return result


# -- a cluster ----------------------------------------------------------------


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A local cluster of two nodes; the environment in which to use it."""

    def local(*words: str) -> str:
        command = [sys.executable, "cluster/local.py", "--folder", str(folder), *words]
        environment = os.environ | {"RAY_worker_niceness": "0"}
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    local(
        "start",
        "--workers",
        "1",
        "--cpus-per-node",
        "3",
        "--object-store-memory",
        "150",
        "--port",
        "0",
        "--dashboard-port",
        "0",
    )
    try:
        exported = re.findall(r"export (\w+)=(\S+)", local("env"))
        yield {**os.environ, **dict(exported), "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    finally:
        local("stop")


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """Prometheus reading the endpoints of a cluster; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    scrape = {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)], "refresh_interval": "2s"}]}
    settings = {"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    words = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*words, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def ask(server: str, query: str, minutes: float = 15) -> list[Any]:
    """The series that answer a query over the last minutes."""
    now = time.time()
    url = f"{server}/api/v1/query_range?query={quote(query)}&start={now - 60 * minutes}&end={now}&step=5"
    with urlopen(url, timeout=30) as answer:  # noqa: S310 - a server of ours
        series: list[Any] = json.load(answer)["data"]["result"]
    return series


def watch_cluster(folder: Path) -> None:
    """Run the sample pipeline on a cluster and take the pictures of its pages meanwhile."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - the other pictures need no browser

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    dashboard = json.loads((ROOT / "cluster/grafana/pixloom.json").read_text())
    with (
        tempfile.TemporaryDirectory(prefix="px", dir="/tmp") as temp,
        cluster(Path(temp, "c")) as environment,
    ):
        token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        ray = environment["RAY_API_SERVER_ADDRESS"]
        (targets,) = Path(temp, "c").glob("*/prom_metrics_service_discovery.json")
        with prometheus(Path(temp), targets) as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
            )
            headers = {"Authorization": f"Bearer {token}"}
            size: Any = {"width": 1400, "height": 900}
            page = browser.new_context(extra_http_headers=headers, viewport=size).new_page()
            words = [sys.executable, "-m", "pipeline.run", "-c", str(config(Path(temp), pairs=48, epochs=8))]
            run = subprocess.Popen(words, cwd=ROOT, env=environment)
            try:
                wait(lambda: checkpoint(Path(temp)), run)
                jobs = Request(f"{ray}/api/jobs/", headers=headers)  # noqa: S310
                with urlopen(jobs, timeout=30) as answer:  # noqa: S310
                    job = json.load(answer)[0]["job_id"]
                page.goto(f"{ray}/#/jobs/{job}")
                page.get_by_text("Ray Data Overview").first.click()
                page.get_by_text(re.compile("^shard_")).first.wait_for()
                top = page.get_by_text("Ray Data Overview").first.bounding_box()
                clip = {"x": 0, "y": top["y"] - 20, "width": size["width"], "height": 740}
                reduce(page.screenshot(clip=clip, full_page=True), folder / "ray_data.png")
                page.goto(f"{ray}/#/actors")
                page.get_by_text("RayTrainWorker").first.wait_for()
                reduce(page.screenshot(), folder / "ray_train.png")
                if run.wait():
                    raise SystemExit("the run failed")
            finally:
                run.kill()
            answers = {
                panel["title"]: [ask(server, t["expr"]) for t in panel["targets"]]
                for panel in dashboard["panels"]
            }
            for title, series in answers.items():
                print(f"{title:<35} {sum(map(len, series))} series")  # noqa: T201
            shown = [
                "ray_pixloom_train_images_per_second",
                "sum by (operator) (rate(ray_data_output_rows[1m]))",
            ]
            graphs = "&".join(
                f"g{n}.expr={quote(q)}&g{n}.tab=0&g{n}.range_input=5m" for n, q in enumerate(shown)
            )
            page = browser.new_context(viewport={"width": 1100, "height": 1250}).new_page()
            page.goto(f"{server}/classic/graph?{graphs}")
            page.locator(".rickshaw_graph svg path").first.wait_for()
            reduce(page.screenshot(), folder / "prometheus.png")
            browser.close()


def save_small(drawn: Figure, path: Path) -> None:
    """A drawing as PNG with 64 colours."""
    data = io.BytesIO()
    drawn.savefig(data, format="png", dpi=110)
    reduce(data.getvalue(), path)


def reduce(png: bytes, path: Path) -> None:
    """Write a PNG with 64 colours: a tenth of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


PICTURES: Mapping[str, Any] = {
    "pages": [draw_steps, draw_layers, draw_pairs, draw_launches, draw_efficiency, draw_killed],
    "cluster": [watch_cluster],
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*PICTURES, *(draw.__name__ for draw in PICTURES["pages"])])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    stop_on_sigterm()
    draws = PICTURES.get(options.what) or [globals()[options.what]]
    for draw in draws:
        draw(options.folder)


if __name__ == "__main__":
    main()
