"""Models by their location: a folder anywhere, a training step's folder, or a model that MLflow stores.

    local_model("s3://bucket/model", temp)           a folder as `stages.models.files.saved` writes it
    local_model("workspace/train-joint-...", temp)   its folder `model/`
    local_model("models:/street@champion", temp)     a registered model; also `runs:/<id>`, `models:/m-...`

Only the files that inference reads are copied: a discriminator is larger than some generators. Messages begin
with the location; the caller puts its config key or option before it.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from stages import storage
from stages.config.tracking import sqlite_file
from stages.errors import UserError, one_line
from stages.inference.model_folder import folder_description, model_folder, parsed
from stages.models.files.saved import DISCRIMINATOR, EMA, MANIFEST, WEIGHTS
from stages.storage.local import download

_SERVER = threading.RLock()


def is_mlflow(uri: str) -> bool:
    """Whether a location is one that MLflow resolves."""
    return urlsplit(uri).scheme in ("models", "runs", "mlflow-artifacts")


def description(uri: str, tracking_uri: str | None = None) -> dict[str, Any]:
    """The content of a model's `model.json`. Raises UserError if there is no model or the file is damaged."""
    if is_mlflow(uri):
        with tempfile.TemporaryDirectory(prefix="pixloom-model-") as temp:
            return parsed((mlflow_model(uri, Path(temp), tracking_uri) / MANIFEST).read_bytes(), uri)
    return folder_description(uri)


def local_model(
    uri: str, temp: Path, *, weights: Literal["ema", "raw"] = "ema", tracking_uri: str | None = None
) -> Path:
    """A folder on this machine with the model: its own folder if it is local, else a copy in `temp`."""
    if is_mlflow(uri):
        return mlflow_model(uri, temp, tracking_uri)
    folder = model_folder(uri)
    if storage.is_local(folder):
        return Path(storage.filesystem(folder)[1])
    files = folder_description(folder)["files"]
    unused = {DISCRIMINATOR} | ({WEIGHTS} if weights == "ema" and EMA in files else {EMA})
    temp.mkdir(parents=True, exist_ok=True)
    for name in [MANIFEST, *files]:
        if name not in unused:
            download(storage.join(folder, name), temp / name)
    return temp


def mlflow_model(uri: str, temp: Path, tracking_uri: str | None = None) -> Path:
    """Let MLflow download a model to `temp`; returns the folder that holds `model.json`. Raises UserError."""
    # Imported here: it takes 2-3 s, which a model in a folder need not pay.
    import mlflow.artifacts  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    temp.mkdir(parents=True, exist_ok=True)  # MLflow would make one that nobody removes
    if (database := sqlite_file(tracking_uri or "")) is not None and not database.exists():
        raise UserError(f"{uri}: there is no MLflow database {database}; set tracking.uri")
    try:
        # MLflow's argument `tracking_uri` reaches the run store, but not the model registry.
        with tracking_server(tracking_uri), _fewer_retries():
            if uri.startswith("runs:/") and uri.count("/") == 1:
                outputs = MlflowClient().get_run(uri.removeprefix("runs:/")).outputs.model_outputs
                if not outputs:
                    raise UserError(f"{uri}: this run has logged no model")
                uri = f"models:/{outputs[-1].model_id}"
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(temp)))
    except (MlflowException, OSError) as error:
        raise UserError(f"{uri}: {one_line(error)}") from error
    manifests = sorted(local.rglob(MANIFEST), key=lambda path: len(path.parts))
    if not manifests:
        raise UserError(f"{uri}: MLflow holds no {MANIFEST} there, so this is no model of Pixloom")
    return manifests[0].parent


@contextmanager
def _fewer_retries() -> Iterator[None]:
    """Let MLflow retry a server that does not answer for half a minute; its default is four minutes."""
    name, before = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", set(os.environ)
    os.environ.setdefault(name, "4")
    try:
        yield
    finally:
        if name not in before:
            del os.environ[name]


@contextmanager
def tracking_server(uri: str | None) -> Iterator[None]:
    """Let MLflow's module functions use the server `uri` (None: the environment's), one thread at a time.

    Afterwards they use the process's former server again.
    """
    import mlflow  # noqa: PLC0415 - see above

    if uri is None:
        yield
        return
    with _SERVER:
        before = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)
