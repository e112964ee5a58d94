"""The thread that makes MLflow agree with what runs record: it looks up what MLflow holds and sends the rest.

A fact has a name and is sent once; a later value replaces an unsent one. Of a curve, MLflow's last step says
what is missing. What the server does not take is also written into a folder of the workspace until it takes
it, for the next process in the workspace to send; curves are there already, in their phase's folder.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from stages import storage
from stages.base import Point
from stages.errors import PixloomError, StageError, one_line, without_password
from stages.storage.local import local_file

logger = logging.getLogger(__name__)

KEY_TAG, PROCESS_TAG, WORKSPACE_TAG = "pixloom.key", "pixloom.process", "pixloom.workspace"
ALIVE_TAG = "pixloom.alive"  # when the process that created the run was there, in ms since 1970
CURVES_TAG = "pixloom.curves"  # folder of the phase whose curves a run shows
UNSENT, DOCUMENT = "mlflow-unsent", "facts.json"  # in the workspace: a folder, and in it one per process
SMALL = ("param", "tag", "metric")  # kinds of facts of which one request takes many
LINGER_S = 0.3  # how long facts are collected: one request instead of many
RETRY_S = (1.0, 2.0, 5.0, 10.0, 15.0)
ALIVE_S = 60.0  # between two such signs of life, of a process that has a run open
GONE_S = 900.0  # after so long without one, a process of another machine has ended
GIVE_UP_S = 120.0  # what fails so long while the server answers is dropped
MOST_ROWS = 100_000  # unsent values of a phase's curves in memory; its folder has the others at its end
ROWS = 1000  # values of curves that one request takes

Fact = tuple[str | int, ...]
"""A kind, and names within it: ("param", name), ("metric", name, step), ("artifact", name), ("end",) ...

