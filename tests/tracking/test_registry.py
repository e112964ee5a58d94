"""A trained model in MLflow: sent twice it is one, and the better one is champion."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient
from PIL import Image

from stages.config.tracking import Promotion, Registration, TrackingConfig
from stages.errors import StageError
from stages.images import encode
from stages.inference.model_source import local_model
from stages.inference.translator import Translator
from stages.models.files.saved import DISCRIMINATOR, load_model
from stages.tracking import registry
from stages.tracking.registry import Measurement, register, register_model
from stages.tracking.run import Run, open_parent
from stages.tracking.sender import Sender
from tests.stores.seaweed import free_ports
from tests.support.models import make_model, scene
from tests.support.shards import make_shards

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own use of pandas, alembic and type hints

LOAD = """
import sys
class Absent:  # what a serving machine need not have
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "torchmetrics", "s3fs", "pipeline", "tests"):
            raise ImportError(f"{name} is not among the model's requirements")
sys.meta_path.insert(0, Absent())
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
data = open(sys.argv[3], "rb").read()
open(sys.argv[4], "wb").write(model.predict(pd.DataFrame({"image": [data]}))["image"][0])
example = model.input_example
open(sys.argv[5], "wb").write(model.predict(example)["image"][0])
"""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the experiment `e`."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(tracking_uri=uri).create_experiment("e", artifact_location=(folder / "artifacts").as_uri())
    return uri


def new_run(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("e")
    return str(client.create_run(experiment.experiment_id).info.run_id)


EXAMPLE = {"image": encode.encode_png(scene(3, 32, 32)["source"])}


def measured(value: float, data: str = "d", *, apart: float | None = None) -> Measurement:
    """l1 by image: this mean, and a noise of its own so that it differs clearly from none of the others."""
    rng = np.random.default_rng(int(value * 1000))
    noise = rng.normal(0, 0.001 if apart is None else apart, 20)
    images = {"key": [f"k{i}" for i in range(20)], "group": [""] * 20, "l1": value + noise - noise.mean()}
    return Measurement(metric="l1", value=value, data=data, images=pa.table(images))


def test_one_that_is_worse_on_the_shared_images_or_compared_with_nothing_known_is_no_champion(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=uri)

    def send(width: int, value: float, images: pa.Table) -> str:
        folder = str(make_model(tmp_path / str(width), trained=(width, 32)))
        result = Measurement(metric="l1", value=value, data="d", images=images)
        return register(step("lane"), folder, uri, new_run(client), example=EXAMPLE, measured=result)

    def images(count: int, value: float) -> pa.Table:
        return pa.table(
            {"key": [f"k{i}" for i in range(count)], "group": [""] * count, "l1": [value] * count}
        )

    assert "now champion" in send(32, 0.2, images(20, 0.2))
    # its mean is lower, since it has no images of the hard ones; of each that both have, it is worse
    assert "not clearly better, 0.05 (" in send(64, 0.1, images(10, 0.25))

    def away(*_: object) -> None:
        raise MlflowException("API request failed with error code 503", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(registry.MlflowClient, "get_model_version_by_alias", away)
    with pytest.raises(MlflowException, match="503"):
        send(96, 0.9, images(20, 0.9))
    monkeypatch.undo()
    assert str(client.get_model_version_by_alias("lane", "champion").version) == "1"


def test_the_better_one_is_champion_and_none_is_made_twice(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=uri)
    before = os.environ.get("MLFLOW_TRACKING_URI")
    models = [make_model(tmp_path / str(width), trained=(width, 32)) for width in (32, 64, 96)]

    def send(index: int, result: Measurement | None, promote: Promotion = "interval") -> str:
        config, folder = step("street", promote=promote), str(models[index])
        return register(config, folder, uri, new_run(client), example=EXAMPLE, measured=result)

    def champion() -> str:
        return str(client.get_model_version_by_alias("street", "champion").version)

    assert send(0, None) == "registered as models:/street/1"  # not evaluated yet
    assert "now champion (l1 0.2)" in send(0, measured(0.2))
    assert champion() == "1"
    assert "champion stays version 1 (l1 0.2), this one has 0.3" in send(1, measured(0.3))
    assert "this one has 0.19: not clearly better, -0.01 (" in send(2, measured(0.19, apart=0.2))
    assert champion() == "1"
    better = send(2, measured(0.1))
    assert "now champion (l1 0.1, before: version 1 (l1 0.2), difference -0.1 (" in better
    assert "it is champion" in send(2, measured(0.1))
    assert "other data" in send(0, measured(0.05, "more"))
    assert champion() == "3"
    assert "now champion (l1 0.09" in send(1, measured(0.09, apart=0.2), "mean")
    assert len(client.search_model_versions("name = 'street'")) == 3
    experiment = client.get_experiment_by_name("e").experiment_id
    logged = client.search_logged_models([experiment])
    assert len(logged) == 3
    assert {m.value for model in logged for m in model.metrics or [] if m.key == "l1"} >= {0.2, 0.3, 0.1}
    assert os.environ.get("MLFLOW_TRACKING_URI") == before


def test_what_has_no_scores_by_image_is_compared_by_its_value_or_not_at_all(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=uri)

    def send(width: int, result: Measurement) -> str:
        config = step(f"by-{result.metric}")
        folder = str(make_model(tmp_path / f"{result.metric}{width}", trained=(width, 32)))
        return register(config, folder, uri, new_run(client), example=EXAMPLE, measured=result)

    send(160, Measurement(metric="fid", value=9.0, data="d"))
    assert "now champion (fid 8, before" in send(192, Measurement(metric="fid", value=8.0, data="d"))
    send(224, Measurement(metric="l1", value=0.9, data="d"))  # as an older version
    assert "tracking.promote: mean" in send(256, measured(0.1))


def test_of_each_metric_it_is_known_on_which_data_it_was_measured(uri: str, tmp_path: Path) -> None:
    def send(width: int, metric: str, value: float, data: str) -> str:
        folder = str(make_model(tmp_path / str(width), trained=(width, 48)))
        result = Measurement(metric=metric, value=value, data=data)
        config = step("two-metrics")
        return register(
            config, folder, uri, new_run(MlflowClient(tracking_uri=uri)), example=EXAMPLE, measured=result
        )

    assert "now champion" in send(32, "fid", 9.0, "d")
    assert "it is champion" in send(32, "kid", 9.0, "more")
    assert "other data" in send(64, "fid", 8.0, "more")
    assert "now champion (fid 8" in send(64, "fid", 8.0, "d")


def test_what_a_kill_left_of_a_model_is_taken_away(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=uri)
    model = str(make_model(tmp_path / "model", trained=(128, 32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.tracking.client.MlflowClient.log_model_artifacts", _killed)
        with pytest.raises(KeyboardInterrupt):
            register(step("killed"), model, uri, new_run(client), example=EXAMPLE)
    line = register(step("killed"), model, uri, new_run(client), example=EXAMPLE)
    assert register(step("killed"), model, uri, new_run(client), example=EXAMPLE) == line
    experiment = client.get_experiment_by_name("e").experiment_id
    found = client.search_logged_models([experiment])
    assert all(one.status == LoggedModelStatus.READY for one in found)
    (version,) = client.search_model_versions("name = 'killed'")
    assert version.source in [f"models:/{one.model_id}" for one in found]


def _killed(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


class Away:
    """A tracking client without a server."""

    def __getattr__(self, name: str) -> object:
        raise ConnectionError("no route")


@pytest.fixture
def results(tmp_path: Path) -> dict[str, str]:
    """What the register step reads: a phase's folder, shards, an evaluation."""
    make_model(tmp_path / "phase" / "model")
    make_shards(tmp_path / "shards", {"train": [4], "val": [2]})
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "summary.json").write_text(json.dumps({"l1": 0.5, "baselines": {}}))
    pq.write_table(pa.table({"key": ["a"], "group": [""], "l1": [0.5]}), tmp_path / "metrics/metrics.parquet")
    return {
        "model": str(tmp_path / "phase"),
        "shards": str(tmp_path / "shards"),
        "metrics": str(tmp_path / "metrics"),
    }


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_parent(TrackingConfig(), "run", None, str(tmp_path_factory.mktemp("workspace")))
    assert run.flush()
    return run


