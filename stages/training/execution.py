"""How a phase is computed where its numbers depend on it: decided when it begins, recorded, kept on resume.

    <phase>/execution.json    precision, micro-batch, and the workers and device of each part of the phase

Batch norm computes its statistics over the pairs that are in memory together, and dropout draws its noise for
them, so a micro-batch's size changes the result; under unsynchronised batch norm, the number of workers does
too. Precision, if the config leaves it open, is what is fastest where the phase begins.
"""

from __future__ import annotations

from stages import storage
from stages.base import Config, Precision
from stages.config.train import PhaseJob
from stages.errors import UserError

NAME = "execution.json"


class Part(Config):
    """Who computed a phase after its first `images` images, until the next part."""

    images: int
    workers: int
    device: str

    def __str__(self) -> str:
        since = f" after {self.images:,} images" if self.images else ""
        return f"{self.workers} on {self.device}{since}"


class Execution(Config):
    """How a phase is computed."""

    precision: Precision
    micro_batch: int | None = None
    parts: tuple[Part, ...] = ()

    def notes(self) -> dict[str, str]:
        """The same for people: the marker, the report and MLflow show it."""
        accumulated = {} if self.micro_batch is None else {"micro_batch": str(self.micro_batch)}
        workers = ", ".join(map(str, self.parts))
        return {"precision": self.precision, **accumulated, "workers": workers}


def read(folder: str) -> Execution | None:
    """The record of a phase's folder; None if the phase has not begun."""
    try:
        return Execution.model_validate_json(storage.read_bytes(storage.join(folder, NAME)))
    except FileNotFoundError:
        return None


def write(folder: str, execution: Execution) -> None:
    """Record how a phase is computed."""
    storage.write_json(storage.join(folder, NAME), execution.model_dump(mode="json"))


def decide(
    job: PhaseJob, begun: Execution | None, micro_batch: int | None, fastest: Precision, part: Part
) -> Execution:
    """How the phase is computed from `part` on.

    begun     its record if it resumes from a checkpoint, else None
    fastest   the precision to take if the config leaves it open

    Raises UserError if the phase began with another number of workers, and its result depends on it.
    """
    if begun is None:
        return Execution(precision=job.precision or fastest, micro_batch=micro_batch, parts=(part,))
    earlier = tuple(one for one in begun.parts if one.images < part.images)
    last = earlier[-1] if earlier else part
    if job.depends_on_workers and last.workers != part.workers:
        raise UserError(
            f"resources.train_workers: '{job.phase.name}' began with {last.workers} and resumes with "
            f"{part.workers}, but its batch norm depends on their number; use {last.workers}, or set "
            "train.synchronised_norms: true to train it from the start"
        )
    same = (last.workers, last.device) == (part.workers, part.device)
    return Execution(
        precision=begun.precision,
        micro_batch=begun.micro_batch if job.depends_on_micro_batch else micro_batch,
        parts=earlier if earlier and same else (*earlier, part),
    )
