"""Read the reference tensors: the published implementations' inputs, weights and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor, nn

from stages.models.files.nvidia_names import layer_names, renamed

TOLERANCE = 1e-4  # the reference's own README


Network = TypeVar("Network", bound=nn.Module)


class Reference:
    """One file: `tensors`, `config`, and `load` to put published weights into our network."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
            self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {name[len(start) :]: t for name, t in self.tensors.items() if name.startswith(start)}

    def load(self, network: Network, prefix: str = "weights") -> Network:
        ours = {theirs: name for name, theirs in layer_names(network).items()}
        network.load_state_dict(renamed(self.state(prefix), ours), strict=True)
        return network


def relative_error(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return ((ours.double() - reference.double()).abs().max() / reference.abs().max()).item()
