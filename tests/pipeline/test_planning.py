"""What a plan meets outside the pipeline: stores that refuse, stay away or are not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import s3fs
import yaml

from pipeline import cli, config, infer, run
from stages import storage
from stages.errors import UserError
from stages.storage import retry
from tests.stores.seaweed import SeaweedS3
from tests.support.pairs import photo, write_image

WAYS = {
    "credentials": ({"key": None, "secret": None}, "access denied.*NoCredentialsError"),
    "secret": ({"secret": "wrong"}, "access denied.*signature"),
    "user": ({"key": "nobody"}, "access denied.*access key"),
    "dead": ({"endpoint_url": "http://127.0.0.1:9"}, r"workspace: s3://.*/ws: cannot reach the store, check"),
    "endpoint": ({"endpoint_url": "minio"}, "storage.s3: ValueError: Invalid endpoint: minio"),
    "option": ({"endpoint": "http://127.0.0.1:9"}, "storage.s3: TypeError: .*'endpoint'"),
    "profile": ({"profile": "nobody"}, "storage.s3: ProfileNotFound"),
    "bucket": ({"bucket": "no-such-bucket"}, "s3://no-such-bucket/ws: there is no such bucket"),
    "name": ({"bucket": "No_Bucket!"}, "s3://No_Bucket!/ws: ParamValidationError"),
}


@pytest.fixture(autouse=True)
def no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's log would stay on a stream of its test."""
    monkeypatch.setattr(cli, "log_to_stdout", lambda: None)


@pytest.mark.s3
@pytest.mark.parametrize("way", WAYS)
def test_a_workspace_that_cannot_be_used_is_one_line(
    way: str,
    s3_store: SeaweedS3,
    s3_bucket: str,
    client_options: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()  # a client keeps the credentials it was made with
    changes, complaint = WAYS[way]
    options = s3_store.options() | {"config_kwargs": {"retries": {"max_attempts": 1}}} | changes
    bucket = options.pop("bucket", s3_bucket)
    file = write_config(tmp_path, workspace=f"s3://{bucket}/ws")
    for name in ("key", "secret"):  # no secrets in a config
        if value := options.pop(name):
            monkeypatch.setenv({"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}[name], value)
    settings = ["--set", f"storage.s3={yaml.safe_dump(options, default_flow_style=True)}"]
    assert run.main(["-c", file, "--plan", *settings]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(complaint, error), error


@pytest.mark.parametrize(
    ("location", "workspace"),
    [
        ("s3://bucket", "s3://bucket/ws"),
        ("s3://bucket/photos/", "s3://bucket/photos"),
        ("data", "data/work/here"),
        ("/data", "/data/../data/ws"),
        ("file:///data", "/data/ws"),
        (".", "ws"),
    ],
)
def test_results_are_never_below_the_images_they_come_from(
    location: str, workspace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("ingest.locations.0.uri", "infer.input", "evaluate.images"):
        file = write_config(tmp_path, workspace=workspace)
        with pytest.raises(UserError, match=rf"workspace: .* is in {key} \({re.escape(location)}\)"):
            config.load(file, [f"{key}={location}"])
    words = ["--model", "m", "--input", location, "--output", workspace]
    assert infer.main(words) == 2
    assert "--output: " in capsys.readouterr().err


def test_the_runs_of_a_remote_workspace_are_not_read_as_images_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file = write_config(tmp_path, workspace="s3://bucket/ws")
    with pytest.raises(
        UserError, match=r"tracking.uri: .*/mlflow/artifacts is in ingest.locations.0.uri \(\.\)"
    ):
        config.load(file, ["ingest.locations.0.uri=."])
    config.load(file, ["ingest.locations.0.uri=.", "tracking.enabled=false"])
    config.load(file, ["ingest.locations.0.uri=.", "tracking.uri=http://localhost:5000"])


def test_a_workspace_beside_the_images_or_around_them_is_allowed(tmp_path: Path) -> None:
    file = write_config(tmp_path, workspace="s3://bucket/photos-ws")
    config.load(file, ["ingest.locations.0.uri=s3://bucket/photos"])
    config.load(file, ["ingest.locations.0.uri=s3://bucket/photos-ws/sample"])
    config.load(file, ["ingest.locations.0={uri: s3://bucket/pairs.csv, role: table}"])


def write_config(folder: Path, **values: Any) -> str:
    """A config for photos of `folder`/data."""
    for n in range(4):
        write_image(folder / "data" / f"{n}.png", photo(n))
    settings = {
        "workspace": str(folder / "ws"),
        "ingest": {"locations": [{"uri": str(folder / "data"), "role": "target"}]},
        "pair": {"derive_source": "edges"},
        "shard": {"size": [64, 64]},
        "augment": {"crop": None},
        "train": {
            "model": {"kind": "pix2pix", "levels": 6, "width": 8},
            "phases": [{"name": "whole", "kind": "whole", "epochs": 1, "batch": 2}],
        },
    } | values
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)
