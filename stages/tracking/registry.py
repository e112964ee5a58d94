"""The register step: logs a model, registers it, and moves the alias `champion` to it if it scores better.

in:  a model folder, a source image as its input example, and a metric that evaluation measured
out: a logged model (`models:/m-...`), a version of a registered model, perhaps the alias

Each is looked up before it is created: logged twice, it is one model and one version. The metric and the data
it was measured on are tags of the version; versions measured on other data are not compared.
"""

from __future__ import annotations

import io
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from stages import storage
from stages.base import Outcome
from stages.config.tracking import Registration
from stages.errors import StageError, one_line
from stages.inference.model_source import description, local_model, tracking_server
from stages.models.files.saved import DISCRIMINATOR, EMA, WEIGHTS, fingerprint, read_manifest
from stages.scoring import table
from stages.scoring.intervals import Interval, difference
from stages.scoring.metrics import lower_is_better
from stages.shards import dataset
from stages.tracking import served
from stages.tracking.run import Run, allowed_name
from stages.tracking.sender import find_model, is_refusal, open_model

logger = logging.getLogger(__name__)

AGAIN = "the results are complete; run the same command again to register their model, and nothing else"
WAITS = (2.0, 10.0)  # seconds before another attempt

NAME = "model"  # below its run: `runs:/<id>/model`
MODEL_TAG, DATA_TAG = "pixloom.model", "pixloom.data"
SCORES = "scores"  # the artifacts with scores of single images
ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # MLflow's words for no model, no alias
UNCERTAIN = "no interval of the difference can be had; tracking.promote: mean compares the means alone"
REQUIREMENTS = ["imagecodecs", "mlflow", "pandas", "pillow", "pydantic", "safetensors", "tifffile", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A model's value of a metric."""

    metric: str
    value: float
    data: str
    """What it was measured on: the shards, their split, and how the images were generated."""
    images: pa.Table | None = None
    """The values of single images as {key, group, metric}; None for a metric of the whole set."""

    @property
    def file(self) -> str:
        """The name of the file of the values of single images."""
        return allowed_name(f"{self.metric} {self.data}").replace(" ", "-") + ".parquet"


def register_model(
    config: Registration, *, parent: Run, model: str, shards: str, metrics: str = ""
) -> Outcome:
    """Log the model in a phase's folder to the parent run, register it, and compare it by its metric.

    metrics   the folder of its evaluation; "": it is not evaluated, the alias stays

    Raises StageError if MLflow is away or refuses: run again, this step alone is done.
    """
    spec = dataset.load(shards)
    scores = table.headline(storage.read_json(storage.join(metrics, "summary.json"))) if metrics else {}
    measured = None
    if scores and not math.isfinite(scores.get(config.metric, math.nan)):
        there = ", ".join(name for name in scores if not table.is_bound(name))
        logger.warning("tracking.metric: %s was not measured; there are %s", config.metric, there)
    elif scores:
        split = spec.scored_split(config.split, "evaluate.split")
        measured = Measurement(
            metric=config.metric,
            value=scores[config.metric],
            data=f"{shards.rpartition('/')[2]} {split} {config.judged_by}".rstrip(),
            images=table.of_images(storage.join(metrics, "metrics.parquet"), config.metric),
        )
    example = dataset.example(shards, spec)
    parent.flush()
    if not (run_id := parent.run_id(wait=1.0)):
        raise StageError(f"register: MLflow at {config.server} does not answer; {AGAIN}")
    folder = storage.join(model, "model")
    for wait in (*WAITS, None):
        try:
            outcome = register(config, folder, parent.uri, run_id, example=example, measured=measured)
            break
        except Exception as error:  # every client library of MLflow has its own
            if wait is None or is_refusal(error):
                reason = one_line(error, kind=True)
                raise StageError(f"register: MLflow did not take the model ({reason}); {AGAIN}") from error
            time.sleep(wait)
    return Outcome(notes={"model": outcome})


def register(
    config: Registration,
    folder: str,
    tracking_uri: str,
    run_id: str,
    *,
    example: Mapping[str, bytes],
    measured: Measurement | None = None,
) -> str:
    """Log the model in `folder` (any URI) to a run, register and compare it. Returns a log line.

    example    encoded images by column, as `served` takes them
    measured   None: not measured, the alias stays
    """
    client, name = MlflowClient(tracking_uri=tracking_uri), config.name
    identity = fingerprint(description(folder))
    with tracking_server(tracking_uri):
        experiment = client.get_run(run_id).info.experiment_id
        if logged := find_model(client, experiment, MODEL_TAG, identity):
            model_id = str(logged.model_id)
        else:
            model_id = _log(client, folder, run_id, example)
            client.set_logged_model_tags(model_id, {MODEL_TAG: identity})  # now it has its files
        if measured is not None:
            client.log_metric(
                run_id,
                measured.metric,
                measured.value,
                model_id=model_id,
                dataset_name="shards",
                dataset_digest=measured.data[:36],
            )
        version = _version(client, name, model_id, identity)
        if measured is not None and measured.images is not None:
            with tempfile.TemporaryDirectory(prefix="pixloom-scores-") as temp:  # for later versions
                pq.write_table(measured.images, file := Path(temp) / measured.file)
                client.log_artifact(client.get_model_version(name, version).run_id, str(file), SCORES)
    if measured is None:
        return f"registered as models:/{name}/{version}"
    client.set_model_version_tag(name, version, measured.metric, f"{measured.value:.9g}")
    client.set_model_version_tag(name, version, f"{DATA_TAG}.{measured.metric}", measured.data)
    outcome = _promote(client, config, version, measured)
    return f"registered as models:/{name}/{version}; {outcome}"


def _promote(client: MlflowClient, config: Registration, version: str, measured: Measurement) -> str:
    """Move the alias to a version if it is better by its metric than the version with the alias."""
    name, alias, metric, value = config.name, config.alias, measured.metric, measured.value
    try:
        champion = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        champion = None
    if champion is not None and str(champion.version) == version:
        return f"it is {alias} ({metric} {value:.4g})"
    before = ""
    if champion is not None and metric in champion.tags:
        best = float(champion.tags[metric])
        other = f"version {champion.version} ({metric} {best:.4g})"
        if champion.tags.get(f"{DATA_TAG}.{metric}", champion.tags.get(DATA_TAG)) != measured.data:
            return f"{alias} stays {other}: it was measured on other data or with other settings of infer"
        if not (value < best if lower_is_better(metric) else value > best):
            return f"{alias} stays {other}, this one has {value:.4g}"
        if config.promote == "interval" and measured.images is not None:
            apart = _difference(client, champion, measured)
            if apart is None:
                return f"{alias} stays {other}, this one has {value:.4g}: {UNCERTAIN}"
            amount = f"{apart.mean:.2g} ({apart.low:.2g} to {apart.high:.2g})"
            if not (apart.high < 0 if lower_is_better(metric) else apart.low > 0):
                return f"{alias} stays {other}, this one has {value:.4g}: not clearly better, {amount}"
            other += f", difference {amount}"
        before = f", before: {other}"
    client.set_registered_model_alias(name, alias, version)
    return f"now {alias} ({metric} {value:.4g}{before})"


def _difference(client: MlflowClient, champion: ModelVersion, measured: Measurement) -> Interval | None:
    """What was measured minus the same of the champion, by image; None if its run has no such scores."""
    path = f"{SCORES}/{measured.file}"
    if path not in {file.path for file in client.list_artifacts(champion.run_id, SCORES)}:
        return None
    with tempfile.TemporaryDirectory(prefix="pixloom-scores-") as temp:
        other = pq.read_table(client.download_artifacts(champion.run_id, path, temp))
    return difference(measured.images, other, measured.metric)


# -- logging ------------------------------------------------------------------


def _log(client: MlflowClient, folder: str, run_id: str, example: Mapping[str, bytes]) -> str:
    """Log the files of a model folder to its LoggedModel and link a run; returns MLflow's id of the model."""
    code = Path(served.__file__).resolve()
    # opened here, since `Model.log` would take the experiment that is active in this process
    model_id = str(open_model(client, client.get_run(run_id), NAME, folder).model_id)
    with tempfile.TemporaryDirectory(prefix="pixloom-served-") as temp:
        local, needed = local_model(folder, Path(temp) / "all"), Path(temp) / "model"
        unused = {DISCRIMINATOR} | ({WEIGHTS} if EMA in read_manifest(local).files else set())
        shutil.copytree(local, needed, ignore=lambda *_: unused)  # which is half of the bytes
        Model.log(
            artifact_path=None,
            name=NAME,
            model_id=model_id,
            flavor=mlflow.pyfunc,
            run_id=run_id,
            python_model=str(code),
            artifacts={"model": str(needed)},
            code_paths=[str(code.parents[1])],
            signature=signature(local),
            input_example=pd.DataFrame({name: [data] for name, data in example.items()}),
            pip_requirements=REQUIREMENTS,
        )
    return model_id


def signature(folder: Path) -> ModelSignature:
    """The columns and parameters that the model of a folder takes and returns."""
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


def _version(client: MlflowClient, name: str, model_id: str, identity: str) -> str:
    """The version of a logged model under a registered name, registered if it has none."""
    source = f"models:/{model_id}"  # a database leaves out a version's model_id
    for version in client.search_model_versions(f"name = '{name}'", max_results=1000):
        if version.source == source:
            return str(version.version)
    tags = {MODEL_TAG: identity}
    with redirect_stderr(io.StringIO()):  # it prints what our own line says
        return str(mlflow.register_model(source, name, await_registration_for=0, tags=tags).version)
