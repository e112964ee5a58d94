"""A trained model in MLflow: logged once to its run, registered, and champion if it beats the one that is.

in:  a model folder, a source image as its input example, and what evaluation measured of it
out: a logged model (`models:/m-...`), a version of a registered model, perhaps the alias

Everything is looked up before it is made: sent twice, it is still one model and one version. What a version
is worth is kept in its tags; versions measured on other data are not compared.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from stages.inference.model_source import description, fingerprint, local_model, tracking_server
from stages.models.files.saved import DISCRIMINATOR, EMA, WEIGHTS, read_manifest
from stages.scoring.metrics import lower_is_better
from stages.tracking import served

NAME = "model"  # below its run: `runs:/<id>/model`
MODEL_TAG, DATA_TAG = "pixloom.model", "pixloom.data"
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "torch")


def publish(
    folder: str,
    *,
    tracking_uri: str,
    run_id: str,
    example: Mapping[str, bytes],
    name: str | None = None,
    alias: str = "champion",
    metric: str = "l1",
    value: float | None = None,
    data: str = "",
) -> str:
    """Log the model in `folder` (any location) to a run; with a `name`, register it and compare it.

    `example`: encoded images by column, as `served` takes them. `value` of `metric` was measured on the data
    with the digest `data`; None: it was not, and the alias stays where it is. Returns what came of it, in a
    line.
    """
    client = MlflowClient(tracking_uri=tracking_uri)
    identity = fingerprint(description(folder))
    with tracking_server(tracking_uri):
        model_id = _logged(client, run_id, identity)
        if not model_id:
            with tempfile.TemporaryDirectory(prefix="pixloom-publish-") as temp:
                model_id = _log(client, local_model(folder, Path(temp)), run_id, example, identity)
        if value is not None:
            client.log_metric(run_id, metric, value, model_id=model_id)
        if name is None:
            return f"logged as models:/{model_id}"
        version = _registered(client, name, model_id) or _register(name, model_id, identity)
    if value is None:
        return f"registered as models:/{name}/{version}"
    told = {metric: f"{value:.9g}", DATA_TAG: data}
    for tag, text in told.items():
        client.set_model_version_tag(name, version, tag, text)
    return f"registered as models:/{name}/{version}; " + _promote(
        client, name=name, version=version, alias=alias, metric=metric, value=value, data=data
    )


def _promote(
    client: MlflowClient, *, name: str, version: str, alias: str, metric: str, value: float, data: str
) -> str:
    """Give a version the alias if it beats the one that has it; returns what came of it, in words."""
    try:
        champion = client.get_model_version_by_alias(name, alias)
    except MlflowException:
        champion = None
    if champion is not None and str(champion.version) == version:
        return f"it is {alias} ({metric} {value:.4g})"
    beaten = ""
    if champion is not None and (held := champion.tags.get(metric)) is not None:
        holder = f"version {champion.version} ({metric} {float(held):.4g})"
        if champion.tags.get(DATA_TAG, "") != data:
            return f"{alias} stays {holder}: it was measured on other data, so nobody knows which is better"
        better = value < float(held) if lower_is_better(metric) else value > float(held)
        if not better:
            return f"{alias} stays {holder}, this one has {value:.4g}"
        beaten = f", before: {holder}"
    client.set_registered_model_alias(name, alias, version)
    return f"now {alias} ({metric} {value:.4g}{beaten})"


# -- logging ------------------------------------------------------------------


def _log(client: MlflowClient, folder: Path, run_id: str, example: Mapping[str, bytes], identity: str) -> str:
    """Log a local model folder to a run; returns MLflow's id of the model."""
    code = Path(served.__file__).resolve()
    unused = {DISCRIMINATOR} | ({WEIGHTS} if EMA in read_manifest(folder).files else set())
    run = client.get_run(run_id)
    # made here, since `Model.log` would take the experiment that is active in this process
    made = client.create_logged_model(
        run.info.experiment_id,
        name=NAME,
        source_run_id=run_id,
        tags={MODEL_TAG: identity},
        params=run.data.params,
    )
    with tempfile.TemporaryDirectory(prefix="pixloom-served-") as temp:
        wanted = Path(temp) / "model"
        wanted.mkdir()
        for path in folder.iterdir():
            if path.is_file() and path.name not in unused:  # serves nobody, and is half of the bytes
                shutil.copyfile(path, wanted / path.name)
        Model.log(
            artifact_path=None,
            name=NAME,
            model_id=made.model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(code),
            artifacts={"model": str(wanted)},
            code_paths=[str(code.parent)],
            signature=signature(folder),
            input_example=pd.DataFrame({name: [data] for name, data in example.items()}),
            pip_requirements=list(REQUIREMENTS),
        )
    return str(made.model_id)


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


def _logged(client: MlflowClient, run_id: str, identity: str) -> str:
    """The id of this very model, logged before in the run's experiment; "" if it was not.

    One that was killed while it was sent is taken away.
    """
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment], filter_string=f"tags.`{MODEL_TAG}` = '{identity}'")
    ready = [model.model_id for model in found if model.status == LoggedModelStatus.READY]
    for model in found:
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)
    return str(ready[0]) if ready else ""


def _registered(client: MlflowClient, name: str, model_id: str) -> str:
    """The version that this logged model has under a registered name; "" if it has none."""
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    source = f"models:/{model_id}"  # a database does not tell a version's model_id
    return next((str(version.version) for version in found if version.source == source), "")


def _register(name: str, model_id: str, identity: str) -> str:
    made = mlflow.register_model(
        f"models:/{model_id}", name, await_registration_for=0, tags={MODEL_TAG: identity}
    )
    return str(made.version)
