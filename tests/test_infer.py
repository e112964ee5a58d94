"""Batch inference: rules, and whole runs on small models."""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from stages import infer
from stages.base import Outcome, Resources
from stages.config.infer import InferConfig
from stages.errors import StageError, UserError
from stages.images import colour, decode, encode, geotiff
from stages.images.kinds import ImageRejected
from stages.infer import InferenceWorker, LoadedItem, draws, same_shape_batches, source_size
from stages.inference import inputs, outputs
from stages.inference.inputs import InputImages, Item
from stages.inference.translator import Translator
from stages.models.files.saved import load_model
from stages.tracking.run import Run
from tests.support.here import workers_here
from tests.support.models import CLASSES, make_model, scene
from tests.support.shards import make_shards

RESOURCES = Resources(infer_actors=1, io_threads=4, threads_per_worker=1, gpu=False)


def run(
    output: Path, resources: Resources = RESOURCES, model: str = "", shards: str = "", **config: Any
) -> Outcome:
    return infer.run(
        InferConfig(**config), resources, output=str(output), track=Run(), model=model, shards=shards
    )


def table(output: Path) -> list[dict[str, Any]]:
    return [row for uri in outputs.parts(str(output)) for row in pq.read_table(uri).to_pylist()]


def whole(output: Path) -> bool:
    """Every row without an error has its image, byte for byte, and there is no image without a row."""
    rows = [row for row in table(output) if row["error"] is None]
    named = {row["output"] for row in rows}
    there = {
        str(path.relative_to(output))
        for top in ("images", "samples")
        for path in (output / top).rglob("*")
        if path.is_file()
    }
    return there == named and all(
        zlib.crc32((output / row["output"]).read_bytes()) == row["crc"] for row in rows
    )


# -- rules ---------------------------------------------------------------------------------------


def test_a_jitter_crop_is_the_size_to_generate_and_a_smaller_crop_is_not() -> None:
    assert source_size((286, 286), (256, 256), None) == (256, 256)
    assert source_size((2048, 1024), (512, 512), None) is None
    assert source_size((256, 256), (256, 256), None) is None
    assert source_size((256, 128), None, None) is None
    assert source_size((286, 286), (256, 256), (128, 64)) == (128, 64)


def test_batches_hold_one_shape_and_wait_within_bounds() -> None:
    def loaded(place: int, side: int) -> LoadedItem:
        images = InputImages(np.zeros((side, side, 3)))
        return LoadedItem(place, Item(str(place), "", lambda: images), images)

    items = [loaded(i, side) for i, side in enumerate([1, 2, 1, 3, 1, 2, 4, 5, 6, 7])]
    batches = list(same_shape_batches(items, lambda shape: 3 if shape[0] == 1 else 2, most=4))
    assert sorted(item.place for batch in batches for item in batch) == list(range(10))
    assert all(len({item.images.source.shape for item in batch}) == 1 for batch in batches)
    assert [item.place for item in batches[0]] == [0, 2]  # four waited


def test_a_tiff_that_is_read_by_rows_and_a_picture_of_its_shape_are_in_no_batch_together(
    tmp_path: Path,
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 80, 3), np.uint8)
    (folder := tmp_path / "in").mkdir()
    for number in (1, 2):
        Image.fromarray(image).save(folder / f"png{number}.png")
        tifffile.imwrite(folder / f"tiff{number}.tif", image)
    model = str(make_model(tmp_path / "model", source="rgb"))
    with workers_here(infer):
        run(output := tmp_path / "out", model=model, input=str(folder), tile=64, format="tiff")
    assert len({row["crc"] for row in table(output)}) == 1


