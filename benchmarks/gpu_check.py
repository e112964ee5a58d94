"""Settles the GPU path in a run of eight minutes: does it work, how fast is it, where does the time go.

    python -m benchmarks.gpu_check --out results --facades facades      every part, in this order:

    tests      `-m gpu` tests (tests/gpu)
    train      ms per step, peak memory, how often the host waits; of the published step and of ours
    infer      images per second
    profile    the kernels of a step by time; how many are launched; the share that only changes layouts
    compiled   our step under torch.compile, which takes a minute a case
    facades    Pix2Pix on Facades to the paper's recipe for the time that is left, and its test images' scores
    graph      our whole step as one CUDA graph: what launches cost; last, as a failed capture may end CUDA

    python -m benchmarks.gpu_check --device cpu --tiny                   tries the script itself

Needs torch, numpy, pillow, pydantic, safetensors and pytest; neither Ray nor pyarrow. `gpu.json` and `gpu.md`
(docs/gpu.md) are written after every row: a run that is cut off loses only its last one. A case that fails
is a row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train_step import Case, make_batch, our_gan, plain_gan, plain_step
from stages.images import augment, geometry
from stages.images.kinds import Array
from stages.models.architecture import Pix2Pix, Pix2PixHD, paper_weights
from stages.models.fast.frozen import freeze
from stages.models.fast.process import set_tf32, tune_process
from stages.models.gan import GanState, set_learning_rate
from stages.models.inputs import make_condition
from stages.models.step import Batch, update
from stages.training.graph import CudaGraphs, GraphedStep

Run = Callable[[], Any]
Row = dict[str, Any]

HD = Pix2PixHD()
CASES = {
    "U-Net 256, batch 1": Case(Pix2Pix(), (256, 256)),
    "U-Net 256, batch 16": Case(Pix2Pix(), (256, 256), rows=16),
    "U-Net 256, batch 64": Case(Pix2Pix(), (256, 256), rows=64),
    "G1 1024x512": Case(HD, (1024, 512), scales=2),
    "joint 2048x1024": Case(HD, (2048, 1024), enhancers=1, scales=3),
}
SMALL_UNET = Pix2Pix(levels=5, width=4, discriminator_width=4, discriminator_layers=1)
SMALL_HD = Pix2PixHD(
    width=2,
    downsamplings=1,
    blocks=1,
    enhancer_blocks=1,
    discriminators=2,
    discriminator_width=4,
    discriminator_layers=1,
)
TINY = {
    "U-Net 256, batch 1": Case(SMALL_UNET, (32, 32)),
    "joint 2048x1024": Case(SMALL_HD, (32, 16), enhancers=1, scales=2),
}
PROFILED = ("U-Net 256, batch 1", "U-Net 256, batch 16", "G1 1024x512", "joint 2048x1024")
COMPILED = ("U-Net 256, batch 1", "G1 1024x512", "joint 2048x1024")
GRAPHED = ("U-Net 256, batch 1", "U-Net 256, batch 16", "G1 1024x512")
GRAPH_S = 20  # for all of them
COMPILE_S = 60  # to compile a case

LAYOUT = ("nchwToNhwc", "nhwcToNchw", "direct_copy", "CatArray", "transpose")
"""Parts of the names of kernels that only move numbers."""

FACADES_LOAD, FACADES_SIZE = (286, 286), (256, 256)
SHOWN = 12  # test images on the sheet


@dataclass
class Report:
    """Rows, printed and written as they come; and the time that is left."""

    out: Path
    device: torch.device
    seconds: float
    rows: list[Row] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the run should have ended."""
        return self.seconds - (time.monotonic() - self.started)

    def add(self, part: str, **values: Any) -> None:
        """Add a row and write all of them."""
        self.rows.append({"part": part, **values})
        shown = "  ".join(f"{name}={_shown(value)}" for name, value in values.items())
        print(f"{time.monotonic() - self.started:6.1f} s  {part:8}  {shown}", flush=True)
        for name, text in (("gpu.json", json.dumps(self.rows, indent=1)), ("gpu.md", markdown(self.rows))):
            (self.out / f"{name}.new").write_text(text)
            (self.out / f"{name}.new").replace(self.out / name)

    @contextmanager
    def trying(self, part: str, **values: Any) -> Iterator[None]:
        """A failure of the block is a row; memory is freed after it."""
        try:
            yield
        except Exception as error:  # the next case may work
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f for f in frames if "/stages/" in f.filename or "/benchmarks/" in f.filename] or frames[
                -1:
            ]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            text = (str(error).splitlines() or [""])[0][:200]
            self.add(part, **values, failed=f"{type(error).__name__} at {place}: {text}")
        finally:
            if "torch._dynamo" in sys.modules:  # importing it takes seconds
                torch._dynamo.reset()
            self.free()

    def free(self) -> None:
        """Free memory that nobody refers to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table for each part, for docs/gpu.md."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    text = ""
    for part, members in parts.items():
        names = list(dict.fromkeys(name for row in members for name in row if name != "part"))
        text += f"\n**{part}**\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        for row in members:
            cells = (_shown(row.get(name, "")).replace("|", "/") for name in names)
            text += f"| {' | '.join(cells)} |\n"
    return text.lstrip()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- steps in their variants ----------------------------------------------------------------------


def published_variants(case: Case, device: torch.device) -> Iterator[tuple[str, Run]]:
    """The published step in float32, in TF32 (torch's default for convolutions), and under autocast."""
    with torch.device(device):
        plain = plain_gan(case)
    batch = make_batch(case).to(device)
    for name, tf32, bf16 in (("float32", False, False), ("tf32", True, False), ("bf16", True, True)):

        def run(bf16: bool = bf16) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                plain_step(case, plain, batch)

        set_tf32(tf32)
        yield f"published {name}", run


def our_variants(case: Case, gan: GanState, batch: Batch) -> Iterator[tuple[str, Run]]:
    """Our step in float32, TF32 and bf16."""
    weights = paper_weights(case.arch)

    def run() -> None:
        update(gan, batch, weights=weights)

    for name, tf32 in (("float32", False), ("tf32", True), ("bf16", True)):
        set_tf32(tf32)
        gan.precision = "bf16" if name == "bf16" else "float32"
        yield f"ours {name}", run


def measure(run: Run, device: torch.device, seconds: float) -> dict[str, float]:
    """Median ms per step by the device's clock, ms the host takes to launch it, and peak memory."""
    cuda = device.type == "cuda"
    for _ in range(4 if cuda else 1):
        run()
    if not cuda:
        started = time.perf_counter()
        run()
        return {"ms": 1e3 * (time.perf_counter() - started)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    deadline, ms, host = time.monotonic() + seconds, list[float](), list[float]()
    group = 5  # steps follow one another as in training; reading the clock waits
    while time.monotonic() < deadline or len(ms) < 3:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        began = time.perf_counter()
        for _ in range(group):
            run()
        host.append(1e3 * (time.perf_counter() - began) / group)
        last.record()
        last.synchronize()
        ms.append(first.elapsed_time(last) / group)
    return {
        "ms": statistics.median(ms),
        "spread": (max(ms) - min(ms)) / statistics.median(ms),
        "host_ms": statistics.median(host),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def add_times(report: Report, case_name: str, variant: str, run: Run, options: argparse.Namespace) -> None:
    """Measure a training step and compare it with the published ones."""
    values = measure(run, report.device, options.each)
    before = {
        row["variant"]: row["ms"]
        for row in report.rows
        if row["part"] == "train" and row["case"] == case_name and "ms" in row
    }
    ratios = {
        f"x {name}": before[f"published {name}"] / values["ms"]
        for name in ("float32", "bf16")
        if f"published {name}" in before
    }
    rate = 1e3 * options.cases[case_name].rows / values["ms"]
    waits = count_waits(run, report.device)
    report.add("train", case=case_name, variant=variant, **values, pairs_s=rate, waits=waits, **ratios)


# -- parts ------------------------------------------------------------------------------------------


def tests(report: Report, _: argparse.Namespace) -> None:
    """pytest in a process of its own, without the tests that compile: each takes a minute."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-k", "not compiled", "tests/gpu", "-v"]
    limit = max(60.0, min(150.0, report.left() / 3))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        text, last = done.stdout + done.stderr, (done.stdout.splitlines() or [""])[-1]
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        last = f"not finished after {limit:.0f} s"
    (report.out / "tests.txt").write_text(text)
    for line in text.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            report.add("tests", result=line[:200])
    report.add("tests", result=last)


def count_waits(run: Run, device: torch.device) -> int:
    """How often the host waits for the device while it starts one step."""
    with warnings.catch_warnings(record=True) as found, watched_for_waits(device):
        warnings.simplefilter("always")
        run()
    waits = [warning for warning in found if "called a synchronizing" in str(warning.message)]
    for warning in waits:
        print(f"waits at {Path(warning.filename).name}:{warning.lineno}")
    return len(waits)


@contextmanager
def watched_for_waits(device: torch.device) -> Iterator[None]:
    """Have torch warn whenever the host waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(report: Report, options: argparse.Namespace) -> None:
    """Every case in every variant that needs no compilation."""
    for name, case in options.cases.items():
        if report.left() < options.keep:
            report.add("train", case=name, variant="all", failed="no time left")
            continue
        with report.trying("train", case=name, variant="published"):
            for variant, run in published_variants(case, report.device):
                add_times(report, name, variant, run, options)
        with report.trying("train", case=name, variant="ours"):
            gan, batch = our_gan(case, "float32", report.device), make_batch(case).to(report.device)
            for variant, run in our_variants(case, gan, batch):
                add_times(report, name, variant, run, options)
    set_tf32(True)


def compiled(report: Report, options: argparse.Namespace) -> None:
    """Our bf16 step under torch.compile."""
    for name in (name for name in COMPILED if name in options.cases and not options.tiny):
        case = options.cases[name]
        if report.left() < options.facades_s + COMPILE_S:
            report.add("train", case=name, variant="ours bf16 compiled", failed="no time left")
            continue
        with report.trying("train", case=name, variant="ours bf16 compiled"):
            gan, batch = our_gan(case, "bf16", report.device), make_batch(case).to(report.device)
            gan.generator.compile()
            if gan.discriminator is not None:
                gan.discriminator.compile()
            *_, (_, run) = our_variants(case, gan, batch)
            add_times(report, name, "ours bf16 compiled", run, options)


def profile(report: Report, options: argparse.Namespace) -> None:
    """The kernels of a bf16 step."""
    from torch.profiler import ProfilerActivity  # noqa: PLC0415 - loads slowly

    steps = 3
    for name in (name for name in PROFILED if name in options.cases):
        case = options.cases[name]
        with report.trying("profile", case=name):
            gan, batch = our_gan(case, "bf16", report.device), make_batch(case).to(report.device)
            *_, (_, run) = our_variants(case, gan, batch)
            for _ in range(3):
                run()
            cuda = report.device.type == "cuda"
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
            with torch.profiler.profile(activities=activities) as profiled:
                for _ in range(steps):
                    run()
                if cuda:
                    torch.cuda.synchronize()
            table = profiled.key_averages()
            text = table.table(sort_by="self_device_time_total", row_limit=60, max_name_column_width=110)
            (report.out / f"profile-{name.replace(',', '').replace(' ', '-')}.txt").write_text(text)
            kernels = [event for event in table if str(event.device_type).endswith("CUDA")]
            total = sum(event.self_device_time_total for event in kernels) or 1
            layout = [event for event in kernels if any(part in event.key for part in LAYOUT)]
            report.add(
                "profile",
                case=name,
                device_ms=total / 1e3 / steps,
                kernels=sum(event.count for event in kernels) / steps,
                layout_share=sum(event.self_device_time_total for event in layout) / total,
            )
            for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
                ms = event.self_device_time_total / 1e3 / steps
                report.add("kernels", case=name, ms=ms, calls=event.count / steps, name=event.key[:100])


def infer(report: Report, options: argparse.Namespace) -> None:
    """The published generator under autocast, and ours with frozen weights."""
    for name, case in options.cases.items():
        batch = make_batch(case).to(report.device)
        condition = make_condition(batch.source, batch.instance, arch=case.arch, inputs=case.inputs)
        last = condition.contiguous(memory_format=torch.channels_last)
        with torch.device(report.device):
            plain = plain_gan(case).generator
        trained = our_gan(case, "float32", report.device).generator.eval().requires_grad_(False)
        for precision in ("tf32", "bf16"):
            bf16 = precision == "bf16"
            with report.trying("infer", case=name, precision=precision):
                dtype = torch.bfloat16 if bf16 else torch.float32
                ours = freeze(trained, device=report.device, dtype=dtype)

                def run(network: Any, images: Tensor, bf16: bool = bf16) -> None:
                    with (
                        torch.inference_mode(),
                        torch.autocast(report.device.type, torch.bfloat16, enabled=bf16),
                    ):
                        network(images)

                for side, network, images in (("published", plain, condition), ("ours", ours, last)):
                    values = measure(lambda n=network, i=images: run(n, i), report.device, options.each)
                    rate = 1e3 * case.rows / values["ms"]
                    report.add("infer", case=name, precision=precision, side=side, **values, images_s=rate)


def graph(report: Report, options: argparse.Namespace) -> None:
    """Our bf16 step, recorded once and replayed, as the trainer does it with `resources.cuda_graph`."""
    for name in () if report.device.type == "cpu" else GRAPHED:
        case = options.cases[name]
        with report.trying("train", case=name, variant="ours bf16 graph"):
            gan, batch = our_gan(case, "bf16", report.device), make_batch(case).to(report.device)
            weights = paper_weights(case.arch)
            graphed = GraphedStep(
                lambda batch, _, gan=gan, weights=weights: (update(gan, batch, weights=weights), {}),  # type: ignore[misc]
                rows=case.rows,
                record=CudaGraphs(),
            )
            add_times(report, name, "ours bf16 graph", partial(graphed, batch, False), options)


# -- Facades ----------------------------------------------------------------------------------------


def pairs(folder: Path, size: tuple[int, int]) -> dict[str, tuple[Array, Array]]:
    """Source (labels, the right half) and target (photo, the left half) by name, resized to `size`."""
    files = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
    wholes = {path.stem: np.asarray(Image.open(path).convert("RGB")) for path in files}
    return {
        name: (
            geometry.resize(geometry.crop_half(whole, "right"), size, "rgb"),
            geometry.resize(geometry.crop_half(whole, "left"), size, "rgb"),
        )
        for name, whole in wholes.items()
    }


def on_device(images: Iterable[Array], device: torch.device) -> Tensor:
    """Images (H, W, C) as one tensor (N, C, H, W)."""
    return torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2).to(device)


def facades(report: Report, options: argparse.Namespace) -> None:
    """Batch 1, the paper's 200 epochs with a rate that falls to 0 in the second half.

    If there is time for fewer epochs, the schedule is as much shorter.
    """
    if options.facades is None:
        report.add("facades", failed="no --facades folder")
        return
    device, arch = report.device, SMALL_UNET if options.tiny else Pix2Pix()
    train_pairs = pairs(options.facades / "train", FACADES_LOAD)
    images = on_device((image for pair in train_pairs.values() for image in pair), device)
    names, weights = list(train_pairs), paper_weights(arch)
    gan = our_gan(Case(arch, FACADES_SIZE), options.precision, device)
    budget = max(1.0, report.left() - options.score_s - GRAPH_S)
    order, started, steps, curve = torch.Generator().manual_seed(0), time.monotonic(), 0, list[Row]()
    last_step, progress = options.epochs * len(names), 0.0
    while progress < 1:
        rate = 2e-4 * min(1.0, 2 * (1 - progress))
        set_learning_rate(gan, rate)
        epoch = steps // len(names)
        for index in torch.randperm(len(names), generator=order).tolist():
            pair = jittered(images[2 * index : 2 * index + 2], epoch, names[index])
            losses = update(gan, Batch(source=pair[:1], target=pair[1:]), weights=weights)
            steps += 1
        curve.append({"epoch": epoch + 1, "rate": rate} | {k: float(v) for k, v in losses.items()})
        progress = max(steps / last_step, (time.monotonic() - started) / budget)
    seconds = time.monotonic() - started
    (report.out / "facades.json").write_text(json.dumps(curve))
    test_pairs = pairs(options.facades / "test", FACADES_SIZE)
    source, target = (on_device(side, device) for side in zip(*test_pairs.values(), strict=True))
    generated = generate(gan, source)
    report.add(
        "facades",
        epochs=steps / len(names),
        steps=steps,
        seconds=seconds,
        steps_s=steps / seconds,
        **scores(generated, target),
        **{name: value for name, value in curve[-1].items() if name.count("/") == 1},
    )
    columns = [torch.cat(list(side[:SHOWN].cpu()), 1) for side in (source, generated, target)]
    Image.fromarray(torch.cat(columns, 2).permute(1, 2, 0).numpy()).save(report.out / "facades.png")


def jittered(pair: Tensor, epoch: int, name: str) -> Tensor:
    """A crop of both images of a pair, mirrored every second time, as the trainer's feed draws it."""
    (width, height), drawn = FACADES_SIZE, augment.draw(0, epoch, name, FACADES_LOAD, FACADES_SIZE)
    crop = pair[:, :, drawn.y : drawn.y + height, drawn.x : drawn.x + width]
    return crop.flip(3) if drawn.flip else crop


def generate(gan: GanState, source: Tensor) -> Tensor:
    """Images (N, 3, H, W) uint8 of sources (N, 3, H, W) uint8, one at a time."""
    gan.generator.eval()
    with torch.inference_mode():
        inputs = (image.float() / 127.5 - 1 for image in source.split(1))
        images = [gan.generator(image.contiguous(memory_format=torch.channels_last)) for image in inputs]
    return ((torch.cat(images) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def scores(generated: Tensor, target: Tensor) -> dict[str, float]:
    """Means over images (N, 3, H, W) uint8 of L1, PSNR and SSIM, as `stages.scoring.metrics` defines them."""
    fake, real = generated.double() / 255, target.double() / 255
    psnr = -10 * (fake - real).square().mean((1, 2, 3)).log10()
    return {
        "l1": float((fake - real).abs().mean()),
        "psnr": float(psnr.mean()),
        "ssim": float(ssim(fake, real).mean()),
    }


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(N,) SSIM (Wang et al. 2004: Gaussian window of 11, sigma 1.5) of images (N, C, H, W) in [0, 1]."""
    offsets = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(weights, weights)[None, None] / weights.sum() ** 2

    def mean(images: Tensor) -> Tensor:
        return F.conv2d(F.pad(images, (5, 5, 5, 5), mode="reflect").flatten(0, 1)[:, None], window)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    values = values / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return values.view(x.shape[0], -1).mean(1)


# -- all ---------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (tests, train, infer, profile, compiled, facades, graph)}


def machine(device: torch.device) -> Row:
    """What the figures were measured on."""
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version() or 0}
    if device.type != "cuda":
        return {"device": "cpu", "cores": os.cpu_count(), **versions}
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 1e9
    cuda = torch.version.cuda or ""
    return {"device": properties.name, "memory_gb": memory, "cuda": cuda, "cores": os.cpu_count(), **versions}


def main(arguments: list[str] | None = None) -> None:
    """Run the parts and write what they measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all if none is named"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument(
        "--facades", type=Path, help="folder with train/ and test/, of photo and labels side by side"
    )
    parser.add_argument("--seconds", type=float, default=470, help="for everything")
    parser.add_argument("--each", type=float, default=1.5, help="seconds of timing a variant")
    parser.add_argument(
        "--keep", type=float, default=200, help="seconds that `train` leaves for the parts after it"
    )
    parser.add_argument("--facades-s", type=float, default=90, help="seconds that `compiled` leaves")
    parser.add_argument("--score-s", type=float, default=15, help="seconds to score Facades' test images")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16", help="for Facades")
    parser.add_argument("--epochs", type=int, default=200, help="of Facades, at most")
    parser.add_argument(
        "--tiny", action="store_true", help="networks that a CPU steps in a fraction of a second"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    options.cases = TINY if options.tiny else CASES
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(options.out, torch.device(options.device), options.seconds)
    tune_process(report.device)
    if report.device.type == "cpu":
        torch.set_num_threads(1)
    report.add("machine", **machine(report.device))
    for name in options.parts or PARTS:
        with report.trying(name):
            PARTS[name](report, options)
    report.add("machine", seconds=time.monotonic() - report.started)


if __name__ == "__main__":
    main()
