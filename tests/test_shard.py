"""Shards: images come back as they were, unusable pairs are quarantined, a killed run is resumed."""

from __future__ import annotations

import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image
from pydantic import ValidationError

from stages import ingest, shard, storage
from stages.base import Resources
from stages.config.ingest import IngestConfig
from stages.config.shard import ShardConfig
from stages.errors import StageError, UserError
from stages.images import colour, decode, encode, geometry, kinds
from stages.images.colour import class_ids
from stages.images.kinds import ImageRejected
from stages.models.architecture import Picture
from stages.shard import check_shapes, row_group_rows
from stages.shards import card, dataset
from stages.tracking.run import Run
from tests.stores.faults import FaultProxy
from tests.stores.seaweed import SeaweedS3
from tests.support.pairs import (
    SIZE,
    ids,
    list_and_pair,
    make_shards,
    pair_row,
    photo,
    photo_pairs,
    write_image,
    write_parts,
)


def quarantine(folder: Path) -> dict[str, str]:
    rows = [r for p in sorted(folder.glob("quarantine-*.parquet")) for r in pq.read_table(p).to_pylist()]
    return {row["key"]: row["reason"] for row in rows}


# -- rules --------------------------------------------------------------------


def test_a_kind_that_lacks_its_number_is_refused_by_the_config():
    with pytest.raises(ValidationError, match=r"shard\.classes"):
        ShardConfig(kinds={"source": "labels"})
    with pytest.raises(ValidationError, match=r"shard\.channels"):
        ShardConfig(kinds={"source": "channels"})
    with pytest.raises(UserError, match=r"shard\.classes"):
        shard.role_specs(ShardConfig(), ["source", "target", "label"])


def test_ids_are_stored_without_loss_whatever_the_encoding():
    config = ShardConfig(encoding="jpeg", classes=5, kinds={"source": "labels"})
    specs = shard.role_specs(config, ["source", "target", "instance"])
    assert [specs[r].encoding for r in ("source", "target", "instance")] == ["png", "jpeg", "png"]


def test_row_groups_have_about_eight_mebibytes():
    config = ShardConfig()
    assert row_group_rows(config, shard.role_specs(config, ["source", "target"])) == 17
    large = ShardConfig(size=(2048, 1024))
    assert row_group_rows(large, shard.role_specs(large, ["source", "target"])) == 1
    assert row_group_rows(ShardConfig(row_group_rows=5), {}) == 5


def test_an_id_outside_the_classes_is_a_reject_unless_it_is_the_ignored_one():
    array = np.array([[[0], [255]]], np.uint8)
    with pytest.raises(ImageRejected) as caught:
        class_ids(array, Picture(kind="labels", classes=5))
    assert caught.value.reason == "label_range"
    config = ShardConfig(classes=5, ignore_label=255, kinds={"source": "labels"})
    spec = shard.role_specs(config, ["source", "target"])
    assert class_ids(array, spec["source"]).ravel().tolist() == [0, 4]
    config = ShardConfig(classes=5, ignore_label=255, void_class=2, kinds={"source": "labels"})
    spec = shard.role_specs(config, ["source", "target"])
    assert (spec["source"].ignore_label, spec["source"].void_class) == (255, 2)
    assert spec["target"].ignore_label is None
    assert class_ids(array, spec["source"]).ravel().tolist() == [0, 2]


def test_images_of_a_pair_may_differ_in_resolution_but_not_in_shape():
    check_shapes({"source": (512, 256), "target": (1024, 512)})
    check_shapes({"source": (33, 17), "target": (16, 8)})
    with pytest.raises(ImageRejected):
        check_shapes({"source": (512, 256), "target": (512, 300)})


# -- a partition -----------------------------------------------------------------


