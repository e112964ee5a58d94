"""What `pixloom init` makes of folders: layouts, kinds, sizes, and what it refuses."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image

from pipeline import __main__ as pixloom, config as configuration
from pipeline.config import PipelineConfig
from stages import storage
from tests.stores.seaweed import SeaweedS3
from tests.support.pairs import ids, photo, write_image


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative, as a user types them."""
    monkeypatch.chdir(tmp_path)


def written(*names: str) -> PipelineConfig:
    assert pixloom.main(["init", *names]) == 0
    config = configuration.load("pixloom.yaml")
    with Image.open("pixloom.png") as sheet:
        assert sheet.width > 2 * config.shard.size[0]
    return config


def fill(name: str, make: Callable[..., np.ndarray] = photo, count: int = 12, width: int = 24) -> None:
    """Images at `name`, in which {} is their number."""
    for n in range(count):
        write_image(Path(name.format(n)), make(n, width))


def places(config: PipelineConfig) -> list[tuple[str, str, str]]:
    return [(one.uri, one.role, one.pattern) for one in config.ingest.locations]


def test_two_folders_with_the_same_names_make_pairs_and_label_ids_are_the_source() -> None:
    fill("one/{}.png", ids)
    fill("two/{}.png")
    config = written("two", "one")
    assert places(config) == [("one", "source", "{key}.png"), ("two", "target", "{key}.png")]
    assert config.shard.kinds == {"source": "labels", "target": "rgb"}
    assert (config.shard.classes, config.shard.palette, config.shard.fit) == (5, None, "same")
    assert config.shard.size == (128, 96)  # 24x16, drawn large enough for the networks


def test_endings_of_two_folders_and_unequal_counts_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    fill("gt/{}_mask.png", lambda n, w: (ids(n, w) > 2).astype(np.uint8) * 255, count=9)
    fill("pictures/{}_photo.png")
    config = written("pictures", "gt")
    assert places(config) == [("gt", "source", "{key}_mask.png"), ("pictures", "target", "{key}_photo.png")]
    assert (config.shard.classes, config.shard.palette) == (2, {"source": (0, 255)})
    assert "pairs: 9; 3 other images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "target", "uris", "patterns"),
    [
        ("data/a/{}.png", "data/b/{}.png", ["data/a", "data/b"], ["{key}.png"] * 2),
        ("data/{}_A.png", "data/{}_B.png", ["data"] * 2, ["{key}_A.png", "{key}_B.png"]),
        ("data/s{}_w1.tif", "data/s{}_w2.TIF", ["data"] * 2, ["{key}_w1.tif", "{key}_w2.TIF"]),
        ("data/{}_source.png", "data/{}_target.png", ["data"] * 2, ["{key}_source.png", "{key}_target.png"]),
        ("data/{}/mask.png", "data/{}/photo.png", ["data"] * 2, ["{key}/mask.png", "{key}/photo.png"]),
        ("data/mask_{}.png", "data/photo_{}.png", ["data"] * 2, ["mask_{key}.png", "photo_{key}.png"]),
        ("data/{}_mask.png", "data/{}.png", ["data"] * 2, ["{key}_mask.png", "{key}.png"]),
        (
            "data/{}_gtFine_labelIds.png",
            "data/{}_leftImg8bit.png",
            ["data"] * 2,
            ["{key}_gtFine_labelIds.png", "{key}_leftImg8bit.png"],
        ),
        # a group that is always the same would put all pairs into one split
        ("data/set/a/{}.png", "data/set/b/{}.png", ["data"] * 2, ["set/a/{key}.png", "set/b/{key}.png"]),
    ],
)
def test_images_of_one_folder_are_told_apart(
    source: str, target: str, uris: list[str], patterns: list[str]
) -> None:
    fill(source)
    fill(target)
    assert places(written("data")) == list(zip(uris, ["source", "target"], patterns, strict=True))


@pytest.mark.parametrize(
    ("folders", "uris", "patterns"),
    [
        ("data/{split}_label data/{split}_img", "data data", "{split}_label/{key}.png {split}_img/{key}.png"),
        ("data/{split}A data/{split}B", "data data", "{split}A/{key}.png {split}B/{key}.png"),
        ("data/{split}/in data/{split}/out", "data data", "{split}/in/{key}.png {split}/out/{key}.png"),
        ("data/in/{split} data/out/{split}", "data/in data/out", "{split}/{key}.png {split}/{key}.png"),
    ],
)
def test_splits_in_the_path_are_kept(folders: str, uris: str, patterns: str) -> None:
    for folder in folders.split():
        for split in ("train", "test"):
            fill(folder.replace("{split}", split) + "/{}.png", count=3)
    found = places(written("data"))
    assert [uri for uri, _, _ in found] == uris.split()
    assert [pattern for _, _, pattern in found] == patterns.split()


