"""The data's whole way, ingest to batches, on a real S3 server in trouble: the same rows, or one clear error.

Each stage's tasks run in this process, without Ray, so that one fault is one test of a few seconds; the
stages' tests run them through Ray. `pytest -s` shows how many requests were made
and how many of them were spoiled.
"""

from __future__ import annotations

import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import torch

from stages import shard, storage
from stages.base import Role
from stages.config.ingest import IngestConfig
from stages.config.shard import ShardConfig
from stages.errors import StageError, UserError
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.shards.feed import Feed, read_here
from stages.storage import retry
from tests.stores.ceph import CephS3, missing
from tests.stores.faults import Fault, FaultProxy
from tests.stores.seaweed import SeaweedS3
from tests.support import pairs
from tests.support.pairs import SIZE, photo

PAIRS = 24
ROLES: tuple[Role, ...] = ("source", "target")
SHARD = ShardConfig(size=SIZE, row_group_rows=4)
Store = SeaweedS3 | CephS3
Batches = list[tuple[list[str], torch.Tensor, torch.Tensor]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("seaweed", marks=pytest.mark.s3),
        pytest.param("ceph", marks=pytest.mark.ceph),
    ],
)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """One real server for the module, of either make."""
    if request.param == "seaweed":
        yield request.getfixturevalue("s3_store")
        return
    if missing():
        pytest.skip(f"NOT RUN: needs Ceph's {', '.join(missing())} (apt: radosgw ceph-mon ceph-osd)")
    # A short path: the servers' sockets live in it, and their names are limited to 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="ceph", ignore_cleanup_errors=True) as folder,
        CephS3(Path(folder)) as ceph,
    ):
        yield ceph


@pytest.fixture(scope="module", autouse=True)
def client_options() -> Iterator[None]:
    """Client options that a test sets are its own."""
    before = dict(fsspec.config.conf)
    yield
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)


def png(seed: int) -> bytes:
    from stages.images.encode import encode_png as encode

    return encode(photo(seed))


def fill(store: Store, bucket: str, count: int = PAIRS) -> None:
    files = {
        f"{bucket}/data/{n:02d}_{role}.png": png(2 * n + at)
        for n in range(count)
        for at, role in enumerate(ROLES)
    }
    store.client().pipe(files)


def put_bucket(store: Store, name: str) -> str:
    store.client().call_s3("create_bucket", Bucket=name)
    return name


def listing(bucket: str) -> IngestConfig:
    return IngestConfig.model_validate(
        {
            "locations": [
                {"uri": f"s3://{bucket}/data", "role": role, "pattern": f"{{key}}_{role}.png"}
                for role in ROLES
            ]
        }
    )


def list_and_pair(bucket: str, work: str) -> list[str]:
    """The parts of pairs of a bucket."""
    return pairs.list_and_pair(listing(bucket), work)


def make(parts: Sequence[str], output: str) -> DatasetSpec:
    """Shards of the parts."""
    specs = shard.role_specs(SHARD, ROLES)
    done = shard.Summary()
    for part in parts:
        done.add(shard.shard_part(part, output=output, config=SHARD, specs=specs, io_threads=4))
    done.check(0.0, output)
    spec = DatasetSpec(size=SIZE, roles=specs, splits=done.splits())
    dataset.save(output, spec)
    return spec


def batches(output: str, spec: DatasetSpec) -> Batches:
    """An epoch of training input."""
    with Feed(output, spec, batch=4, epochs=1, threads=2, read=read_here) as feed:
        return [(list(b.keys), b.source.clone(), b.target.clone()) for b in feed.epoch(0)]


def reachable(store: Store) -> bool:
    try:
        socket.create_connection(store.address, timeout=1).close()
    except OSError:
        return False
    return True


def contents(store: Store, folder: str) -> dict[str, bytes]:
    """Every object below a folder, read straight from the store."""
    client = store.client()
    return {path.removeprefix(folder): client.cat_file(path) for path in client.find(folder)}


@pytest.fixture(scope="module")
def bucket(store: Store) -> str:
    name = put_bucket(store, "faults")
    fill(store, name)
    return name


@pytest.fixture(scope="module")
def wanted(store: Store, bucket: str) -> tuple[dict[str, bytes], Batches]:
    """The shards and batches of a run without faults."""
    storage.configure({"s3": store.options()})
    parts = list_and_pair(bucket, f"s3://{bucket}/calm")
    output = f"s3://{bucket}/calm/shards"
    spec = make(parts, output)
    assert spec.rows("train") == PAIRS
    return contents(store, f"{bucket}/calm/shards/"), batches(output, spec)