def test_what_goes_in_comes_out_in_every_role(tmp_path: Path):
    rows = photo_pairs(tmp_path / "in", 9, roles=("source", "target", "label"))
    spec = make_shards(tmp_path / "shards", rows, classes=5)
    read = {s.key: s for s in dataset.read_split(str(tmp_path / "shards"), spec, "train")}
    assert len(read) == 9
    for n in range(9):
        sample = read[f"train/{n:04d}"]
        assert np.array_equal(sample.images["source"], photo(2 * n))
        assert np.array_equal(sample.images["target"], photo(2 * n + 1))
        assert np.array_equal(sample.images["label"], ids(n))
        assert sample.original["source"] == SIZE
        assert sample.uris["target"].endswith(f"target/{n:04d}.png")


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg", "webp"])
def test_a_side_by_side_file_becomes_two_images(tmp_path: Path, encoding: str):
    both = np.concatenate([photo(1, 32, 32), photo(2, 32, 32)], axis=1)
    uri = write_image(tmp_path / "both.png", both)
    row = pair_row("a", "train", {"source": uri, "target": uri}, source_crop="right", target_crop="left")
    spec = make_shards(tmp_path / "shards", [row], size=(32, 32), encoding=encoding)
    (sample,) = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    for role, seed in (("target", 1), ("source", 2)):
        apart = np.abs(sample.images[role].astype(int) - photo(seed, 32, 32))
        assert apart.max() <= (0 if encoding in ("raw", "png") else 40)


def test_every_bad_pair_is_quarantined_with_its_reason_and_the_good_ones_stay(tmp_path: Path):
    folder = tmp_path / "in"
    rows = photo_pairs(folder, 12)
    good = write_image(folder / "good.png", photo(99))

    def bad(key: str, content: bytes, **more: Any) -> dict[str, Any]:
        (folder / f"{key}.png").write_bytes(content)
        return pair_row(key, "train", {"source": str(folder / f"{key}.png"), "target": good}, **more)

    whole = Path(good).read_bytes()
    write_image(folder / "wide.png", photo(5, 60, 16))
    write_image(folder / "tiny.png", photo(5, 1, 1))
    rows += [
        bad("empty", b""),
        bad("cut", whole[:-30]),
        bad("text", b"<html>no such image</html>"),
        bad("changed", whole, source_etag="123"),
        bad("grown", whole, source_size=3),
        pair_row("gone", "train", {"source": str(folder / "gone.png"), "target": good}),
        pair_row("wide", "train", {"source": str(folder / "wide.png"), "target": good}),
        pair_row("tiny", "train", {"source": str(folder / "tiny.png"), "target": good}),
    ]
    spec = make_shards(tmp_path / "shards", rows, parts=3)
    assert spec.rows("train") == 12
    assert quarantine(tmp_path / "shards") == {
        "empty": "empty",
        "cut": "truncated",
        "text": "not_an_image",
        "changed": "changed",
        "grown": "changed",
        "gone": "missing",
        "wide": "size_mismatch",
        "tiny": "too_small",
    }


