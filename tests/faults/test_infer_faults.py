"""Batch inference under faults: of the store, of a worker process, of the driver, of MLflow."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import s3fs

from stages.images import encode
from stages.inference import outputs
from tests.stores.faults import Fault, FaultProxy
from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3, free_ports
from tests.support.models import make_model, scene

pytestmark = [pytest.mark.long, pytest.mark.s3]

COUNT = 200
FAULTS = (
    Fault("status", 0.03),
    Fault("status", 0.02, code=500, error="InternalError"),
    Fault("reset", 0.02),
    Fault("status_after", 0.02, method="PUT"),  # written, and answered with an error
    Fault("reset_after", 0.02, method="PUT"),
    Fault("truncate", 0.03, method="GET"),
    Fault("flip", 0.03, method="GET", path=r"/in/"),
)


def command(bucket: str, endpoint: str, *more: str) -> tuple[list[str], dict[str, str]]:
    """The command over a bucket, with its environment."""
    words = [sys.executable, "-m", "pipeline.infer", "--model", f"s3://{bucket}/model"]
    words += ["--input", f"s3://{bucket}/in", "--output", f"s3://{bucket}/out"]
    for setting in (
        f"storage.s3.endpoint_url={endpoint}",
        "resources.infer_actors=1",
        "resources.threads_per_worker=1",
        *more,
    ):
        words += ["--set", setting]
    credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    return words, {**os.environ, **credentials, "RAY_AUTH_MODE": "disabled"}


def fill(client: s3fs.S3FileSystem, bucket: str, model: Path) -> None:
    sources = {
        f"{bucket}/in/{index:03d}.png": encode.encode_image(scene(index, 96, 64)["source"], "png")
        for index in range(COUNT)
    }
    client.pipe(sources)
    client.pipe({f"{bucket}/model/{path.name}": path.read_bytes() for path in model.iterdir()})


def rows(client: s3fs.S3FileSystem, bucket: str) -> list[dict[str, Any]]:
    names = client.find(f"{bucket}/out/{outputs.TABLE}")
    return [row for name in names for row in pq.read_table(io.BytesIO(client.cat_file(name))).to_pylist()]


def check(client: s3fs.S3FileSystem, bucket: str) -> None:
    """Every source has one row and one image, byte for byte; there is nothing else."""
    listed = rows(client, bucket)
    assert sorted(row["key"] for row in listed) == [f"{index:03d}" for index in range(COUNT)]
    assert not [row for row in listed if row["error"] is not None]
    client.invalidate_cache()
    images = {name: client.cat_file(name) for name in client.find(f"{bucket}/out/{outputs.IMAGES}")}
    assert {name.rpartition("/")[2] for name in images} == {f"{index:03d}.png" for index in range(COUNT)}
    for row in listed:
        data = images[f"{bucket}/out/{row['output']}"]
        assert (zlib.crc32(data), len(data)) == (row["crc"], row["size"])


def wait(condition: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    until = time.monotonic() + 240
    while not (value := condition()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, "the condition was never true"
        time.sleep(0.05)
    return value


def workers(driver: int) -> list[psutil.Process]:
    """The worker processes of this driver's Ray."""
    processes = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "MapBatches(infer)" in " ".join(process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def test_a_bad_network_a_killed_process_and_a_killed_driver_lose_and_repeat_nothing(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path
) -> None:
    client = s3_store.client()
    fill(client, s3_bucket, make_model(tmp_path / "model"))
    log = tmp_path / "log"

    def written() -> list[str]:
        client.invalidate_cache()
        names: list[str] = client.find(f"{s3_bucket}/out/{outputs.IMAGES}")
        return names

    def parts() -> dict[str, Any]:
        client.invalidate_cache()
        entries = client.find(f"{s3_bucket}/out/{outputs.TABLE}", detail=True)
        return {name: entry["LastModified"] for name, entry in entries.items()}

    with FaultProxy(s3_store.address, FAULTS) as proxy:
        words, environment = command(s3_bucket, proxy.url)
        with log.open("wb") as file:
            driver = subprocess.Popen(
                words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait(written, driver, log)
        (first,) = workers(driver.pid)
        first.kill()
        wait(lambda: parts() and [p for p in workers(driver.pid) if p.pid != first.pid], driver, log)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        before = parts()
        result = subprocess.run(
            words, env=environment, timeout=400, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"images {COUNT}, errors 0" in result.stdout
        spoiled = {name: number for name, number in proxy.counts.items() if name != "requests"}
        assert spoiled.keys() == {fault.action for fault in FAULTS}, spoiled
    assert {name: when for name, when in parts().items() if name in before} == before
    check(client, s3_bucket)


def test_a_store_that_is_killed_and_comes_back_only_delays(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path
) -> None:
    client = s3_store.client()
    fill(client, s3_bucket, make_model(tmp_path / "model"))
    log = tmp_path / "log"
    with FaultProxy(s3_store.address) as proxy:
        words, environment = command(s3_bucket, proxy.url)
        with log.open("wb") as file:
            driver = subprocess.Popen(
                words, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            wait(lambda: client.find(f"{s3_bucket}/out/{outputs.IMAGES}"), driver, log)
            s3_store.kill()
            refused_from = proxy.counts["requests"]
            wait(lambda: proxy.counts["requests"] >= refused_from + 4, driver, log)
            s3_store.start()
            assert driver.wait(timeout=300) == 0, log.read_text()
        finally:
            if driver.poll() is None:
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
    check(s3_store.client(skip_instance_cache=True), s3_bucket)


def test_without_its_mlflow_a_model_in_a_folder_generates_and_a_registered_one_is_named(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path
) -> None:
    client = s3_store.client()
    fill(client, s3_bucket, make_model(tmp_path / "model"))
    (port,) = free_ports(1)  # nobody listens there
    words, environment = command(s3_bucket, s3_store.url, f"tracking.uri=http://127.0.0.1:{port}")
    result = subprocess.run(words, env=environment, timeout=400, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    check(client, s3_bucket)
    words[words.index(f"s3://{s3_bucket}/model")] = "models:/street@champion"
    result = subprocess.run(words, env=environment, timeout=400, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("--model: models:/street@champion: ")