def step(name: str, **changes: str) -> Registration:
    return (
        TrackingConfig(experiment="pixloom", **changes)
        .registration("/w", None)
        .model_copy(update={"name": name})
    )


def test_the_step_registers_the_model_of_a_run_with_its_score(
    parent: Run, results: dict[str, str], tmp_path: Path
) -> None:
    outcome = register_model(step("street"), parent=parent, **results)
    assert outcome.notes == {"model": "registered as models:/street/1; now champion (l1 0.5)"}
    version = MlflowClient(tracking_uri=parent.uri).get_model_version_by_alias("street", "champion")
    assert (version.run_id, version.tags["pixloom.data.l1"]) == (parent.run_id(), "shards val")
    model = Path(results["model"]) / "model"
    for uri in ("models:/street@champion", f"runs:/{parent.run_id()}"):
        found = local_model(uri, tmp_path / "temp", tracking_uri=parent.uri)
        assert load_model(found).fingerprint == load_model(model).fingerprint
        assert not (found / DISCRIMINATOR).exists()


def test_models_judged_by_other_settings_are_not_compared(results: dict[str, str], tmp_path: Path) -> None:
    def send(width: int, value: float, judged_by: str) -> str:
        make_model(tmp_path / str(width) / "model", trained=(width, 32))
        (tmp_path / "metrics" / "summary.json").write_text(json.dumps({"l1": value, "baselines": {}}))
        config = step("judged").model_copy(update={"judged_by": judged_by})
        with open_parent(TrackingConfig(), "run", None, str(tmp_path / "workspace")) as run:
            values = results | {"model": str(tmp_path / str(width))}
            return str(register_model(config, parent=run, **values).notes["model"])

    assert "now champion (l1 0.5)" in send(32, 0.5, "")
    assert "stays version 1 (l1 0.5): it was measured on other data or" in send(64, 0.1, "01234567")


