"""The model as MLflow stores and serves it: encoded images in, encoded images out.

in:  a table with a column `image` (PNG, JPEG, WebP, TIFF or .npy bytes); `instance` where a model needs it
out: a table with a column `image` (PNG bytes)

It is logged as code (this file and the packages it imports) with a model folder: `mlflow models serve` and
`mlflow.pyfunc.load_model` need neither this repository nor its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from stages.images import decode, encode, kinds
from stages.inference.translator import Translator, noise_seed
from stages.models.files.saved import load_model


class Served(PythonModel):  # type: ignore[misc]
    """A `Translator` with MLflow's interface."""

    def load_context(self, context: Any) -> None:
        """Load the model folder that was logged as the artifact `model`."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(Path(context.artifacts["model"]), device=device)
        self.translators = {
            stochastic: Translator(model, stochastic=stochastic) for stochastic in (False, True)
        }

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Generate an image for every row. Raises MlflowException for a row without a readable image."""
        options = params or {}
        translator = self.translators[bool(options.get("stochastic", False))]
        images = []
        for index, row in enumerate(model_input.to_dict("records")):
            try:
                source = translator.prepared(decode.decode_image(row["image"], translator.source))
                instance = None
                if translator.needs_instances:
                    instance = [decode.decode_image(row.get("instance") or b"", "instances")]
                seed = noise_seed(int(options.get("seed", 0)), str(index))
                (out,) = translator.translate([source], instance, seeds=[seed])
            except (kinds.ImageRejected, ValueError) as error:
                raise MlflowException.invalid_parameter_value(f"row {index}: {error}") from error
            images.append(encode.encode_png(translator.output(out, source)))
        return pd.DataFrame({"image": images})


set_model(Served())  # at import, because that is how MLflow takes a model from its code