def same_batches(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for a, b in zip(one, other, strict=True)
    )


# One attempt of a client that waits for a second: faults reach our own patience at once.
HASTY: dict[str, Any] = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}

PASSING = {
    "slow down": Fault("status", share=0.2, code=503, error="SlowDown"),
    "reset": Fault("reset", share=0.1),
    "reset after": Fault("reset_after", share=0.1),
    "500 after a write": Fault("status_after", share=0.3, method="PUT", code=500, error="InternalError"),
    "truncated": Fault("truncate", share=0.1, method="GET"),
    "flipped": Fault("flip", share=0.1, method="GET", path=r"\.(png|parquet)"),
    "latency": Fault("delay", seconds=0.05),
    "black hole": Fault("hang", share=0.05, times=3),
}


@pytest.mark.parametrize("name", PASSING)
def test_trouble_that_passes_changes_nothing(
    store: Store, bucket: str, wanted: tuple[dict[str, bytes], Batches], name: str
) -> None:
    fault = replace(PASSING[name])  # of its own, with none of its `times` used up
    work = f"s3://{bucket}/{name.replace(' ', '-')}"
    output = f"{work}/shards"
    with FaultProxy(store.address, [fault], seed=5) as proxy:
        storage.configure({"s3": {**store.options(endpoint=proxy.url), **HASTY}})
        parts = list_and_pair(bucket, work)
        spec = make(parts, output)
        shard_requests = dict(proxy.counts)
        read = batches(output, spec)
        print(f"\n{name}: {dict(proxy.counts)} in all, {shard_requests} until the shards were there")
        assert proxy.counts[fault.action]
    assert contents(store, output.removeprefix("s3://") + "/") == wanted[0]
    assert same_batches(read, wanted[1])


@pytest.mark.parametrize("request_", ["uploads", "uploadId="])
def test_a_file_in_parts_is_whole_though_an_answer_about_it_is_lost(
    store: Store, bucket: str, request_: str
) -> None:
    uri, data = f"s3://{bucket}/parts-{request_}", random.Random(0).randbytes(storage.UPLOAD_BYTES + 3)
    lost = Fault("status_after", times=1, method="POST", path=request_, code=500)

    def send() -> None:
        with storage.create(uri) as file:
            file.write(data)

    with FaultProxy(store.address, [lost], seed=5) as proxy:
        storage.configure({"s3": store.options(endpoint=proxy.url)})
        storage.written(send, uri)
        assert proxy.counts["status_after"] == 1, dict(proxy.counts)
    assert store.client().cat_file(uri) == data


def test_a_store_that_is_killed_and_comes_back_after_seconds_is_waited_for(
    store: Store, bucket: str, wanted: tuple[dict[str, bytes], Batches]
) -> None:
    """SIGKILL while shards are made, and again while they are read."""
    storage.configure({"s3": {**store.options(), **HASTY}})
    parts = list_and_pair(bucket, f"s3://{bucket}/killed")
    output = f"s3://{bucket}/killed/shards"

    def away(seconds: float) -> threading.Thread:
        def kill_and_start() -> None:
            store.kill()
            time.sleep(seconds)
            store.start()

        thread = threading.Thread(target=kill_and_start)
        thread.start()
        while reachable(store):
            time.sleep(0.01)
        return thread

    thread = away(5.0)
    spec = make(parts, output)
    thread.join()
    thread = away(1.0)
    read = batches(output, spec)
    thread.join()
    assert contents(store, output.removeprefix("s3://") + "/") == wanted[0]
    assert same_batches(read, wanted[1])