def test_of_three_folders_those_are_taken_whose_names_say_what_they_are() -> None:
    for folder in ("inst", "label", "photo"):
        fill(f"data/{folder}/{{}}.png")
    assert [uri for uri, _, _ in places(written("data"))] == ["data/label", "data/photo"]


def test_large_folders_are_each_looked_at() -> None:
    write_image(Path("x.png"), photo(0))
    for folder in ("a", "b"):
        Path("data", folder).mkdir(parents=True)
        for n in range(1100):
            shutil.copy("x.png", f"data/{folder}/{n}.png")
    assert len(places(written("data"))) == 2


def test_a_table_that_holds_images_is_a_location_with_its_columns() -> None:
    fill("a/{:02}.png")
    fill("b/{:02}.png")
    images = {
        name: [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(Path(folder).iterdir())]
        for name, folder in (("image", "a"), ("conditioning_image", "b"))
    }
    pq.write_table(pa.table({"text": ["x"] * 12} | images), "train-0.parquet", row_group_size=5)
    (location,) = written("{split}-*.parquet").ingest.locations
    assert (location.role, Path(location.uri).name) == ("table", "{split}-*.parquet")
    assert location.columns == {"source": "conditioning_image", "target": "image"}


def test_images_that_cannot_be_used_are_named_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    fill("one/{}.png", count=4)
    fill("two/{}.png", ids, count=4)
    Path("one/2.png").write_bytes(Path("one/2.png").read_bytes()[:60])
    config = written("one", "two")
    assert config.shard.kinds == {"source": "labels", "target": "rgb"}
    assert re.search(
        r"left out of this look, and later of training: \S+one/2.png and \S+two/2.png: ",
        capsys.readouterr().out,
    )
    for n in range(4):
        Path(f"one/{n}.png").write_bytes(b"no image")
    assert pixloom.main(["init", "one", "two", "--output", "other.yaml"]) == 2
    assert "no image of the sample can be used; " in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_a_table_without_an_image_are_left_out() -> None:
    fill("a/{}.png", count=4)
    images = [{"bytes": Path(f"a/{n}.png").read_bytes(), "path": None} for n in range(4)]
    lacking = [*images[:2], {"bytes": None, "path": None}, images[3]]
    pq.write_table(pa.table({"source": images, "target": lacking}), "data.parquet")
    (location,) = written("data.parquet").ingest.locations
    assert location.columns == {"source": "source", "target": "target"}


def test_files_with_both_images_side_by_side() -> None:
    for split in ("train", "val"):
        fill(f"data/{split}/{{}}.png", width=32)
    config = written("data")
    assert places(config) == [("data", "pair", "{split}/{key}.*")]
    assert (config.pair.source_half, config.shard.size) == ("left", (128, 128))


def test_ids_with_a_void_value_deep_grey_and_other_shapes() -> None:
    fill("label/{}.png", lambda n, w: np.where(ids(n, w) == 4, 255, ids(n, w)).astype(np.uint8))
    fill("deep/{}.png", lambda n, w: photo(n, w + 8)[:, :, :1].astype(np.uint16) * 257)
    config = written("label", "deep")
    assert config.shard.kinds == {"source": "labels", "target": "grey16"}
    assert config.shard.range == {"target": (0, 65535)}
    assert (config.shard.classes, config.shard.ignore_label, config.shard.fit) == (5, 255, "stretch")


def test_a_microscopes_channels_have_the_values_that_they_use() -> None:
    for channel, peak in ("w1", 4000), ("w2", 900):
        fill(f"plate/s{{}}_{channel}.tif", lambda n, w, peak=peak: np.full((w, w, 1), peak - n, np.uint16))
    config = written("plate")
    assert config.shard.kinds == {"source": "grey16", "target": "grey16"}
    assert config.shard.range == {"source": (0, 4095), "target": (0, 1023)}
    with Image.open("pixloom.png") as sheet:
        assert sheet.getpixel((20, 20))[0] > 200  # no black sheet of what is in the lower bits


@pytest.mark.parametrize(
    ("low", "high", "dtype", "bits", "kind", "expected"),
    [
        (0, 4000, np.uint16, 12, "grey16", (0, 4095)),  # 12 bits, packed
        (-500, 2500, np.int16, 16, "grey16", (-4096, 4095)),
        (-9000, -5000, np.int16, 16, "grey16", (-16384, 16383)),
        (0, 300_000, np.int32, 32, "grey16", (0, 524_287)),
        (0, 250, np.uint16, 16, "grey", (0, 255)),
        (0, 0.7, np.float32, 32, "grey16", (0, 1)),
        (-0.2, 5.5, np.float32, 32, "grey16", (-8, 8)),
    ],
)
def test_values_of_deep_files_are_between_black_and_white(
    low: float, high: float, dtype: type, bits: int, kind: str, expected: tuple[int, int]
) -> None:
    fill("b/{}.png")
    Path("a").mkdir()
    for n in range(12):
        values = np.linspace(low, high, 24 * 16).reshape(16, 24).astype(dtype)
        tifffile.imwrite(f"a/{n}.tif", values, bitspersample=bits, photometric="minisblack")
    config = written("a", "b")
    assert config.shard.kinds["source"] == kind
    assert config.shard.range == {"source": expected}


