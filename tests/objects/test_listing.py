"""Listing real stores in pieces: every object once, however it is cut and whatever goes wrong."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest

from stages import storage
from stages.objects import Listed, listing
from stages.objects.fetch import Object, Reader
from stages.objects.listing import Unit
from stages.storage import retry
from tests.stores.faults import Fault, FaultProxy
from tests.stores.files import FileServer
from tests.stores.seaweed import SeaweedS3


def list_paths(uri: str, want: int = 8) -> list[str]:
    """Paths of all units, in the order of the units."""
    units = listing.split_location(uri, want=want)
    return [one.path for unit in units for one in listing.list_objects(uri, unit)]


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="surrogateescape"))


@pytest.fixture
def short_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few objects that take several pages, instead of thousands."""
    monkeypatch.setattr(listing, "PAGE", 50)


# -- local folders ------------------------------------------------------------

NAMES = ["a.png", "x/b.png", "x/y/c.png", "x/y/z/d.png", "e f.png", "ü/😀.png", "w/1.png", "w/2.png"]


@pytest.mark.parametrize("want", [1, 2, 3, 5, 100])
def test_a_folder_holds_each_file_once_however_it_is_cut(tmp_path: Path, want: int) -> None:
    make_files(tmp_path, *NAMES)
    assert sorted(list_paths(str(tmp_path), want)) == sorted(NAMES)


def test_a_folder_of_many_folders_is_no_more_units_than_asked_for(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{number}/a.png" for number in range(100)))
    assert len(listing.split_location(str(tmp_path), want=8)) <= 9
    assert len(list_paths(str(tmp_path), 8)) == 100


def test_a_listed_object_has_its_place_its_size_and_its_version(tmp_path: Path) -> None:
    make_files(tmp_path, "x/b.png")
    (one,) = listing.list_objects(str(tmp_path), Unit("tree"))
    version = f"{(tmp_path / 'x/b.png').stat().st_mtime_ns:x}"
    assert one == Listed("x/b.png", f"{tmp_path}/x/b.png", 7, version)


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    make_files(tmp_path, "data/a.png", "elsewhere/b.png")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert sorted(list_paths(str(tmp_path / "data"))) == ["a.png", "gone.png", "more/b.png"]


def test_links_that_lead_to_each_other_end(tmp_path: Path) -> None:
    make_files(tmp_path, "data/a/1.png", "data/b/2.png")
    (tmp_path / "data" / "a" / "on").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "b" / "on").symlink_to(tmp_path / "data" / "a")
    assert sorted(list_paths(str(tmp_path / "data"))) == ["a/1.png", "a/on/2.png", "b/2.png", "b/on/1.png"]