("curves",): the points that the folder of the run's phase has by now are sent, before newer ones.
"""


@dataclass
class Record:
    """What MLflow may not hold yet of a run: facts, and values of curves in the order of their steps.

    The value of an artifact is bytes, or the URI where the workspace keeps them. `curves` is the folder of
    the phase whose curves are also sent when the run ends.
    """

    facts: dict[Fact, Any] = field(default_factory=dict)
    rows: list[Point] = field(default_factory=list)
    curves: str = ""
    is_full: bool = False


@dataclass
class Held:
    """What MLflow holds of a run: the last step of each metric, and the names of parameters."""

    run_id: str
    steps: dict[str, int] = field(default_factory=dict)
    params: set[str] = field(default_factory=set)


def take_fresh(rows: Iterable[Point], last_steps: dict[str, int]) -> list[Point]:
    """The rows whose curve has no value at that step or a later one, which they move: a restart repeats."""
    fresh = []
    for row in rows:
        if row.step > last_steps.get(row.name, -1):
            fresh.append(row)
            last_steps[row.name] = row.step
    return fresh


def shown(points: Sequence[Point]) -> list[Point]:
    """Points as MLflow's page has them: with each step's images and epoch, without curves per layer."""
    steps = {point.step: point for point in points}.values()
    counts = [
        p._replace(name=n, value=float(v))
        for p in steps
        for n, v in (("images", p.images), ("epoch", p.epoch))
    ]
    return [point for point in points if "/layer" not in point.name] + counts


def stored_points(folder: str) -> Iterator[list[Point]]:
    """The curves of a phase, some points at a time, from its result or else from its newest checkpoint.

    Raises UserError if the store cannot be asked.
    """
    checkpoints, names = storage.join(folder, "checkpoints"), None
    while names != (there := storage.list_folders(checkpoints)):  # others may come while these go
        names = there
        newest = sorted(names, key=lambda name: (len(name), name), reverse=True)  # as `checkpoints.names`
        stored = [storage.join(checkpoints, name, "curves.parquet") for name in newest]
        for place in [storage.join(folder, "metrics.parquet"), *stored]:
            try:
                with local_file(place) as path, pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for batch in file.iter_batches(ROWS, use_threads=False):
                        yield [Point(**row) for row in batch.to_pylist()]
                return
            except FileNotFoundError:  # not at its end, or a newer checkpoint has replaced it
                continue
            except (OSError, ValueError, StageError) as error:
                logger.warning("%s: unreadable curves, MLflow misses them: %s", place, one_line(error))


def find_model(client: Any, experiment: str, tag: str, value: str) -> Any:
    """The LoggedModel of an experiment with this tag; None if there is none."""
    where = f"tags.`{tag}` = '{value}'"
    return next(iter(client.search_logged_models([experiment], filter_string=where, max_results=1)), None)


def open_model(client: Any, run: Any, name: str, folder: str) -> Any:
    """The LoggedModel of a model's folder, created with a run's params and tags if there is none."""
    key, experiment = uuid.uuid5(uuid.NAMESPACE_URL, storage.absolute(folder)).hex, run.info.experiment_id
    return find_model(client, experiment, KEY_TAG, key) or client.create_logged_model(
        experiment,
        name=name,
        source_run_id=run.data.tags.get("mlflow.parentRunId", run.info.run_id),
        tags={name: text for name, text in run.data.tags.items() if "pixloom." in name} | {KEY_TAG: key},
        params=run.data.params,
    )


def log_model(client: Any, run_id: str, name: str, *, folder: str, step: int) -> None:
    """Log the model of a phase's folder, with the values of its curves at a step; again, nothing changes."""
    from mlflow.entities import LoggedModelOutput, Metric  # noqa: PLC0415 - see connect

    run = client.get_run(run_id)
    model = open_model(client, run, name, storage.join(folder, "model"))
    link = {"model_id": model.model_id}
    for data in run.inputs.dataset_inputs:
        link |= {"dataset_name": data.dataset.name, "dataset_digest": data.dataset.digest}
    rows = (row for points in stored_points(folder) for row in shown(points) if row.step <= step)
    values = {row.name: row for row in rows}.values()
    client.log_batch(run_id, metrics=[Metric(r.name, r.value, r.time_ms, r.step, **link) for r in values])
    if all(output.model_id != model.model_id for output in run.outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.finalize_logged_model(model.model_id, "READY")


def documents(workspace: str) -> dict[str, Any]:
    """What MLflow has not taken, a document per process, by its folder."""
    unsent = storage.join(storage.absolute(workspace), UNSENT)
    folders = [storage.join(unsent, name) for name in storage.list_folders(unsent)]
    found = ((folder, storage.find_json(storage.join(folder, DOCUMENT))) for folder in folders)
    return {folder: document for folder, document in found if document is not None}


def connect(uri: str) -> Any:
    """An MLflow client with short timeouts: the sender retries by itself."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at the end of every child
    # imported here: it takes 2-3 s, which workers, --help and a run with nothing to do need not pay
    from mlflow.tracking import MlflowClient  # noqa: PLC0415

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # of each retry; the sender says what comes of it
    return MlflowClient(tracking_uri=uri)


def process_name(pid: int | None = None) -> str:
    """Host, process id and start time: no other process has the same. None: of this one."""
    process = psutil.Process(pid)
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def is_gone(process: str, alive: float = math.inf) -> bool:
    """Whether the process of that `process_name` has ended. `alive`: its last sign of life, inf: unknown.

    A Kubernetes pod that starts again has another name, and no lock in a bucket says that the first is gone.
    """
    if not process.startswith(f"{socket.gethostname()} "):
        return now_ms() - alive > 1000 * GONE_S
    with suppress(psutil.NoSuchProcess):
        return process_name(int(process.split()[1])) != process
    return True


def now_ms() -> int:
    """The time as MLflow counts it."""
    return int(time.time() * 1000)


def ended(status: str) -> dict[Fact, Any]:
    """The fact that a run has ended: FINISHED, FAILED or KILLED."""
    return {("end",): {"status": status, "end_time": now_ms()}}


class Sender:
    """Sends one process's records to one server. `client` is MLflow's, made when it is first needed."""

    def __init__(self, uri: str, experiment: str, workspace: str) -> None:
        self.uri, self.experiment, self.workspace = uri, experiment, storage.absolute(workspace)
        self.unsent = storage.join(self.workspace, UNSENT)
        self.client: Any = None
        self._folder = storage.join(self.unsent, uuid.uuid4().hex)
        self._folders: set[str] = set()  # this one and those of ended processes, while they hold facts
        self._records: dict[str, Record] = {}  # by key
        self._changed, self._storing = threading.Condition(), threading.Lock()
        self._hurry = False
        self._ids: dict[str, str] = {}
        self._held: dict[str, Held] = {}  # forgotten after an error: the server may have taken what failed
        self.open: dict[str, None] = {}  # keys of the runs that this process created and has not ended
        self._alive = time.monotonic()
        self._failing: dict[Any, float] = {}  # since when facts fail though the server answers
        self._trouble: Exception | None = None
        self._away_since: float | None = None
        threading.Thread(target=self._work, name="mlflow-sender", daemon=True).start()
        atexit.register(self.close)

    def __reduce__(self) -> Any:
        return Sender, (self.uri, self.experiment, self.workspace)

    def put(self, key: str, facts: Mapping[Fact, Any], rows: Iterable[Point] = (), curves: str = "") -> None:
        """Add facts and values of curves to the run with this key. Of a parameter, the first value counts."""
        with self._changed:
            record = self._records.setdefault(key, Record())
            record.facts |= {f: v for f, v in facts.items() if f[0] != "param" or f not in record.facts}
            record.curves = curves or record.curves
            record.facts |= {("curves",): time.monotonic_ns()} if curves else {}
            if ("end",) in facts:
                self.open.pop(key, None)
            record.is_full |= bool(record.curves) and len(record.rows) > MOST_ROWS
            if not record.is_full:  # without gaps, so that the last step says what is missing
                record.rows += rows
            self._changed.notify_all()

    def run_id(self, key: str, wait: float) -> str:
        """MLflow's id of the run with this key; "" if it is unknown after `wait` seconds."""
        self._wait(lambda: key in self._ids, wait)
        return self._ids.get(key, "")

    def flush(self, wait: float | None = None) -> bool:
        """Wait until MLflow holds everything; if not after `wait` seconds, the workspace has the rest.

        By default, for 20 s, or less if the server is away.
        """
        away = self._away_since is not None
        if wait is None and not away:
            self._wait(lambda: self._is_settled() or self._away_since is not None, 20.0)
        done = self._wait(self._is_settled, wait or (2.0 if away else 0.0))
        if not done:
            self._store()
        return done

    def close(self) -> None:
        """Send the rest when the process ends, or say where it is."""
        if not self.flush():
            where = without_password(self.uri)
            logger.warning("MLflow at %s has no answer; the next run sends what is in %s", where, self.unsent)

    def take_over(self) -> None:
        """End the runs that ended processes left open; send what they could not of this workspace."""
        self.client = self.client or connect(self.uri)
        self._end_abandoned()
        for folder, document in documents(self.workspace).items():
            process, gone = document["process"], is_gone(document["process"])
            if not gone and process != process_name() and process.split()[0] == socket.gethostname():
                continue  # it sends them itself
            old, new = (json.dumps(f"{place}/")[:-1] for place in (document["workspace"], self.workspace))
            records = json.loads(json.dumps(document["records"]).replace(old, new))  # which may have moved
            with self._changed:
                self._folders.add(folder)
                for key, record in records.items():
                    facts = {tuple(fact): value for fact, value in record["facts"]}
                    unfinished = ended("KILLED") if gone and ("create",) in facts else {}
                    self.put(key, unfinished | facts, curves=record["curves"])

    def _end_abandoned(self) -> None:
        """End the runs that ended processes left open as KILLED, with the curves of their phases."""
        where = "attributes.status = 'RUNNING'"
        runs = self.client.search_runs([self.experiment], filter_string=where, max_results=1000)
        owners = [run.data.tags.get(PROCESS_TAG, "") for run in runs]
        times = [float(run.data.tags.get(ALIVE_TAG, "inf")) for run in runs]
        alive = dict(sorted(zip(owners, times, strict=True)))  # the last one of each
        for run, owner in zip(runs, owners, strict=True):
            if is_gone(owner, alive[owner]):
                self.client.set_terminated(run.info.run_id, status="KILLED")
                phase = run.data.tags.get(CURVES_TAG, "").rpartition("/")[2]  # the workspace may have moved
                phase = phase and storage.join(self.workspace, phase)
                self.put(run.data.tags[KEY_TAG], ended("KILLED"), curves=phase)

    # -- the thread -----------------------------------------------------------

    def _is_settled(self) -> bool:
        return not (self._folders or any(record.facts or record.rows for record in self._records.values()))

    def _wait(self, condition: Callable[[], bool], wait: float) -> bool:
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            try:
                return self._changed.wait_for(condition, timeout=wait)
            finally:
                self._hurry = False

    def _work(self) -> None:
        attempt = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._is_settled(), ALIVE_S if self.open else None)
                if not self._hurry:
                    self._changed.wait_for(lambda: self._hurry, timeout=LINGER_S)
                records = list(self._records.items())
            self._trouble, complete = None, True
            try:
                self.client = self.client or connect(self.uri)
                if self.open and time.monotonic() - self._alive > ALIVE_S:
                    self._alive = time.monotonic()
                    self._end_abandoned()
                    with self._changed:
                        for key in [*self.open][:1]:
                            self._records[key].facts["tag", ALIVE_TAG] = str(now_ms())
                for key, record in records:
                    complete &= self._send(key, record)
            except Exception as error:  # every client library has its own; none may end training
                self._trouble = error
                self._failing.clear()
            self._report()
            attempt = 0 if complete and self._trouble is None else attempt + 1
            if attempt:
                with self._changed:
                    self._changed.wait(timeout=RETRY_S[min(attempt, len(RETRY_S)) - 1])

    def _send(self, key: str, record: Record) -> bool:
        """Send what is missing of one run; False if another process is to create it and has not."""
        if not (record.facts or record.rows):
            return True
        if (held := self._look_up(key, record.facts.get(("create",)))) is None:
            return False
        with self._changed:
            record.facts.pop(("create",), None)
            facts, points, asked = list(record.facts), len(record.rows), record.facts.get(("curves",))
        small = [fact for fact in facts if fact[0] in SMALL]
        for start in range(0, len(small), 100):
            self._deliver(record, held, small[start : start + 100])
        if record.curves and {("curves",), ("end",)} & {*facts}:
            for stored in stored_points(record.curves):
                self._send_points(held, shown(stored))
            with self._changed:
                if record.facts.get(("curves",)) == asked:
                    record.facts.pop(("curves",), None)
        for start in range(0, points, ROWS):  # those after another ("curves",) wait for it
            batch = record.rows[: min(ROWS, points - start)]
            self._send_points(held, batch)
            with self._changed:
                del record.rows[: len(batch)]
                self._changed.notify_all()
        for kind in ("dataset", "model", "artifact", "end"):
            for fact in facts:
                if fact[0] == kind:
                    self._deliver(record, held, [fact])
        return True

    def _look_up(self, key: str, create: Mapping[str, Any] | None = None) -> Held | None:
        """What MLflow holds of a run, after creating it if that is a fact; None if the run is not there."""
        if key in self._held and create is None:
            return self._held[key]
        where = f"tags.`{KEY_TAG}` = '{key}'"
        runs = self.client.search_runs([self.experiment], filter_string=where, max_results=1)
        if runs:
            data, run_id = runs[0].data, runs[0].info.run_id
            steps = {metric.key: metric.step for metric in data.to_proto().metrics}
            held = Held(run_id, steps, set(data.params))
        elif create is None:
            return None
        else:
            tags = {**create["tags"], KEY_TAG: key, WORKSPACE_TAG: self.workspace}
            if create["parent"]:
                if (parent := self._look_up(create["parent"])) is None:
                    return None
                tags["mlflow.parentRunId"] = parent.run_id
            start, name = create["start_time"], create["name"]
            run = self.client.create_run(self.experiment, start_time=start, tags=tags, run_name=name)
            held = Held(run.info.run_id)
        with self._changed:
            self._held[key], self._ids[key] = held, held.run_id
            self._changed.notify_all()
        return held

    def _send_points(self, held: Held, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric  # noqa: PLC0415 - see connect

        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in take_fresh(points, held.steps)]
        for start in range(0, len(metrics), ROWS):
            self.client.log_batch(held.run_id, metrics=metrics[start : start + ROWS])

    def _deliver(self, record: Record, held: Held, facts: Sequence[Fact]) -> None:
        """Send facts in one request. What the server refuses is dropped; what fails otherwise is kept."""
        values = {fact: record.facts[fact] for fact in facts}
        try:
            self._log(held, values)
        except Exception as error:
            if not is_refusal(error):
                self.client.get_experiment(self.experiment)  # raises if the server is away
                since = self._failing.setdefault((held.run_id, *facts), time.monotonic())
                if time.monotonic() - since < GIVE_UP_S:
                    self._trouble = error  # the other facts are sent nevertheless
                    return
            if len(facts) > 1:
                for fact in facts:
                    self._deliver(record, held, [fact])
                return
            logger.warning("MLflow refused %s: %s", " ".join(map(str, facts[0])), one_line(error))
        with self._changed:
            for fact, value in values.items():
                if record.facts[fact] == value:
                    del record.facts[fact]
            self._changed.notify_all()

    def _log(self, held: Held, values: Mapping[Fact, Any]) -> None:
        """Send small facts in one request, or one of another kind."""
        from mlflow import entities  # noqa: PLC0415 - see connect

        ((kind, *names), value) = next(iter(values.items()))
        if kind in SMALL:
            metrics = [entities.Metric(f[1], *value, f[2]) for f, value in values.items() if f[0] == "metric"]
            params = {str(f[1]): value for f, value in values.items() if f[0] == "param"}
            fresh = [entities.Param(name, value) for name, value in params.items() if name not in held.params]
            tags = [entities.RunTag(f[1], value) for f, value in values.items() if f[0] == "tag"]
            self.client.log_batch(held.run_id, metrics=metrics, params=fresh, tags=tags)
            held.params |= params.keys()
        elif kind == "end":
            self.client.set_terminated(held.run_id, **value)
        elif kind == "dataset":
            context = entities.InputTag("mlflow.data.context", str(names[1]))
            self.client.log_inputs(held.run_id, [entities.DatasetInput(entities.Dataset(**value), [context])])
        elif kind == "model":
            log_model(self.client, held.run_id, str(names[0]), **value)
        else:
            folder, _, name = str(names[0]).rpartition("/")
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / name
                path.write_bytes(value if isinstance(value, bytes) else storage.read_bytes(value))
                self.client.log_artifact(held.run_id, str(path), artifact_path=folder or None)

    # -- while the server is away ---------------------------------------------

    def _report(self) -> None:
        """Log that the server is away, or back; have the workspace hold what it does not."""
        if self._trouble is not None:
            self._held.clear()
            if self._away_since is None:
                self._away_since, where = time.monotonic(), without_password(self.uri)
                reason = one_line(self._trouble, limit=200)
                logger.warning("MLflow at %s does not answer (%s): it is completed later", where, reason)
            self._store()
            with self._changed:
                self._changed.notify_all()
            return
        if self._away_since is not None:
            logger.warning("MLflow answers again after %.0f s", time.monotonic() - self._away_since)
            self._away_since = None
        self._clear()

    def _store(self) -> None:
        """Write unsent facts into the workspace; the bytes of artifacts leave the memory."""
        with self._storing:
            with self._changed:
                records = [(key, record, list(record.facts.items())) for key, record in self._records.items()]
            document: dict[str, Any] = {}
            try:
                for key, record, facts in records:
                    if not (facts or record.rows):
                        continue
                    for fact, value in facts:
                        if isinstance(value, bytes):
                            uri = storage.join(self._folder, uuid.uuid4().hex)
                            storage.write_bytes(uri, value)
                            with self._changed:
                                record.facts[fact] = uri
                    stored = [(fact, record.facts.get(fact, value)) for fact, value in facts]
                    document[key] = {"curves": record.curves, "facts": stored}
                whole = {"process": process_name(), "workspace": self.workspace, "records": document}
                storage.write_json(storage.join(self._folder, DOCUMENT), whole)
                with self._changed:
                    self._folders.add(self._folder)
            except (OSError, PixloomError) as error:
                logger.warning("%s cannot be written: %s", self._folder, one_line(error))

    def _clear(self) -> None:
        """Remove what the workspace keeps, if MLflow holds all of it by now."""
        with self._storing:
            with self._changed:
                folders = set() if any(r.facts for r in self._records.values()) else self._folders.copy()
            for folder in folders:
                with suppress(OSError, PixloomError):  # the next run sends it again, which changes nothing
                    storage.remove(folder)
            with self._changed:
                self._folders -= folders
                self._changed.notify_all()


def is_refusal(error: Exception) -> bool:
    """Whether trying again would not help: the server said no, or another process has sent and removed it."""
    code = getattr(error, "error_code", "")
    refusals = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "INVALID_STATE"}
    return code in refusals or isinstance(error, FileNotFoundError)
