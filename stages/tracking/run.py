"""MLflow runs that never hold up, and never lose, the work they describe.

    parent run (one per pipeline run)
    ├── child (one per stage)
    └── child (one per training phase)

A `Run` is a handle: every method only queues what to write and returns at once; one thread per process and
tracking server sends it, metrics in batches. When the server does not answer, the log says so once, what
is queued is also kept in files of the spool folder, and it is sent when the server is back, by this
process or by the next `open_parent`. Even a run's creation is queued: runs are found by a key of ours
(tag `pixloom.key`), not by the id that MLflow gives them, so that nothing waits for the server.
"""

from __future__ import annotations

import atexit
import base64
import io
import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import psutil
from PIL import Image

from stages import storage
from stages.config.tracking import TrackingConfig
from stages.errors import PixloomError, UserError
from stages.images import encode

logger = logging.getLogger(__name__)

KEY_TAG = "pixloom.key"
PROCESS_TAG = "pixloom.process"
WORKSPACE_TAG = "pixloom.workspace"

Status = Literal["FINISHED", "FAILED", "KILLED"]
Action = Literal["create", "params", "metrics", "tags", "image", "artifact", "dataset", "model", "end"]

LONGEST_VALUE = 6000  # characters; MLflow refuses longer parameter values
LINGER_S = 0.3  # how long the sender collects before it sends: one request instead of many
GIVE_UP_S = 120.0  # what fails so long while the server answers is dropped
RETRY_S = (1.0, 2.0, 5.0, 10.0, 15.0)


