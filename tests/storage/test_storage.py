"""Files at any location are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from stages import storage
from stages.errors import StageError, UserError
from tests.stores.faults import Fault, FaultProxy
from tests.stores.seaweed import SeaweedS3


def test_a_file_of_this_machine_is_asked_for_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "none"))
    (tmp_path / "file").write_bytes(b"")
    assert storage.list_names(str(tmp_path / "none")) == []


def test_a_folder_that_cannot_be_made_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r"^/proc/none/x: it cannot be made"):
        storage.write_bytes("/proc/none/x", b"x")


@pytest.mark.parametrize("place", ["file/below", "file/in/it", "folder"])
def test_a_file_in_the_place_of_a_folder_or_a_folder_in_that_of_a_file_is_the_users_error(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{place}: it cannot be made"):
        storage.write_bytes(str(tmp_path / place), b"x")
    assert storage.list_names(str(tmp_path / "file/in/it")) == []
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_damage_in_a_table_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table({"a": ["some", "text"] * 20})
    storage.write_parquet(str(path), table, use_dictionary=False, write_statistics=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"text") + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StageError, match=r"t\.parquet: .*CRC"):
        storage.read_parquet(str(path))


def begin(uri: str, data: bytes) -> None:
    """A file whose writer fails."""
    with storage.create(uri) as file:
        file.write(data)
        raise ZeroDivisionError


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "new" / "file"
    with storage.create(str(place)) as file:
        file.write(b"one")
        assert not place.exists()
    assert place.read_bytes() == b"one"
    with pytest.raises(ZeroDivisionError):
        begin(str(place), b"half")
    assert place.read_bytes() == b"one"
    assert [path.name for path in place.parent.iterdir()] == ["file"]


@pytest.mark.s3
@pytest.mark.parametrize("size", [3, 2 * storage.UPLOAD_BYTES + 3])
def test_an_object_appears_whole_and_a_dropped_one_leaves_no_upload(
    s3_store: SeaweedS3, s3_bucket: str, size: int
) -> None:
    storage.configure({"s3": s3_store.options()})
    client, data = s3_store.client(skip_instance_cache=True), bytes(size)
    with storage.create(f"s3://{s3_bucket}/whole-{size}") as file:
        file.write(data)
    assert client.cat_file(f"{s3_bucket}/whole-{size}") == data
    sent_in_parts = file.mpu is not None
    assert sent_in_parts == (size >= storage.UPLOAD_BYTES)  # one request leaves nothing if it is cut off
    with pytest.raises(ZeroDivisionError):
        begin(f"s3://{s3_bucket}/half-{size}", data)
    assert not client.exists(f"{s3_bucket}/half-{size}")
    assert client.list_multipart_uploads(s3_bucket) == []
    storage.configure({"s3": {}})


@pytest.mark.s3
def test_an_upload_that_a_lost_attempt_completed_is_written_again(
    s3_store: SeaweedS3, s3_bucket: str
) -> None:
    uri, data = f"s3://{s3_bucket}/lost", bytes(storage.UPLOAD_BYTES + 3)
    lost = Fault("status_after", times=1, method="POST", path="uploadId=", code=404, error="NoSuchUpload")

    def send() -> None:
        with storage.create(uri) as file:
            file.write(data)

    with FaultProxy(s3_store.address, [lost]) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        storage.written(send, uri)
    client = s3_store.client(skip_instance_cache=True)
    assert lost.done == 1
    assert client.cat_file(f"{s3_bucket}/lost") == data
    assert client.list_multipart_uploads(s3_bucket) == []
    storage.configure({"s3": {}})
