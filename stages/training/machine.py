"""The load of a training worker's machine, for the curves."""

from __future__ import annotations

from contextlib import suppress

import psutil
import torch


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
