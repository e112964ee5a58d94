"""Models by their location."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import mlflow
import pytest
from mlflow import MlflowClient

from stages import storage
from stages.errors import UserError
from stages.inference.model_folder import model_folder
from stages.inference.model_source import (
    description,
    is_mlflow,
    local_model,
    mlflow_model,
    tracking_server,
)
from stages.models.files.saved import DISCRIMINATOR, EMA, MANIFEST, WEIGHTS, fingerprint, load_model
from stages.storage.local import upload_folder
from tests.support.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("step") / "model")


@pytest.fixture
def remote(model: Path) -> Iterator[str]:
    """The model in a store, with the other files that training saves."""
    uri = "memory://model-source/model"
    upload_folder(model, uri, last=MANIFEST)
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["files"] |= {EMA: manifest["files"][WEIGHTS], DISCRIMINATOR: manifest["files"][WEIGHTS]}
    for name in (EMA, DISCRIMINATOR):
        storage.write_bytes(storage.join(uri, name), (model / WEIGHTS).read_bytes())
    storage.write_json(storage.join(uri, MANIFEST), manifest)
    yield uri
    fsspec.filesystem("memory").rm("/model-source", recursive=True)


@pytest.fixture
def former_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server that this process uses before and after."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///former")
    yield "file:///former"
    mlflow.set_tracking_uri(None)


def test_a_folder_is_the_model_itself_or_the_step_that_holds_it(model: Path) -> None:
    assert model_folder(str(model)) == str(model)
    assert model_folder(str(model.parent)) == str(model)
    assert local_model(str(model.parent), model / "unused") == model
    assert not (model / "unused").exists()


def test_where_there_is_no_model_the_location_is_named_first(tmp_path: Path) -> None:
    for ask in (model_folder, description):
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: there is no model\.json"):
            ask(str(tmp_path))


ARCHITECTURE = b'{"architecture": {"kind": "pix2pix"}, "inputs": {}, "files": %s}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": "\xe9"}', b"{}"),
        *(
            ARCHITECTURE % files
            for files in (b"5", b'["../x"]', b'{"../x": {}}', b'{"weights.safetensors": 1}')
        ),
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}: model\.json: [^\n]{{1,300}}$"):
        description(str(tmp_path))


def test_the_fingerprint_follows_the_description_and_not_its_order(model: Path) -> None:
    manifest = description(str(model))
    assert fingerprint(dict(reversed(manifest.items()))) == fingerprint(manifest)
    assert fingerprint(manifest | {"extra": {"epoch": 3}}) != fingerprint(manifest)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(manifest))


@pytest.mark.parametrize(("weights", "left_out"), [("ema", WEIGHTS), ("raw", EMA)])
def test_of_a_remote_model_only_what_is_needed_is_copied(
    tmp_path: Path, remote: str, model: Path, weights: str, left_out: str
) -> None:
    folder = local_model(remote, tmp_path / "copy", weights=weights)  # type: ignore[arg-type]
    files = {path.name for path in folder.iterdir()}
    assert files == {MANIFEST, *description(remote)["files"]} - {DISCRIMINATOR, left_out}
    for name in files - {MANIFEST, EMA}:
        assert (folder / name).read_bytes() == (model / name).read_bytes()


def test_a_remote_model_without_an_average_keeps_its_only_weights(tmp_path: Path, model: Path) -> None:
    uri = "memory://model-source/plain"
    upload_folder(model, uri, last=MANIFEST)
    folder = local_model(uri, tmp_path)
    assert load_model(folder).fingerprint == load_model(model).fingerprint


def test_what_mlflow_resolves_is_known_by_its_scheme() -> None:
    assert all(map(is_mlflow, ("models:/street@champion", "runs:/abc", "mlflow-artifacts:/1/a")))
    assert not any(map(is_mlflow, ("models/street", "s3://models/street", "/models:/street")))


def test_a_missing_mlflow_database_is_named_and_not_created(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with pytest.raises(
        UserError, match=rf"^runs:/abc: there is no MLflow database {re.escape(str(database))}"
    ):
        mlflow_model("runs:/abc", tmp_path, f"sqlite:///{database}")
    assert not database.exists()


def test_mlflows_errors_are_one_line_and_a_run_without_a_model_is_named(
    tmp_path: Path, model: Path, former_server: str
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    for name in ("models:/street@champion", "models:/street/7", "runs:/abc"):
        with pytest.raises(UserError) as caught:
            mlflow_model(name, tmp_path / "temp", uri)
        assert str(caught.value).startswith(name)
        assert "\n" not in str(caught.value)
    client.log_text(run, "no model", "model/notes.txt")
    with pytest.raises(UserError, match=rf"^runs:/{run}: this run has logged no model"):
        description(f"runs:/{run}", uri)
    with pytest.raises(UserError, match=rf"^runs:/{run}/model: MLflow holds no model\.json there"):
        description(f"runs:/{run}/model", uri)
    client.log_artifacts(run, str(model), "model/artifacts/model")
    assert description(f"runs:/{run}/model", uri) == description(str(model))
    folder = local_model(f"runs:/{run}/model", tmp_path / "temp", tracking_uri=uri)
    assert load_model(folder)
    assert folder.is_relative_to(tmp_path / "temp")  # MLflow's own temporary folders stay
    assert mlflow.get_tracking_uri() == former_server


def test_the_former_server_is_set_again_after_an_error(former_server: str) -> None:
    def fail() -> None:
        with tracking_server("file:///during"):
            assert mlflow.get_tracking_uri() == "file:///during"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert mlflow.get_tracking_uri() == former_server
