"""Small objects through obstore: what s3fs would have read and written, or left to it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import NoCredentialsError

from stages import storage
from stages.errors import UserError
from stages.objects.fetch import Object, Reader
from stages.storage import s3
from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3

KEYS = (
    "a/b.png", "with space.png", "ü/ä 😀.png", "100%25.png", "p%.png", "q#h", "w?x=1&y", "a+b",
    "it's \"so\"*~", "a:b@c,d=e;f$g!",
)  # fmt: skip
LEFT_TO_S3FS = ("a//b", "tab\tbed", "new\nline", "folder/")


@pytest.mark.s3
@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_the_same_key_for_both_clients(s3_store: SeaweedS3, s3_bucket: str, key: str) -> None:
    fs, path = s3_store.client(), f"{s3_bucket}/{key}"
    assert s3.put(fs, path, key.encode())
    assert fs.cat_file(path) == key.encode()
    assert [entry["name"] for entry in fs.find(s3_bucket, detail=True).values()] == [path]
    found = s3.get(fs, path)
    assert found is not None
    assert found == (key.encode(), fs.info(path)["ETag"].strip('"'))


@pytest.mark.s3
@pytest.mark.parametrize("key", LEFT_TO_S3FS)
def test_a_key_that_would_become_another_is_left_to_s3fs(
    s3_store: SeaweedS3, s3_bucket: str, key: str
) -> None:
    fs = s3_store.client()
    assert not s3.put(fs, f"{s3_bucket}/{key}", b"x")
    assert s3.get(fs, f"{s3_bucket}/{key}") is None
    assert fs.find(s3_bucket) == []
    assert s3.put(fs, f"{s3_bucket}/plain", b"x")  # and the bucket is not given up for it


@pytest.mark.s3
def test_what_is_not_there_is_for_s3fs_to_say(s3_store: SeaweedS3, s3_bucket: str) -> None:
    fs = s3_store.client()
    assert s3.get(fs, f"{s3_bucket}/none") is None
    assert not s3.put(fs, "no-such-bucket/a", b"x")
    assert s3.put(fs, f"{s3_bucket}/a", b"x")


@pytest.mark.s3
def test_large_objects_are_left_to_s3fs(
    s3_store: SeaweedS3, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MOST_BYTES", 3)
    fs = s3_store.client()
    assert s3.put(fs, f"{s3_bucket}/a", b"123")
    assert not s3.put(fs, f"{s3_bucket}/a", b"1234")
    assert fs.cat_file(f"{s3_bucket}/a") == b"123"


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
def test_what_only_s3fs_knows_is_not_left_out_of_a_request(
    s3_store: SeaweedS3, s3_bucket: str, options: dict[str, Any]
) -> None:
    fs = s3_store.client(**options)
    assert not s3.put(fs, f"{s3_bucket}/a", b"x")
    assert s3.get(fs, f"{s3_bucket}/a") is None


@pytest.mark.s3
def test_credentials_are_those_of_s3fs_wherever_it_has_them_from(
    s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"endpoint_url": s3_store.url, "key": None, "secret": None, "skip_instance_cache": True}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    assert s3.put(s3_store.client(**names), f"{s3_bucket}/from-environment", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text(f"[loom]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    fs = s3_store.client(**names, profile="loom")
    assert s3.put(fs, f"{s3_bucket}/from-profile", b"x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = s3_store.client(**names, max_concurrency=3)
    assert not s3.put(nobody, f"{s3_bucket}/from-nobody", b"x")
    with pytest.raises(NoCredentialsError):
        nobody.pipe_file(f"{s3_bucket}/from-nobody", b"x")


@pytest.mark.s3
def test_a_refusal_is_told_as_s3fs_tells_it(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None
) -> None:
    reader = s3_store.options(read_only=True)
    fs = s3_store.client(**reader)
    assert not s3.put(fs, f"{s3_bucket}/a", b"x")
    storage.configure({"s3": reader})
    with pytest.raises(UserError, match="access denied"):
        storage.write_bytes(f"s3://{s3_bucket}/a", b"x")


@pytest.mark.s3
def test_a_store_that_failed_is_left_to_s3fs_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="weed", ignore_cleanup_errors=True) as folder:
        store = SeaweedS3(Path(folder)).start()
        try:
            fs = store.client()
            fs.call_s3("create_bucket", Bucket="bucket")
            assert s3.put(fs, "bucket/a", b"x")
            store.kill()
            assert s3.get(fs, "bucket/a") is None
            store.start()
            assert fs.cat_file("bucket/a") == b"x"
            assert s3.get(fs, "bucket/a") is None  # it answers again, but is asked again only later
            later = s3.time.monotonic() + s3.REST_S
            monkeypatch.setattr(s3.time, "monotonic", lambda: later)
            assert s3.get(fs, "bucket/a") is not None
        finally:
            store.kill()


@pytest.mark.s3
def test_an_object_without_an_md5_is_read_by_the_client_that_checks_it(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = s3_store.client()
    fs.pipe_file(f"{s3_bucket}/a", b"pixels")
    etag = fs.info(f"{s3_bucket}/a")["ETag"].strip('"')
    asked: list[str] = []
    get = s3.get
    monkeypatch.setattr(s3, "get", lambda fs, path: asked.append(path) or get(fs, path))
    storage.configure({"s3": s3_store.options()})
    uri = f"s3://{s3_bucket}/a"
    assert Reader().read(Object(uri)) == b"pixels"
    assert Reader().read(Object(uri, size=6)) == b"pixels"
    assert asked == []
    assert Reader().read(Object(uri, size=6, etag=etag)) == b"pixels"
    assert asked == [f"{s3_bucket}/a"]