def test_a_name_that_is_no_unicode_is_written_out_with_its_fault(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    (tmp_path / "café.png").write_bytes(b"x")
    listed = {one.path: one for one in listing.list_objects(str(tmp_path), Unit("tree"))}
    assert {path: one.fault for path, one in listed.items()} == {"caf\\udce9.png": "bad_key", "café.png": ""}
    assert listed["caf\\udce9.png"].uri == f"{tmp_path}/caf\\udce9.png"


def test_a_missing_folder_and_a_glob_are_no_locations(tmp_path: Path) -> None:
    make_files(tmp_path, "a.png")
    with pytest.raises(FileNotFoundError) as caught:
        listing.split_location(str(tmp_path / "nothing"), want=4)
    assert retry.explain(caught.value) == "there is no such bucket, folder or file"
    globs = {"*.png": ".png", "**/a_*.jpg": ".jpg", "*": ".*", "a?.png": ".png", "[ab].png": ".png"}
    for glob, suffix in globs.items():
        message = f"no glob: name the folder {tmp_path} alone, and as pattern '{{key}}{re.escape(suffix)}'"
        with pytest.raises(ValueError, match=message):
            listing.split_location(str(tmp_path / glob), want=4)


MARKED = ["a[1].png", "b?.png", "c*.png", "d[1]/e?.png"]
"""Names that hold what a glob means something by."""


def test_names_with_marks_of_globs_are_files_as_others(tmp_path: Path) -> None:
    make_files(tmp_path, *MARKED, "a1.png")
    assert sorted(list_paths(str(tmp_path))) == sorted([*MARKED, "a1.png"])
    for name in (*MARKED[:3], "d[1]"):
        (unit,) = listing.split_location(str(tmp_path / name), want=1)
        (path,) = [one.uri for one in listing.list_objects(str(tmp_path / name), unit)]
        assert path.startswith(str(tmp_path / name))
        assert Reader().read(Object(path)) == Path(path).read_bytes()


@pytest.mark.s3
def test_keys_with_marks_of_globs_are_read_and_removed_alone(
    s3_bucket: str, s3_store: SeaweedS3, client_options: None
) -> None:
    storage.configure({"s3": s3_store.options()})
    for name in (*MARKED, "a1.png", "d1/e1.png"):
        storage.write_bytes(f"s3://{s3_bucket}/in/{name}", name.encode())
    for name in MARKED[:3]:
        uri = f"s3://{s3_bucket}/in/{name}"
        (unit,) = listing.split_location(uri, want=1)
        assert [one.uri for one in listing.list_objects(uri, unit)] == [uri]
        assert Reader().read(Object(uri)) == name.encode()
        storage.remove(uri)
    storage.remove(f"s3://{s3_bucket}/in/d[1]")
    assert storage.list_names(f"s3://{s3_bucket}/in") == ["a1.png"]
    assert storage.list_names(f"s3://{s3_bucket}/in/d1") == ["e1.png"]
    assert not storage.exists(f"s3://{s3_bucket}/in/d[1]/e?.png")
    with pytest.raises(ValueError, match="no glob"):
        listing.split_location(f"s3://{s3_bucket}/in/?.png", want=1)


def test_a_single_file_is_a_location(tmp_path: Path) -> None:
    make_files(tmp_path, "set/a b.png", "set/a b.png.txt", "set/[1].png")
    fsspec.filesystem("memory").pipe_file("/one/a b.png", b"x")
    with FileServer(tmp_path) as server:
        for uri in (f"{tmp_path}/set/a b.png", "memory://one/a b.png", f"{server.url}/set/a%20b.png"):
            (unit,) = listing.split_location(uri, want=4)
            (one,) = listing.list_objects(uri, unit)
            assert (one.path, one.uri) == ("a b.png", uri)
            assert Reader().read(Object(one.uri, one.size, one.etag))
    assert list_paths(f"{tmp_path}/set/[1].png") == ["[1].png"]


def test_a_server_that_does_not_say_how_long_its_files_are_is_a_location(tmp_path: Path) -> None:
    make_files(tmp_path, "set/a.png")
    with FileServer(tmp_path, lengths=False) as server:
        for uri in (f"{server.url}/set", f"{server.url}/set/a.png"):
            (unit,) = listing.split_location(uri, want=4)
            (one,) = listing.list_objects(uri, unit)
            assert one.size == -1
            assert Reader().read(Object(one.uri, one.size, one.etag))


def test_any_other_fsspec_file_system_is_a_location() -> None:
    fs = fsspec.filesystem("memory")
    for name in NAMES:
        fs.pipe_file(f"/images/{name}", b"x")
    try:
        assert sorted(list_paths("memory://images", 3)) == sorted(NAMES)
        (one, _) = listing.list_objects("memory://images", Unit("tree", ("w",)))
        assert fsspec.filesystem("memory").cat_file(one.uri) == b"x"
    finally:
        fs.rm("/images", recursive=True)


# -- HTTP ---------------------------------------------------------------------


def test_index_pages_are_followed_below_the_location_only(tmp_path: Path) -> None:
    make_files(tmp_path, "set/a.png", "set/c&d.png", "set/sub dir/b ü.png", "other/c.png", "secret.png")
    with FileServer(tmp_path) as server:
        outside = ["http://127.0.0.1:1/x.png", "/secret.png", "../secret.png", "%2e%2e/secret.png"]
        for link in [*outside, "a.png?download=1", "sub%20dir/../../secret.png"]:
            server.extra_links.append(f'<a href="{link}">not below</a>')
        uri = f"{server.url}/set"
        rows = sorted(listing.list_objects(uri, Unit("index")))
    assert [(one.path, one.uri, one.size) for one in rows] == [
        ("a.png", f"{uri}/a.png", 9),
        ("c&d.png", f"{uri}/c&d.png", 11),
        ("sub dir/b ü.png", f"{uri}/sub%20dir/b%20%C3%BC.png", 20),
    ]
    assert all(one.etag for one in rows)


def test_a_page_of_each_folder_of_a_server_comes_before_the_next_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "PAGE", 2)
    make_files(tmp_path, *(f"set/{folder}/{n}.png" for folder in "ab" for n in range(5)))
    with FileServer(tmp_path) as server:
        paths = [one.path for one in listing.list_objects(f"{server.url}/set", Unit("index"))]
    assert [path[0] for path in paths] == [*"aabbaabbab"]
    assert sorted(set(paths)) == sorted(f"{folder}/{n}.png" for folder in "ab" for n in range(5))


def test_an_http_location_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with FileServer(tmp_path) as server, pytest.raises(FileNotFoundError):
        list_paths(f"{server.url}/nothing")


# -- S3 -----------------------------------------------------------------------


@pytest.mark.s3
def test_a_single_object_is_a_location(s3_store: SeaweedS3, s3_bucket: str, s3_options: None) -> None:
    put(s3_store, s3_bucket, ["set/a.png", "set/a.png.txt", "set/b.png"])
    storage.configure({"s3": s3_store.options()})
    assert list_paths(f"s3://{s3_bucket}/set/a.png") == ["a.png"]