class MetricRow(NamedTuple):
    """One value of one metric. `time_ms` is when it was measured, in milliseconds since 1970."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to write about the run with this key."""

    action: Action
    key: str
    values: Mapping[str, Any]

    def to_json(self) -> str:
        """One line; bytes become base64."""
        values = {
            name: {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
            for name, value in self.values.items()
        }
        return json.dumps({"action": self.action, "key": self.key, "values": values})

    @classmethod
    def from_json(cls, line: str) -> Operation:
        """The inverse of `to_json`."""
        raw = json.loads(line)
        values = {
            name: base64.b64decode(value["base64"])
            if isinstance(value, dict) and set(value) == {"base64"}
            else value
            for name, value in raw["values"].items()
        }
        return cls(raw["action"], raw["key"], values)


# -- rules --------------------------------------------------------------------


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, text values no longer than MLflow takes."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[allowed_name(f"{prefix}{name}")] = text[:LONGEST_VALUE]
    return flat


def allowed_name(text: str) -> str:
    """A name MLflow takes for metrics, parameters and pictures: anything else in it becomes "_"."""
    return re.sub(r"[^a-zA-Z0-9_\-. /]", "_", text)[:250]


def merge(operations: Sequence[Operation], limit: int = 1000) -> list[tuple[Operation, int]]:
    """Neighbouring metrics of one run as one operation of about `limit` rows, each with how many it is."""
    merged: list[tuple[Operation, int]] = []
    for operation in operations:
        if merged and operation.action == "metrics":
            last, count = merged[-1]
            alike = (last.action, last.key, last.values.get("once")) == (
                "metrics",
                operation.key,
                operation.values["once"],
            )
            if alike and len(last.values["rows"]) + len(operation.values["rows"]) <= limit:
                rows = [*last.values["rows"], *operation.values["rows"]]
                merged[-1] = (Operation("metrics", last.key, {**last.values, "rows": rows}), count + 1)
                continue
        merged.append((operation, 1))
    return merged


def not_yet_there(rows: Iterable[Sequence[Any]], last_steps: Mapping[str, int]) -> list[Sequence[Any]]:
    """The rows whose metric has no value yet at that step or a later one: a restart repeats steps."""
    return [row for row in rows if row[2] > last_steps.get(row[0], -1)]


# -- handles ------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run to write to, from any process; leaving its context ends it (FINISHED, FAILED or KILLED).

    uri         the tracking server or database
    experiment  MLflow's id of the experiment
    key         our name of the run, in its tag `pixloom.key`
    spool       folder URI for what the server could not take
    inherited   tags every child gets too
    """

    uri: str
    experiment: str
    key: str
    spool: str
    inherited: Mapping[str, str] = field(default_factory=dict)

    def _queue(self, action: Action, **values: Any) -> None:
        _sender(self.uri, self.experiment, self.spool).put(Operation(action, self.key, values))

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of this run; nested ones get dotted names. MLflow keeps the first value of each."""
        self._queue("params", params=flatten(values))

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Values at one step."""
        now = int(time.time() * 1000)
        rows = [[allowed_name(name), float(value), step, now] for name, value in values.items()]
        self._queue("metrics", rows=rows, once=False)

    def metrics_batch(self, rows: Iterable[MetricRow]) -> None:
        """Curves. A row at or before a step that an earlier process already recorded is left out."""
        listed = [[allowed_name(row.name), float(row.value), int(row.step), int(row.time_ms)] for row in rows]
        for start in range(0, len(listed), 1000):
            self._queue("metrics", rows=listed[start : start + 1000], once=True)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags; a later value replaces an earlier one."""
        self._queue("tags", tags={allowed_name(name): str(value) for name, value in values.items()})

    def image(self, array: np.ndarray, key: str, step: int) -> None:
        """A picture, (H, W, 1 or 3) uint8, of a series that MLflow's page shows by step."""
        self._queue("image", png=encode.encode_png(array), name=allowed_name(key), step=step)

    def artifact(self, name: str, data: bytes | Path) -> None:
        """A file, under `name` ("folder/file.json"), from memory or from a local path."""
        content = data.read_bytes() if isinstance(data, Path) else bytes(data)
        self._queue("artifact", name=name, data=content)

    def dataset(self, name: str, *, uri: str, digest: str, context: str, counts: Mapping[str, int]) -> None:
        """A data set this run read, for `context` "training", "validation", "inference" ..."""
        self._queue("dataset", name=name, uri=uri, digest=digest[:36], context=context, counts=dict(counts))

    def model(self, folder: str, example: Mapping[str, bytes], **registration: Any) -> None:
        """The model of this run, as `stages.registry.publish` takes it; only its location is queued."""
        values = {"folder": folder, "registration": registration}
        self._queue("model", **values, **{f"example_{name}": data for name, data in example.items()})

    def child(self, name: str, tags: Mapping[str, str] | None = None, *, key: str | None = None) -> Run:
        """A new run below this one. With a `key`, a run that has it already is taken up again."""
        child = Run(self.uri, self.experiment, key or uuid.uuid4().hex, self.spool, self.inherited)
        child._queue(
            "create",
            name=name,
            tags={**self.inherited, PROCESS_TAG: _this_process(), **(tags or {})},
            parent=self.key,
            time_ms=int(time.time() * 1000),
        )
        return child

    def run_id(self, wait: float = 20.0) -> str:
        """MLflow's id of this run; "" if the server did not answer within `wait` seconds."""
        return _sender(self.uri, self.experiment, self.spool).run_id(self.key, wait)

    def url(self) -> str:
        """The address of this run's page on a tracking server; "" if it is a database."""
        if not self.uri.startswith(("http://", "https://")):
            return ""
        return f"{self.uri.rstrip('/')}/#/experiments/{self.experiment}/runs/{self.run_id()}"

    def flush(self, wait: float = 20.0) -> bool:
        """Wait until all is sent; False if it is not after `wait` seconds (then it is in the spool)."""
        return _sender(self.uri, self.experiment, self.spool).flush(wait)

    def end(self, status: Status = "FINISHED") -> None:
        """Close the run."""
        self._queue("end", status=status, time_ms=int(time.time() * 1000))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end("FINISHED")
        else:
            self.end("FAILED" if issubclass(kind, Exception) else "KILLED")
        self.flush()


class NullRun(Run):
    """Records nothing: tracking is off, or this is a test."""

    def __init__(self) -> None:
        super().__init__(uri="", experiment="", key="", spool="")

    def _queue(self, action: Action, **values: Any) -> None:
        pass

    def child(self, name: str, tags: Mapping[str, str] | None = None, *, key: str | None = None) -> Run:  # noqa: ARG002
        """Itself."""
        return self

    def run_id(self, wait: float = 0.0) -> str:  # noqa: ARG002
        """No id."""
        return ""

    def url(self) -> str:
        """Nothing to show."""
        return ""

    def flush(self, wait: float = 0.0) -> bool:  # noqa: ARG002
        """Nothing to send."""
        return True


def open_parent(
    config: TrackingConfig,
    run_name: str,
    tags: Mapping[str, str] | None,
    workspace: str,
    *,
    key: str | None = None,
) -> Run:
    """The run of one pipeline run. Creates database and experiment, sends what an earlier run left unsent.

    With a `key`, a run that has it already is taken up again. Raises UserError if the server cannot be
    used: at this point nothing is lost by stopping; later on, training goes on without it.
    """
    if not config.enabled:
        return NullRun()
    uri = _absolute_sqlite(config.place(workspace))
    try:
        experiment = _open_experiment(uri, config.experiment)
    except UserError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy and requests each have their own
        reason = str(error).splitlines()[0][:300]
        raise UserError(f"tracking.uri: cannot use {_without_password(uri)}: {reason}") from error
    spool = storage.join(storage.absolute(workspace), "mlflow-spool")
    inherited = {WORKSPACE_TAG: workspace}
    _close_abandoned(uri, experiment, workspace)
    _sender(uri, experiment, spool).put_all(_take_spool(spool))
    parent = Run(uri, experiment, key or uuid.uuid4().hex, spool, inherited)
    parent._queue(
        "create",
        name=run_name,
        tags={**inherited, PROCESS_TAG: _this_process(), **(tags or {})},
        parent="",
        time_ms=int(time.time() * 1000),
    )
    return parent


def _absolute_sqlite(uri: str) -> str:
    """A SQLite URI that means the same file from every working directory; its folder is made."""
    if not uri.startswith("sqlite:///") or uri == "sqlite:///:memory:":
        return uri
    path = Path(uri.removeprefix("sqlite:///")).expanduser().absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def _without_password(uri: str) -> str:
    head, _, tail = uri.partition("://")
    return f"{head}://{tail.rsplit('@', 1)[-1]}" if tail else uri


def _open_experiment(uri: str, name: str) -> str:
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise UserError(f"the experiment {name} was deleted in MLflow; restore it or take another name")
        return str(found.experiment_id)
    location = None  # a server decides where artifacts go
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / name).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _client(uri: str) -> Any:
    """An MLflow client that gives up soon: the sender retries by itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    # imported here: it takes 2-3 s, which workers, --help and a run with nothing to do need not pay
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _this_process() -> str:
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _is_gone(process: str) -> bool:
    """Whether a process named by `_this_process` has ended; False of another machine's: nobody knows."""
    host, pid, started = process.split() if process.count(" ") == 2 else ("", "0", "")
    if host != socket.gethostname():
        return False
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" != started
    except psutil.NoSuchProcess:
        return True


