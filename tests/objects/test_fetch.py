"""Objects are read whole, again when the store fails, and never another version than the one listed."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import os
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stages import storage
from stages.errors import StageError, UserError
from stages.images.kinds import ImageRejected
from stages.objects import archives, fetch
from stages.objects.fetch import Object, Reader
from stages.storage import etag_of, local_etag
from tests.stores.seaweed import SeaweedS3

BODY = bytes(range(256)) * 8


class FaultyServer(ThreadingHTTPServer):
    """Serves BODY at any path; `faults` says for each request in turn what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: Iterator[str] = itertools.repeat("")
        self.requests = 0
        self.etag = '"v1"'

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/a.png"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that a fault cuts off


class Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        self.server.requests += 1
        fault = next(self.server.faults)
        if fault.isdigit():
            self.send_error(int(fault))
            return
        if fault == "reset":
            self.connection.close()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(BODY[:100] if fault == "cut" else BODY)
        if fault == "cut":
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def quick(attempts: int = 5) -> Reader:
    return Reader(attempts=attempts, first_wait=0.001)


def rejected(reader: Reader, wanted: Object) -> str:
    with pytest.raises(ImageRejected) as caught:
        reader.read(wanted)
    return caught.value.reason


def test_an_archive_that_is_gone_is_a_missing_image_each(tmp_path: Path) -> None:
    wanted = Object(f"tar://a.png::{tmp_path}/gone.tar.gz")
    reader = quick()
    reader.expect([wanted])
    assert rejected(reader, wanted) == "missing"


# -- versions -----------------------------------------------------------------


def test_a_local_file_is_read_if_it_is_the_one_that_was_listed(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(BODY)
    etag = local_etag(path.stat())
    assert quick().read(Object(str(path), len(BODY), etag)) == BODY
    assert quick().read(Object(str(path))) == BODY
    assert rejected(quick(), Object(str(path), len(BODY), "0")) == "changed"
    assert rejected(quick(), Object(str(path), 7)) == "changed"
    assert rejected(quick(), Object(str(tmp_path / "b.png"))) == "missing"
    assert rejected(quick(), Object(str(tmp_path))) == "missing"


def test_an_object_of_any_store_is_compared_with_its_listing():
    uri = "memory://fetch/a.png"
    storage.write_bytes(uri, BODY)
    fs, path = storage.filesystem(uri)
    etag = etag_of(fs.info(path))
    assert quick().read(Object(uri, len(BODY), etag)) == BODY
    assert rejected(quick(), Object(uri, 3)) == "changed"
    assert rejected(quick(), Object("memory://fetch/none.png", 3)) == "missing"


# -- faults -------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "500", "reset", "cut"])
def test_passing_faults_of_a_server_are_survived(server: FaultyServer, fault: str):
    server.faults = itertools.chain([fault, fault], itertools.repeat(""))
    assert quick().read(Object(server.url, len(BODY), "v1")) == BODY
    assert server.requests == 3


def test_a_server_that_stays_away_is_one_clear_error(server: FaultyServer):
    server.faults = itertools.repeat("503")
    with pytest.raises(UserError, match=r"a\.png: failed at each of 4 attempts") as caught:
        quick(4).read(Object(server.url))
    assert "\n" not in str(caught.value)
    assert server.requests == 4


def test_a_refusal_is_the_users_error_and_is_not_tried_again(server: FaultyServer):
    server.faults = itertools.repeat("403")
    with pytest.raises(UserError, match="credentials"):
        quick().read(Object(server.url))
    assert server.requests == 1


def test_what_is_gone_or_replaced_is_known_at_once(server: FaultyServer):
    server.faults = iter(["404", ""])
    assert rejected(quick(), Object(server.url, len(BODY), "v1")) == "missing"
    server.etag = '"v2"'
    assert rejected(quick(), Object(server.url, len(BODY), "v1")) == "changed"
    assert server.requests == 2


def test_a_flipped_bit_is_found_by_the_stores_md5():
    wanted = Object("s3://b/a.png", len(BODY), hashlib.md5(BODY).hexdigest())  # noqa: S324
    flipped = bytes([BODY[0] ^ 1]) + BODY[1:]
    reader = quick()
    reader._check_md5(wanted, BODY, lambda: pytest.fail("no second read is needed"))
    with pytest.raises(OSError, match="differ from the store's MD5"):
        reader._check_md5(wanted, flipped, lambda: BODY)
    encrypted = Object("s3://b/a.png", len(BODY), "0" * 32)
    reader._check_md5(encrypted, BODY, lambda: BODY)  # two reads agree: the etag is no MD5 here
    reader._check_md5(encrypted, BODY, lambda: pytest.fail("is known by now"))


# -- archives -----------------------------------------------------------------


def files() -> dict[str, bytes]:
    return {f"train/{n}.png": bytes([n]) * (100 + 50 * n) for n in range(5)} | {"x y/é.png": b"unusual name"}


def packed(kind: str) -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files().items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tar.gz" else "w") as archive:
            for name, data in files().items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members(path: Path) -> dict[str, Object]:
    version = etag_of(archives.info(str(path)))
    return {m.path: Object(m.uri, m.size, m.etag) for m in archives.members(str(path), version=version)}


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_members_of_archives_are_read_in_place(tmp_path: Path, kind: str):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed(kind))
    listed = members(path)
    reader = quick()
    reader.expect(listed.values())
    assert {name: reader.read(one) for name, one in listed.items()} == files()