def test_hostile_but_readable_images_are_normalised(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    target = write_image(folder / "target.png", photo(0))
    picture = Image.fromarray(photo(3))
    for name, image, options in (
        ("cmyk.jpg", picture.convert("CMYK"), {}),
        ("palette.gif", picture.convert("P"), {}),
        ("alpha.webp", picture.convert("RGBA"), {}),
        ("wrong.png", picture, {"format": "JPEG"}),
        ("deep.png", Image.fromarray(photo(3)[:, :, 0].astype(np.uint16) * 257), {}),
    ):
        image.save(folder / name, **options)
    rows = [pair_row(p.name, "train", {"source": str(p), "target": target}) for p in folder.iterdir()]
    spec = make_shards(tmp_path / "shards", rows)
    assert quarantine(tmp_path / "shards") == {}
    for sample in dataset.read_split(str(tmp_path / "shards"), spec, "train"):
        assert sample.images["source"].shape == (16, 24, 3)


def test_kinds_of_many_channels_and_lab_are_stored(tmp_path: Path):
    cube = np.random.default_rng(0).random((16, 24, 7), np.float32)
    np.save(tmp_path / "cube.npy", cube)
    target = write_image(tmp_path / "t.png", photo(0))
    row = pair_row("a", "train", {"source": str(tmp_path / "cube.npy"), "target": target})
    spec = make_shards(
        tmp_path / "shards", [row], kinds={"source": "channels", "target": "lab_ab"}, channels=7
    )
    (sample,) = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    assert np.array_equal(sample.images["source"], cube)
    assert sample.images["target"].shape == (16, 24, 2)


@pytest.mark.parametrize("kind", ["rgb", "labels"])
def test_features_become_channels_of_the_source(tmp_path: Path, kind: str):
    maps = np.random.default_rng(0).uniform(-1, 1, (16, 24, 3)).astype(np.float32)
    np.save(tmp_path / "f.npy", maps)
    array = photo(0) if kind == "rgb" else ids(0)
    uris = {
        "source": write_image(tmp_path / "s.png", array),
        "target": write_image(tmp_path / "t.png", photo(1)),
    }
    row = pair_row("a", "train", {**uris, "features": str(tmp_path / "f.npy")})
    options = {"kinds": {"source": kind}, "classes": 5, "features": 3}
    spec = make_shards(tmp_path / "shards", [row], **options)
    (sample,) = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    seen = kinds.normalise(array, "rgb") if kind == "rgb" else np.eye(5, dtype=np.float32)[array[:, :, 0]]
    assert np.array_equal(sample.images["source"], np.concatenate([seen, maps], axis=2))
    assert (spec.roles["source"].kind, spec.roles["source"].channels) == ("channels", seen.shape[2] + 3)
    assert set(spec.roles) == {"source", "target"}
    with pytest.raises(UserError, match=r"shard\.features"):
        shard.role_specs(ShardConfig(), ["source", "target", "features"])
    np.save(tmp_path / "f.npy", maps[:, :, :2])
    row = pair_row("a", "train", {**uris, "features": str(tmp_path / "f.npy")})
    make_shards(tmp_path / "other", [row], parts=1, **options)
    assert quarantine(tmp_path / "other") == {"a": "wrong_kind"}


def test_a_derived_source_is_made_of_the_target(tmp_path: Path):
    target = write_image(tmp_path / "t.png", photo(0))
    row = pair_row("a", "train", {"source": target, "target": target}, source_derive="lab_lightness")
    spec = make_shards(tmp_path / "shards", [row], kinds={"source": "lab_l", "target": "lab_ab"})
    (sample,) = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    assert np.array_equal(sample.images["source"], colour.lab_channels(photo(0), "lab_l"))
    shown = sample.picture(spec, "target").astype(int)
    assert np.abs(shown - photo(0)).mean() < 3


@pytest.mark.parametrize(("given", "made"), [("target", "source"), ("source", "target")])
def test_a_derived_image_is_made_of_the_values_that_the_other_shows(tmp_path: Path, given: str, made: str):
    deep = np.full((16, 16, 1), 4095, np.uint16)
    uri = write_image(tmp_path / "t.png", deep)
    row = pair_row("a", "train", {"source": uri, "target": uri}, **{f"{made}_derive": "grey"})
    spec = make_shards(tmp_path / "shards", [row], kinds={given: "grey"}, range={given: (0, 4095)})
    (sample,) = dataset.read_split(str(tmp_path / "shards"), spec, "train")
    assert sample.images[given].min() == sample.images[made].min() == 255


# -- damage, resuming, two at once ------------------------------------------------


def test_a_partition_with_a_marker_is_not_done_again_and_one_without_is(tmp_path: Path):
    rows = photo_pairs(tmp_path / "in", 8)
    make_shards(tmp_path / "shards", rows)
    files = sorted((tmp_path / "shards").glob("train-*.parquet"))
    before = [f.read_bytes() for f in files]
    (tmp_path / "shards" / "_parts" / "00001.json").unlink()  # killed before its last write
    files[1].write_bytes(b"half")
    stamp = files[0].stat().st_mtime_ns
    make_shards(tmp_path / "shards", rows)
    assert [f.read_bytes() for f in files] == before
    assert files[0].stat().st_mtime_ns == stamp
    assert not list((tmp_path / "shards").glob(".*.partial"))


def test_a_partition_that_lacked_an_object_is_done_again(tmp_path: Path):
    rows = photo_pairs(tmp_path / "in", 8)
    for row in rows:
        row["target_etag"] = ""  # a copy that is put back has another time
    target = Path(rows[0]["target_uri"])
    target.rename(tmp_path / "away.png")
    make_shards(tmp_path / "shards", rows)
    assert quarantine(tmp_path / "shards") == {rows[0]["key"]: "missing"}
    (tmp_path / "away.png").rename(target)
    assert make_shards(tmp_path / "shards", rows).splits["train"].rows == 8
    assert quarantine(tmp_path / "shards") == {}


def test_a_sum_of_partitions_that_lacked_an_object_is_not_kept(tmp_path: Path, ray_local: None):
    rows = photo_pairs(tmp_path / "in", 8)
    target = Path(rows[0]["target_uri"])
    target.rename(tmp_path / "away.png")
    pairs, output = write_parts(tmp_path / "pairs", rows), str(tmp_path / "shards")
    config = ShardConfig(size=SIZE, max_reject_fraction=0.0)
    with pytest.raises(StageError, match="missing 1"):
        shard.run(config, Resources(), output=output, track=Run(), pairs=pairs)
    (tmp_path / "away.png").rename(target)
    outcome = shard.run(config, Resources(), output=output, track=Run(), pairs=pairs)
    assert (outcome.counts["train"], outcome.counts["rejected"]) == (8, 0)
    assert list((tmp_path / "shards" / "_parts" / "groups").iterdir())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    rows = photo_pairs(tmp_path / "in", 10)
    for name in ("one", "two"):
        make_shards(tmp_path / name, rows)
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_two_drivers_on_one_folder_write_the_same_files(tmp_path: Path):
    rows = photo_pairs(tmp_path / "in", 10)
    spec = make_shards(tmp_path / "one", rows)
    (tmp_path / "one" / "dataset.parquet").unlink()
    config = ShardConfig(size=SIZE, row_group_rows=4)

    def drive(_: int) -> None:
        for part in sorted((tmp_path / "one-pairs").iterdir()):
            output = str(tmp_path / "two")
            shard.shard_part(str(part), output=output, config=config, specs=spec.roles, io_threads=2)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(drive, range(2)))
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    written = sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert written == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_shard_is_read_by_pandas_and_duckdb(tmp_path: Path):
    make_shards(tmp_path / "shards", photo_pairs(tmp_path / "in", 4), parts=1)
    file = tmp_path / "shards" / "train-00000.parquet"
    frame = pd.read_parquet(file)
    raw = np.frombuffer(frame["source"][0], np.uint8).reshape(3, 16, 24)
    assert np.array_equal(np.moveaxis(raw, 0, 2), photo(0))
    count, size = (
        duckdb.read_parquet(str(file)).aggregate("count(*), min(octet_length(target))").fetchall()[0]
    )
    assert (count, size) == (4, 24 * 16 * 3)