def test_a_store_that_stays_away_is_one_error_and_nothing_is_taken_for_whole(
    store: Store, bucket: str, wanted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    storage.configure({"s3": store.options()})
    parts = list_and_pair(bucket, f"s3://{bucket}/stays-away")
    output = f"s3://{bucket}/stays-away/shards"
    once = {"config_kwargs": {"read_timeout": 0.5, "connect_timeout": 0.5, "retries": {"max_attempts": 0}}}
    for fault in (Fault("status", code=503, path=r"\.png"), Fault("reset", path=r"\.png")):
        with FaultProxy(store.address, [fault]) as proxy:
            storage.configure({"s3": {**store.options(endpoint=proxy.url), **once}})
            with pytest.raises(
                UserError, match=r"s3://.*\.png: failed at each of 8 attempts.* when the store answers"
            ) as caught:
                make(parts, output)
            print(f"\n{fault.action}: {dict(proxy.counts)}")
        assert "\n" not in str(caught.value)
        assert not [name for name in contents(store, output.removeprefix("s3://")) if "quarantine" in name]
        storage.configure({"s3": store.options()})
        with pytest.raises(UserError, match=r"no dataset\.parquet"):
            dataset.load(output)
    spec = make(parts, output)  # and once it is back the run goes on
    assert spec.rows("train") == PAIRS


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"secret": "wrong"}, id="secret"),
        pytest.param({"key": "nobody"}, id="user"),
        pytest.param({"token": "expired"}, id="token"),
        pytest.param({"anon": True, "key": None, "secret": None}, id="anonymous"),
    ],
)
def test_credentials_that_do_not_hold_end_every_stage_with_one_line(
    store: Store, bucket: str, wanted: tuple[dict[str, bytes], Batches], changes: dict[str, Any]
) -> None:
    storage.configure({"s3": store.options()})
    work = f"s3://{bucket}/refused-{'-'.join(changes)}"
    parts = list_and_pair(bucket, work)
    spec = dataset.load(f"s3://{bucket}/calm/shards")
    if "token" in changes:  # this server takes any token; AWS answers so to one that is too old
        answer = Fault("status", code=403, error="ExpiredToken", method="GET")
    else:
        answer = Fault("delay", seconds=0)
    with FaultProxy(store.address, [answer]) as proxy:
        storage.configure({"s3": {**store.options(endpoint=proxy.url), **changes}})
        for stage in (
            lambda: list_and_pair(bucket, f"{work}/again"),
            lambda: make(parts, f"{work}/shards"),
            lambda: batches(f"s3://{bucket}/calm/shards", spec),
        ):
            with pytest.raises(UserError, match=r"access denied.*credentials") as caught:
                stage()
            assert "\n" not in str(caught.value)
    storage.configure({"s3": store.options()})  # `contents` would take the refused ones as its defaults
    assert contents(store, f"{bucket}/{work.rpartition('/')[2]}/shards") == {}


def test_a_bucket_that_is_missing_or_may_not_be_written_is_named(
    store: Store, bucket: str, wanted: object
) -> None:
    storage.configure({"s3": store.options()})
    parts = list_and_pair(bucket, f"s3://{bucket}/places")
    with pytest.raises(UserError, match=r"s3://no-such-bucket/out.*: there is no such bucket"):
        make(parts, "s3://no-such-bucket/out")
    if isinstance(store, CephS3):
        return  # one user is set up there
    storage.configure({"s3": store.options(read_only=True)})
    for write in (
        lambda: make(parts, f"s3://{bucket}/read-only"),
        lambda: list_and_pair(bucket, f"s3://{bucket}/read-only"),
    ):
        with pytest.raises(UserError, match=rf"s3://{bucket}/read-only.*: access denied"):
            write()
    storage.configure({"s3": store.options()})
    assert contents(store, f"{bucket}/read-only") == {}


def test_objects_deleted_or_replaced_between_listing_and_reading_are_left_out(store: Store) -> None:
    bucket = put_bucket(store, "moving")
    fill(store, bucket, 12)
    storage.configure({"s3": store.options()})
    parts = list_and_pair(bucket, f"s3://{bucket}/work")
    client = store.client()
    client.rm_file(f"{bucket}/data/03_source.png")
    client.pipe_file(f"{bucket}/data/07_target.png", png(99))
    client.pipe_file(f"{bucket}/data/08_target.png", png(17))  # again, but with the same content
    output = f"s3://{bucket}/work/shards"
    specs = shard.role_specs(SHARD, ROLES)
    done = shard.Summary()
    for part in parts:
        done.add(shard.shard_part(part, output=output, config=SHARD, specs=specs, io_threads=4))
    assert dict(done.rejects) == {"missing": 1, "changed": 1}
    assert done.counts()["train"] == 10
    with pytest.raises(
        StageError, match=r"2 of 12 pairs were rejected .*missing 1, changed 1|changed 1, missing 1"
    ):
        done.check(0.01, output)


def test_flips_that_stay_are_one_error_when_shards_are_read(
    store: Store, bucket: str, wanted: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is damaged in the store itself; its pairs are not dropped quietly."""
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.02)
    storage.configure({"s3": store.options()})
    client = store.client()
    client.cp(f"{bucket}/calm/shards", f"{bucket}/rotten", recursive=True)
    spec = dataset.load(f"s3://{bucket}/rotten")
    name = next(iter(spec.splits["train"])).name
    data = bytearray(client.cat_file(f"{bucket}/rotten/{name}"))
    data[len(data) // 3] ^= 4
    client.pipe_file(f"{bucket}/rotten/{name}", bytes(data))
    with pytest.raises(StageError, match=rf"{name}.*(CRC|damaged)"):
        batches(f"s3://{bucket}/rotten", spec)
