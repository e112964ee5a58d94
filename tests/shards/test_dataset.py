"""Shards folders read back: descriptions, pairs, damage."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.errors import StageError, UserError
from stages.images import decode
from stages.images.kinds import ImageRejected
from stages.shards import dataset
from stages.shards.dataset import RoleSpec
from tests.support import shards as drawn
from tests.support.pairs import ids, make_shards, pair_row, photo, photo_pairs, write_image


def test_a_description_comes_back_and_a_folder_without_or_with_a_damaged_one_is_named(tmp_path: Path) -> None:
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 5))
    loaded = dataset.load(str(tmp_path / "shards"))
    assert (loaded.size, loaded.roles, loaded.digest()) == (spec.size, spec.roles, spec.digest())
    assert {s: list(files) for s, files in loaded.splits.items()} == {"train": list(spec.splits["train"])}
    assert spec.counts() == {"num_train": 5}
    assert (spec.rows("train"), spec.rows("test")) == (5, 0)
    with pytest.raises(UserError, match=r"in: no dataset\.parquet, so this is not a finished shards folder"):
        dataset.load(str(tmp_path / "in"))
    file = tmp_path / "shards" / dataset.NAME
    table = pq.read_table(file)
    for metadata, reason in (({}, "pixloom"), ({"pixloom": '{"slize": 1}'}, "slize: there is no such key")):
        pq.write_table(table.replace_schema_metadata(metadata), file)
        with pytest.raises(UserError, match=f"shards: its description is damaged: .*{reason}"):
            dataset.load(str(tmp_path / "shards"))


def test_a_folder_with_the_older_description_is_read(tmp_path: Path) -> None:
    spec = drawn.make_shards(tmp_path, {"train": [7, 2], "test": [3]})
    listed = {
        split: [{"name": f.name, "rows": f.rows, "row_groups": f.row_groups} for f in files]
        for split, files in spec.splits.items()
    }
    roles = {role: stored.model_dump() for role, stored in spec.roles.items()}
    older = {"version": 1, "size": spec.size, "roles": roles, "splits": listed}
    (tmp_path / dataset.NAME).unlink()
    (tmp_path / dataset.OLD_NAME).write_text(json.dumps(older))
    loaded = dataset.load(str(tmp_path))
    assert loaded.digest() == spec.digest()
    assert [s.key for s in dataset.read_split(str(tmp_path), loaded, "test")] == [
        f"test/{n:03d}" for n in range(9, 12)
    ]


def test_row_groups_of_a_split_are_found_in_their_files(tmp_path: Path) -> None:
    files = drawn.make_shards(tmp_path, {"train": [7, 2, 9]}, row_group=4).splits["train"]
    assert files.sizes().tolist() == [4, 3, 2, 4, 4, 1]
    places = [files.place(group) for group in range(6)]
    assert places == [
        (f"train-{n:05d}.parquet", g) for n, g in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2))
    ]
    assert files.place(2) == ("train-00001.parquet", 0)


def test_the_digest_follows_files_rows_and_kinds(tmp_path: Path) -> None:
    spec = drawn.make_shards(tmp_path, {"train": [3]})
    assert spec.digest() == dataset.load(str(tmp_path)).digest()
    other = drawn.make_shards(tmp_path / "other", {"train": [4]})
    assert other.digest() != spec.digest()


def test_a_file_gives_its_pairs_and_a_split_those_of_its_files_up_to_a_limit(tmp_path: Path) -> None:
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 9))
    folder = str(tmp_path / "shards")
    by_file = [
        [sample.key for sample in dataset.read_file(folder, spec, "train", file.name)]
        for file in spec.splits["train"]
    ]
    assert [len(keys) for keys in by_file] == [5, 4]
    picked = dataset.read_file(folder, spec, "train", "train-00001.parquet", {"train/0003", "train/0004"})
    assert [sample.key for sample in picked] == ["train/0003"]
    in_order = [key for keys in by_file for key in keys]
    assert sorted(in_order) == [f"train/{n:04d}" for n in range(9)]
    for limit, expected in ((None, 9), (0, 0), (3, 3), (5, 5), (100, 9)):
        samples = dataset.read_split(folder, spec, "train", limit=limit)
        assert [sample.key for sample in samples] == in_order[:expected]
    assert list(dataset.read_split(folder, spec, "test")) == []


def test_an_optional_role_may_be_missing_from_a_pair(tmp_path: Path) -> None:
    rows = photo_pairs(tmp_path / "in", 2)
    instances = tmp_path / "instances.png"
    Image.fromarray(np.full((16, 24), 26001, np.uint16)).save(instances)
    rows[0] |= {"instance_uri": str(instances), "instance_crop": "", "instance_derive": ""}
    rows[1] |= {"instance_uri": None, "instance_crop": None, "instance_derive": None}
    spec = make_shards(tmp_path / "shards", rows, parts=1)
    first, second = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    assert (first.images["instance"] == 26001).all()
    for values in (second.images, second.uris, second.original):
        assert values.keys() == {"source", "target"}
    assert dataset.example(str(tmp_path / "shards"), spec).keys() == {"image", "instance"}


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_flipped_bit_in_a_shard_is_one_clear_error(tmp_path: Path, encoding: str) -> None:
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 4), parts=1, encoding=encoding)
    file = tmp_path / "shards" / "train-00000.parquet"
    table = pq.read_table(file)
    values = table["target"].to_pylist()
    data = bytearray(values[2])
    data[100] ^= 4
    values[2] = bytes(data)
    at = table.schema.get_field_index("target")
    pq.write_table(table.set_column(at, table.schema.field(at), [values]), file)
    samples = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    assert [next(samples).key for _ in range(2)] == ["train/0000", "train/0001"]
    with pytest.raises(
        StageError, match=r"train-00000\.parquet: image 'target' of pair 'train/0002' is damaged \(unreadable"
    ):
        next(samples)


def test_a_shard_that_is_gone_or_cut_is_named(tmp_path: Path) -> None:
    spec = drawn.make_shards(tmp_path, {"train": [3]})
    file = tmp_path / "train-00000.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(
            StageError, match=r"train-00000\.parquet: not the shard that dataset\.parquet describes"
        ):
            list(dataset.read_split(str(tmp_path), spec, "train"))
        file.unlink(missing_ok=True)


def test_stored_bytes_must_have_their_checksum_and_size() -> None:
    role = RoleSpec(kind="labels", encoding="raw", classes=5)
    data = ids(0).tobytes()
    crc = dataset.encode.checksum(data)
    assert np.array_equal(dataset.decode_role(data, crc, role, (24, 16)), ids(0))
    for size, checksum in (((24, 15), crc), ((24, 16), crc ^ 1)):
        with pytest.raises(ImageRejected) as caught:
            dataset.decode_role(data, checksum, role, size)
        assert caught.value.reason == "unreadable"


def test_the_example_is_a_corner_of_a_source_that_a_model_decodes(tmp_path: Path) -> None:
    uris = {role: write_image(tmp_path / f"{role}.png", photo(3, 200, 150)) for role in ("source", "target")}
    spec = make_shards(tmp_path / "shards", [pair_row("a", "train", uris)], parts=1, size=(200, 150))
    encoded = dataset.example(str(tmp_path / "shards"), spec)
    assert encoded.keys() == {"image"}
    assert np.array_equal(decode.decode_image(encoded["image"], "rgb"), photo(3, 200, 150)[:128, :128])


def test_the_example_of_channels_is_an_array_file(tmp_path: Path) -> None:
    cube = np.random.default_rng(0).random((16, 24, 7), np.float32)
    np.save(tmp_path / "cube.npy", cube)
    uris = {"source": str(tmp_path / "cube.npy"), "target": write_image(tmp_path / "t.png", photo(0))}
    row = pair_row("a", "test", uris)
    spec = make_shards(tmp_path / "shards", [row], parts=1, kinds={"source": "channels"}, channels=7)
    image = dataset.example(str(tmp_path / "shards"), spec)["image"]
    assert np.array_equal(np.load(io.BytesIO(image)), cube)