@pytest.mark.parametrize("codec", [gzip, bz2, lzma], ids=["gz", "bz2", "xz"])
def test_an_archive_of_several_compressed_streams_is_read(tmp_path: Path, codec: Any):
    """As bgzip, pbzip2 and pixz write it, or `cat`."""
    plain = packed("tar")
    path = tmp_path / {gzip: "a.tar.gz", bz2: "a.tar.bz2", lzma: "a.tar.xz"}[codec]
    path.write_bytes(b"".join(codec.compress(plain[at : at + 700]) for at in range(0, len(plain), 700)))
    listed = members(path)
    reader = quick()
    reader.expect(listed.values())
    assert {name: reader.read(one) for name, one in listed.items()} == files()
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + bytes(40) + whole[100:])
    os.utime(path, ns=(0, int(next(iter(listed.values())).etag.rpartition("@")[2], 16)))
    with pytest.raises(StageError, match=path.name):  # damaged on its way, at every attempt
        quick().expect(listed.values())


@pytest.mark.s3
def test_an_empty_member_of_a_tar_in_a_bucket_is_empty(
    tmp_path: Path, s3_store: SeaweedS3, s3_bucket: str, client_options: None
):
    """A request for no bytes is refused, or answered with all of them."""
    storage.configure({"s3": s3_store.options()})
    uri = f"s3://{s3_bucket}/a.tar"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("empty.png"))
    storage.write_bytes(uri, (tmp_path / "a.tar").read_bytes())
    (one,) = archives.members(uri, version="")
    assert quick().read(Object(one.uri, one.size, one.etag)) == b""


def test_a_pipe_in_the_place_of_a_file_is_missing(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    assert rejected(quick(), Object(str(tmp_path / "a.png"))) == "missing"


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_was_replaced_is_noticed(tmp_path: Path, kind: str, announced: bool):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(packed(kind))
    listed = members(path)
    path.write_bytes(packed(kind) + b"\0" * 512)
    reader = quick()
    reader.expect(listed.values() if announced else [])
    assert rejected(reader, listed["train/1.png"]) == "changed"


def test_an_object_of_more_bytes_than_can_be_read_is_rejected(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "MOST_BYTES", 100)
    path = tmp_path / "a.png"
    path.write_bytes(BODY)
    for wanted in (Object(str(path)), Object("s3://b/a.png", 101), Object(server.url)):
        assert rejected(quick(), wanted) == "too_large"
    for kind in ("tar", "tar.gz", "zip"):
        archive = tmp_path / f"a.{kind}"
        archive.write_bytes(packed(kind))
        listed = members(archive)
        reader = quick()
        reader.expect(listed.values())
        assert rejected(reader, listed["train/1.png"]) == "too_large"
        assert reader.read(listed["train/0.png"]) == bytes(100)


def test_a_zip_member_is_unpacked_no_further_than_its_size(tmp_path: Path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(64 << 20))
    data = path.read_bytes().replace((64 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    path.write_bytes(data)
    (member,) = members(path).values()
    assert member.size == 100
    tracemalloc.start()
    try:
        assert rejected(quick(), member) == "unreadable"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_damaged_zip_member_is_one_rejected_image(tmp_path: Path):
    path = tmp_path / "a.zip"
    path.write_bytes(packed("zip"))
    member = members(path)["train/3.png"]
    data = bytearray(path.read_bytes())
    start = int(member.etag.split("+")[0])
    data[start + 30 + len("train/3.png") + 4] ^= 255
    stamp = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert rejected(quick(2), member) == "unreadable"
    assert quick(2).read(members(path)["train/2.png"])
