"""Progress of long work, as lines for a terminal and for a job's log file.

shard         312/500 pairs  62 %  85.1/s  2 s left
"""

from __future__ import annotations

import logging
import time
from typing import Self

logger = logging.getLogger("pixloom.progress")


def duration(seconds: float) -> str:
    """A duration for people: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Counts finished units and logs a line every `interval` seconds, and a last one at the end."""

    def __init__(
        self, label: str, *, total: int | None, unit: str, done: int = 0, interval: float = 5.0
    ) -> None:
        self.label, self.total, self.unit, self.interval = label, total, unit, interval
        self.done = self.start_done = done
        self.said: int | None = None
        self.started = self.spoken = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count more units; `note` ends the line, e.g. the latest losses."""
        self.done += count
        if time.monotonic() - self.spoken >= self.interval:
            self.say(note)

    def say(self, note: str = "") -> None:
        """Log the line now."""
        self.spoken, self.said = time.monotonic(), self.done
        logger.info("%s", self.line(self.spoken - self.started, note))

    def line(self, elapsed: float, note: str = "") -> str:
        """The line after `elapsed` seconds."""
        rate = (self.done - self.start_done) / elapsed if elapsed > 0 else 0.0
        parts = [f"{self.done:,} {self.unit}"]
        if self.total is not None:
            share = 100 * self.done / self.total if self.total else 100.0
            parts = [f"{self.done:,}/{self.total:,} {self.unit}  {share:.0f} %"]
        if rate:
            parts.append(f"{rate:,.1f}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        if note:
            parts.append(note)
        return f"{self.label:<13} " + "  ".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self.say("stopped")
        elif self.said != self.done:
            self.say()