# -- the stage ----------------------------------------------------------------


@pytest.mark.ray
def test_the_stage_writes_shards_card_and_counts(tmp_path: Path, ray_local: None):
    rows = photo_pairs(tmp_path / "in", 10, roles=("source", "target", "label"))
    rows += photo_pairs(tmp_path / "held", 4, "test", first=8, roles=("source", "target", "label"))
    rows += photo_pairs(tmp_path / "val", 2, "val", first=11, roles=("source", "target", "label"))
    rows.append(pair_row("gone", "val", {r: str(tmp_path / "no.png") for r in ("source", "target", "label")}))
    pairs = write_parts(tmp_path / "pairs", rows, 3)
    output = str(tmp_path / "shards")
    config = ShardConfig(size=SIZE, classes=5, max_reject_fraction=0.1, row_group_rows=4)
    outcome = shard.run(config, Resources(), output=output, track=Run(), pairs=pairs)
    counts = dict(outcome.counts)
    assert (counts["pairs"], counts["train"], counts["test"], counts["rejected_missing"]) == (17, 10, 4, 1)
    spec = dataset.load(output)
    assert (spec.rows("train"), spec.rows("test")) == (10, 4)
    content = json.loads((tmp_path / "shards" / "card.json").read_text())
    assert abs(sum(content["splits"]["train"]["roles"]["label"]["frequencies"].values()) - 1) < 1e-9
    stacked = np.stack([photo(2 * n) for n in range(10)]).reshape(-1, 3)
    assert np.allclose(content["splits"]["train"]["roles"]["source"]["mean"], stacked.mean(0))
    assert np.allclose(content["splits"]["train"]["roles"]["source"]["std"], stacked.std(0))
    assert counts["leaks"] == 2  # pairs 8 and 9 are in train and test
    assert (content["leakage"]["val"], content["leakage"]["found_in_val"]) == (2, 1)  # 11 is in val and test
    assert "Near-duplicates" in (tmp_path / "shards" / "card.md").read_text()
    sheet = decode.decode_image((tmp_path / "shards" / "samples.png").read_bytes(), "rgb")
    assert sheet.shape == (4 * 20 + 4, 3 * 28 + 4, 3)
    again = shard.run(config, Resources(), output=output, track=Run(), pairs=pairs)
    assert again == outcome


