"""Training input: each pair once, the same whatever the workers, resumable, verified."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from stages import storage
from stages.config.augment import AugmentConfig
from stages.errors import StageError, UserError
from stages.images import geometry
from stages.images.augment import apply, draw
from stages.models.step import Batch
from stages.shards.dataset import DatasetSpec, read_split
from stages.shards.feed import Feed, read_here
from stages.shards.prepare import copy_pixels
from stages.shards.row_groups import read_row_group
from stages.train import read_with_ray
from tests.support.pairs import SIZE, make_shards, pair_row, photo, photo_pairs, write_image

ROWS = 23
AUGMENT = AugmentConfig(crop=(16, 8), mirror=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DatasetSpec]:
    folder = tmp_path_factory.mktemp("feed")
    rows = photo_pairs(folder / "in", ROWS, roles=("source", "target", "label"))
    spec = make_shards(folder / "shards", rows, parts=3, classes=5)
    return str(folder / "shards"), spec


def epoch_of(feed: Feed, epoch: int = 0, start: int = 0) -> list[Batch]:
    return list(feed.epoch(epoch, start))


def keys(batches: list[Batch]) -> list[list[str]]:
    return [list(batch.keys) for batch in batches]


def same(one: Batch, other: Batch) -> bool:
    return (
        list(one.keys) == list(other.keys)
        and torch.equal(one.source, other.source)
        and torch.equal(one.target, other.target)
    )


# -- order --------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4, 5, 23, 32]), st.integers(0, 3), st.integers(0, 2))
def test_every_pair_comes_exactly_once_an_epoch(shards, batch, seed, epoch):
    folder, spec = shards
    with Feed(folder, spec, seed=seed, batch=batch, epochs=3, read=read_here) as feed:
        seen = keys(epoch_of(feed, epoch))
    assert len(seen) == feed.steps_per_epoch == -(-ROWS // batch)
    assert sorted(k for step in seen for k in step) == [f"train/{n:04d}" for n in range(ROWS)]


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_workers(shards, world):
    folder, spec = shards
    options = {"seed": 1, "batch": 4, "augment": AUGMENT, "epochs": 2, "read": read_here}
    with Feed(folder, spec, **options) as alone:
        whole = epoch_of(alone, 1)
    each = []
    for rank in range(world):
        with Feed(folder, spec, rank=rank, world=world, **options) as feed:
            each.append(epoch_of(feed, 1))
            alike = zip(feed.whole_epoch(1), whole, strict=True)  # all ranks' pairs, for one that needs them
            assert all(same(*batches) for batches in alike)
    for step, batch in enumerate(whole):
        parts = [ranks[step] for ranks in each]
        assert [k for part in parts for k in part.keys] == list(batch.keys)
        assert torch.equal(torch.cat([part.source for part in parts]), batch.source)
        assert sum(part.share for part in parts) == pytest.approx(world)
    last = [ranks[-1] for ranks in each]
    assert [len(part.keys) for part in last] == ([2, 1] if world == 2 else [1, 1, 1, 0])
    assert last[-1].source.shape[1:] == (3, 8, 16)


def test_going_on_at_any_step_gives_what_an_uninterrupted_run_gets(shards):
    folder, spec = shards
    options = {"seed": 2, "batch": 4, "augment": AUGMENT, "epochs": 2, "read": read_here}
    with Feed(folder, spec, **options) as feed:
        whole = epoch_of(feed, 0) + epoch_of(feed, 1)
    for start in range(feed.steps_per_epoch + 1):
        with Feed(folder, spec, **options) as feed:
            rest = epoch_of(feed, 0, start) + epoch_of(feed, 1)
        assert len(rest) == len(whole) - start
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


def test_leaving_an_epoch_and_starting_it_again_is_no_difference(shards):
    folder, spec = shards
    with Feed(folder, spec, batch=4, read=read_here) as feed:
        whole = epoch_of(feed, 0)
        partial = feed.epoch(0)
        next(partial)
        next(partial)
        assert all(same(a, b) for a, b in zip(epoch_of(feed, 0), whole, strict=True))
        assert all(same(a, b) for a, b in zip(epoch_of(feed, 0, 2), whole[2:], strict=True))


# -- images -------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("scale", [1, 2])
def test_images_are_those_of_the_shard_cropped_mirrored_and_scaled(tmp_path, encoding, scale):
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 9), encoding=encoding)
    stored = {s.key: s for s in read_split(str(tmp_path / "shards"), spec, "train")}
    with Feed(
        str(tmp_path / "shards"),
        spec,
        seed=5,
        batch=4,
        augment=AUGMENT,
        scale=scale,
        epochs=1,
        read=read_here,
    ) as feed:
        flips = set()
        for batch in feed.epoch(0):
            assert batch.source.dtype == torch.uint8
            assert batch.source.shape[1:] == (3, 8 // scale, 16 // scale)
            for index, key in enumerate(batch.keys):
                drawn = draw(5, 0, key, SIZE, (16, 8))
                flips.add(drawn.flip)
                for role, tensor in (("source", batch.source), ("target", batch.target)):
                    wanted = geometry.shrink(
                        apply(stored[key].images[role], drawn, SIZE, (16, 8)), scale, "rgb"
                    )
                    assert np.array_equal(tensor[index].permute(1, 2, 0).numpy(), wanted)
        assert flips == {True, False}


def test_every_kind_comes_as_the_networks_take_it(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(3):
        np.save(tmp_path / f"{n}.npy", rng.random((16, 24, 5), np.float32))
        inst = np.full((16, 24, 1), 26000 + n, np.uint16)
        uris = {
            "source": str(tmp_path / f"{n}.npy"),
            "target": write_image(tmp_path / f"t{n}.png", photo(n)),
            "instance": write_image(tmp_path / f"i{n}.png", inst),
        }
        rows.append(pair_row(str(n), "train", uris))
    rows[2] |= {"instance_uri": None}
    spec = make_shards(
        tmp_path / "shards", rows, parts=1, kinds={"source": "channels", "target": "lab_ab"}, channels=5
    )
    with Feed(str(tmp_path / "shards"), spec, batch=3, epochs=1, read=read_here) as feed:
        (batch,) = feed.epoch(0)
    assert batch.source.dtype == batch.target.dtype == torch.float32
    assert batch.source.shape == (3, 5, 16, 24)
    assert batch.target.shape == (3, 2, 16, 24)
    assert batch.instance is not None
    assert batch.instance.dtype == torch.int32
    largest = {key: int(i.max()) for key, i in zip(batch.keys, batch.instance, strict=True)}
    assert largest == {"0": 26000, "1": 26001, "2": 0}


@pytest.mark.parametrize("flip", [False, True])
def test_mirrored_pixels_are_copied_right_in_every_layout(flip):
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for source in (array, np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 2, 0)), 0, 2)):
        for out in (np.zeros((6, 8, 3), np.uint8), np.moveaxis(np.zeros((3, 6, 8), np.uint8), 0, 2)):
            copy_pixels(source[:, ::-1] if flip else source, out)
            assert np.array_equal(out, array[:, ::-1] if flip else array)


# -- integrity and errors -----------------------------------------------------


def test_a_flipped_bit_ends_training_with_one_clear_error(tmp_path):
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 6), parts=1)
    file = tmp_path / "shards" / "train-00000.parquet"
    table = pq.read_table(file)
    values = table["source"].to_pylist()
    values[3] = bytes([values[3][0] ^ 16]) + values[3][1:]
    at = table.schema.get_field_index("source")
    pq.write_table(table.set_column(at, table.schema.field(at), [values]), file, row_group_size=4)
    with (
        Feed(str(tmp_path / "shards"), spec, batch=2, epochs=1, read=read_here) as feed,
        pytest.raises(StageError, match=r"image 'source' of pair 'train/0003' is damaged"),
    ):
        epoch_of(feed)


def test_a_shard_that_is_gone_is_one_clear_error(tmp_path):
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 6), parts=1)
    (tmp_path / "shards" / "train-00000.parquet").unlink()
    with (
        Feed(str(tmp_path / "shards"), spec, read=read_here) as feed,
        pytest.raises(StageError, match=r"train-00000\.parquet"),
    ):
        epoch_of(feed)


@pytest.mark.parametrize("place", ["local", "memory"])
@pytest.mark.parametrize("less", ["rows", "groups", "columns"])
def test_a_shard_that_another_replaces_is_one_clear_error(tmp_path, less, place):
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 9), parts=1)
    file = tmp_path / "shards" / "train-00000.parquet"
    table = pq.read_table(file)
    small = {"rows": table[:6], "groups": table[:4], "columns": table.drop_columns(["target_crc"])}[less]
    folder = str(tmp_path / "shards")
    if place == "memory":
        folder = f"memory://{tmp_path.name}-{less}"
        storage.write_bytes(f"{folder}/{file.name}", file.read_bytes())
        read_row_group(f"{folder}/{file.name}", 1, ["key"])  # its footer is remembered
    pq.write_table(small, file, row_group_size=4)
    if place == "memory":
        storage.write_bytes(f"{folder}/{file.name}", file.read_bytes())
    says = r"train-00000\.parquet: not the shard that dataset\.parquet describes .*; put it back, or delete"
    with Feed(folder, spec, batch=2, epochs=1) as feed, pytest.raises(StageError, match=says):
        epoch_of(feed)


def test_what_cannot_work_is_refused_before_anything_is_read(shards):
    folder, spec = shards
    with pytest.raises(UserError, match="no pairs in split 'val'"):
        Feed(folder, spec, split="val")
    with pytest.raises(UserError, match="too small for 3"):
        Feed(folder, spec, batch=2, world=3)
    with pytest.raises(UserError, match=r"augment\.crop"):
        Feed(folder, spec, augment=AugmentConfig(crop=(25, 8)))


# -- with Ray -----------------------------------------------------------------


@pytest.mark.ray
def test_rays_tasks_give_what_reading_here_gives(shards, ray_local):
    folder, spec = shards
    options = {"seed": 3, "batch": 4, "rank": 1, "world": 2, "augment": AUGMENT, "epochs": 4}
    with Feed(folder, spec, read=read_here, **options) as feed:
        expected = [batch for epoch in range(4) for batch in feed.epoch(epoch)]
    with Feed(folder, spec, read=read_with_ray, **options) as feed:
        batches = [batch for epoch in range(4) for batch in feed.epoch(epoch)]
    assert len(batches) == len(expected)
    assert all(same(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.ray
def test_a_damaged_shard_seen_by_ray_is_an_error_that_names_it(tmp_path, ray_local):
    spec = make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 6), parts=1)
    (tmp_path / "shards" / "train-00000.parquet").write_bytes(b"PAR1 not any more")
    with (
        Feed(str(tmp_path / "shards"), spec, read=read_with_ray) as feed,
        pytest.raises(StageError, match=r"train-00000\.parquet") as caught,
    ):
        epoch_of(feed)
    assert type(caught.value) is StageError
    assert "\n" not in str(caught.value)
