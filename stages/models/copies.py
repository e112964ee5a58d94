"""Copies between this machine's memory and a GPU's that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device: through pinned memory, from which a GPU copies when it gets there."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def arrival(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that a GPU has been asked to do so far; None for a CPU, which has done it."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A device's values on the host, and the event after which they are there; None: they are."""
    return values.to("cpu", non_blocking=True), arrival(values.device)  # into pinned memory