@pytest.mark.ray
def test_too_many_rejects_fail_the_stage_and_name_the_reasons(tmp_path: Path, ray_local: None):
    rows = photo_pairs(tmp_path / "in", 4)
    rows.append(pair_row("gone", "train", {"source": "/nowhere/a.png", "target": "/nowhere/a.png"}))
    pairs = write_parts(tmp_path / "pairs", rows)
    message = r"1 of 5 .*20\.0%.*shard\.max_reject_fraction allows.*missing 1; 'gone' \(source\): "
    with pytest.raises(StageError, match=message):
        shard.run(ShardConfig(size=SIZE), Resources(), output=str(tmp_path / "out"), track=Run(), pairs=pairs)
    assert not (tmp_path / "out" / "dataset.parquet").exists()
    with pytest.raises(UserError, match="no pairs"):
        shard.run(ShardConfig(), Resources(), output=str(tmp_path), track=Run(), pairs=str(tmp_path / "x"))


def test_deep_images_that_use_little_of_their_range_and_pixels_without_a_value_are_said(tmp_path: Path):
    deep = np.linspace(0, 4080, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[1], SIZE[0], 1)
    height = deep.astype(np.float32)
    height[0, :5] = np.nan
    row = {"key": "a", "split": "train", "group": None}
    row |= {
        "source_uri": write_image(tmp_path / "deep.png", deep),
        "target_uri": str(tmp_path / "height.tif"),
    }
    tifffile.imwrite(tmp_path / "height.tif", height[..., 0])

    def remarks(**settings: Any) -> list[str]:
        folder = tmp_path / f"shards-{len(settings)}"
        kinds: dict[str, Any] = {"kinds": {"source": "grey16", "target": "grey"}} | settings
        spec = make_shards(folder, [row], parts=1, **kinds)
        marker = json.loads(next(folder.glob("_parts/*.json")).read_text())
        done = shard.Summary()
        done.add(marker)
        return card.remarks(spec, done.statistics, keep_shape=True)

    first, second = remarks(range={"target": [0, 4080]})
    assert first.startswith("source: values 0 to 4080 of 0 to 65535")
    assert second == "target: 5 pixels of 1 images have no value (NaN, nodata); they are read as black"
    assert remarks(range=[0, 4080], min_side=1) == [second]


def test_images_of_two_shapes_are_refused_cropped_or_stretched(tmp_path: Path):
    wide, tall = photo(1, 48, 16), photo(2, 24, 32)
    row = {"key": "a", "split": "train", "group": None}
    row |= {
        "source_uri": write_image(tmp_path / "w.png", wide),
        "target_uri": write_image(tmp_path / "t.png", tall),
    }
    assert not make_shards(tmp_path / "same", [row], parts=1).splits
    for fit in ("crop", "stretch"):
        spec = make_shards(tmp_path / fit, [row], parts=1, fit=fit)
        (sample,) = dataset.read_split(str(tmp_path / fit), spec, "train")
        whole = wide[:, 12:36] if fit == "crop" else wide
        assert np.array_equal(sample.images["source"], geometry.resize(whole, SIZE, "rgb"))
        part = tall[8:24] if fit == "crop" else tall
        assert np.array_equal(sample.images["target"], geometry.resize(part, SIZE, "rgb"))