def _close_abandoned(uri: str, experiment: str, workspace: str) -> None:
    """End, as KILLED, this workspace's runs whose process was killed before it could do so."""
    client = _client(uri)
    where = f"attributes.status = 'RUNNING' and tags.`{WORKSPACE_TAG}` = '{workspace.replace(chr(39), '')}'"
    for run in client.search_runs([experiment], filter_string=where, max_results=1000):
        if _is_gone(run.data.tags.get(PROCESS_TAG, "")):
            client.set_terminated(run.info.run_id, status="KILLED")


def _take_spool(spool: str) -> list[Operation]:
    """What earlier processes left unsent; the files are removed: from here on the sender has it."""
    operations: list[Operation] = []
    for name in storage.list_names(spool):
        if name.endswith(".jsonl"):
            lines = storage.read_bytes(storage.join(spool, name)).decode().splitlines()
            operations += [Operation.from_json(line) for line in lines]
            _remove(storage.join(spool, name))
    return sorted(operations, key=lambda operation: operation.action != "create")  # runs before their values


def system_metrics() -> dict[str, float]:
    """This machine's load, under the names MLflow's page shows as system metrics."""
    memory = psutil.virtual_memory()
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }


def _remove(uri: str) -> None:
    fs, path = storage.filesystem(uri)
    if fs.exists(path):
        fs.rm_file(path)


# -- the sender ---------------------------------------------------------------

_senders: dict[str, Sender] = {}
_senders_lock = threading.Lock()


def _sender(uri: str, experiment: str, spool: str) -> Sender:
    """This process's sender to a server."""
    with _senders_lock:
        if uri not in _senders:
            _senders[uri] = Sender(uri, experiment, spool)
        return _senders[uri]


