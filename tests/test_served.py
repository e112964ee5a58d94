"""The model behind MLflow: logged as code, loaded where this repository is not."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from stages import images
from stages.inference import Painter
from stages.model_source import local_model
from stages.models.saved import load_model
from stages.served import Served, log_model, promote
from tests.small import make_model, scene

LOAD = """
import sys, mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
data = open(sys.argv[3], "rb").read()
open(sys.argv[4], "wb").write(model.predict(pd.DataFrame({"image": [data]}))["image"][0])
"""


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
    table = pd.DataFrame({"image": [images.encode(labels, "png"), array.getvalue()]})
    made = served.predict(None, table)
    expected = Painter(load_model(folder)).translate([labels])[0]
    for data in made["image"]:
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image), expected)
    with pytest.raises(mlflow.exceptions.MlflowException, match="row 0: not_an_image"):
        served.predict(None, pd.DataFrame({"image": [b"no image"]}))


@pytest.mark.filterwarnings("ignore")  # MLflow's own use of pandas and alembic
@pytest.mark.long
def test_a_logged_model_loads_elsewhere_and_the_better_one_is_champion(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    folder = make_model(tmp_path / "model")
    versions = []
    for _ in range(2):
        run = client.create_run(experiment).info.run_id
        logged = log_model(folder, tracking_uri=uri, run_id=run, registered_name="street")
        versions.append(str(logged.registered_model_version))
    assert promote(
        tracking_uri=uri, name="street", version=versions[0], alias="champion", metric="l1", value=0.2
    )
    assert not promote(
        tracking_uri=uri, name="street", version=versions[1], alias="champion", metric="l1", value=0.3
    )
    champion = client.get_model_version_by_alias("street", "champion")
    assert str(champion.version) == versions[0]
    labels = scene(1, 32, 32)["source"]
    (tmp_path / "in.png").write_bytes(images.encode(labels, "png"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = [
        sys.executable,
        "-c",
        LOAD,
        uri,
        "models:/street@champion",
        str(tmp_path / "in.png"),
        str(tmp_path / "out.png"),
    ]
    subprocess.run(words, cwd=elsewhere, env=environment, check=True, timeout=300, capture_output=True)
    with Image.open(tmp_path / "out.png") as image:
        assert np.array_equal(np.asarray(image), Painter(load_model(folder)).translate([labels])[0])
    found = local_model("models:/street@champion", tmp_path / "temp", tracking_uri=uri)
    assert load_model(found).fingerprint == load_model(folder).fingerprint
