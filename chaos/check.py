"""What a run left, against what a calm run of the same config left: everything that must be the same."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from mlflow.tracking import MlflowClient

CURVES = ("generator/", "discriminator/", "learning_rate/", "gradient_norm/")
OF_A_RUN = {
    "seconds",
    "time_ms",
    "time",
    "model",
}  # columns: the clock, a digest that covers the run's id in MLflow
PASSING = ("_attempts", "checkpoints/", "news", "train.pid")  # of a phase: not the result


@dataclass
class Remains:
    """What a finished run left, without what depends on the clock or on the place.

    pairs    how often a key is in a split or in quarantine
    files    the bytes of every file that must be equal byte for byte, by name below the workspace
    tables   rows of tables, sorted, by name
    curves   value of each curve at each step, by phase
    tracked  steps of each curve in MLflow, by phase
    names    every object below the workspace
    versions how many the registered model has
    """

    pairs: Counter[str] = field(default_factory=Counter)
    files: dict[str, bytes] = field(default_factory=dict)
    tables: dict[str, list[Any]] = field(default_factory=dict)
    curves: dict[str, dict[tuple[int, str], float]] = field(default_factory=dict)
    tracked: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    unfinished_uploads: list[str] = field(default_factory=list)
    versions: int = 0


def collect(client: Any, workspace: str, mlflow_url: str, experiment: str) -> Remains:
    """Read a run's workspace by a client of the store, and its runs by MLflow's API."""
    root = workspace.removeprefix("s3://")
    remains = Remains()
    client.invalidate_cache()  # of before the run, by other faults
    for path in sorted(client.find(root)):
        name, data = path.removeprefix(f"{root}/"), client.cat_file(path)
        remains.names.add(name)
        folder, _, file = name.partition("/")
        if file.startswith("checkpoints/"):
            continue
        if folder.startswith("shard-") and file.endswith(".parquet"):
            _count_pairs(remains, file, data)
        if file == "metrics.parquet" and folder.startswith("train-"):
            rows = pq.read_table(io.BytesIO(data)).to_pylist()
            remains.curves[folder] = {
                (row["step"], row["name"]): row["value"] for row in rows if row["name"].startswith(CURVES)
            }
        elif file.endswith((".safetensors", ".png")) or (folder.startswith("shard-") and "-0" in file):
            remains.files[name] = data
        elif file.endswith(".parquet") and folder.startswith(("infer-", "evaluate-")):
            remains.tables[name] = _rows(data)
        elif file == "_SUCCESS.json" and not folder.startswith("register-"):  # which names the experiment
            marker = json.loads(data)
            counts = {n: v for n, v in marker["counts"].items() if (folder[:7], n) != ("report-", "bytes")}
            remains.tables[name] = [json.dumps([counts, _steady(marker["metrics"])], sort_keys=True)]
    remains.unfinished_uploads = list(client.list_multipart_uploads(root.partition("/")[0]))
    remains.tracked = _tracked(mlflow_url, experiment)
    remains.versions = len(MlflowClient(mlflow_url).search_model_versions(f"name = '{experiment}'"))
    return remains


def _count_pairs(remains: Remains, file: str, data: bytes) -> None:
    table = pq.read_table(io.BytesIO(data))
    if "key" not in table.column_names:
        return
    where = "quarantine" if file.startswith("quarantine") else file.partition("-")[0]
    for row in table.select(["key", *(["reason"] if where == "quarantine" else [])]).to_pylist():
        remains.pairs[f"{row['key']} in {where}{' for ' + row['reason'] if 'reason' in row else ''}"] += 1


def _rows(data: bytes) -> list[Any]:
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    return sorted(
        json.dumps({k: v for k, v in row.items() if k not in OF_A_RUN}, default=str) for row in rows
    )


def _steady(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("system/", "time/"))}


def _tracked(url: str, experiment: str) -> dict[str, dict[str, list[int]]]:
    """Steps of every curve of the finished run of each phase."""
    client = MlflowClient(url)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    tracked = {}
    for run in client.search_runs([found.experiment_id], "attributes.status = 'FINISHED'"):
        name = run.info.run_name
        if not name.startswith("train-") or name in tracked:  # the newest comes first
            continue
        tracked[name] = {
            metric: [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            for metric in run.data.metrics
            if metric.startswith(CURVES)
        }
    return tracked


def differences(calm: Remains, found: Remains) -> list[str]:
    """Everything that is not as after a calm run, a line each; empty if all is well."""
    problems = [
        f"pair {name}: {found.pairs[name]} times, {calm.pairs[name]} in a calm run"
        for name in sorted(calm.pairs.keys() | found.pairs.keys())
        if calm.pairs[name] != found.pairs[name]
    ]
    problems += _compare("file", calm.files, found.files)
    problems += _compare("table", calm.tables, found.tables)
    problems += _compare("curves of", calm.curves, found.curves)
    for phase, curves in calm.tracked.items():
        for metric, wanted in curves.items():
            steps, calm_steps = Counter(found.tracked.get(phase, {}).get(metric, [])), Counter(wanted)
            if steps != calm_steps:
                missing, more = sorted(calm_steps - steps), sorted(steps - calm_steps)
                problems.append(f"MLflow, {phase}, {metric}: steps {missing} missing, {more} too many")
    folders = {name.partition("/")[0] for name in calm.names}
    problems += [
        f"left behind: {name}"
        for name in sorted(found.names - calm.names)
        if name.partition("/")[0] in folders and not any(part in name for part in PASSING)
    ]
    if found.versions != calm.versions:
        problems.append(f"the model is registered {found.versions} times, in a calm run {calm.versions}")
    problems += [f"an upload that was not finished: {upload}" for upload in found.unfinished_uploads]
    return problems


def _compare(what: str, calm: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {name}: {'missing' if name not in found else 'another one'}"
        for name in sorted(calm)
        if found.get(name) != calm[name]
    ]
