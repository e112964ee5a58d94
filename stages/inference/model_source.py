"""Models by where they are: a folder anywhere, a phase's folder, or one that MLflow keeps.

    local_model("s3://bucket/model", temp)           a folder as `stages.models.files.saved` writes it
    local_model("workspace/train-joint-...", temp)   its `model/` is meant
    local_model("models:/street@champion", temp)     a registered model; also `runs:/<id>`, `models:/m-...`

Only what inference reads is copied: a discriminator is larger than some generators.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from stages import storage
from stages.errors import UserError
from stages.models.files.saved import DISCRIMINATOR, EMA, MANIFEST, WEIGHTS

_SERVER = threading.RLock()

MLFLOW_SCHEMES = ("models", "runs", "mlflow-artifacts")


def is_mlflow(uri: str) -> bool:
    """Whether MLflow has to be asked where the model is."""
    return urlsplit(uri).scheme in MLFLOW_SCHEMES


def model_folder(uri: str) -> str:
    """The folder URI that holds `model.json`: the one given or its `model/`. UserError if neither does."""
    uri = storage.absolute(uri)
    for folder in (uri, storage.join(uri, "model")):
        if storage.exists(storage.join(folder, MANIFEST)):
            return folder
    raise UserError(f"infer.model: {uri}: there is no {MANIFEST}, so this is no model folder")


def description(uri: str, tracking_uri: str | None = None) -> dict[str, Any]:
    """The `model.json` of a model, as it is; its checksums tell one model from another. Raises UserError."""
    if is_mlflow(uri):
        folder = mlflow_model(uri, tracking_uri)
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    else:
        text = storage.read_bytes(storage.join(model_folder(uri), MANIFEST)).decode(errors="replace")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"infer.model: {uri}: {MANIFEST} is damaged")
    return value


def fingerprint(told: Mapping[str, Any]) -> str:
    """Sixteen hex digits of a model's `model.json`: they differ whenever its weights or settings do."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def local_model(
    uri: str, temp: Path, *, weights: Literal["ema", "raw"] = "ema", tracking_uri: str | None = None
) -> Path:
    """A folder on this machine with the model: the model's own if it is here, else a copy in `temp`."""
    if is_mlflow(uri):
        return mlflow_model(uri, tracking_uri)
    folder = model_folder(uri)
    fs, path = storage.filesystem(folder)
    if storage.is_local(folder):
        return Path(path)
    temp.mkdir(parents=True, exist_ok=True)
    files = description(folder).get("files", {})
    unused = {DISCRIMINATOR} | ({WEIGHTS} if weights == "ema" and EMA in files else {EMA})
    for name in [MANIFEST, *files]:
        if name in unused or "/" in name:
            continue
        with fs.open(f"{path}/{name}", "rb") as there, (temp / name).open("wb") as here:
            shutil.copyfileobj(there, here, 1 << 22)
    return temp


def mlflow_model(uri: str, tracking_uri: str | None = None) -> Path:
    """Have MLflow bring a model here; returns the folder in it that holds `model.json`. Raises UserError."""
    # imported here: it takes 2-3 s, which a model in a folder need not pay
    import mlflow.artifacts  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    database = Path((tracking_uri or "").removeprefix("sqlite:///"))
    if tracking_uri and tracking_uri.startswith("sqlite:///") and not database.exists():
        raise UserError(f"infer.model: {uri}: there is no MLflow database {database}; set tracking.uri")
    if uri.startswith("runs:/") and uri.count("/") == 1:
        uri += "/model"
    try:
        # The argument `tracking_uri` of MLflow's reaches the run store, but not the model registry.
        with tracking_server(tracking_uri), _fewer_retries():
            local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        raise UserError(f"infer.model: {uri}: {str(error).splitlines()[0][:300]}") from error
    found = sorted(local.rglob(MANIFEST), key=lambda path: len(path.parts))
    if not found:
        raise UserError(f"infer.model: {uri}: what MLflow keeps there holds no {MANIFEST}")
    return found[0].parent


@contextmanager
def _fewer_retries() -> Iterator[None]:
    """MLflow gives up on a server that is away after half a minute; by itself it tries for four."""
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if name in os.environ:
        yield
        return
    os.environ[name] = "4"
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def tracking_server(uri: str | None) -> Iterator[None]:
    """MLflow's module functions talk to `uri` (None: as the environment says), one thread at a time.

    What this process had set before is set again.
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