def test_colours_of_few_bits_in_deep_files_are_not_black() -> None:
    fill("a/{}.png", lambda n, w: photo(n, w).astype(np.uint16) * 16)
    fill("b/{}.png", lambda n, w: np.zeros((16, w, 3), np.uint8) if n % 2 else photo(n, w) // 3)
    config = written("a", "b")
    assert config.shard.range == {"source": (0, 4095)}
    fill("halves/{}.png", lambda n, w: photo(n, 32).astype(np.uint16) * 16)
    assert pixloom.main(["init", "halves", "--output", "halves.yaml"]) == 0
    assert configuration.load("halves.yaml").shard.range == (0, 4095)


def test_numbers_of_images_are_no_channels(capsys: pytest.CaptureFixture[str]) -> None:
    fill("data/frame_f{}.png")
    assert pixloom.main(["init", "data"]) == 2
    assert "12 names and no pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "said"), [(0, "no images there"), (1, "one image there"), (5, "and no pairs")]
)
def test_what_is_no_pair_is_one_line_with_the_known_layouts(
    count: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data").mkdir()
    fill("data/{}.png", count=count)
    assert pixloom.main(["init", "data"]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "init knows two locations" in message
    assert message.count("\n") == 1
    assert not Path("pixloom.yaml").exists()


def test_a_folder_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert pixloom.main(["init", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("nowhere: ")


@pytest.mark.parametrize("name", ["pixloom.yaml", "pixloom.png"])
def test_no_file_is_overwritten(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill("a/{}.png")
    fill("b/{}.png")
    Path(name).write_text("mine")
    assert pixloom.main(["init", "a", "b"]) == 2
    assert f"{name}: exists" in capsys.readouterr().err
    assert Path(name).read_text() == "mine"


@pytest.mark.parametrize("name", ["pixloom.yaml", "pixloom.png"])
def test_a_file_that_another_process_made_meanwhile_is_kept(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill("data/a/{}.png", count=2)
    fill("data/b/{}.png", count=2)

    class Server(SimpleHTTPRequestHandler):
        """A file server at whose first page the other process writes."""

        def do_GET(self) -> None:
            Path(name).write_text("theirs")
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever).start()
        root = f"http://127.0.0.1:{server.server_port}/data"
        assert pixloom.main(["init", f"{root}/a/", f"{root}/b/"]) == 2
        server.shutdown()
    assert f"{name}: exists" in capsys.readouterr().err
    assert Path(name).read_text() == "theirs"
    assert [file.name for file in Path().glob("pixloom.*")] == [name]  # nothing of ours is left


@pytest.mark.s3
def test_a_bucket_is_looked_at_as_a_folder_is(
    s3_store: SeaweedS3, s3_bucket: str, client_options: None
) -> None:
    storage.configure({"s3": s3_store.options()})
    fill("data/a/{}.png", ids)
    fill("data/b/{}.png")
    for file in Path("data").rglob("*.png"):
        s3_store.client().pipe_file(f"{s3_bucket}/{file}", file.read_bytes())
    found = places(written(f"s3://{s3_bucket}/data"))
    assert [uri for uri, _, _ in found] == [f"s3://{s3_bucket}/data/{folder}" for folder in "ab"]


def test_a_name_with_a_line_break_stays_in_its_comment(capsys: pytest.CaptureFixture[str]) -> None:
    fill("data/a\nworkspace: elsewhere\n#/{}.png")
    fill("data/b/{}.png")
    for side in ("a\nworkspace: elsewhere\n#", "b"):
        Path(f"data/{side}/9\x1b[31m.png").write_bytes(b"no image")
    config = written("data")
    assert Path(config.workspace).name == "workspace"
    assert "source: a\\nworkspace: elsewhere\\n#, colours\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("", "ends in .yaml"),
        ("x.png", "ends in .yaml"),
        ("/proc/x/y.yaml", "cannot be written: [Errno 2] No such file"),
        ("data/a/0.png/y.yaml", "data/a/0.png: exists"),
    ],
)
def test_an_output_that_cannot_be_is_refused(
    output: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill("data/a/{}.png", count=2)
    fill("data/b/{}.png", count=2)
    assert pixloom.main(["init", "data", "--output", output]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