def test_the_model_of_a_phase_gets_its_files_and_its_score(
    parent: Run, results: dict[str, str], tmp_path: Path
) -> None:
    make_model(tmp_path / "phase" / "model", trained=(40, 32))
    with parent.child("train-global") as child:
        child.model("train-global", folder=results["model"], step=4)
    outcome = register_model(step("square"), parent=parent, **results)
    client = MlflowClient(tracking_uri=parent.uri)
    version = client.get_model_version_by_alias("square", "champion")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert (model.name, model.status) == ("train-global", LoggedModelStatus.READY)
    assert version.run_id == model.source_run_id == parent.run_id()
    assert {metric.key: metric.dataset_digest for metric in model.metrics} == {"l1": "shards val"}
    assert outcome.notes["model"].startswith("registered as models:/square/1")
    again = register_model(step("square"), parent=parent, **results)
    assert again.notes["model"].endswith("it is champion (l1 0.5)")
    assert len(client.search_logged_models([model.experiment_id], "name = 'train-global'")) == 1
    found = local_model(f"runs:/{child.run_id()}", tmp_path / "temp", tracking_uri=parent.uri)
    assert load_model(found).fingerprint == load_model(tmp_path / "phase" / "model").fingerprint


def test_without_an_evaluation_or_its_metric_the_alias_stays(
    parent: Run, results: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    outcome = register_model(step("alley", metric="fid"), parent=parent, **results)
    assert outcome.notes == {"model": "registered as models:/alley/1"}
    assert "tracking.metric: fid was not measured; there are l1" in caplog.text
    summary = Path(results["metrics"], "summary.json")
    summary.write_text(json.dumps({"l1": 0.5, "fid": math.nan, "baselines": {}}))  # of scores all alike
    assert register_model(step("alley", metric="fid"), parent=parent, **results) == outcome
    del results["metrics"]
    assert register_model(step("alley"), parent=parent, **results) == outcome


def test_a_refusal_or_an_outage_fails_the_step_and_a_rerun_completes_it(
    parent: Run, results: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "WAITS", (0.0,))
    with pytest.raises(
        StageError, match=r"did not take the model \(.*[Ii]nvalid.*; the results are complete; run"
    ):
        register_model(step("team/street"), parent=parent, **results)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "MlflowClient", lambda **_: Away())
        with pytest.raises(StageError, match=r"ConnectionError: no route.*; run the same command again"):
            register_model(step("lane"), parent=parent, **results)
    assert "models:/lane/1" in register_model(step("lane"), parent=parent, **results).notes["model"]
    client = MlflowClient(tracking_uri=parent.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "pixloom"]
    assert (
        len(client.search_logged_models([experiment.experiment_id], "name = 'model'")) == 1
    )  # each attempt found it


