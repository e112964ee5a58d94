"""Joining roles by key, and dealing pairs to splits."""

from __future__ import annotations

import csv
import io
import json
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import ValidationError

from stages import pair
from stages.base import Resources
from stages.config.pair import PairConfig, SplitConfig
from stages.errors import StageError, UserError
from stages.ingest import OBJECTS
from stages.tracking.run import Run

BOTH = ("source", "target")
NOW = int(time.time())


def objects(*rows: dict[str, Any]) -> pa.Table:
    """Rows of ingest's schema; what a row leaves out is as for a plain object."""
    full = []
    for number, row in enumerate(rows):
        plain = dict.fromkeys(OBJECTS.names) | {
            "uri": f"/data/{number}.png",
            "size": 7,
            "etag": "e",
            "location": 0,
        }
        full.append(plain | row)
    return pa.Table.from_pylist(full, schema=OBJECTS)


def join(table: pa.Table, *roles: Any, **config: Any) -> tuple[list[dict[str, Any]], dict[str, set[str]]]:
    """Pairs as rows, and the rejected keys by reason."""
    pairs, rejects = pair.join_roles(table, roles or BOTH, PairConfig(**config), (0, 0))
    reasons = defaultdict(set)
    for row in rejects.to_pylist():
        reasons[row["reason"]].add(row["key"])
    return pairs.to_pylist(), dict(reasons)


def both(key: str, **values: Any) -> list[dict[str, Any]]:
    return [{"key": key, "role": role, "uri": f"/{role}/{key}", **values} for role in BOTH]


# -- the join -----------------------------------------------------------------


def test_objects_of_one_key_become_a_pair_and_pairs_are_sorted() -> None:
    pairs, rejects = join(objects(*both("b"), *reversed(both("a"))))
    assert [row["key"] for row in pairs] == ["a", "b"]
    assert pairs[0]["source_uri"] == "/source/a"
    assert pairs[0]["target_uri"] == "/target/a"
    assert not rejects


def test_a_missing_file_shifts_nothing() -> None:
    rows = [row for key in "abcd" for row in both(key) if row["uri"] != "/source/b"]
    pairs, rejects = join(objects(*rows))
    assert [(row["source_uri"], row["target_uri"]) for row in pairs] == [
        (f"/source/{key}", f"/target/{key}") for key in "acd"
    ]
    assert rejects == {"no_source": {"b"}}


def test_a_key_that_comes_twice_in_a_role_is_rejected_with_all_its_objects() -> None:
    table = objects(*both("a"), {"key": "a", "role": "target"}, *both("b"))
    pairs, rejects = pair.join_roles(table, BOTH, PairConfig(), (0, 0))
    assert pairs["key"].to_pylist() == ["b"]
    assert rejects["reason"].to_pylist() == ["duplicate_target"] * 3


def test_an_object_that_is_listed_twice_is_one() -> None:
    pairs, rejects = join(
        objects(*both("a"), *both("b"), *both("a"), {"key": "b", "role": "target", "uri": "/x"})
    )
    assert [row["key"] for row in pairs] == ["a"]
    assert rejects == {"duplicate_target": {"b"}}


def test_keys_that_differ_only_in_case_are_reported_as_such() -> None:
    table = objects(
        {"key": "Img", "role": "source"}, {"key": "img", "role": "target"}, {"key": "c", "role": "source"}
    )
    pairs, rejects = join(table)
    assert not pairs
    assert rejects == {"case_differs": {"Img", "img"}, "no_target": {"c"}}
    assert len(set(pair.partition_of(pa.array(["Img", "img", "IMG"]), 97).tolist())) == 1


def test_keys_that_differ_in_case_pair_when_each_is_whole() -> None:
    pairs, rejects = join(objects(*both("A"), *both("a")))
    assert [row["key"] for row in pairs] == ["A", "a"]
    assert not rejects


def test_an_image_of_both_halves_is_source_and_target() -> None:
    (row,), _ = join(objects({"key": "a", "role": "pair", "uri": "/ab.jpg"}), source_half="right")
    assert (row["source_uri"], row["source_crop"]) == ("/ab.jpg", "right")
    assert (row["target_uri"], row["target_crop"]) == ("/ab.jpg", "left")


def test_the_direction_can_be_turned_round() -> None:
    (row,), _ = join(objects({"key": "a", "role": "pair"}), source_half="top", reverse=True)
    assert (row["source_crop"], row["target_crop"]) == ("bottom", "top")
    (row,), _ = join(objects(*both("a")), reverse=True)
    assert (row["source_uri"], row["target_uri"]) == ("/target/a", "/source/a")


