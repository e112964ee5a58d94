"""The metrics of a run in Ray's Prometheus endpoints. This is the only place that names them.

The driver records them: news and results of workers reach it anyway, so what runs in workers needs none of
this. Ray exports a gauge only after it was set, so what must stay visible is a counter. Without Ray, records
are dropped. In Prometheus every name begins with `ray_`, and a counter's ends with
`_total`. docs/operations.md explains each; cluster/grafana/pixloom.json shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

TRAIN_IMAGES = Counter("pixloom_train_images", "Pairs trained on, counted again in each epoch.", ("phase",))
TRAIN_IMAGES_PER_SECOND = Gauge(
    "pixloom_train_images_per_second", "Pairs per second since the last point of the curves.", ("phase",)
)
TRAIN_DATA_WAIT_RATIO = Gauge(
    "pixloom_train_data_wait_ratio", "Share of the time that training waited for a batch, 0 to 1.", ("phase",)
)
TRAIN_CHECKPOINT_SECONDS = Gauge(
    "pixloom_train_checkpoint_seconds", "Seconds that writing the last checkpoint took.", ("phase",)
)
TRAIN_RESTARTS = Counter("pixloom_train_restarts", "Restarts of the group of workers.", ("phase",))
PAIRS_REJECTED = Counter("pixloom_pairs_rejected", "Pairs left out of the data set.", ("stage", "reason"))
INFER_IMAGES = Counter("pixloom_infer_images", "Images generated.")

CURVES = {
    "throughput/images_per_second": TRAIN_IMAGES_PER_SECOND,
    "throughput/data_wait_fraction": TRAIN_DATA_WAIT_RATIO,
}
"""The gauges that show the last value of a training curve."""


def count_rejected(stage: str, reasons: Mapping[str, int]) -> None:
    """Count pairs that a stage left out, by reason."""
    for reason, pairs in reasons.items():
        PAIRS_REJECTED.inc(pairs, {"stage": stage, "reason": reason})