@pytest.fixture
def s3_options(short_pages: None, client_options: None) -> None:
    """Pages are short, and client options that a test sets are its own."""


def put(store: SeaweedS3, bucket: str, keys: list[str]) -> None:
    client = store.client()
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda key: client.pipe_file(f"{bucket}/{key}", key.encode()), keys))


KEYS = [
    *(f"data/{'ab'[number % 2]}/img_{number:05d}.png" for number in range(160)),
    *("data/ü/x.png", "data/😀.png", "data/𐍈/z.png", "data/b/y/1.png", "data/zz.png", "data/sp ace+%20.png"),
]
OTHERS = ["dataset/x.png", "data.png"]


@pytest.fixture(scope="module")
def s3_data(s3_store: SeaweedS3) -> str:
    """A bucket with more than a page of keys under `data/`."""
    s3_store.client().call_s3("create_bucket", Bucket="listing-test")
    put(s3_store, "listing-test", KEYS + OTHERS)
    return "listing-test"


@pytest.mark.s3
@pytest.mark.parametrize("want", [1, 4, 64])
def test_a_bucket_holds_each_key_once_however_it_is_cut(
    s3_store: SeaweedS3, s3_data: str, s3_options: None, want: int
) -> None:
    storage.configure({"s3": s3_store.options()})
    paths = list_paths(f"s3://{s3_data}/data", want)
    assert paths == sorted((key.removeprefix("data/") for key in KEYS), key=str.encode)


@pytest.mark.s3
def test_a_flat_prefix_is_cut_too(s3_store: SeaweedS3, s3_data: str, s3_options: None) -> None:
    storage.configure({"s3": s3_store.options()})
    units = listing.split_location(f"s3://{s3_data}/data", want=16)
    sizes = [len(list(listing.list_objects(f"s3://{s3_data}/data", unit))) for unit in units]
    assert len(units) > 3
    assert max(sizes) <= 81


@pytest.mark.s3
@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", share=0.2, code=503, error="SlowDown"),
        Fault("status", share=0.1, code=500, error="InternalError"),
        Fault("reset", share=0.2),
        Fault("truncate", share=0.1),
        Fault("delay", seconds=0.05),
    ],
    ids=lambda fault: fault.action + str(fault.code if fault.action == "status" else ""),
)
def test_a_store_in_trouble_gives_the_same_listing(
    s3_store: SeaweedS3, s3_data: str, s3_options: None, fault: Fault
) -> None:
    with FaultProxy(s3_store.address, [fault], seed=1) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        paths = list_paths(f"s3://{s3_data}/data", 8)
        print(f"{fault.action}: {proxy.counts}")
        assert proxy.counts[fault.action]
    assert sorted(paths) == sorted(key.removeprefix("data/") for key in KEYS)


@pytest.mark.s3
def test_a_store_that_is_away_for_a_while_is_waited_for(
    s3_bucket: str, s3_store: SeaweedS3, s3_options: None
) -> None:
    put(s3_store, s3_bucket, ["a.png"])
    with FaultProxy(s3_store.address) as proxy, ThreadPoolExecutor(1) as threads:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        s3_store.kill()
        listed = threads.submit(list_paths, f"s3://{s3_bucket}")
        while proxy.counts["requests"] < 2:  # the first was refused, and repeated
            assert not listed.done()
            time.sleep(0.01)
        s3_store.start()
        assert listed.result() == ["a.png"]


@pytest.mark.s3
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"secret": "wrong"}, "access denied"),
        ({"key": "nobody"}, "access denied"),
        ({"anon": True, "key": None, "secret": None}, "access denied"),
        ({"bucket": "no-such-bucket"}, "no such bucket"),
        ({"prefix": "nothing-here"}, "no such bucket, folder"),
        (
            {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 1}}},
            "cannot reach",
        ),
    ],
    ids=["secret", "user", "anonymous", "bucket", "prefix", "endpoint"],
)
def test_what_the_user_can_fix_is_said_in_a_line(
    s3_store: SeaweedS3,
    s3_data: str,
    s3_options: None,
    short_pages: None,
    changes: dict[str, Any],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    given = dict(changes)
    uri = f"s3://{given.pop('bucket', s3_data)}/{given.pop('prefix', 'data')}"
    storage.configure({"s3": {**s3_store.options(), **given}})
    with pytest.raises(Exception) as caught:  # noqa: PT011 - `explain` is what tells them apart
        listing.split_location(uri, want=4)
    line = retry.explain(caught.value)
    assert line is not None
    assert complaint in line


@pytest.mark.s3
def test_reading_needs_no_more_than_reading(s3_store: SeaweedS3, s3_data: str, s3_options: None) -> None:
    storage.configure({"s3": s3_store.options(read_only=True)})
    assert len(list_paths(f"s3://{s3_data}/data")) == len(KEYS)