def test_a_derived_source_is_the_target_with_its_recipe() -> None:
    (row,), _ = join(objects({"key": "a", "role": "target", "uri": "/a.png"}), derive_source="grey")
    assert row["source_uri"] == row["target_uri"] == "/a.png"
    assert (row["source_derive"], row["target_derive"]) == ("grey", "")


def test_optional_roles_may_be_lacking_and_others_may_not() -> None:
    rows = [*both("a"), *both("b"), {"key": "a", "role": "instance"}, {"key": "a", "role": "label"}]
    pairs, rejects = join(objects(*rows), *BOTH, "label", "instance", optional=("instance", "label"))
    assert [(row["key"], row["instance_uri"] is None) for row in pairs] == [("a", False), ("b", True)]
    assert not rejects
    pairs, rejects = join(objects(*rows), *BOTH, "label", "instance")
    assert [row["key"] for row in pairs] == ["a"]
    assert rejects == {"no_label": {"b"}}


def test_roles_that_disagree_on_the_split_and_unknown_splits_are_rejected() -> None:
    rows = [{"key": "a", "role": "source", "split": "train"}, {"key": "a", "role": "target", "split": "val"}]
    pairs, rejects = join(objects(*rows, *both("b", split="extra"), *both("c", split="test")))
    assert [(row["key"], row["split"]) for row in pairs] == [("c", "test")]
    assert rejects == {"bad_split": {"a", "b"}}
    _, table = pair.join_roles(objects(*both("b", split="extra")), BOTH, PairConfig(), (0, 0))
    assert table["detail"].to_pylist() == ["extra", "extra"]


def test_a_split_that_one_role_names_holds_for_the_pair() -> None:
    (row,), _ = join(objects({"key": "a", "role": "source"}, {"key": "a", "role": "target", "split": "val"}))
    assert row["split"] == "val"


NAMES = st.sampled_from(["a", "b", "B", "c/d", "é", "😀", "z" * 60])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(["source", "target", "instance", "label", "pair"])), max_size=30
    )
)
def test_every_object_is_in_one_pair_or_among_the_rejects(rows: list[tuple[str, str]]) -> None:
    table = objects(*({"key": key, "role": role} for key, role in rows))
    config = PairConfig(source_half="left", optional=("instance", "label"))
    pairs, rejects = pair.join_roles(table, ("source", "target", "label", "instance"), config, (0, 0))
    placed = Counter[tuple[str, str]]()
    for row in pairs.to_pylist():
        for role in ("source", "target", "label", "instance"):
            if row[f"{role}_uri"] is not None:
                placed[(row["key"], role)] += 1
    assert set(placed.values()) <= {1}
    placed.update((row["key"], row["role"]) for row in rejects.to_pylist())
    expected = Counter[tuple[str, str]]()
    for key, role in rows:
        expected.update([(key, "source"), (key, "target")] if role == "pair" else [(key, role)])
    assert placed == expected
    assert not {row["key"] for row in pairs.to_pylist()} & {row["key"] for row in rejects.to_pylist()}
    assert all(rejects["reason"].to_pylist())


# -- splits -------------------------------------------------------------------


def numbered(count: int, groups: int | None = None) -> pa.Table:
    return pa.table(
        {
            "key": [f"scene_{n}" for n in range(count)],
            "split": pa.nulls(count, pa.string()),
            "group": pa.array([f"video_{n % groups}" if groups else None for n in range(count)], pa.string()),
            "x": np.arange(count) % 100.0,
            "y": np.arange(count) // 100.0,
        }
    )


