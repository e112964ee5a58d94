"""How well the pair doctor finds what is wrong: clean sets with some pairs made wrong, so the truth is known.

    python -m benchmarks.suspects [--sets facades,camvid,edges2shoes,sample] [--turns 5]
    OMP_NUM_THREADS=1 python -m benchmarks.suspects --cost    # its share of the shard stage's processor time

In each turn 5 % of the pairs, chosen at random, are made wrong in one way. Precision is the share of the
named pairs that are wrong, recall the share of the wrong pairs that are named, both over all turns. "clean"
is the share of the untouched set that is named. Sets of ../shared/data that are absent are left out.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline import sample
from stages import shard
from stages.base import Split
from stages.config.shard import ShardConfig
from stages.images import colour
from stages.images.kinds import Array
from stages.shards import suspects
from stages.shards.dataset import RoleSpec
from stages.storage import local_etag

DATA = Path(__file__).resolve().parents[2] / "shared/data"
SHARE = 0.05
SIDE = 256
SPECS: dict[Any, RoleSpec] = {role: RoleSpec(kind="rgb", encoding="raw") for role in ("source", "target")}

Pair = tuple[Array, Array]
"""Source and target."""


# -- clean sets ---------------------------------------------------------------


def side_by_side(folder: str, *, source_left: bool, most: int) -> list[Pair]:
    pairs: list[Pair] = []
    for path in sorted((DATA / folder).glob("[tv]*/*.jpg"))[:most]:
        both = np.asarray(Image.open(path).convert("RGB"))
        left, right = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        pairs.append((left, right) if source_left else (right, left))
    return pairs


def camvid(most: int) -> list[Pair]:
    pairs = []
    for path in sorted((DATA / "camvid").glob("*_label/*"))[:most]:
        (photo,) = path.parent.with_name(path.parent.name.replace("label", "photo")).glob(f"{path.stem}.*")
        ids = np.asarray(Image.open(path).resize((SIDE, 192), Image.Resampling.NEAREST))
        with Image.open(photo) as image:
            resized = image.convert("RGB").resize((SIDE, 192), Image.Resampling.BOX)
        pairs.append((colour.colorize(ids[:, :, None], 12), np.asarray(resized)))
    return pairs


def scenes(most: int) -> list[Pair]:
    drawn = (sample.draw(0, n, SIDE, SIDE // 2) for n in range(min(most, 200)))
    return [(colour.colorize(scene.label), scene.photo) for scene in drawn]


SETS: dict[str, Callable[[int], list[Pair]]] = {
    "facades": lambda most: side_by_side("facades", source_left=False, most=most),
    "camvid": camvid,
    "edges2shoes": lambda most: side_by_side("edges2shoes", source_left=True, most=most),
    "sample": scenes,
}


# -- what is made wrong -------------------------------------------------------


def shifted(pairs: Sequence[Pair], n: int, other: int, rng: np.random.Generator) -> Pair:  # noqa: ARG001
    """The target moved sideways by 2 % to 8 % of the width; its edge pixels fill the gap."""
    source, target = pairs[n]
    pixels = round(target.shape[1] * rng.uniform(0.02, 0.08)) * int(rng.choice([-1, 1]))
    columns = np.clip(np.arange(target.shape[1]) - pixels, 0, target.shape[1] - 1)
    return source, target[:, columns]


def mirrored(pairs: Sequence[Pair], n: int, other: int, rng: np.random.Generator) -> Pair:  # noqa: ARG001
    return pairs[n][0], pairs[n][1][:, ::-1]


def mismatched(pairs: Sequence[Pair], n: int, other: int, rng: np.random.Generator) -> Pair:  # noqa: ARG001
    """Another pair's target."""
    return pairs[n][0], pairs[other][1]


