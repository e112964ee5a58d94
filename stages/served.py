"""The model as MLflow keeps and serves it: encoded images in, encoded images out.

in:  a table with a column `image` (PNG, JPEG, WebP, TIFF or .npy bytes); `instance` where a model needs it
out: a table with a column `image` (PNG bytes)

Logged as code (this file and the packages it imports) beside a model folder, so that `mlflow models serve`
and `mlflow.pyfunc.load_model` need neither this repository nor its config.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from stages import images
from stages.inference import Painter, noise_seed
from stages.metrics import lower_is_better
from stages.models.saved import DISCRIMINATOR, load_model, read_manifest

logger = logging.getLogger(__name__)

REQUIREMENTS = ("numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")


class Served(PythonModel):  # type: ignore[misc]
    """A `Painter` behind MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was logged as the artifact `model`."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(Path(context.artifacts["model"]), device=device)
        self.device = device

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Generate a picture for every row. Raises MlflowException for a row that is no image."""
        given = params or {}
        painter = Painter(self.model, device=self.device, stochastic=bool(given.get("stochastic", False)))
        made = []
        for index, row in enumerate(model_input.to_dict("records")):
            try:
                source = images.decode(row["image"], painter.source_kind)
                instance = None
                if painter.needs_instances:
                    instance = [images.decode(row.get("instance") or b"", "instances")]
                seed = noise_seed(int(given.get("seed", 0)), str(index))
                (out,) = painter.translate([source], instance, seeds=[seed])
            except (images.ImageRejected, ValueError) as why:
                raise MlflowException.invalid_parameter_value(f"row {index}: {why}") from why
            if painter.target_kind not in ("rgb", "grey", "grey16"):
                light = source if painter.source_kind == "lab_l" else None
                out = images.picture(out, painter.target_kind, lightness=light)
            made.append(images.to_png(out))
        return pd.DataFrame({"image": made})


def signature(folder: Path) -> ModelSignature:
    """What goes in and out of a model folder's model."""
    columns = [ColSpec(DataType.binary, "image")]
    if read_manifest(folder).inputs.instances:
        columns.append(ColSpec(DataType.binary, "instance", required=False))
    return ModelSignature(
        inputs=Schema(columns),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema(
            [ParamSpec("seed", DataType.long, 0), ParamSpec("stochastic", DataType.boolean, default=False)]
        ),
    )


def log_model(folder: Path, *, tracking_uri: str, run_id: str, registered_name: str | None = None) -> Any:
    """Log a model folder to a run, and register it if a name is given. Returns MLflow's `ModelInfo`."""
    mlflow.set_tracking_uri(tracking_uri)
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory(prefix="pixloom-served-") as temp:
        wanted = Path(temp) / "model"
        wanted.mkdir()
        for path in folder.iterdir():
            if path.name != DISCRIMINATOR:  # it serves nobody
                shutil.copyfile(path, wanted / path.name)
        return Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            registered_model_name=registered_name,
            python_model=str(here),
            artifacts={"model": str(wanted)},
            code_paths=[str(here.parent)],
            signature=signature(folder),
            pip_requirements=list(REQUIREMENTS),
        )


def promote(*, tracking_uri: str, name: str, version: str, alias: str, metric: str, value: float) -> bool:
    """Give a version the alias if it beats the one that has it; returns whether it did.

    The metric's value is kept as a tag of the version: a champion without it is beaten by any.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    client.set_model_version_tag(name, version, metric, f"{value:.9g}")
    try:
        champion = client.get_model_version_by_alias(name, alias)
    except MlflowException:
        champion = None
    if champion is not None and (held := champion.tags.get(metric)) is not None:
        better = value < float(held) if lower_is_better(metric) else value > float(held)
        if not better:
            logger.info(
                "%s: version %s stays %s: %s %s against %.6g",
                name,
                champion.version,
                alias,
                metric,
                held,
                value,
            )
            return False
    client.set_registered_model_alias(name, alias, version)
    return True


set_model(Served())  # at import, because that is how MLflow takes a model from its code