def test_the_message_of_too_many_rejects_quotes_examples_and_the_settings_that_help(tmp_path: Path):
    mask = np.where(ids(1) > 2, 255, 0).astype(np.uint8)
    colours = np.repeat(mask, 3, axis=2)
    rows = []
    for n, source in enumerate((mask, mask, mask, colours)):
        row = pair_row(f"k{n}", "train", {"source": write_image(tmp_path / f"{n}.png", source)})
        rows.append(row | {"target_uri": write_image(tmp_path / f"t{n}.png", photo(n))})
    config = ShardConfig(size=SIZE, classes=2, kinds={"source": "labels"})
    specs = shard.role_specs(config, ["source", "target"])
    done = shard.Summary()
    for part in sorted(Path(write_parts(tmp_path / "pairs", rows, 2)).glob("part-*")):
        done.add(
            shard.shard_part(
                str(part), output=str(tmp_path / "out"), config=config, specs=specs, io_threads=2
            )
        )
    with pytest.raises(StageError) as caught:
        done.check(config.max_reject_fraction, "out")
    text = str(caught.value)
    assert (
        "label_range 3, wrong_kind 1; 'k0' (source): id 255, classes are 0..1; 'k3' (source): ids need"
        in text
    )
    assert text.count("id 255") == 2
    assert "shard.palette lists" in text
    assert "\n" not in text


def test_tars_of_webdataset_become_shards_and_a_damaged_member_is_quarantined(tmp_path: Path) -> None:
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number:03d}.tar", "w") as archive:
            for n in range(3 * number, 3 * number + 3):
                for at, role in enumerate(("source", "target")):
                    data = encode.encode_png(photo(2 * n + at))
                    member = tarfile.TarInfo(f"{n:06d}.{role}.png")
                    data = data[:-30] if (n, role) == (4, "target") else data
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                text = tarfile.TarInfo(f"{n:06d}.json")
                archive.addfile(text, io.BytesIO())
    uri = f"{tmp_path}/train-{{000..001}}.tar"
    roles = ("source", "target")
    listed = IngestConfig.model_validate(
        {"locations": [{"uri": uri, "role": role, "pattern": f"{{key}}.{role}.png"} for role in roles]}
    )
    before = ingest.survey(listed)
    parts = list_and_pair(listed, str(tmp_path / "work"))
    config = ShardConfig(size=SIZE)
    specs = shard.role_specs(config, roles)
    done = shard.Summary()
    for part in parts:
        done.add(
            shard.shard_part(part, output=str(tmp_path / "out"), config=config, specs=specs, io_threads=2)
        )
    assert (done.rows, dict(done.rejects)) == (6, {"truncated": 1})
    assert sum(files.rows for files in done.splits().values()) == 5
    (tmp_path / "train-001.tar").unlink()
    with pytest.raises(UserError, match=r"ingest\.locations\.0\.uri: "):
        ingest.survey(listed)
    assert len(before.digest) == 32


def shards_of(listed: IngestConfig, work: Path) -> shard.Summary:
    """Shards of what the locations hold, made as the tasks of the stages make them."""
    config = ShardConfig(size=SIZE)
    specs = shard.role_specs(config, ("source", "target"))
    done = shard.Summary()
    for part in list_and_pair(listed, str(work)):
        done.add(shard.shard_part(part, output=str(work / "out"), config=config, specs=specs, io_threads=4))
    return done


def stored(work: Path) -> dict[str, list[Any]]:
    """Of each pair the split, the images and their checksums."""
    names = ("source", "source_crc", "target", "target_crc")
    return {
        row["key"]: [path.name.partition("-")[0], *(row[name] for name in names)]
        for path in (work / "out").glob("t*-*.parquet")
        for row in pq.read_table(path).to_pylist()
    }


