"""Objects of S3 stores: whole ones read and written, and pages of listings.

    get(fs, path, size=..., verify=...)   -> bytes, etag    by one request, so the etag is that of these bytes
    put(fs, path, data)
    list_page(fs, bucket, prefix, ...)    -> S3's answer

Two clients can do it. s3fs is the one that users configure. obstore takes a quarter of s3fs's processor time
a request (benchmarks/README.md), but knows fewer options, keys and kinds of bucket. Which one serves a bucket
is chosen once, from the options and the bucket alone (`choose`); keys and sizes that obstore cannot serve
(`suits`) go to s3fs. No request is sent a second time by the other client: a failure is an error, which
`stages.storage.retry` repeats or not. Either client's errors are Python's own (FileNotFoundError,
PermissionError, OSError), by the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import obstore
from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]
from fsspec.asyn import sync
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store
from s3fs.errors import ERROR_CODE_TO_EXCEPTION

if TYPE_CHECKING:
    from obstore.store import S3Credential
    from s3fs import S3FileSystem

MAX_BYTES = 16 << 20  # of an object sent or read by one request of obstore; larger ones travel in parts
TIMEOUT = 300.0  # seconds for one object; the clients' own timeouts come first where they are set
CREDENTIALS_S = 300.0  # seconds after which s3fs's session is asked for credentials again: it renews them

# s3fs's options that obstore has too, or that make no difference to whole objects.
_OPTIONS = {
    "endpoint_url", "key", "secret", "token", "profile", "use_ssl",
    "use_listings_cache", "listings_expiry_time", "skip_instance_cache",
    "default_block_size", "default_cache_type", "default_fill_cache", "max_concurrency",
    "client_kwargs", "config_kwargs",
}  # fmt: skip
_CLIENT_OPTIONS = {"endpoint_url", "region_name"}
_CONFIG_OPTIONS = {"retries", "connect_timeout", "read_timeout", "max_pool_connections", "region_name"}

_SEGMENT = r"(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f\ud800-\udfff]+"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]*(?<!--x-s3)(?<!--ol-s3)(?<!-s3alias)")  # ordinary ones only


def get(fs: S3FileSystem, path: str, *, size: int = -1, verify: bool = True) -> tuple[bytes, str]:
    """An object's bytes and etag.

    size     as listed; -1 if it is not known
    verify   compare the bytes with the checksum that the store may keep, which obstore does not

    Raises FileNotFoundError, PermissionError, OSError; NoCredentialsError.
    """
    bucket, key, version = fs.split_path(path)
    store = choose(fs, bucket) if version is None and suits(key, size) and not verify else None
    if store is None:
        return cast(tuple[bytes, str], sync(fs.loop, _get_by_s3fs, fs, path, timeout=TIMEOUT))
    with _errors():
        answer = obstore.get(store, key)
        return bytes(answer.bytes()), (answer.meta["e_tag"] or "").strip('"')


def put(fs: S3FileSystem, path: str, data: bytes) -> None:
    """Write an object, its bytes signed. Raises as `get` does."""
    bucket, key, version = fs.split_path(path)
    store = choose(fs, bucket) if version is None and suits(key, len(data)) else None
    if store is None:
        fs.pipe_file(path, data)  # one PUT, or a multipart upload that appears when it is completed
        return
    with _errors():
        obstore.put(store, key, data, use_multipart=False)
    fs.invalidate_cache(path)


def list_page(
    fs: S3FileSystem, bucket: str, prefix: str, *, size: int, after: str = "", token: str = ""
) -> dict[str, Any]:
    """One page of a listing, in key order: S3's answer to ListObjectsV2. Raises as `get` does.

    Only s3fs lists: its cost is per page. Its own `find` would keep all pages in memory.
    """
    start = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
    page: dict[str, Any] = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=size, **start)
    return page


def suits(key: str, size: int) -> bool:
    """Whether obstore serves an object of this key and size (-1: unknown).

    It strips slashes at the ends of a key, and refuses empty, `.` and `..` segments and control characters.
    """
    return size <= MAX_BYTES and _KEY.fullmatch(key) is not None


@lru_cache(maxsize=256)
def choose(fs: S3FileSystem, bucket: str) -> S3Store | None:
    """obstore's client of a bucket, or None where s3fs serves it. Chosen once a process.

    Raises as `get` does: the bucket is asked for its region.
    """
    client = fs.s3.meta
    region = client.region_name if client.region_name != "aws-global" else "us-east-1"
    if not (_understood(fs) and _BUCKET.fullmatch(bucket) and _region(fs, bucket) in ("", region)):
        return None
    _credentials(fs)  # if there are none, it is said here: obstore would wrap the error
    return S3Store(
        bucket,
        endpoint=client.endpoint_url,
        region=region,
        virtual_hosted_style_request=False,
        credential_provider=lambda: _credentials(fs),
        client_options={
            "allow_http": _plain_http(fs),
            "connect_timeout": timedelta(seconds=fs.config_kwargs.get("connect_timeout", fs.connect_timeout)),
            "read_timeout": timedelta(seconds=fs.config_kwargs.get("read_timeout", fs.read_timeout)),
            "timeout": timedelta(seconds=TIMEOUT),
        },
        retry_config={"max_retries": 0},
    )


def _understood(fs: S3FileSystem) -> bool:
    """Whether obstore knows every option of s3fs, and nothing in AWS's own files changes the requests."""
    options = fs.storage_options
    return (
        options.keys() <= _OPTIONS
        and (options.get("client_kwargs") or {}).keys() <= _CLIENT_OPTIONS
        and (options.get("config_kwargs") or {}).keys() <= _CONFIG_OPTIONS
        and (_plain_http(fs) or not fs.session.get_config_variable("ca_bundle"))
        and not fs.session.get_scoped_config().get("s3")
    )


