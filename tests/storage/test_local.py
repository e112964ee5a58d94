"""Files and folders come to this machine and leave it whole, whatever the store does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from stages import storage
from stages.errors import StageError, UserError
from stages.storage import local, retry


class FailingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory: `failures` are raised by the next downloads, `log` says what was written."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012 - as MemoryFileSystem has it
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list[Exception] = []  # noqa: RUF012
    log: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("failing://", "memory://")))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        if self.failures:
            Path(lpath).write_bytes(self.cat_file(rpath)[:2])
            raise self.failures.pop(0)
        Path(lpath).write_bytes(self.cat_file(rpath))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode == "wb":
            self.log.append(f"write {path.rpartition('/')[2]}")
        return super()._open(path, mode, **kwargs)

    def rm_file(self, path: str) -> None:
        self.log.append(f"remove {path.rpartition('/')[2]}")
        super()._rm(path)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingFileSystem]:
    """An empty store; a failed call is repeated without a wait."""
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.0)
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    fs = FailingFileSystem()
    for values in (fs.store, fs.failures, fs.log):
        values.clear()
    yield fs
    fs.store.clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- download -----------------------------------------------------------------


def test_a_file_of_this_machine_is_used_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with local.local_file(f"file://{tmp_path}/a") as path:
        assert path == tmp_path / "a"
    with local.local_folder(str(tmp_path)) as folder:
        assert folder == tmp_path
    assert names(tmp_path) == ["a"]


def test_a_copy_is_there_for_the_block_only(store: FailingFileSystem) -> None:
    store.pipe({"/m/a.bin": b"one", "/m/b.bin": b"two", "/m/deep/c.bin": b"three"})
    with local.local_file("failing://m/a.bin") as path:
        assert (path.name, path.read_bytes()) == ("a.bin", b"one")
    assert not path.exists()
    with local.local_folder("failing://m", leave_out=["a.bin"]) as folder:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"b.bin": b"two"}
    assert not folder.exists()


def test_a_file_that_is_nowhere_is_not_found(store: FailingFileSystem, tmp_path: Path) -> None:
    for uri in ("failing://m/none", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError), local.local_file(uri):
            pass


def test_a_download_is_repeated_and_appears_when_it_is_whole(
    store: FailingFileSystem, tmp_path: Path
) -> None:
    store.pipe("/m/a", b"whole")
    store.failures += [ConnectionResetError("reset")] * 3
    local.download("failing://m/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (ConnectionResetError("reset"), UserError),
        (OSError("bad block"), StageError),
        (PermissionError("no"), UserError),
    ],
)
def test_half_a_file_is_never_seen(
    store: FailingFileSystem, tmp_path: Path, failure: Exception, error: type[Exception]
) -> None:
    store.pipe("/m/a", b"whole")
    store.failures += [failure] * retry.ATTEMPTS
    with pytest.raises(error, match=r"^failing://m/a: "):
        local.download("failing://m/a", tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["..", "nul\0", "x" * 250])
def test_a_name_that_no_local_file_can_have_is_refused(store: FailingFileSystem, name: str) -> None:
    store.pipe("/x", b"")
    store.store[f"/m/{name}"] = store.store["/x"]
    with (
        pytest.raises(UserError, match=r"failing://m: .* rename the object"),
        local.local_folder("failing://m"),
    ):
        pass


# -- upload -------------------------------------------------------------------


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    folder = tmp_path / "from"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_marker_is_removed_first_and_written_last(store: FailingFileSystem, tmp_path: Path) -> None:
    store.pipe("/m/card", b"old")
    store.log.clear()
    local.upload_folder(folder_of(tmp_path, a=b"1", card=b"new", z=b"2"), "failing://m", last="card")
    assert store.log == ["remove card", "write a", "write z", "write card"]
    assert {name: store.cat_file(f"/m/{name}") for name in "az"} == {"a": b"1", "z": b"2"}
    assert store.cat_file("/m/card") == b"new"


def test_a_folder_is_uploaded_to_a_new_place_of_this_machine(tmp_path: Path) -> None:
    local.upload_folder(folder_of(tmp_path, a=b"1", card=b"2"), str(tmp_path / "new" / "to"), last="card")
    assert names(tmp_path / "new" / "to") == ["a", "card"]


def test_an_upload_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    (tmp_path / "a").write_bytes(b"new")
    storage.write_bytes(str(tmp_path / "b"), b"old")
    monkeypatch.setattr("shutil.copyfileobj", fail)
    with (tmp_path / "a").open("rb") as source, pytest.raises(StageError, match="No space left"):
        local.upload(source, str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "b"]


def test_what_a_killed_process_had_half_written_is_removed(tmp_path: Path) -> None:
    half = tmp_path / "deep" / f".a.parquet.{'0f' * 16}.partial"
    other = tmp_path / ".video.mp4.partial"
    half.parent.mkdir()
    for path in (half, other):
        path.write_bytes(b"x")
    with local.alone(str(tmp_path), shared=True):
        assert half.exists()
    with local.alone(str(tmp_path)):
        assert not half.exists()
        assert other.exists()
