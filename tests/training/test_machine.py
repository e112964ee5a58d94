"""The load of a worker's machine."""

from __future__ import annotations

import torch

from stages.training.machine import machine_metrics


def test_the_machines_load_has_the_names_mlflow_shows() -> None:
    values = machine_metrics(torch.device("cpu"))
    assert all(name.startswith("system/") for name in values)
    assert 0 < values["system/system_memory_usage_percentage"] <= 100


def test_each_of_several_workers_has_names_of_its_own() -> None:
    device = torch.device("cpu")
    assert set(machine_metrics(device, 2)) == {
        name.replace("system/", "system/worker_2/") for name in machine_metrics(device)
    }
