"""Small objects of S3 stores, whole, through obstore: a quarter of s3fs's processor time for each.

Pictures are read and written one by one, and next to a network s3fs's 1 to 3 core-ms a request count
(benchmarks/README.md). s3fs stays the client that is configured, and the one with the last word: whatever is
not a plain success here (an option or a key that obstore does not have, an error, a store that is away) is
left to it, with its answers, errors and retries. So nothing here is retried or explained.

Bytes are not compared with the store's checksum, as s3fs does; to compare them is the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec.asyn
import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore.store import S3Credential
    from s3fs import S3FileSystem

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

MOST_BYTES = 16 << 20  # of an object: larger ones travel in parts, and cost per byte
REST_S = 60.0  # for which a bucket is left to s3fs after a failure
CREDENTIALS_S = 300.0  # after which s3fs's session is asked again: it renews them

_UNDERSTOOD = {
    "endpoint_url", "key", "secret", "token", "profile", "use_ssl",
    "use_listings_cache", "listings_expiry_time", "skip_instance_cache",
    "default_block_size", "default_cache_type", "default_fill_cache", "max_concurrency",
    "client_kwargs", "config_kwargs",
}  # fmt: skip
_UNDERSTOOD_CLIENT = {"endpoint_url", "region_name"}
_UNDERSTOOD_CONFIG = {"retries", "connect_timeout", "read_timeout", "max_pool_connections", "region_name"}


def get(fs: S3FileSystem, path: str) -> tuple[bytes, str] | None:
    """An object's bytes and etag, by one request; None: ask s3fs."""
    return _try(fs, path, _get)


def put(fs: S3FileSystem, path: str, data: bytes) -> bool:
    """Write an object by one request, its bytes signed; False: it may not be written, ask s3fs."""
    if len(data) > MOST_BYTES:
        return False

    def write(store: S3Store, key: str) -> bool:
        obstore.put(store, key, data, use_multipart=False)
        fs.invalidate_cache(path)
        return True

    return bool(_try(fs, path, write))


def _get(store: S3Store, key: str) -> tuple[bytes, str]:
    answer = obstore.get(store, key)
    return bytes(answer.bytes()), (answer.meta["e_tag"] or "").strip('"')


def _try(fs: S3FileSystem, path: str, call: Callable[[S3Store, str], Value]) -> Value | None:
    name, key, version = fs.split_path(path)
    if version is not None or not key or key != key.strip("/"):  # obstore would strip them
        return None
    bucket = _bucket(fs, name)
    store = bucket.store()
    if store is None:
        return None
    try:
        return call(store, key)
    except (FileNotFoundError, ValueError):  # nothing there; not a key of obstore's: `a//b`, `a/../b`
        return None
    except Exception as error:  # s3fs makes the attempt that counts
        logger.debug("s3://%s: left to s3fs after %s", name, type(error).__name__)
        bucket.rest()
        return None


class _Bucket:
    """obstore's client of a bucket, with the endpoint, region and credentials of an s3fs."""

    def __init__(self, fs: S3FileSystem, name: str) -> None:
        self.fs, self.name = fs, name
        self._store: S3Store | None = None
        self._rest_until = 0.0
        self._lock = threading.Lock()

    def rest(self) -> None:
        """Leave the bucket to s3fs for a while."""
        self._rest_until = time.monotonic() + REST_S

    def store(self) -> S3Store | None:
        """The client; None while the bucket is left to s3fs."""
        if time.monotonic() < self._rest_until:
            return None
        with self._lock:
            if self._store is None:
                try:
                    self._store = self._connect()
                except Exception as error:
                    logger.debug("s3://%s: left to s3fs after %s", self.name, type(error).__name__)
                    self.rest()
            return self._store

    def _connect(self) -> S3Store | None:
        if not _understood(self.fs.storage_options) or self.fs.anon:
            self._rest_until = float("inf")
            return None
        client = self.fs.s3.meta
        endpoint = str(client.endpoint_url)
        config = self.fs.config_kwargs
        return S3Store(
            self.name,
            endpoint=endpoint,
            region=client.region_name if client.region_name != "aws-global" else "us-east-1",
            virtual_hosted_style_request=False,
            credential_provider=self._credentials,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=config.get("connect_timeout", self.fs.connect_timeout)),
                "read_timeout": timedelta(seconds=config.get("read_timeout", self.fs.read_timeout)),
                "timeout": timedelta(seconds=60),
            },
            retry_config={"max_retries": 0},
        )

    def _credentials(self) -> S3Credential:
        fs = self.fs
        if fs.key:
            return {
                "access_key_id": fs.key,
                "secret_access_key": fs.secret,
                "token": fs.token,
                "expires_at": None,
            }

        async def ask() -> Any:
            return await (await fs.session.get_credentials()).get_frozen_credentials()

        found = fsspec.asyn.sync(fs.loop, ask)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIALS_S),
        }


@lru_cache(maxsize=256)
def _bucket(fs: S3FileSystem, name: str) -> _Bucket:
    return _Bucket(fs, name)


def _understood(options: dict[str, Any]) -> bool:
    """Whether no option of s3fs is one that obstore would have to know (encryption, who pays, ...)."""
    return (
        options.keys() <= _UNDERSTOOD
        and (options.get("client_kwargs") or {}).keys() <= _UNDERSTOOD_CLIENT
        and (options.get("config_kwargs") or {}).keys() <= _UNDERSTOOD_CONFIG
    )
