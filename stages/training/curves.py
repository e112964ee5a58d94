"""The curves of a phase: what was measured at which step, on its way from the device to a table.

Losses stay on the device until `Window.close`, so that a step never waits; a point of a curve is the mean
over a window of steps, and the mean over all workers, weighted by their rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from stages.base import Point
from stages.models.copies import to_host
from stages.training.checkpoints import Position
from stages.training.gradients import Messages

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

NEWEST = 10_000  # points, many more than those of a window


class DivergedError(Exception):
    """A loss or a weight is no longer a number."""


@dataclass
class Window:
    """The losses of the steps since the last point, on the device."""

    messages: Messages
    names: Sequence[str] | None = None
    """Rank 0's: a worker without rows has no losses of its own to name."""
    steps: list[int] = field(default_factory=list)
    _losses: list[Mapping[str, Tensor]] = field(default_factory=list)
    _shares: list[float] = field(default_factory=list)

    def add(self, step: int, losses: Mapping[str, Tensor], share: float) -> None:
        """Keep a step's losses; `share` as in `Batch`."""
        self.steps.append(step)
        self._losses.append(losses)
        self._shares.append(share)

    def close(self, rate: float, norms: Mapping[str, Tensor] | None = None) -> ClosedWindow:
        """The window's values, on their way from the device. Every worker calls it at the same step.

        norms   further scalars, which are the same on every worker
        """
        norms = norms or {}
        if self.names is None:
            self.names = self.messages.broadcast(list(self._losses[0]))
        zero = torch.zeros((), device=self.messages.device)
        rows = [
            torch.stack([losses.get(name, zero).float() for name in self.names]) * share
            for losses, share in zip(self._losses, self._shares, strict=True)
        ]
        table = torch.stack(rows)  # (steps, names)
        table = self.messages.total(table) / self.messages.workers
        numbers = torch.cat([table.flatten(), *(norm.float().reshape(1) for norm in norms.values())])
        numbers, arrived = to_host(numbers)
        steps, self.steps, self._losses, self._shares = self.steps, [], [], []
        return ClosedWindow(steps, self.names, list(norms), numbers, rate, arrived)


@dataclass(frozen=True, slots=True)
class ClosedWindow:
    """The losses of a window of steps, and further scalars, on their way from the device."""

    steps: Sequence[int]
    losses: Sequence[str]
    norms: Sequence[str]
    numbers: Tensor
    """The losses of every step, then the further scalars."""
    rate: float
    arrived: torch.cuda.Event | None = None
    """None: the numbers are there."""

    def means(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean of each loss over the window; the further scalars. Waits for the device.

        Raises DivergedError, on all workers alike, naming the first step whose losses are not finite.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        count = len(self.steps) * len(self.losses)
        values = self.numbers[:count].view(len(self.steps), len(self.losses))
        finite = values.isfinite().all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0, 0])
            shown = ", ".join(
                f"{name} {value:.4g}"
                for name, value in zip(self.losses, values[first].tolist(), strict=True)
                if "/scale" not in name and "/layer" not in name
            )
            raise DivergedError(f"step {self.steps[first]:,}: {shown} at learning rate {self.rate:.3g}")
        means = dict(zip(self.losses, values.mean(0).tolist(), strict=True))
        return means, dict(zip(self.norms, self.numbers[count:].tolist(), strict=True))


class Curves:
    """All points of a phase so far, as a table: a list of ten million takes half a minute to convert."""

    def __init__(self, table: pa.Table) -> None:
        self._table, self._fresh = table, list[Point]()

    def add(self, rows: Sequence[Point]) -> None:
        """Add points."""
        self._fresh += rows

    def table(self) -> pa.Table:
        """All points in their order."""
        if self._fresh:
            self._table, self._fresh = pa.concat_tables([self._table, to_table(self._fresh)]), []
        return self._table

    def named(self, name: str) -> list[Point]:
        """The points of one curve."""
        table = self.table()
        return from_table(table.filter(pc.is_in(table["name"], pa.array([name]))))


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
    columns = (table[name].to_numpy().tolist() for name in SCHEMA.names)
    return list(map(Point._make, zip(*columns, strict=True)))


def last_losses(table: pa.Table) -> dict[str, float]:
    """The losses of the newest window: a phase that resumes at its end takes no step that would give them."""
    rows = from_table(table.slice(max(0, table.num_rows - NEWEST)))
    return {row.name: row.value for row in rows if row.name.startswith(("generator/", "discriminator/"))}


def balance(losses: Mapping[str, float]) -> dict[str, float]:
    """How far ahead the discriminator is: its mean loss over the generator's; far below 1, it wins."""
    real, fake = losses.get("discriminator/real"), losses.get("discriminator/fake")
    gan = losses.get("generator/gan")
    if real is None or fake is None or not gan or not math.isfinite(gan):
        return {}
    return {"health/discriminator_over_generator": 0.5 * (real + fake) / gan}


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