def test_images_inside_tables_become_the_same_shards_as_files(tmp_path: Path) -> None:
    """A table for each split: sources are structs, as Hugging Face writes them, targets plain bytes."""
    files = tmp_path / "files"
    for split, numbers in (("train", range(16)), ("test", range(16, 24))):
        for n in numbers:
            for at, role in enumerate(("source", "target")):
                write_image(files / role / split / f"{n:02d}.png", photo(2 * n + at))
        sources = sorted((files / "source" / split).iterdir())
        targets = [(files / "target" / split / path.name).read_bytes() for path in sources]
        table = {
            "edges": [{"bytes": path.read_bytes(), "path": path.name} for path in sources],
            "photo": pa.array(targets, pa.large_binary()),
            "label": [7] * len(sources),
        }
        pq.write_table(pa.table(table), tmp_path / f"{split}-0.parquet", row_group_size=3)
    folders = [
        {"uri": str(files / role), "role": role, "pattern": "{split}/{key}.png"}
        for role in ("source", "target")
    ]
    table_location = {
        "uri": f"{tmp_path}/{{split}}-*.parquet",
        "role": "table",
        "columns": {"source": "edges", "target": "photo"},
    }
    from_files, from_tables = (
        IngestConfig.model_validate({"locations": locations}) for locations in (folders, [table_location])
    )
    done = shards_of(from_files, tmp_path / "a"), shards_of(from_tables, tmp_path / "b")
    assert [(one.rows, dict(one.rejects)) for one in done] == [(24, {}), (24, {})]
    assert stored(tmp_path / "b") == stored(tmp_path / "a")
    assert len(stored(tmp_path / "a")) == 24


def test_a_damaged_image_inside_a_table_is_quarantined_with_its_key_and_row(tmp_path: Path) -> None:
    good = [encode.encode_png(photo(n)) for n in range(6)]
    table = {
        "key": [f"k{n}" for n in range(6)],
        "source": pa.array(good),
        "target": pa.array([*good[:4], good[4][:-30], b""]),
    }
    uri = f"{tmp_path}/t.parquet"
    pq.write_table(pa.table(table), uri, row_group_size=4)
    done = shards_of(
        IngestConfig.model_validate({"locations": [{"uri": uri, "role": "table"}]}), tmp_path / "work"
    )
    assert (done.rows, dict(done.rejects)) == (6, {"truncated": 1, "empty": 1})
    files = (tmp_path / "work" / "out").glob("quarantine-*")
    rows = {row["key"]: row for path in files for row in pq.read_table(path).to_pylist()}
    assert {key: (row["role"], row["uri"], row["reason"]) for key, row in rows.items()} == {
        "k4": ("target", f"parquet://0000000005/target::{uri}", "truncated"),
        "k5": ("target", f"parquet://0000000006/target::{uri}", "empty"),
    }


@pytest.mark.s3
def test_the_row_groups_of_a_table_in_a_store_are_read_about_once_by_all_parts(
    tmp_path: Path, s3_store: SeaweedS3, s3_bucket: str, client_options: None
) -> None:
    images = [encode.encode_png(photo(n)) for n in range(60)]
    cells = [{"bytes": data, "path": f"{n * 7919 % 1000}.png"} for n, data in enumerate(images)]
    pq.write_table(pa.table({"source": cells, "target": cells}), tmp_path / "t.parquet", row_group_size=5)
    s3_store.client().put_file(str(tmp_path / "t.parquet"), f"{s3_bucket}/t.parquet")
    location = {"uri": f"s3://{s3_bucket}/*.parquet", "role": "table"}
    with FaultProxy(s3_store.address) as proxy:
        storage.configure({"s3": s3_store.options(endpoint=proxy.url)})
        done = shards_of(IngestConfig.model_validate({"locations": [location]}), tmp_path / "work")
        gets = sum(count for agent, count in proxy.agents.items() if agent.startswith("GET "))
    assert (done.rows, dict(done.rejects), len(done.files)) == (60, {}, 3)
    # 12 row groups of 2 columns, 2 of which two parts share; by the hash of the key all parts would read all
    print(f"requests: {gets}")
    assert gets < 2 * 14 + 20
