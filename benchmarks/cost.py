"""How far off `--plan` is: the time that it expects of small runs of five recipes, and what they take.

    python -m benchmarks.cost                     # all five
    python -m benchmarks.cost facades --pairs 20

The first run of a workspace is expected by a probe and constants. The second has another seed and twice the
epochs: its training and inference are expected by the first. All train on drawn scenes in one thread, and end
after inference.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline import config as configuration
from stages import storage

PHOTO = "{uri: DATA/photo, role: target, pattern: '{key}.png'}"
LABEL = "{uri: DATA/label, role: source, pattern: '{key}.png'}"
INSTANCE = "{uri: DATA/instance, role: instance, pattern: '{key}.png'}"
PAIRS = f"ingest.locations=[{LABEL}, {PHOTO}]"
COARSE = ["train.model.enhancers=0", "train.phases.2=null", "train.phases.1=null"]  # the first phase alone
CASES: dict[str, tuple[int, list[str]]] = {  # epochs of each phase of the first run
    "facades": (2, [PAIRS, "pair.source_half=null", *COARSE]),
    "sample": (2, [f"ingest.locations=[{LABEL}, {PHOTO}, {INSTANCE}]", "shard.size=[128, 128]", *COARSE]),
    "pix2pix/facades": (12, [PAIRS, "pair.source_half=null"]),
    "pix2pix/colorization": (12, [f"ingest.locations=[{PHOTO}]"]),
    "pix2pix/inpainting": (12, [f"ingest.locations=[{PHOTO}]"]),
}
SHARED = ["tracking.enabled=false", "resources.threads_per_worker=1", "resources.gpu=false"]


def pipeline(module: str, *words: str) -> None:
    """Run a command of the pipeline; its output is shown only if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def measure(recipe: str, folder: Path, data: Path, epochs: int) -> Iterator[dict[str, tuple[float, float]]]:
    """Of each of both runs, the seconds that each step was expected to take, and took."""
    path = configuration.located(recipe)
    settings = [text.replace("DATA", str(data)) for text in CASES[recipe][1]] + SHARED
    phases = range(len(configuration.load(path, settings).train.phases))
    seen = set[str]()
    for number in (1, 2):
        chosen = [*settings, f"workspace={folder}", f"train.seed={number}"]
        for phase in phases:
            chosen += [
                f"train.phases.{phase}.decay_epochs=0",
                f"train.phases.{phase}.epochs={number * epochs}",
            ]
        words = ["-c", path, "--until", "infer", *(word for one in chosen for word in ("--set", one))]
        pipeline("pipeline.run", *words, "--plan")
        pipeline("pipeline.run", *words)
        markers = {}
        for name in sorted({*storage.list_folders(str(folder))} - seen):
            markers[name] = storage.read_json(str(folder / name / "_SUCCESS.json"))
        seen |= markers.keys()
        yield {m["step"]: (m["predicted"], m["seconds"]) for m in markers.values()}


def main() -> None:
    """Print two rows for each recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=40, help="scenes to draw")
    parser.add_argument("--epochs", type=int, help="of each phase of the first run")
    options = parser.parse_args()
    print("| recipe | run | training expected | took | off by | all steps expected | took | off by |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data"
        pipeline("pipeline.sample", str(data), "--pairs", str(options.pairs), "--size", "192x192")
        for number, recipe in enumerate(options.recipes):
            runs = measure(recipe, Path(place) / str(number), data, options.epochs or CASES[recipe][0])
            for name, run in zip(("first", "second"), runs, strict=True):
                trained = {step: times for step, times in run.items() if step.startswith("train")}
                cells = []
                for steps in (trained, run):
                    expected, took = (sum(times[n] for times in steps.values()) for n in (0, 1))
                    cells += [f"{expected:.0f} s", f"{took:.0f} s", f"{expected / took - 1:+.0%}"]
                print(f"| {recipe} | {name} | {' | '.join(cells)} |", flush=True)
                print(f"  {run}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
