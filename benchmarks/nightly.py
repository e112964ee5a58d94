"""Measure a few ratios, append them as a line of JSON to a file, and draw all its lines over time.

    python -m benchmarks.nightly                # appends to benchmarks/history.jsonl, draws history.png

A figure is how many times as fast our side is as the published or usual one, measured in turns. Points of
one processor are joined: between processors ratios differ too.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HISTORY = Path(__file__).with_name("history.jsonl")
MEASURES = {  # the name of a figure: the command, and where in its output the ratio is
    "training step, U-Net-256": (
        ["train_step", "unet", "--no-memory", "--precision", "float32"],
        r"\| unet \| float32 \| .*? \| ([\d.]+)x",
    ),
    "training input": (["data", "input"], r"(?m)^feed .*? x *([\d.]+)"),
    "PNG writer": (["data", "png"], r"(?m)^stages\.images\.encode .*? x *([\d.]+)"),
}


def measured(command: list[str], ratio: str) -> float:
    """Run one benchmark and read the ratio off its table."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ratio_in(done.stdout, ratio)


def ratio_in(printed: str, pattern: str) -> float:
    """The ratio in what a benchmark printed. Raises ValueError if it is not there."""
    match = re.search(pattern, printed)
    if match is None:
        raise ValueError(f"there is no {pattern!r} in\n{printed}")
    return float(match[1])


def processor() -> str:
    """The processor's name and the number of its cores that we may use."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """One panel for each figure, one line for each processor."""
    figure = Figure(figsize=(8, 2.2 * len(MEASURES)), layout="constrained")
    for axes, name in zip(figure.subplots(len(MEASURES), 1, sharex=True), MEASURES, strict=True):
        for place in sorted({point["processor"] for point in points}):
            known = [p for p in points if p["processor"] == place and name in p["ratios"]]
            times = [datetime.fromisoformat(p["time"]) for p in known]
            axes.plot(times, [p["ratios"][name] for p in known], "o-", label=place)
        axes.set_title(name, loc="left")
        axes.set_ylabel("times as fast")
        axes.set_ylim(bottom=0)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Add a point and draw the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--history", type=Path, default=HISTORY, metavar="FILE", help="file to append to")
    parser.add_argument("--turns", type=int, default=5, help="of each benchmark")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], stdout=subprocess.PIPE, text=True, check=True
    )
    turns = ["--turns", str(options.turns)]
    ratios = {name: measured([*command, *turns], ratio) for name, (command, ratio) in MEASURES.items()}
    point = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.stdout.strip()}
    with options.history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**point, "processor": processor(), "ratios": ratios}) + "\n")
    points = [json.loads(line) for line in options.history.read_text(encoding="utf-8").splitlines()]
    draw(points, options.history.with_suffix(".png"))
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