def test_samples_of_few_sources_fill_a_batch_and_those_of_many_are_cut() -> None:
    images = InputImages(np.zeros((8, 8, 3)))
    batch = [LoadedItem(place, Item(str(place), "", lambda: images), images) for place in range(3)]

    def places(samples: int, size: int) -> list[list[tuple[int, int]]]:
        return [[(one.place, sample) for one, sample in chunk] for chunk in draws(batch, samples, size)]

    assert places(1, 4) == [[(0, 0), (1, 0), (2, 0)]]
    assert places(2, 4) == [[(0, 0), (1, 0), (2, 0), (0, 1)], [(1, 1), (2, 1)]]
    assert places(2, 3) == [[(place, sample) for place in range(3)] for sample in range(2)]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"pattern": "{nokey}"}, "pattern"),
        ({"instance_pattern": "x.png"}, "instance_pattern"),
        ({"style": {"kind": "reference"}}, "style"),
        ({"tile": 8}, "tile"),
        ({"palette": [[0, 0, 0], [255, 0, 0]], "format": "jpeg"}, "class ids are written as png"),
        ({"palette": [[0, 0, 256], [255, 0, 0]]}, "palette"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        InferConfig(**values)


@pytest.mark.parametrize(
    ("values", "model", "named"),
    [
        ({"samples": 2}, {"dropout": "paper"}, "infer.samples"),
        ({"samples": 2, "stochastic": True}, {"dropout": "none"}, "infer.samples"),
        ({"samples": 2, "stochastic": True}, {"feature_encoder": False}, "infer.samples"),
        ({"samples": 2, "style": {"kind": "cluster"}}, {"feature_encoder": True}, "infer.samples"),
        ({"style": {"kind": "cluster"}}, {"dropout": "paper"}, "infer.style.kind"),
        ({"samples": 2, "stochastic": True}, {"dropout": "paper"}, ""),
        ({"samples": 2}, {"feature_encoder": True}, ""),
        ({"style": {"kind": "cluster"}}, {"feature_encoder": True}, ""),
    ],
)
def test_samples_that_would_be_the_same_are_refused_and_styles_that_no_model_has(
    values: dict[str, Any], model: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) if named else nullcontext():
        InferConfig(**values).check_model(model)


def test_what_is_not_there_is_named_before_training(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards", {"train": [4]})
    with pytest.raises(UserError, match=r"infer.split: .* the split 'test' \(they hold: train 4\)"):
        infer.check(InferConfig(), str(tmp_path / "shards"))
    infer.check(InferConfig())  # no shards yet
    with pytest.raises(UserError, match=r"infer.split: .* the split 'val'"):
        infer.check(InferConfig(input=str(tmp_path / "shards"), split="val"))
    style = {"kind": "reference", "picture": "/no.png", "instances": "/no.png", "labels": "/no.png"}
    with pytest.raises(UserError, match=r"infer.style.picture: /no.png: there is no such file"):
        infer.digest(InferConfig(style=style))


def test_a_plan_reads_the_images_of_a_reference_style_once(tmp_path: Path) -> None:
    read = []

    class Server(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            read.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"one")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        roles = {name: f"{uri}/{name}.png" for name in ("picture", "instances", "labels")}
        config = InferConfig(style={"kind": "reference", **roles})
        infer.digest(config)  # as a plan calls them
        before = list(read)
        infer.check(config)
        server.shutdown()
    assert "/picture.png" in before
    assert read == before


# -- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [4], "test": [70, 9]})
    return str(folder)


@pytest.fixture
def workers_in_process() -> Iterator[None]:
    with workers_here(infer):
        yield


def test_without_a_test_split_validation_is_generated_by_a_model_of_one_fingerprint(
    workers_in_process: None, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make_shards(tmp_path / "shards", {"train": [4], "val": [3]})
    outcome = run(tmp_path / "out", model=model, shards=str(tmp_path / "shards"))
    assert outcome.counts == {"images": 3, "errors": 0}
    assert "generates the val split: 3 pairs" in caplog.text
    begun = json.loads((tmp_path / "out" / outputs.MANIFEST).read_text())
    fingerprints = {row["model"] for row in table(tmp_path / "out")} | {begun["model"]}
    assert fingerprints == {load_model(Path(model)).fingerprint}


@pytest.mark.ray
def test_a_split_is_generated_once_and_a_killed_run_is_resumed(
    ray_local: None, tmp_path: Path, model: str, shards: str
) -> None:
    out = tmp_path / "out"
    outcome = run(out, model=model, shards=shards)
    assert outcome.counts == {"images": 79, "errors": 0}
    assert whole(out)
    rows = table(out)
    assert len(rows) == 79
    assert rows[0]["output"] == "images/test/004.png"
    first = {row["output"]: (out / row["output"]).stat().st_mtime_ns for row in rows}

    # as a kill leaves it: one unit without its table part, one of its images gone
    part = Path(outputs.part_uri(str(out), 1))
    lost = pq.read_table(part).to_pylist()
    part.unlink()
    (out / lost[0]["output"]).unlink()
    assert run(out, model=model, shards=shards).counts == {"images": 79, "errors": 0}
    assert whole(out)
    again = {row["output"]: (out / row["output"]).stat().st_mtime_ns for row in table(out)}
    redone = {name for name in first if again[name] != first[name]}
    assert redone == {row["output"] for row in lost}
    assert [row["crc"] for row in table(out)] == [row["crc"] for row in rows]

    make_model(tmp_path / "other", norm="batch")
    with pytest.raises(UserError, match="another model"):
        run(out, model=str(tmp_path / "other"), shards=shards)
    (out / "images" / "of_an_earlier_input.png").write_bytes(b"x")
    assert run(out, model=str(tmp_path / "other"), shards=shards, overwrite=True).counts["images"] == 79
    assert whole(out)


def folder_of_sources(folder: Path) -> dict[str, np.ndarray]:
    """Label maps of several sizes and hostile names; returns those that are good, by key."""
    good: dict[str, np.ndarray] = {}
    for index, (name, side) in enumerate(
        [
            ("a", 32),
            ("deep/er/b", 40),
            ("deep/er/c d", 40),
            ("100%", 32),
            ("<img src=x>", 33),
            ("\u00fcn\u00ef", 32),
            ("twice", 32),
        ]
    ):
        labels = scene(index, side, 32)["source"]
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode.encode_image(labels, "png"))
        good[name] = labels
    Image.fromarray(good["a"][..., 0]).save(folder / "twice.bmp")  # the same key as twice.png
    for form in (
        "o\u0308",
        "\u00f6",
    ):  # one name in two forms of Unicode: nothing can tell their outputs apart
        (folder / f"{form}.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "not.png").write_bytes(b"no image at all, just text")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "range.png").write_bytes(encode.encode_image(np.full((32, 32, 1), 9, np.uint8), "png"))
    (folder / "large.png").write_bytes(encode.encode_image(np.zeros((200, 200, 1), np.uint8), "png"))
    (folder / "notes.txt").write_text("not an image")
    return good


def test_any_folder_is_generated_and_every_unusable_source_has_its_reason(
    workers_in_process: None, tmp_path: Path, model: str
) -> None:
    good = folder_of_sources(tmp_path / "in")
    out = tmp_path / "out"
    settings = {"input": str(tmp_path / "in"), "max_pixels": 150 * 150, "max_reject_fraction": 1}
    outcome = run(out, model=model, **settings)
    assert outcome.counts["images"] == 8
    assert outcome.counts["errors"] == 7
    assert whole(out)
    rows = {unicodedata.normalize("NFC", row["key"]): row for row in table(out)}
    bad = {"empty", "not", "cut", "range", "large", "\u00f6.png"}
    assert set(rows) == (set(good) - {"twice"}) | bad | {"twice.png", "twice.bmp"}
    reasons = {key: row["error"].partition(":")[0] for key, row in rows.items() if row["error"]}
    assert reasons == {
        "empty": "empty",
        "not": "not_an_image",
        "cut": "truncated",
        "range": "label_range",
        "large": "too_large",
        "\u00f6.png": "duplicate_key",
    }
    assert "200x200" in rows["large"]["error"]
    for key, labels in good.items():
        if key != "twice":
            with Image.open(out / rows[key]["output"]) as image:
                assert image.size == (labels.shape[1], labels.shape[0])
    assert (out / "images/deep/er/c d.png").exists()

    assert run(out, model=model, **settings).counts == outcome.counts  # nothing left to do
    with pytest.raises(StageError, match="7 of 15 sources"):
        run(tmp_path / "strict", model=model, input=str(tmp_path / "in"), max_pixels=150 * 150)
    (tmp_path / "in/new.png").write_bytes((tmp_path / "in/a.png").read_bytes())
    with pytest.raises(UserError, match="another input"):
        run(out, model=model, **settings)


def test_noise_gives_several_samples_each_by_its_seed(workers_in_process: None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(encode.encode_image(scene(index, 32, 32)["source"], "png"))
    model = str(make_model(tmp_path / "model", dropout=True))
    settings: dict[str, Any] = {"input": str(folder), "stochastic": True, "samples": 2, "format": "webp"}
    run(tmp_path / "one", model=model, **settings)
    rows = table(tmp_path / "one")
    assert whole(tmp_path / "one")
    assert [(row["key"], row["sample"]) for row in rows] == [(str(k), s) for k in range(3) for s in range(2)]
    assert len({row["crc"] for row in rows}) == 6
    (folder / "0.png").unlink()  # other neighbours, another place in the unit
    run(tmp_path / "two", Resources(infer_actors=2, gpu=False), model=model, **settings)
    fewer = {(row["key"], row["sample"]): row["crc"] for row in table(tmp_path / "two")}
    assert fewer == {(row["key"], row["sample"]): row["crc"] for row in rows if row["key"] != "0"}


@pytest.mark.parametrize(("large", "off"), [(infer.LARGE_PIXELS["cpu"], 0), (0, 1)], ids=["each", "together"])
def test_threads_change_no_picture(
    tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch, large: int, off: int
) -> None:
    """A batch per thread gives what one thread gives. Threads that share a batch add in another order."""
    monkeypatch.setitem(infer.LARGE_PIXELS, "cpu", large)
    monkeypatch.setattr(infer, "BATCH_PIXELS", {"cpu": 2 * 32 * 32})
    model = str(make_model(tmp_path / "model", dropout=True))
    config = InferConfig(stochastic=True, samples=2)
    by_threads = []
    for threads in (1, 3):
        output = str(tmp_path / str(threads))
        work = infer.prepare(config, output=output, tracking_uri=None, model=model, shards=shards)
        resources = Resources(infer_actors=1, threads_per_worker=threads, gpu=False)
        worker = InferenceWorker(infer.make_job(config, resources, work, output))
        with ThreadPoolExecutor(2) as calls:  # as Ray makes them
            counts = list(calls.map(worker, work.left))
        assert sum(unit["images"] for unit in counts) == 2 * 79
        assert whole(Path(output))
        by_threads.append(
            [np.asarray(Image.open(Path(output, row["output"]))) for row in table(Path(output))]
        )
    one, three = (np.stack(pictures).astype(int) for pictures in by_threads)
    assert len(np.unique(one, axis=0)) == 2 * 79
    assert np.abs(one - three).max() <= off


def test_a_geotiff_gives_a_geotiff_of_the_same_place_row_by_row(
    workers_in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(make_model(tmp_path / "model", source="rgb"))
    folder = tmp_path / "in"
    folder.mkdir()
    place = [(33550, 12, 3, (0.5, 0.5, 0.0), True), (34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1), True)]
    for name, height in (("large", 140), ("damaged", 140), ("small", 40)):
        pixels = colour.colorize(scene(1, 90, height)["source"], CLASSES)
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric="rgb", tile=(32, 32), extratags=place)
    expected = Translator(load_model(tmp_path / "model")).translate(
        [decode.decode_image((folder / "large.tif").read_bytes(), "rgb")]
    )[0]
    settings: dict[str, Any] = {"input": str(folder), "format": "tiff", "tile": 64, "max_reject_fraction": 1}
    read = geotiff.TiffRows.read

    def fails_below(self: geotiff.TiffRows, start: int, stop: int) -> np.ndarray:
        if stop > 100 and "damaged" in self.file.filehandle.name:
            raise ImageRejected("unreadable", "no tile")
        return read(self, start, stop)

    monkeypatch.setattr(geotiff.TiffRows, "read", fails_below)
    assert run(tmp_path / "out", model=model, **settings).counts["images"] == 2
    rows = {row["key"]: row for row in table(tmp_path / "out")}
    assert rows["damaged"]["error"] == "unreadable: no tile"
    for key, height in (("large", 140), ("small", 40)):
        data = (tmp_path / "out" / rows[key]["output"]).read_bytes()
        assert (rows[key]["size"], rows[key]["crc"]) == (len(data), zlib.crc32(data))
        assert (rows[key]["width"], rows[key]["height"]) == (90, height)
        assert [tag[3] for tag in geotiff.place_tags(data)] == [tag[3] for tag in place]
    made = decode.decode_image((tmp_path / "out" / rows["large"]["output"]).read_bytes(), "rgb")
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_a_table_of_uris_is_generated(workers_in_process: None, tmp_path: Path, model: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encode.encode_image(scene(0, 32, 32)["source"], "png"))
    listed = {"key": ["one", "gone", "../up"], "uri": [str(path), str(tmp_path / "no.png"), str(path)]}
    pq.write_table(pa.table(listed), tmp_path / "list.parquet")
    outcome = run(tmp_path / "out", model=model, input=str(tmp_path / "list.parquet"), max_reject_fraction=1)
    assert outcome.counts == {"images": 1, "errors": 2, "error_bad_key": 1, "error_missing": 1}
    assert whole(tmp_path / "out")


def test_a_table_of_uris_may_lack_one_and_names_files_beside_it(
    workers_in_process: None, tmp_path: Path, model: str
) -> None:
    data = encode.encode_image(scene(0, 32, 32)["source"], "png")
    (tmp_path / "x.png").write_bytes(data)
    listed = {"key": [1, 2], "uri": ["x.png", None], "thumbnail": [data, data]}
    pq.write_table(pa.table(listed), tmp_path / "list.parquet")
    outcome = run(tmp_path / "out", model=model, input=f"{tmp_path}/list.parquet", max_reject_fraction=1)
    assert outcome.counts == {"images": 1, "errors": 1, "error_missing": 1}
    pq.write_table(pa.table({"photo": [data], "uri": ["https://elsewhere"]}), tmp_path / "photos.parquet")
    assert run(tmp_path / "two", model=model, input=f"{tmp_path}/photos.parquet").counts["images"] == 1


def test_the_images_inside_a_table_are_generated(
    workers_in_process: None, tmp_path: Path, model: str
) -> None:
    """As the same images in files are; a row without one and a damaged one are errors."""
    data = [encode.encode_image(scene(n, 32, 32)["source"], "png") for n in range(4)]
    for n, one in enumerate(data):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{n}.png").write_bytes(one)
    cells = [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(data)]
    cells += [{"bytes": data[0][:-30], "path": "cut.png"}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"photo": cells, "id": range(6)}), tmp_path / "t-0.parquet", row_group_size=2)
    seen = run(tmp_path / "files", model=model, input=f"{tmp_path}/in")
    assert seen.counts == {"images": 4, "errors": 0}
    outcome = run(tmp_path / "out", model=model, input=f"{tmp_path}/t-*.parquet", max_reject_fraction=1)
    assert outcome.counts == {"images": 4, "errors": 2, "error_truncated": 1, "error_bad_row": 1}
    rows = {row["key"]: row["crc"] for row in table(tmp_path / "out") if row["error"] is None}
    assert rows == {row["key"]: row["crc"] for row in table(tmp_path / "files")}
    numbered = {"source": "photo", "key": None}
    run(
        tmp_path / "no", model=model, input=f"{tmp_path}/t-0.parquet", columns=numbered, max_reject_fraction=1
    )
    assert (tmp_path / "no/images/t-0/000001.png").read_bytes() == (
        tmp_path / "files/images/0.png"
    ).read_bytes()


def test_a_table_with_several_columns_of_images_asks_for_the_sources(tmp_path: Path, model: str) -> None:
    pq.write_table(pa.table({"photo": [b"a"], "mask": [b"b"]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"\(photo, mask\): .* infer\.columns: {source: photo}"):
        run(tmp_path / "out", model=model, input=f"{tmp_path}/t.parquet")


def test_a_table_names_no_instance_map_outside_its_folder(tmp_path: Path) -> None:
    maps = ["ids/a.png", "/etc/b.png", "../c.png"]
    pq.write_table(
        pa.table({"photo": [b"a", b"b", b"c"], "key": list("abc"), "instance": maps}), tmp_path / "t.parquet"
    )
    inputs.plan(InferConfig(input=f"{tmp_path}/t.parquet"), str(tmp_path / "out"))
    rows = pq.read_table(tmp_path / "out/plan/chunk-00000.parquet").to_pylist()
    assert {row["key"]: row["instance"] for row in rows} == {
        "a": f"{tmp_path}/ids/a.png",
        "b": None,
        "c": None,
    }


def test_a_single_image_is_generated(workers_in_process: None, tmp_path: Path, model: str) -> None:
    folder_of_sources(tmp_path / "in")
    assert run(tmp_path / "out", model=model, input=f"{tmp_path}/in/a.png").counts["images"] == 1
    assert (tmp_path / "out/images/a.png").exists()


def test_class_ids_are_written_if_the_colours_are_configured(
    workers_in_process: None, tmp_path: Path, model: str, shards: str
) -> None:
    run(tmp_path / "seen", model=model, input=shards)
    colors = ((0, 0, 0), (255, 255, 255), (128, 128, 128))
    run(tmp_path / "ids", model=model, input=shards, palette=colors)
    for row in table(tmp_path / "ids"):
        seen = np.asarray(Image.open(tmp_path / "seen" / row["output"]).convert("RGB"))
        with Image.open(tmp_path / "ids" / row["output"]) as image:
            assert image.mode == "P"
            assert (np.asarray(image) == colour.nearest_class(seen, colors)).all()


def test_a_model_with_instances_takes_their_maps_by_key(workers_in_process: None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(2):
        drawn = scene(index, 32, 32)
        (folder / f"{index}_label.png").write_bytes(encode.encode_image(drawn["source"], "png"))
        (folder / f"{index}_inst.png").write_bytes(encode.encode_image(drawn["instance"], "png"))
    model = str(make_model(tmp_path / "model", styles=True))
    settings = {"input": str(folder), "pattern": "{key}_label.png", "max_reject_fraction": 1}
    assert run(tmp_path / "b", model=model, **settings).counts["error_missing"] == 2
    settings |= {"model": model, "instance_pattern": "{key}_inst.png"}
    assert run(tmp_path / "a", **settings).counts["images"] == 2
    before = infer.digest(InferConfig.model_validate(settings))
    (folder / "1_inst.png").write_bytes(encode.encode_image(scene(2, 32, 32)["instance"], "png"))
    assert infer.digest(InferConfig.model_validate(settings)) != before
    with pytest.raises(UserError, match="holds images of another input"):
        run(tmp_path / "a", **settings)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"infer.model: .*nowhere: there is no model.json"):
        run(tmp_path / "out", model="nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "no such bucket, folder or file"),
        (lambda folder: folder.mkdir(), "nothing is in it"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")), "none of its 1 objects fits"),
    ],
)
def test_a_missing_or_empty_input_is_named(tmp_path: Path, model: str, make: Any, message: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(UserError, match=f"infer.input: .*{message}"):
        run(tmp_path / "out", model=model, input=str(tmp_path / "in"))


@pytest.mark.parametrize("name", ["x.csv", "x.txt", "x.jsonl.gz"])
def test_an_input_that_is_a_list_says_which_tables_are_read(tmp_path: Path, model: str, name: str) -> None:
    (tmp_path / name).write_text("key,uri\na,a.png\n")
    with pytest.raises(UserError, match=f"{name}: none of .*; of tables only Parquet is read"):
        run(tmp_path / "out", model=model, input=str(tmp_path / name))


def test_a_reference_style_whose_images_differ_in_size_is_refused(
    workers_in_process: None, tmp_path: Path
) -> None:
    model = str(make_model(tmp_path / "model", styles=True))
    style = {"kind": "reference"}
    for name, role, width in (
        ("picture", "target", 48),
        ("instances", "instance", 48),
        ("labels", "source", 40),
    ):
        style[name] = str(tmp_path / f"{name}.png")
        Image.fromarray(scene(0, width, 32)[role].squeeze()).save(style[name])
    with pytest.raises(UserError, match=r"infer\.style: .* differ in size: 48x32, 48x32, 40x32"):
        run(tmp_path / "out", model=model, input=style["labels"], style=style)


def test_another_reference_style_in_its_place_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "style.png"
    file.write_bytes(b"one")
    names = ("picture", "instances", "labels")
    config = InferConfig(style={"kind": "reference", **dict.fromkeys(names, str(file))})
    before = infer.digest(config)
    file.write_bytes(b"two")
    assert infer.digest(config) != before
    assert infer.digest(InferConfig()) == ""


def test_the_digest_follows_the_input_and_the_model(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a")
    config = InferConfig(input=str(folder), model=model)
    before = infer.digest(config)
    assert infer.digest(config) == before
    (folder / "b.png").write_bytes(b"b")
    assert infer.digest(config) != before
    changed = json.loads((Path(model) / "model.json").read_text()) | {"extra": {"epoch": 3}}
    other = tmp_path / "model"
    other.mkdir()
    (other / "model.json").write_text(json.dumps(changed))
    assert infer.digest(InferConfig(model=str(other))) != infer.digest(InferConfig(model=model))