def _plain_http(fs: S3FileSystem) -> bool:
    return str(fs.s3.meta.endpoint_url).startswith("http://")


def _region(fs: S3FileSystem, bucket: str) -> str:
    """The region a bucket says it is in, or "". s3fs follows a bucket to another region, obstore does not."""
    try:
        answer = fs.call_s3("head_bucket", Bucket=bucket)
    except OSError as error:
        answer = getattr(error.__cause__, "response", None)
        if answer is None or answer["ResponseMetadata"]["HTTPStatusCode"] >= 500:
            raise
        # Some may read and write but not list. If more is wrong, the request for the object shows it.
    return str(answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region", ""))


def _credentials(fs: S3FileSystem) -> S3Credential:
    """The credentials of s3fs: configured, or its session's, which may expire. Raises NoCredentialsError."""
    if fs.key:
        return {
            "access_key_id": fs.key,
            "secret_access_key": fs.secret,
            "token": fs.token,
            "expires_at": None,
        }

    async def ask() -> Any:
        credentials = await fs.session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
        return await credentials.get_frozen_credentials()

    frozen = sync(fs.loop, ask)
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S),
    }


async def _get_by_s3fs(fs: Any, path: str) -> tuple[bytes, str]:
    bucket, key, version = fs.split_path(path)
    where = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})
    answer = await fs._call_s3("get_object", **where)
    try:
        data: bytes = await answer["Body"].read()
    finally:
        answer["Body"].close()
    if len(data) != int(answer["ContentLength"]):
        raise OSError(f"s3://{path}: {len(data)} bytes of {answer['ContentLength']}")
    return data, str(answer["ETag"]).strip('"')


@contextmanager
def _errors() -> Iterator[None]:
    """Raises obstore's errors as the ones that s3fs makes of the same answers."""
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        text = str(error).partition("\n\n")[0]
        code, message = (re.findall(rf"<{tag}>([^<]*)", text) for tag in ("Code", "Message"))
        kind = ERROR_CODE_TO_EXCEPTION.get(code[0]) if code else None
        if kind is None and isinstance(error, PermissionDeniedError | UnauthenticatedError):
            kind = PermissionError
        elif kind is None:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(": ".join(code + message) or text) from error