def test_a_server_that_never_answered_fails_the_step(
    tmp_path: Path, results: dict[str, str], parent: Run
) -> None:
    assert parent.sender is not None
    away = Sender("http://127.0.0.1:9", "0", str(tmp_path / "other"))
    away.client = Away()
    run = Run(away, "key")
    run.tags({"a": "b"})
    with pytest.raises(StageError, match=r"register: MLflow at .* does not answer; the results are complete"):
        register_model(step("street"), parent=run, **results)


@pytest.mark.long
def test_a_registered_model_is_loaded_and_served_where_this_repository_is_not(
    uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(tracking_uri=uri)
    folder, result = make_model(tmp_path / "model"), Measurement(metric="l1", value=0.5, data="d")
    line = register(step("served"), str(folder), uri, new_run(client), example=EXAMPLE, measured=result)
    assert "now champion" in line
    labels = scene(1, 40, 24)["source"]
    expected = Translator(load_model(folder)).translate([labels])[0]
    (tmp_path / "in.png").write_bytes(encode.encode_image(labels, "png"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    names = [str(tmp_path / name) for name in ("in.png", "out.png", "example.png")]
    words = [sys.executable, "-c", LOAD, uri, "models:/served@champion", *names]
    subprocess.run(words, cwd=elsewhere, env=environment, check=True, timeout=300, capture_output=True)
    assert np.array_equal(picture((tmp_path / "out.png").read_bytes()), expected)
    with Image.open(tmp_path / "example.png") as image:
        assert image.size == (32, 32)

    (port,) = free_ports(1)
    mlflow_command = Path(sys.executable).with_name("mlflow")
    serve = [mlflow_command, "models", "serve", "-m", "models:/served@champion", "--env-manager", "local"]
    path = f"{mlflow_command.parent}:{environment['PATH']}"
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*serve, "--port", str(port)],
            cwd=elsewhere,
            env=environment | {"MLFLOW_TRACKING_URI": uri, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        data = base64.b64encode((tmp_path / "in.png").read_bytes()).decode()
        answer = invoke(port, {"dataframe_split": {"columns": ["image"], "data": [[data]]}}, server)
        made = base64.b64decode(answer["predictions"][0]["image"])
        assert np.array_equal(picture(made), expected)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def invoke(port: int, body: object, server: subprocess.Popen[bytes]) -> dict[str, list[dict[str, str]]]:
    """The server's answer, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                found: dict[str, list[dict[str, str]]] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server never answered"
            time.sleep(0.5)
