"""Archives in place, also those made to do harm."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from stages.config.locations import archive_parts, is_archive
from stages.objects import Listed, archives, listing
from stages.objects.fetch import Object, Reader
from stages.storage import retry


def make_tar(path: Path, names: list[str], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode(errors="surrogateescape")))
    return str(path)


def make_zip(path: Path, names: list[str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return str(path)


def members(uri: str) -> list[Listed]:
    return list(archives.members(uri, "v1"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_a_tar_is_listed_in_place(tmp_path: Path, name: str) -> None:
    mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(name.rpartition(".")[2], "w")
    uri = make_tar(tmp_path / name, ["train/1.jpg", "./train/2.jpg", "notes.md"], mode)
    assert is_archive(uri)
    listed = members(uri)
    assert [member.path for member in listed] == ["train/1.jpg", "train/2.jpg", "notes.md"]
    assert listed[0].uri == f"tar://train/1.jpg::{uri}"
    assert listed[0].etag == "512+11@v1"


def test_the_place_in_the_etag_is_where_the_bytes_are(tmp_path: Path) -> None:
    uri = make_tar(tmp_path / "a.tar", ["train/1.jpg", "train/2.jpg"])
    data = Path(uri).read_bytes()
    for member in members(uri):
        start, _, size = member.etag.partition("@")[0].partition("+")
        assert data[int(start) : int(start) + int(size)] == member.path.encode()


def test_a_folder_of_an_archive_is_a_location(tmp_path: Path) -> None:
    uri = make_zip(tmp_path / "a.zip", ["maps/train/1.jpg", "maps/val/2.jpg", "mapsize.jpg"])
    assert [member.path for member in members(f"zip://maps::{uri}")] == ["train/1.jpg", "val/2.jpg"]
    assert [member.uri for member in members(f"zip://maps/val::{uri}")] == [f"zip://maps/val/2.jpg::{uri}"]


def test_names_as_other_programs_write_them_are_paths(tmp_path: Path) -> None:
    windows = make_zip(tmp_path / "a.zip", ["set\\", "set\\A\\1.jpg", "set\\B\\1.jpg"])
    assert [member.path for member in members(windows)] == ["set/A/1.jpg", "set/B/1.jpg"]
    absolute = make_tar(tmp_path / "a.tar.gz", ["/set/A/1.jpg", "//set/B/1.jpg", "././set/C/1.jpg"], "w:gz")
    assert [member.path for member in members(absolute)] == ["set/A/1.jpg", "set/B/1.jpg", "set/C/1.jpg"]
    for uri in (f"zip://set/A::{windows}", f"tar://set/A::{absolute}"):
        (listed,) = listing.list_objects(uri, listing.Unit("archive", (uri,)))
        assert listed.path == "1.jpg"
        reader, wanted = Reader(), Object(listed.uri, listed.size, listed.etag)
        reader.expect([wanted])
        assert reader.read(wanted).endswith(b"1.jpg")


def test_a_folder_that_an_archive_lacks_is_said_with_a_member(tmp_path: Path) -> None:
    uri = make_zip(tmp_path / "a.zip", ["maps/train/1.jpg"])
    with pytest.raises(ValueError, match=r"nothing below 'train'; a member is 'maps/train/1\.jpg'"):
        members(f"zip://train::{uri}")


def test_a_chain_without_an_archive_is_refused() -> None:
    with pytest.raises(ValueError, match="after '::'"):
        archive_parts("tar://facades.tar")


def test_a_member_that_comes_twice_is_listed_twice(tmp_path: Path) -> None:
    uri = make_tar(tmp_path / "a.tar", ["1.jpg", "1.jpg"])
    assert [member.path for member in members(uri)] == ["1.jpg", "1.jpg"]


def test_names_that_lead_out_are_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "one" / "two"  # from here all of them lead into tmp_path
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    names = ["../../evil.jpg", f"{tmp_path}/evil.jpg", "a/../../evil.jpg"]
    for uri in (make_tar(deep / "a.tar", names), make_zip(deep / "a.zip", names)):
        assert [member.path for member in members(uri)] == [name.removeprefix("/") for name in names]
    assert list(tmp_path.rglob("*.jpg")) == []


def test_links_and_devices_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("s.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("d.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert [member.fault for member in members(str(path))] == ["link"] * 3


def test_links_and_encrypted_members_of_a_zip_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("s.jpg")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("secret.jpg", "x")
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1  # the flag that says encrypted
    path.write_bytes(data)
    assert [member.fault for member in members(str(path))] == ["link", "encrypted"]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz"])
@pytest.mark.parametrize("cut", [0, 100, 700, 1024, 1500])
def test_an_archive_that_is_cut_off_is_an_error_of_the_location(tmp_path: Path, name: str, cut: int) -> None:
    mode = {"gz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(name.rpartition(".")[2], "w")
    uri = make_tar(tmp_path / name, [f"{number * 7919}.jpg" for number in range(2000)], mode)
    data = Path(uri).read_bytes()
    Path(uri).write_bytes(data[:cut])
    with pytest.raises(OSError, match="damaged archive") as caught:
        members(uri)
    assert retry.explain(caught.value)


def test_what_is_no_zip_is_an_error_of_the_location(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip at all")
    with pytest.raises(OSError, match="damaged archive"):
        members(str(tmp_path / "a.zip"))


def test_names_that_are_no_unicode_are_listed(tmp_path: Path) -> None:
    uri = make_tar(tmp_path / "a.tar", ["caf\udce9.jpg"])
    assert [member.path for member in members(uri)] == ["caf\udce9.jpg"]