def near_duplicate(pairs: Sequence[Pair], n: int, other: int, rng: np.random.Generator) -> Pair:  # noqa: ARG001
    """The next pair, saved again at three quarters of its size, darker or lighter, as JPEG."""
    source, target = pairs[n + 1]
    image = Image.fromarray(np.clip(target * rng.uniform(0.9, 1.1), 0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(file, "JPEG", quality=80)
    return source, np.asarray(Image.open(file).resize(image.size))


def constant(pairs: Sequence[Pair], n: int, other: int, rng: np.random.Generator) -> Pair:  # noqa: ARG001
    """A target of one colour with a little noise."""
    source, target = pairs[n]
    noise = rng.normal(rng.uniform(0, 255, 3), 2, target.shape)
    return source, np.clip(noise, 0, 255).astype(np.uint8)


WRONG: dict[str, Callable[[Sequence[Pair], int, int, np.random.Generator], Pair]] = {
    "shifted": shifted,
    "mirrored": mirrored,
    "mismatched": mismatched,
    "near_duplicate": near_duplicate,
    "constant": constant,
}


# -- precision and recall -----------------------------------------------------


def named(signs: Sequence[dict[str, Any]], folder: str) -> list[tuple[str, int]]:
    """Kind and number of each suspect of a set, as the shard stage finds them."""
    rows = [{"key": str(n)} | sign for n, sign in enumerate(signs)]
    shards: dict[Split, list[str]] = {"train": ["x.parquet"]}
    pq.write_table(
        pa.Table.from_pylist(rows, schema=suspects.SIGNS), f"{folder}/{suspects.signs_name('x.parquet')}"
    )
    explanation = suspects.Explanation.of(suspects.first_signs(folder, shards["train"], suspects.SAMPLE))
    thumbnails = suspects.Thumbnails.read(folder, shards)
    found = suspects.search(
        ("train", "x.parquet"), folder=folder, explanation=explanation, thumbnails=thumbnails
    )
    return [(kind, int(suspect.key)) for kind, ranked in found.suspects.items() for suspect in ranked]


def sign(pair: Pair) -> dict[str, Any]:
    return suspects.sign({"source": pair[0], "target": np.ascontiguousarray(pair[1])}, SPECS)


def measure(pairs: Sequence[Pair], turns: int) -> dict[str, str]:
    """Of each kind: precision, recall, and the share of the clean pairs that are named."""
    clean = [sign(pair) for pair in pairs]
    cells = {}
    with tempfile.TemporaryDirectory() as folder:
        untouched = named(clean, folder)
        for kind, make in WRONG.items():
            said = right = wrong = 0
            for turn in range(turns):
                rng = np.random.default_rng(turn)
                even = np.arange(0, len(pairs) - 1, 2)  # so the pair after a wrong one is right
                chosen = rng.choice(even, max(2, round(SHARE * len(pairs))), replace=False).tolist()
                signs = list(clean)
                for n, other in zip(chosen, [chosen[-1], *chosen], strict=False):
                    signs[n] = sign(make(pairs, n, other, rng))
                hits = {number for name, number in named(signs, folder) if name == kind}
                # Of two that are alike the later one is named.
                truth = {n + 1 for n in chosen} if kind == "near_duplicate" else set(chosen)
                said, wrong, right = said + len(hits), wrong + len(truth), right + len(hits & truth)
            false = sum(name == kind for name, _ in untouched) / len(pairs)
            precision = f"{right / said:.2f}" if said else "-"
            cells[kind] = f"{precision} / {right / wrong:.2f}, clean {false:.1%}"
    return cells


# -- cost ---------------------------------------------------------------------


def cost(pairs: Sequence[Pair], turns: int) -> tuple[float, float, float]:
    """Milliseconds of processor time a pair: of the shard stage's task, of `sign` in it, of the search."""
    config = ShardConfig.model_validate({"size": (286, 286)})
    specs = shard.role_specs(config, ["source", "target"])
    resized = [tuple(np.asarray(Image.fromarray(i).resize(config.size)) for i in pair) for pair in pairs]
    shards: dict[Split, list[str]] = {"train": ["train-00000.parquet"]}
    whole, own, search = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for n, (source, target) in enumerate(pairs):
            path = Path(scratch, f"{n:04d}.jpg")
            Image.fromarray(np.concatenate([target, source], axis=1)).save(path, quality=90)
            row: dict[str, Any] = {"key": f"{n:04d}", "split": "train", "group": None}
            for role, half in (("source", "right"), ("target", "left")):
                row |= {f"{role}_uri": str(path), f"{role}_crop": half, f"{role}_derive": ""}
                row |= {f"{role}_size": path.stat().st_size, f"{role}_etag": local_etag(path.stat())}
            rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), f"{scratch}/part-00000.parquet")
        for turn in range(turns):
            start = time.process_time()
            shard.shard_part(
                f"{scratch}/part-00000.parquet",
                output=f"{scratch}/{turn}",
                config=config,
                specs=specs,
                io_threads=2,
            )
            whole.append(time.process_time() - start)
            start = time.process_time()
            for source, target in resized:
                suspects.sign({"source": source, "target": target}, SPECS)
            own.append(time.process_time() - start)
            written = f"{scratch}/{turn}"
            explanation = suspects.Explanation.of(suspects.first_signs(written, shards["train"], len(pairs)))
            thumbnails = suspects.Thumbnails.read(written, shards)
            start = time.process_time()
            suspects.search(
                ("train", shards["train"][0]), folder=written, explanation=explanation, thumbnails=thumbnails
            )
            search.append(time.process_time() - start)
    # The least of all turns, since other work on the machine only adds.
    task, signs, searched = (1000 * min(seconds) / len(pairs) for seconds in (whole, own, search))
    return task, signs, searched


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", default=",".join(SETS), help="which of them, separated by commas")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a set at most")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cost", action="store_true", help="measure the processor time instead")
    options = parser.parse_args()
    for name in options.sets.split(","):
        pairs = SETS[name](options.pairs)
        if not pairs:
            print(f"{name}: not here")
        elif options.cost:
            task, own, search = cost(pairs, options.turns)
            print(
                f"{name}: {len(pairs)} pairs; the task takes {task:.2f} ms a pair, with {own:.2f} for the "
                f"signs ({own / task:.0%}); the search {search:.2f} ({search / task:.0%})"
            )
        else:
            print(f"{name}: {len(pairs)} pairs, {options.turns} turns; precision / recall")
            for kind, cell in measure(pairs, options.turns).items():
                print(f"  {kind:15} {cell}", flush=True)


if __name__ == "__main__":
    main()
