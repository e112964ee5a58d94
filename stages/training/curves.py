"""The curves of a phase: what was measured at which step, on its way from the device to a table.

Losses stay on the device until `Window.close`, so that a step never waits; a point of a curve is the mean
over a window of steps, and the mean over all workers, weighted by their rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import psutil
import pyarrow as pa
import torch
from torch import Tensor

from stages.training.checkpoints import Position
from stages.training.news import Point

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("images", pa.int64()),
        ("epoch", pa.int32()),
        ("name", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float64()),
        ("time_ms", pa.int64()),
    ]
)


class DivergedError(Exception):
    """A loss or a weight is no longer a number."""


@dataclass
class Window:
    """The losses of the steps since the last point, on the device."""

    device: torch.device
    total: Callable[[Tensor], Tensor] | None = None
    """Sums a tensor over all workers; None if there is one."""
    workers: int = 1
    agree: Callable[[Sequence[str]], Sequence[str]] = lambda names: names
    """Rank 0's names: a worker without rows has no losses of its own to name."""
    names: Sequence[str] | None = None
    steps: list[int] = field(default_factory=list)
    _losses: list[Mapping[str, Tensor]] = field(default_factory=list)
    _shares: list[float] = field(default_factory=list)

    def add(self, step: int, losses: Mapping[str, Tensor], share: float) -> None:
        """Keep a step's losses; `share` as in `Batch`."""
        self.steps.append(step)
        self._losses.append(losses)
        self._shares.append(share)

    def close(self, rate: float) -> dict[str, float]:
        """Mean of each loss over the window; {} if it is empty. Every worker calls it at the same step.

        Raises DivergedError, on all workers alike, naming the first step whose losses are not finite.
        """
        if not self.steps:
            return {}
        if self.names is None:
            self.names = list(self.agree(list(self._losses[0])))
        zero = torch.zeros((), device=self.device)
        rows = [
            torch.stack([losses.get(name, zero).float() for name in self.names]) * share
            for losses, share in zip(self._losses, self._shares, strict=True)
        ]
        table = torch.stack(rows)  # (steps, names)
        if self.total is not None:
            table = self.total(table) / self.workers
        values = table.cpu()  # the only place that waits for the device
        steps, self.steps, self._losses, self._shares = self.steps, [], [], []
        finite = values.isfinite().all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            shown = ", ".join(
                f"{name} {value:.4g}"
                for name, value in zip(self.names, values[first].tolist(), strict=True)
                if "/scale" not in name and "/layer" not in name
            )
            raise DivergedError(f"step {steps[first]:,}: {shown} at learning rate {rate:.3g}")
        return dict(zip(self.names, values.mean(0).tolist(), strict=True))


def points(position: Position, epoch: int, values: Mapping[str, float]) -> list[Point]:
    """Values as points at a position."""
    now = int(time.time() * 1000)
    return [Point(position.steps, position.images, epoch, name, value, now) for name, value in values.items()]


def to_table(rows: Sequence[Point]) -> pa.Table:
    """Points as a table."""
    columns = {name: [row[index] for row in rows] for index, name in enumerate(SCHEMA.names)}
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Point]:
    """The inverse of `to_table`."""
    columns = [table[name].to_pylist() for name in SCHEMA.names]
    return [Point(*row) for row in zip(*columns, strict=True)]


def balance(losses: Mapping[str, float]) -> dict[str, float]:
    """How far ahead the discriminator is: its mean loss over the generator's; far below 1, it wins."""
    real, fake = losses.get("discriminator/real"), losses.get("discriminator/fake")
    gan = losses.get("generator/gan")
    if real is None or fake is None or not gan or not math.isfinite(gan):
        return {}
    return {"health/discriminator_over_generator": 0.5 * (real + fake) / gan}


def machine_metrics(device: torch.device) -> dict[str, float]:
    """The load of a worker's machine, under the names MLflow's page shows as system metrics."""
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        metrics |= {
            "system/gpu_0_memory_usage_megabytes": (total - free) / 1e6,
            "system/gpu_0_memory_usage_percentage": 100 * (1 - free / total),
            "system/gpu_0_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6,
        }
        with suppress(ImportError, RuntimeError):  # without nvidia-ml-py
            metrics["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return metrics


def note(losses: Mapping[str, float]) -> str:
    """The losses in a progress line: `G 1.23 D 0.45`."""
    whole = {name: value for name, value in losses.items() if name.count("/") == 1}
    sums = {
        short: sum(value for name, value in whole.items() if name.startswith(f"{network}/"))
        for short, network in (("G", "generator"), ("D", "discriminator"))
    }
    if not any(name.startswith("discriminator/") for name in whole):
        del sums["D"]
    elif "discriminator/real" in whole:
        sums["D"] *= 0.5
    return " ".join(f"{short} {value:.3g}" for short, value in sums.items())