def dealt(table: pa.Table, config: SplitConfig) -> np.ndarray[Any, Any]:
    cuts = pair.split_cuts(pair.split_histogram(table, config.seed), config)
    return pair.assign_splits(table, config, cuts).to_numpy(zero_copy_only=False)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.1), (0.25, 0.0), (0.0, 0.3), (0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("groups", [None, 300])
def test_shares_are_kept_within_one_percent(val: float, test: float, groups: int | None) -> None:
    splits = dealt(numbered(3000, groups), SplitConfig(val=val, test=test))
    assert np.mean(splits == "val") == pytest.approx(val, abs=0.01)
    assert np.mean(splits == "test") == pytest.approx(test, abs=0.01)


def test_a_group_is_never_torn() -> None:
    table = numbered(1000, 37)
    split_of = defaultdict(set)
    for group, split in zip(
        table["group"].to_pylist(), dealt(table, SplitConfig(val=0.2, test=0.2)), strict=True
    ):
        split_of[group].add(split)
    assert {len(splits) for splits in split_of.values()} == {1}


def test_the_seed_alone_moves_the_splits() -> None:
    table = numbered(500)
    first, again, other = (dealt(table, SplitConfig(seed=seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    order = np.random.default_rng(0).permutation(500)
    assert (dealt(table.take(pa.array(order)), SplitConfig(seed=1)) == first[order]).all()


def test_a_region_is_held_out_and_what_is_near_it_left_out() -> None:
    config = SplitConfig(
        regions=[{"split": "test", "x": [40, 49]}, {"split": "val", "x": [90, 99]}], buffer=2
    )
    table = numbered(200)
    of_x = defaultdict(set)
    for x, split in zip(table["x"].to_pylist(), dealt(table, config), strict=True):
        of_x[split].add(int(x))
    assert of_x["test"] == set(range(40, 50))
    assert of_x["val"] == set(range(90, 100))
    assert of_x["buffer"] == {38, 39, 50, 51, 88, 89}
    assert of_x["train"] == set(range(88)) - of_x["test"] - of_x["buffer"]


def test_a_region_of_two_axes_is_a_rectangle() -> None:
    splits = dealt(
        numbered(1000), SplitConfig(regions=[{"split": "test", "x": [0, 4], "y": [0, 4]}], buffer=1)
    )
    counts = Counter(splits.tolist())
    assert (counts["test"], counts["buffer"]) == (25, 11)


def test_a_pair_without_a_position_is_in_no_region() -> None:
    table = objects(*both("a", x=1.0), *both("b"))
    pairs, rejects = join(table, split={"regions": [{"split": "test", "x": [0, 5]}]})
    assert [(row["key"], row["split"]) for row in pairs] == [("a", "test")]
    assert rejects == {"no_position": {"b"}}


@pytest.mark.parametrize(
    "config",
    [
        {"val": 0.6, "test": 0.6},
        {"regions": [{"split": "test"}]},
        {"regions": [{"split": "val", "x": [2, 1]}]},
        {"val": 2},
    ],
)
def test_splits_that_make_no_sense_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SplitConfig(**config)


# -- roles, layout, outcome ---------------------------------------------------


@pytest.mark.parametrize(
    ("objects", "config", "complaint"),
    [
        ({"pair": 3}, {}, "pair.source_half"),
        ({"source": 3}, {}, "role target"),
        ({"target": 3}, {}, "role source"),
        ({"source": 3, "target": 3}, {"derive_source": "edges"}, "pair.derive_source"),
    ],
)
def test_roles_that_make_no_pairs_are_the_users_error(
    objects: dict[str, int], config: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        pair.check_roles(PairConfig(**config), objects)


def test_roles_keep_their_order() -> None:
    counts = {"instance": 1, "target": 1, "source": 1}
    assert pair.check_roles(PairConfig(), counts) == ("source", "target", "instance")
    assert pair.check_roles(PairConfig(derive_source="grey"), {"target": 1}) == BOTH


def test_too_many_rejects_fail_the_stage_and_say_why() -> None:
    with pytest.raises(StageError, match=r"2 of 2 pairs rejected.*\(left out by ingest 2\)"):
        pair.outcome(PairConfig(), {}, 2, "out")
    with pytest.raises(StageError, match=r"3 of 10 pairs rejected.*no_target 2.*left out by ingest 1"):
        pair.outcome(PairConfig(), {"train": 7, "reject_no_target": 2}, 1, "/out")
    with pytest.raises(StageError, match=r"a.png \(duplicate_source\); several images .* a `key` column"):
        pair.outcome(PairConfig(), {"reject_duplicate_source": 2}, 0, "/out", ["a.png (duplicate_source)"])
    with pytest.raises(
        StageError, match=r"no_position 2\), pair.split.regions needs \{x\} or \{y\}[^;]*; /out"
    ):
        pair.outcome(PairConfig(), {"reject_no_position": 2}, 0, "/out")
    allowed = pair.outcome(
        PairConfig(max_reject_fraction=0.3), {"train": 7, "reject_no_target": 3}, 0, "/out"
    )
    assert allowed.counts["pairs"] == 7
    assert allowed.counts["reject_no_target"] == 3


def test_what_a_buffer_leaves_out_is_no_fault() -> None:
    outcome = pair.outcome(PairConfig(max_reject_fraction=0), {"train": 7, "reject_buffer": 3}, 0, "/out")
    assert outcome.counts["buffer"] == 3
    assert outcome.counts["rejected"] == 0


def test_neighbours_in_a_table_meet_in_a_part() -> None:
    """Pairs of files stay in the partition of their key; those of tables are dealt in the tables' order."""
    cell = "parquet://{:010d}/image::/data/{}.parquet"
    pairs = pa.table(
        {
            "source_uri": [cell.format(n % 100 + 1, n // 100) for n in range(200)] + ["/data/x.png"] * 20,
            "target_uri": [f"/data/{n}.png" for n in range(220)],
        }
    ).take(np.random.default_rng(0).permutation(220))
    partitions = np.random.default_rng(1).integers(0, 4, 220)
    dealt = pair.deal(pairs, BOTH, partitions)
    assert np.bincount(dealt).tolist() == np.bincount(partitions).tolist()
    uris = pairs["source_uri"].to_pylist()
    places = sorted((uri[-9:], uri, number) for uri, number in zip(uris, dealt, strict=True) if "::" in uri)
    numbers = [number for *_, number in places]
    assert numbers == sorted(numbers)
    files = [n for n, uri in enumerate(uris) if "::" not in uri]
    assert dealt[files].tolist() == partitions[files].tolist()
    assert pair.deal(pairs.slice(0, 0), BOTH, partitions[:0]).tolist() == []


def test_one_task_joins_the_pairs_of_tables_that_hold_images() -> None:
    files = {f"objects-{n:05d}-0000.parquet": 100_000 for n in range(10)}
    listing = {"roles": {"source": 500_000, "target": 500_000}, "files": files, "locations": [{"objects": 1}]}
    assert pair.Layout.of(PairConfig(), listing).gathers > 1
    listing["locations"] = [{"objects": 1, "inside_tables": 1}]
    assert pair.Layout.of(PairConfig(), listing).gathers == 1


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5000), st.integers(1, 400))
def test_every_partition_belongs_to_one_task(count: int, per_shard: int, files: int) -> None:
    listing = {
        "roles": {"source": count, "target": count},
        "files": {f"objects-{n}": 2 * count // files for n in range(files)},
    }
    layout = pair.Layout.of(PairConfig(pairs_per_shard=per_shard), listing)
    assert layout.partitions == max(1, -(-count // per_shard))
    assert 1 <= layout.gathers <= layout.partitions
    assert (layout.partitions - 1) // layout.partitions_per_task == layout.gathers - 1
    names = [name for task in layout.scatters for name in task.files]
    assert sorted(names) == sorted(listing["files"])


# -- wiring -------------------------------------------------------------------


def write_listing(folder: Path, *tables: pa.Table) -> str:
    """An objects folder as ingest leaves it."""
    folder.mkdir(parents=True)
    files, roles = {}, Counter[str]()
    for number, table in enumerate(tables):
        name = f"objects-{number:05d}-0000.parquet"
        pq.write_table(table, folder / name)
        files[name] = table.num_rows
        roles.update(table["role"].to_pylist())
    listing = {"files": files, "roles": roles, "rejected": 0, "examples": []}
    (folder / "_listing.json").write_text(json.dumps(listing))
    return str(folder)


def read(folder: str | Path, prefix: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob(f"{prefix}-*.parquet")))


@pytest.mark.ray
def test_whole_groups_meet_whatever_file_they_came_in(ray_local: None, tmp_path: Path) -> None:
    """Sources and targets come in other orders and files; parts hold whole pairs, each once, sorted."""
    names = [f"scene_{n:04d}" for n in range(900)]
    sources = objects(*({"key": key, "role": "source", "uri": f"/source/{key}"} for key in names))
    targets = objects(
        *({"key": key, "role": "target", "uri": f"/target/{key}"} for key in reversed(names[:-2]))
    )
    folder = write_listing(tmp_path / "objects", sources.slice(0, 300), targets, sources.slice(300))
    config = PairConfig(pairs_per_shard=100, split={"val": 0.2, "test": 0.0})
    run = lambda output: pair.run(config, Resources(), output=str(output), objects=folder, track=Run())  # noqa: E731
    outcome = run(tmp_path / "pairs")
    assert outcome.counts == {
        "pairs": 898, "train": 718, "val": 180, "test": 0, "rejected": 2, "reject_no_target": 2, "buffer": 0,
        "excluded": 0,
    }  # fmt: skip
    pairs = read(tmp_path / "pairs", "part")
    assert sorted(pairs["key"].to_pylist()) == names[:-2]
    for role in BOTH:
        assert pairs[f"{role}_uri"].to_pylist() == [f"/{role}/{key}" for key in pairs["key"].to_pylist()]
    assert set(read(tmp_path / "pairs", "rejects")["key"].to_pylist()) == set(names[-2:])
    for path in (tmp_path / "pairs").glob("part-*"):
        keys = pq.read_table(path)["key"]
        assert keys.to_pylist() == sorted(keys.to_pylist())
        assert set(pair.partition_of(keys, 9).tolist()) == {int(path.stem.removeprefix("part-"))}
    assert not [path for path in (tmp_path / "pairs").iterdir() if path.name.startswith("_exchange")]

    first = {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    (tmp_path / "pairs" / "part-99999.parquet").write_bytes(b"left by a killed run of another layout")
    (tmp_path / "pairs" / f"{pair.EXCHANGE}1000-killed").mkdir()  # long ago
    run(tmp_path / "pairs")
    assert {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()} == first
    assert pc.all(pc.is_in(pairs["split"], pa.array(["train", "val"]))).as_py()


@pytest.mark.ray
# Ray Data keeps its log files by execution, and loses one where two begin at the same time in one process.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_drivers_at_once_come_to_the_same_pairs(ray_local: None, tmp_path: Path) -> None:
    folder = write_listing(tmp_path / "objects", objects(*(row for n in range(200) for row in both(f"{n}"))))
    config = PairConfig(pairs_per_shard=50, split={"val": 0.2, "test": 0.0})
    run = lambda output: pair.run(config, Resources(), output=str(output), objects=folder, track=Run())  # noqa: E731
    alone = run(tmp_path / "alone")
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(run, [tmp_path / "shared"] * 2))
    assert [outcome.counts for outcome in outcomes] == [alone.counts] * 2
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == wanted


def test_another_drivers_exchange_is_left_alone(tmp_path: Path) -> None:
    own, other, old = (
        str(tmp_path / f"{pair.EXCHANGE}{name}") for name in (f"{NOW}-a", f"{NOW}-b", "1000-c")
    )
    for folder in (own, other, old):
        Path(folder).mkdir()
    pair.tidy(str(tmp_path), own, set())
    assert [str(path) for path in tmp_path.iterdir()] == [other]


def test_an_exchange_that_was_removed_is_an_error_and_no_loss(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="removed while it was in use"):
        pair.gather(
            pair.GatherTask(0, [0, 1]),
            shuffle=pair.Shuffle(str(tmp_path), str(tmp_path / "gone"), 1, 1, seed=0),
            output=str(tmp_path),
            roles=BOTH,
            config=PairConfig(),
            cuts=(0, 0),
            threads=2,
        )


# -- pairs that a person leaves out ---------------------------------------------


@pytest.mark.parametrize("first", ["", "sep=;\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_keys_of_an_edited_table_are_left_out_and_are_no_faults(
    tmp_path: Path, encoding: str, first: str
) -> None:
    odd = 'd,"1"\n;é'
    file = io.StringIO(newline="")
    file.write(first)
    writer = csv.writer(file, delimiter=";")
    writer.writerows(
        [["kind", "Key", "score"], ["shifted", "b", "2"], ["shifted", odd, "1"], ["", "gone", "1"]]
    )
    (tmp_path / "edited.csv").write_bytes(file.getvalue().encode(encoding))
    config = PairConfig(exclude=str(tmp_path / "edited.csv"))
    excluded = pair.excluded_keys(config)
    assert excluded == sorted(["b", odd, "gone"])
    table = objects(*both("a"), *both("b"), *both("c"), *both(odd))
    pairs, rejects = pair.join_roles(table, BOTH, config, (0, 0), excluded)
    assert pairs["key"].to_pylist() == ["a", "c"]
    assert {(row["key"], row["reason"]) for row in rejects.to_pylist()} == {
        ("b", "excluded"),
        (odd, "excluded"),
    }
    done = pair.outcome(config, {"train": 2, "reject_excluded": 2}, 0, "out")
    assert (done.counts["pairs"], done.counts["rejected"], done.counts["excluded"]) == (2, 0, 2)


def test_what_is_left_out_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    table = tmp_path / "edited.csv"
    config = PairConfig(exclude=str(table))
    digests = []
    for text in ("key\na\n", "key\nb\na\n", "kind,key\nx,a\ny,b\n"):
        table.write_text(text)
        digests.append(pair.digest(config))
    assert digests[0] != digests[1] == digests[2]
    table.write_text("name\na\n")
    with pytest.raises(UserError, match=r"pair\.exclude.*no column `key`"):
        pair.digest(config)
    with pytest.raises(UserError, match=r"pair\.exclude.*gone"):
        pair.digest(PairConfig(exclude=str(tmp_path / "gone.csv")))
