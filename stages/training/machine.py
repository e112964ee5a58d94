"""The load of a training worker's machine, for the curves."""

from __future__ import annotations

from contextlib import suppress

import psutil
import torch


def machine_metrics(device: torch.device, worker: int | None = None) -> dict[str, float]:
    """The load of a worker's machine, under the names MLflow's page shows as system metrics.

    worker   its rank, part of the names, if there are several
    """
    memory = psutil.virtual_memory()
    load = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        load |= {
            "gpu_0_memory_usage_megabytes": (total - free) / 1e6,
            "gpu_0_memory_usage_percentage": 100 * (1 - free / total),
            "gpu_0_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6,
        }
        # Without nvidia-ml-py, or with errors of its own: a part of a GPU (MIG) has no utilisation.
        with suppress(Exception):
            load["gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    prefix = "system/" if worker is None else f"system/worker_{worker}/"
    return {prefix + name: value for name, value in load.items()}
