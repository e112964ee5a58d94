"""Objects of S3: which client serves them, and that either gives the same bytes, etags and errors."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import certifi
import obstore
import pytest
from botocore.exceptions import NoCredentialsError
from hypothesis import given, settings, strategies as st
from obstore.store import MemoryStore

from stages import storage
from stages.errors import UserError
from stages.images.kinds import ImageRejected
from stages.objects.fetch import Object, Reader
from stages.storage import retry, s3
from tests.stores.faults import Fault, FaultProxy
from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3

KEYS = (
    "a/b.png", "with space.png", "ü/ä 😀.png", "100%25.png", "p%.png", "q#h", "w?x=1&y", "a+b",
    "it's \"so\"*~", "a:b@c,d=e;f$g!",
)  # fmt: skip
KEYS_OF_S3FS = ("a//b", "tab\tbed", "new\nline", "folder/")


def put_and_get(fs: Any, path: str) -> None:
    """What was written is what is read and listed, with one etag, whichever client reads."""
    data = path.encode()
    s3.put(fs, path, data)
    etag = fs.info(path)["ETag"].strip('"')
    assert s3.get(fs, path, verify=False) == (data, etag)
    assert s3.get(fs, path, verify=True) == (data, etag)
    assert fs.cat_file(path) == data


# -- which client -------------------------------------------------------------


@settings(deadline=None)
@given(st.text(st.sampled_from("a./\0\n\x7fü%?\\ \ud800"), max_size=6))
def test_obstore_serves_the_keys_that_it_keeps_as_they_are(key: str) -> None:
    store = MemoryStore()
    try:
        obstore.put(store, key, b"x")
    except ValueError:  # also of a key that has no UTF-8
        unchanged = False
    else:
        unchanged = [entry["path"] for entry in obstore.list(store).collect()] == [key]
    assert s3.suits(key, -1) == unchanged


def test_large_objects_are_not_for_obstore() -> None:
    assert s3.suits("a", s3.MAX_BYTES)
    assert not s3.suits("a", s3.MAX_BYTES + 1)


@pytest.mark.s3
@pytest.mark.parametrize(
    "options",
    [
        {"s3_additional_kwargs": {"ServerSideEncryption": "AES256"}},
        {"requester_pays": True},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"s3": {"addressing_style": "virtual"}}},
        {"anon": True, "key": None, "secret": None},
    ],
)
def test_options_that_obstore_does_not_know_choose_s3fs(
    s3_store: SeaweedS3, s3_bucket: str, options: dict[str, Any]
) -> None:
    assert s3.choose(s3_store.client(), s3_bucket) is not None
    assert s3.choose(s3_store.client(**options), s3_bucket) is None


@pytest.mark.s3
def test_a_style_of_addresses_in_awss_own_file_chooses_s3fs(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = path\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert s3.choose(s3_store.client(max_concurrency=7, skip_instance_cache=True), s3_bucket) is None


@pytest.mark.s3
def test_certificates_of_ones_own_choose_s3fs_where_there_is_tls(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", certifi.where())
    assert s3.choose(s3_store.client(max_concurrency=8, skip_instance_cache=True), s3_bucket) is not None
    secure = s3_store.url.replace("http://", "https://")
    fs = s3_store.client(max_concurrency=8, skip_instance_cache=True, endpoint_url=secure)
    assert s3.choose(fs, s3_bucket) is None


@pytest.mark.s3
@pytest.mark.parametrize(("region", "chosen"), [("us-east-1", True), ("eu-south-2", False)])
def test_a_bucket_in_another_region_is_for_s3fs_which_follows_it(
    s3_store: SeaweedS3, s3_bucket: str, region: str, chosen: bool
) -> None:
    answer = Fault("header", method="HEAD", path=f"/{s3_bucket}$", header=f"x-amz-bucket-region: {region}")
    with FaultProxy(s3_store.address, [answer]) as proxy:
        fs = s3_store.client(endpoint_url=proxy.url, client_kwargs={"region_name": "us-east-1"})
        assert (s3.choose(fs, s3_bucket) is not None) == chosen
        assert proxy.counts["header"]


@pytest.mark.parametrize("bucket", ["my-images", "images.example.com", "my-s3"])
def test_ordinary_buckets_are_for_obstore(bucket: str) -> None:
    assert s3._BUCKET.fullmatch(bucket)


@pytest.mark.parametrize(
    "bucket", ["arn:aws:s3:eu-west-1:1:accesspoint/a", "a--use1-az4--x-s3", "a-s3alias", "tenant:a", "Old"]
)
def test_other_kinds_of_bucket_are_for_s3fs(bucket: str) -> None:
    assert not s3._BUCKET.fullmatch(bucket)


# -- the same result from either ----------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("key", [*KEYS, *KEYS_OF_S3FS[:-1]])
def test_a_key_is_the_same_key_for_both_clients(s3_store: SeaweedS3, s3_bucket: str, key: str) -> None:
    fs, path = s3_store.client(), f"{s3_bucket}/{key}"
    assert s3.suits(key, 1) == (key in KEYS)
    put_and_get(fs, path)
    if key in KEYS:
        assert [entry["name"] for entry in fs.find(s3_bucket, detail=True).values()] == [path]


@pytest.mark.s3
def test_a_large_object_is_written_and_read(
    s3_store: SeaweedS3, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MAX_BYTES", 3)
    put_and_get(s3_store.client(), f"{s3_bucket}/a")


@pytest.mark.s3
def test_an_object_without_an_md5_is_read_by_the_client_that_checks_it(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None
) -> None:
    fs = s3_store.client()
    fs.pipe_file(f"{s3_bucket}/a", b"pixels")
    etag = fs.info(f"{s3_bucket}/a")["ETag"].strip('"')
    uri = f"s3://{s3_bucket}/a"
    with FaultProxy(s3_store.address) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        for unverified in (Object(uri), Object(uri, size=6), Object(uri, size=6, etag="an-upload-in-parts")):
            with suppress(ImageRejected):  # the last is another version
                assert Reader().read(unverified) == b"pixels"
        assert proxy.agents["GET object_store"] == 0
        assert Reader().read(Object(uri, size=6, etag=etag)) == b"pixels"
        assert proxy.agents["GET object_store"] == 1


# -- errors -------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("verify", [False, True], ids=["obstore", "s3fs"])
def test_errors_are_the_same_from_both_clients(s3_store: SeaweedS3, s3_bucket: str, verify: bool) -> None:
    fs = s3_store.client()
    s3.put(fs, f"{s3_bucket}/a", b"x")
    with pytest.raises(FileNotFoundError, match="specified key does not exist"):
        s3.get(fs, f"{s3_bucket}/none", verify=verify)
    answers = {
        ("AccessDenied", 403): PermissionError,
        ("ExpiredToken", 400): PermissionError,
        ("NoSuchKey", 404): FileNotFoundError,
        ("NoSuchBucket", 404): FileNotFoundError,
        ("InternalError", 500): OSError,
        ("NeverHeardOf", 400): OSError,
    }
    with FaultProxy(s3_store.address) as proxy:
        fs = s3_store.client(endpoint_url=proxy.url, config_kwargs={"retries": {"max_attempts": 0}})
        for (code, status), kind in answers.items():
            proxy.faults = [Fault("status", code=status, error=code, method="GET")]
            with pytest.raises(kind, match="injected") as caught:
                s3.get(fs, f"{s3_bucket}/a", verify=verify)
            assert retry.passing(caught.value) == (kind is OSError)


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_not_found(s3_store: SeaweedS3) -> None:
    fs = s3_store.client()
    for verify in (False, True):
        with pytest.raises(FileNotFoundError):
            s3.get(fs, "no-such-bucket/a", verify=verify)
    with pytest.raises(FileNotFoundError):
        s3.put(fs, "no-such-bucket/a", b"x")


@pytest.mark.s3
def test_a_refusal_is_the_users_error(s3_store: SeaweedS3, s3_bucket: str, client_options: None) -> None:
    reader = s3_store.options(read_only=True)
    with pytest.raises(PermissionError, match="Access Denied"):
        s3.put(s3_store.client(**reader), f"{s3_bucket}/a", b"x")
    storage.configure({"s3": reader})
    with pytest.raises(UserError, match="access denied"):
        storage.write_bytes(f"s3://{s3_bucket}/a", b"x")


@pytest.mark.s3
def test_a_failure_is_repeated_by_the_client_that_was_chosen(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.01)
    with FaultProxy(s3_store.address) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        uri = f"s3://{s3_bucket}/a"
        storage.write_bytes(uri, b"first")
        proxy.faults = [Fault("status", times=3, method="PUT"), Fault("reset", times=2, method="PUT")]
        storage.write_bytes(uri, b"second")
        assert proxy.counts["status"] + proxy.counts["reset"] == 5
        proxy.faults = [Fault("status", method="PUT")]
        proxy.counts.clear()
        with pytest.raises(UserError, match=r"failed at each of 8 attempts: .*injected"):
            storage.write_bytes(uri, b"third")
        assert proxy.counts["status"] == retry.ATTEMPTS
    storage.configure({"s3": s3_store.options()})
    assert storage.read_bytes(uri) == b"second"


@pytest.mark.s3
def test_a_store_that_is_back_is_used_at_once(client_options: None) -> None:
    with tempfile.TemporaryDirectory(prefix="weed", ignore_cleanup_errors=True) as folder:
        store = SeaweedS3(Path(folder)).start()
        try:
            fs = store.client(config_kwargs={"retries": {"max_attempts": 0}})
            fs.call_s3("create_bucket", Bucket="bucket")
            s3.put(fs, "bucket/a", b"x")
            store.kill()
            with pytest.raises(OSError) as caught:  # noqa: PT011 - words differ by system
                s3.get(fs, "bucket/a", verify=False)
            assert retry.passing(caught.value)
            store.start()
            assert s3.get(fs, "bucket/a", verify=False)[0] == b"x"
        finally:
            store.kill()


# -- credentials --------------------------------------------------------------


@pytest.mark.s3
def test_credentials_are_those_of_s3fs_wherever_it_has_them_from(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"endpoint_url": s3_store.url, "key": None, "secret": None, "skip_instance_cache": True}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    put_and_get(s3_store.client(**names), f"{s3_bucket}/from-environment")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(f"[loom]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    put_and_get(s3_store.client(**names, profile="loom"), f"{s3_bucket}/from-profile")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = s3_store.client(**names, max_concurrency=3)
    with pytest.raises(NoCredentialsError):
        s3.put(nobody, f"{s3_bucket}/from-nobody", b"x")


@pytest.mark.s3
def test_credentials_of_a_session_are_asked_for_again_before_they_expire(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore keeps them for `CREDENTIALS_S`; s3fs's session, which renews them, is the one to ask."""
    monkeypatch.setattr(s3, "CREDENTIALS_S", 0.0)
    asked = tmp_path / "asked"
    program = tmp_path / "program.sh"
    program.write_text(
        f"#!/bin/sh\necho >> {asked}\n"
        f'echo \'{{"Version": 1, "AccessKeyId": "{ACCESS_KEY}", "SecretAccessKey": "{SECRET_KEY}",'
        " \"Expiration\": \"'$(date -u -d '+1 minute' +%Y-%m-%dT%H:%M:%SZ)'\"}'\n"
    )
    program.chmod(0o700)
    config = tmp_path / "config"
    config.write_text(f"[profile loom]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    names = {"endpoint_url": s3_store.url, "key": None, "secret": None, "skip_instance_cache": True}
    fs = s3_store.client(**names, profile="loom", max_concurrency=5)
    s3.put(fs, f"{s3_bucket}/a", b"x")
    before = len(asked.read_text().splitlines())
    s3.put(fs, f"{s3_bucket}/a", b"y")
    assert len(asked.read_text().splitlines()) > before