class Sender:
    """Sends operations in order from a thread of its own; keeps and retries what the server does not take."""

    def __init__(self, uri: str, experiment: str, spool: str) -> None:
        self.uri, self.experiment, self.spool = uri, experiment, spool
        self._pending: deque[Operation] = deque()
        self._changed = threading.Condition()
        self._hurry = False
        self._ids: dict[str, str] = {}
        self._last_steps: dict[str, dict[str, int]] = {}  # run id -> metric -> step recorded before us
        self._lost_since: float | None = None
        self._spooled: list[str] = []  # files that hold the first `_spooled_count` pending operations
        self._spooled_count = 0
        self._refused_since: float | None = None  # since when the oldest pending operation fails
        self._mlflow: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, operation: Operation) -> None:
        """Queue one operation."""
        self.put_all([operation])

    def put_all(self, operations: Sequence[Operation]) -> None:
        """Queue operations."""
        with self._changed:
            self._pending.extend(operations)
            self._changed.notify_all()

    def run_id(self, key: str, wait: float) -> str:
        """MLflow's id of the run with this key, once known."""
        self._wait(lambda: key in self._ids, wait)
        return self._ids.get(key, "")

    def flush(self, wait: float) -> bool:
        """Wait until nothing is pending; what still is after `wait` seconds goes to the spool.

        A model, which may be gigabytes, is waited for as long as the server takes it.
        """
        done = self._wait(self._is_settled, wait)
        while not done and self._sends_model():
            done = self._wait(self._is_settled, wait)
        if not done:
            self._spool_pending()
        return done

    def _is_settled(self) -> bool:
        """Whether the server has everything, and the spool nothing that would be sent again."""
        return not self._pending and not self._spooled

    def _sends_model(self) -> bool:
        with self._changed:
            return bool(self._pending) and self._pending[0].action == "model" and self._lost_since is None

    def close(self) -> None:
        """At the end of the process: a last attempt, then the spool."""
        if not self.flush(2.0 if self._lost_since else 20.0):
            logger.warning(
                "MLflow did not take %d records; they are kept in %s for the next run",
                len(self._pending), self.spool,
            )  # fmt: skip

    def _wait(self, condition: Any, wait: float) -> bool:
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            try:
                return bool(self._changed.wait_for(condition, timeout=wait))
            finally:
                self._hurry = False

    def _work(self) -> None:
        attempt = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._pending))
                if not self._hurry:
                    self._changed.wait_for(lambda: self._hurry, timeout=LINGER_S)
                batch = list(self._pending)
            try:
                self._send(batch)
                attempt = 0
            except Exception as error:  # every client library has its own; none may end training
                self._lost(error)
                with self._changed:
                    self._changed.wait(timeout=RETRY_S[min(attempt, len(RETRY_S) - 1)])
                attempt += 1

    def _send(self, batch: Sequence[Operation]) -> None:
        """Send as much as the server takes; whatever it took is no longer pending."""
        if self._mlflow is None:
            self._mlflow = _client(self.uri)
        for operation, count in merge(batch):
            try:
                self._perform(operation)
            except Exception as error:
                if not (_is_refusal(error) or self._is_hopeless()):
                    raise
                logger.warning("MLflow refused %s: %s", operation.action, str(error).splitlines()[0][:300])
            self._refused_since = None
            with self._changed:
                for _ in range(count):
                    self._pending.popleft()
                self._spooled_count = max(0, self._spooled_count - count)
                self._changed.notify_all()
        self._back()

    def _is_hopeless(self) -> bool:
        """Whether the operation in hand has failed for long though the server answers everything else."""
        now = time.monotonic()
        if self._refused_since is None:
            self._refused_since = now
        if now - self._refused_since < GIVE_UP_S:
            return False
        try:
            self._mlflow.get_experiment(self.experiment)
        except Exception:  # the server is away: the operation is not to blame
            self._refused_since = now
            return False
        return True

    def _perform(self, operation: Operation) -> None:
        from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415 - see _client

        client, values = self._mlflow, operation.values
        if operation.action == "create":
            self._create(operation)
            return
        run_id = self._resolve(operation.key)
        match operation.action:
            case "metrics":
                rows = values["rows"]
                if values["once"]:
                    rows = not_yet_there(rows, self._last_steps.get(run_id, {}))
                if rows:
                    client.log_batch(run_id, metrics=[Metric(r[0], r[1], r[3], r[2]) for r in rows])
            case "params":
                known = client.get_run(run_id).data.params
                fresh = [Param(n, v) for n, v in values["params"].items() if n not in known]
                for start in range(0, len(fresh), 100):
                    client.log_batch(run_id, params=fresh[start : start + 100])
            case "tags":
                client.log_batch(run_id, tags=[RunTag(n, v) for n, v in values["tags"].items()])
            case "image":
                with Image.open(io.BytesIO(values["png"])) as picture:
                    client.log_image(
                        run_id, picture, key=values["name"], step=values["step"], synchronous=True
                    )
            case "artifact":
                self._artifact(run_id, values["name"], values["data"])
            case "dataset":
                self._dataset(run_id, values)
            case "model":
                self._model(run_id, values)
            case "end":
                client.set_terminated(run_id, status=values["status"], end_time=values["time_ms"])

    def _find(self, key: str) -> str:
        found = self._mlflow.search_runs(
            [self.experiment], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        if not found:
            return ""
        self._last_steps[found[0].info.run_id] = {m.key: m.step for m in found[0].data._metric_objs}
        return str(found[0].info.run_id)

    def _resolve(self, key: str) -> str:
        if key not in self._ids:
            found = self._find(key)
            if not found:
                raise ConnectionError("the run is not there yet")  # its creator's sender is still at it
            self._ids[key] = found
        return self._ids[key]

    def _create(self, operation: Operation) -> None:
        """Create the run, or take it up again if it is there: sent twice, it is still one run."""
        values, key = operation.values, operation.key
        found = self._find(key)
        if found:
            self._mlflow.update_run(found, status="RUNNING")
            self._mlflow.set_tag(found, PROCESS_TAG, values["tags"].get(PROCESS_TAG, ""))
        else:
            tags = {**values["tags"], KEY_TAG: key}
            if values["parent"]:
                tags["mlflow.parentRunId"] = self._resolve(values["parent"])
            run = self._mlflow.create_run(
                self.experiment, start_time=values["time_ms"], tags=tags, run_name=values["name"]
            )
            found = str(run.info.run_id)
        self._ids[key] = found

    def _artifact(self, run_id: str, name: str, data: bytes) -> None:
        where = PurePosixPath(name)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / where.name
            path.write_bytes(data)
            parent = str(where.parent)
            self._mlflow.log_artifact(run_id, str(path), artifact_path=None if parent == "." else parent)

    def _dataset(self, run_id: str, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415 - see _client

        data = Dataset(
            name=values["name"],
            digest=values["digest"],
            source_type="uri",
            source=json.dumps({"uri": values["uri"]}),
            profile=json.dumps(values["counts"]),
        )
        tags = [InputTag("mlflow.data.context", values["context"])]
        self._mlflow.log_inputs(run_id, [DatasetInput(data, tags)])

    def _model(self, run_id: str, values: Mapping[str, Any]) -> None:
        from stages.tracking.registry import publish  # noqa: PLC0415 - imports all of MLflow, see _client

        prefix = "example_"
        example = {name[len(prefix) :]: data for name, data in values.items() if name.startswith(prefix)}
        told = publish(
            values["folder"], tracking_uri=self.uri, run_id=run_id, example=example, **values["registration"]
        )
        logger.info("model         %s", told)

    def _lost(self, error: Exception) -> None:
        if self._lost_since is None:
            self._lost_since = time.monotonic()
            logger.warning(
                "MLflow at %s does not answer (%s): work goes on, its records are kept in %s and sent later",
                _without_password(self.uri), str(error).splitlines()[0][:200], self.spool,
            )  # fmt: skip
        self._spool_pending()

    def _back(self) -> None:
        if self._lost_since is not None:
            logger.warning("MLflow answers again after %.0f s", time.monotonic() - self._lost_since)
            self._lost_since = None
        with self._changed:
            sent = [] if self._spooled_count else list(self._spooled)
        for uri in sent:
            try:
                _remove(uri)
            except (OSError, PixloomError) as error:
                logger.warning("%s cannot be removed, its records will be sent again: %s", uri, error)
        with self._changed:
            self._spooled = [uri for uri in self._spooled if uri not in sent]
            self._changed.notify_all()

    def _spool_pending(self) -> None:
        """Put what is pending and not yet on disk into one more file of the spool."""
        with self._changed:
            fresh = list(self._pending)[self._spooled_count :]
            if not fresh:
                return
            name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}.jsonl"
            lines = "\n".join(operation.to_json() for operation in fresh)
            try:
                storage.write_bytes(storage.join(self.spool, name), lines.encode())
            except (OSError, PixloomError) as error:
                logger.warning("%s cannot be written: %s", self.spool, error)
                return
            self._spooled.append(storage.join(self.spool, name))
            self._spooled_count += len(fresh)


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered and said no, so that trying again would not help."""
    code = getattr(error, "error_code", "")
    return code in {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}
