"""MLflow runs as a view of the workspace: they never hold up the work they show, and end up complete.

    parent run (one per pipeline run)
    ├── child (one per stage)
    └── child (one per training phase)

A `Run` is a handle whose methods return at once; a thread sends what they record (`stages.tracking.sender`).
Even creating a run does not wait for the server: runs are looked up by a key of ours, in a tag.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from stages import storage
from stages.base import Point
from stages.config.tracking import ARTIFACTS, TrackingConfig, sqlite_file, sqlite_uri
from stages.errors import UserError, one_line, without_password
from stages.images import encode
from stages.storage.local import alone
from stages.tracking import sender
from stages.tracking.sender import Fact, Sender, now_ms, shown

LONGEST_VALUE = 6000  # characters; MLflow refuses longer parameter values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as MLflow parameters: dotted names (sections in lists by number), text that MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value)}  # noqa: PLW2901
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[allowed_name(f"{prefix}{name}")] = without_password(text)[:LONGEST_VALUE]
    return flat


def allowed_name(text: str) -> str:
    """The text as a name of a metric, parameter or picture: other characters than MLflow takes become "_"."""
    return re.sub(r"[^a-zA-Z0-9_\-. /]", "_", text)[:250]


@dataclass
class Run:
    """A run to write to, from any process; leaving its context ends it (FINISHED, FAILED or KILLED).

    `key` is our name of the run, in its tag `pixloom.key`. Without a sender it is not recorded: tracking is
    off, or this is a test.
    """

    sender: Sender | None = None
    key: str = ""

    @property
    def uri(self) -> str:
        """The tracking server or database; "" if the run is not recorded."""
        return self.sender.uri if self.sender else ""

    def _put(self, facts: Mapping[Fact, Any], rows: Iterable[Point] = (), curves: str = "") -> None:
        if self.sender:
            self.sender.put(self.key, facts, rows, curves)

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings; nested ones get dotted names. MLflow keeps the first value of each."""
        self._put({("param", name): value for name, value in flatten(values).items()})

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Record values at one step."""
        now = now_ms()
        self._put({("metric", allowed_name(n), step): (float(value), now) for n, value in values.items()})

    def points(self, points: Sequence[Point]) -> None:
        """Record points of curves. One at or before a step that MLflow already holds is left out."""
        self._put({}, [point._replace(name=allowed_name(point.name)) for point in shown(points)])

    def curves(self, folder: str) -> None:
        """Name the folder of the phase whose curves MLflow is to hold: those of now, at the end all."""
        folder = storage.absolute(folder)
        self._put({("tag", sender.CURVES_TAG): folder}, curves=folder)

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags; a later value replaces an earlier one."""
        self._put({("tag", allowed_name(name)): str(value) for name, value in values.items()})

    def image(self, array: np.ndarray, key: str, step: int) -> None:
        """Record a picture, (H, W, 1 or 3) uint8, of a series that MLflow's page shows by step.

        As MLflow's `log_image`, but under names that are chosen once: sent twice, it is one picture.
        """
        series, png, preview = allowed_name(key).replace("/", "~"), encode.encode_png(array), io.BytesIO()
        name = f"images/{series}+step+{step}+timestamp+{now_ms()}+{uuid.uuid4()}"
        small = Image.open(io.BytesIO(png))
        small.thumbnail((256, 256))
        small.save(preview, "webp")
        self.artifact(f"{name}.png", png)
        self.artifact(f"{name}+compressed.webp", preview.getvalue())
        self.tags({"mlflow.loggedImages": "True"})

    def artifact(self, name: str, data: bytes) -> None:
        """Record a file under `name` ("folder/file.json")."""
        self._put({("artifact", name): bytes(data)})

    def dataset(self, name: str, *, uri: str, digest: str, context: str, counts: Mapping[str, int]) -> None:
        """Record a data set that was read, for `context` "training", "validation", "inference" ..."""
        uri = without_password(uri)
        data = {"name": name, "digest": digest[:36], "source_type": "uri", "source": json.dumps({"uri": uri})}
        self._put({("dataset", f"{name} {uri}", context): data | {"profile": json.dumps(dict(counts))}})

    def model(self, name: str, *, folder: str, step: int) -> None:
        """Record a phase's model as a LoggedModel, with the values of its curves at a step."""
        self._put({("model", name): {"folder": storage.absolute(folder), "step": step}})

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> Run:
        """A new run below this one."""
        return _create(self.sender, name, tags or {}, parent=self.key) if self.sender else self

    def run_id(self, wait: float = 20.0) -> str:
        """MLflow's id of this run; "" if the server did not answer within `wait` seconds."""
        return self.sender.run_id(self.key, wait) if self.sender else ""

    def page(self) -> str:
        """The address of this run on its server; "" if it is in a database, or the server is away."""
        if self.sender is None or not self.uri.startswith("http") or not (run_id := self.run_id(0.0)):
            return ""
        return f"{without_password(self.uri)}/#/experiments/{self.sender.experiment}/runs/{run_id}"

    def flush(self, wait: float | None = None) -> bool:
        """Wait until MLflow holds everything; False if it does not after `wait` seconds."""
        return self.sender.flush(wait) if self.sender else True

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the run."""
        self._put(sender.ended(status))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.end()
        else:
            self.end("FAILED" if issubclass(kind, Exception) else "KILLED")
        self.flush()


def open_parent(config: TrackingConfig, run_name: str, tags: Mapping[str, str] | None, workspace: str) -> Run:
    """The run of one pipeline run. Creates database and experiment, completes the runs of ended processes.

    Raises UserError if the server cannot be used: at this point nothing is lost by stopping; later on,
    training goes on without it.
    """
    return _create(_sender(config, workspace), run_name, tags or {}) if config.enabled else Run()


def catch_up(config: TrackingConfig, workspace: str) -> bool:
    """Send what earlier processes could not, if there is any; False if MLflow still misses some of it."""
    return not (config.enabled and sender.documents(workspace)) or _sender(config, workspace).flush()


def _create(to: Sender, name: str, tags: Mapping[str, str], *, parent: str = "") -> Run:
    run = Run(to, uuid.uuid4().hex)
    to.open[run.key] = None
    tags = {**tags, sender.PROCESS_TAG: sender.process_name(), sender.ALIVE_TAG: str(now_ms())}
    run._put({("create",): {"name": name, "tags": tags, "parent": parent, "start_time": now_ms()}})
    return run


def _sender(config: TrackingConfig, workspace: str) -> Sender:
    with _opened(config, workspace) as (uri, experiment):
        new = Sender(uri, experiment, workspace)
        new.take_over()
    return new


def probe(config: TrackingConfig, workspace: str) -> str:
    """Create a run in the experiment and delete it; returns the server. Raises UserError as `open_parent`."""
    with _opened(config, workspace) as (uri, experiment):
        client = sender.connect(uri)
        client.delete_run(client.create_run(experiment, run_name="probe").info.run_id)
    return without_password(uri)


@contextmanager
def _opened(config: TrackingConfig, workspace: str) -> Iterator[tuple[str, str]]:
    """The server's URI and the experiment's id. Raises UserError for what fails in the block."""
    uri = config.place(workspace)
    try:
        if (file := sqlite_file(uri)) is not None:  # the same one from every working directory
            file = file.absolute()
            file.parent.mkdir(parents=True, exist_ok=True)
            uri = sqlite_uri(file)
        # one process at a time: MLflow's migrations of a new SQLite file fail beside each other
        with alone(str(file.parent), shared=True) if file else nullcontext():
            experiment = _open_experiment(uri, file, config.experiment)
        yield uri, experiment
    except UserError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and requests each have their own
        raise UserError(f"tracking.uri: cannot use {without_password(uri)}: {one_line(error)}") from error


def _open_experiment(uri: str, file: Path | None, name: str) -> str:
    client = sender.connect(uri)
    # where artifacts go, whatever the name is; a server decides that itself
    folder = file and file.parent / ARTIFACTS / name.replace("/", "~").lstrip(".")
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=folder and folder.as_uri()))
    if experiment.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name} was deleted in MLflow; restore it or take another name")
    old = Path(unquote(urlsplit(experiment.artifact_location).path))
    if folder and folder.is_dir() and old.resolve() != folder.resolve():
        sender.logger.warning("%s was moved, files still go to %s: name a new tracking.experiment", file, old)
    return str(experiment.experiment_id)
