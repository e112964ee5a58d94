"""The model behind MLflow's interface."""

from __future__ import annotations

import io
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stages.images import encode
from stages.inference.translator import Translator
from stages.models.files.saved import load_model
from stages.tracking.served import Served
from tests.support.models import make_model, scene


class Context:
    def __init__(self, folder: Path) -> None:
        self.artifacts = {"model": str(folder)}


def test_bytes_and_arrays_go_in_and_images_come_out(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    served = Served()
    served.load_context(Context(folder))
    labels = scene(0, 40, 32)["source"]
    array = io.BytesIO()
    np.save(array, labels)
    table = pd.DataFrame({"image": [encode.encode_image(labels, "png"), array.getvalue()]})
    made = served.predict(None, table)
    expected = Translator(load_model(folder)).translate([labels])[0]
    for data in made["image"]:
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image), expected)
    with pytest.raises(mlflow.exceptions.MlflowException, match="row 0: not_an_image"):
        served.predict(None, pd.DataFrame({"image": [b"no image"]}))
