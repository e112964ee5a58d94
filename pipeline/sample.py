"""Draw sample data: street-like scenes as photo, class-label map and instance map, in three folders.

    python -m pipeline.sample sample --pairs 120 --size 256x128 --seed 0

    sample/photo/scene_00000.png      8-bit RGB, textured
    sample/label/scene_00000.png      8-bit ids of the classes in CLASSES
    sample/instance/scene_00000.png   16-bit; below 1000 the class itself, else class * 1000 + number

A scene is a pure function of (seed, number, size). The maps determine the photo, except for fine texture and
a little light, so that a model can learn the mapping and be evaluated on scenes it has not seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline import cli
from stages import storage
from stages.errors import UserError
from stages.images import decode, encode
from stages.progress import Progress

CLASSES = ("void", "road", "sidewalk", "building", "vegetation", "sky", "person", "car")
VOID, ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, PERSON, CAR = range(len(CLASSES))

CAR_PAINT = ((186, 44, 40), (38, 74, 150), (222, 222, 226), (52, 56, 62))
PLASTER = ((196, 158, 116), (168, 92, 72), (148, 146, 150), (206, 190, 160))

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Scene:
    """One scene: `photo` (H, W, 3) uint8, `label` (H, W) uint8 class ids, `instance` (H, W) uint16 ids."""

    photo: Bytes
    label: Bytes
    instance: npt.NDArray[np.uint16]


def rgb(values: Sequence[int]) -> Floats:
    """An RGB colour as float32, for arithmetic."""
    return np.array(values, np.float32)


def draw(seed: int, number: int, width: int, height: int) -> Scene:
    """Draw scene `number`. The same arguments give the same pixels on every machine."""
    return _Canvas(np.random.default_rng([seed, number]), width, height).street()


class _Canvas:
    """Three layers drawn back to front, the later shape over the earlier one."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng, self.width, self.height = rng, width, height
        self.photo: Floats = np.zeros((height, width, 3), np.float32)
        self.label: Bytes = np.full((height, width), VOID, np.uint8)
        self.instance = np.full((height, width), VOID, np.uint16)
        self.rows, self.columns = np.mgrid[0:height, 0:width].astype(np.float32)
        self.numbers = {PERSON: 0, CAR: 0}

    def street(self) -> Scene:
        horizon = self.height * self.rng.uniform(0.42, 0.5)
        self.sky()
        self.houses(horizon)
        self.ground(horizon)
        for _ in range(self.rng.integers(1, 4)):
            self.tree(horizon)
        for depth in np.sort(self.rng.uniform(0.25, 0.9, self.rng.integers(2, 5))):
            self.car(horizon, float(depth))
        for depth in np.sort(self.rng.uniform(0.2, 0.8, self.rng.integers(1, 5))):
            self.person(horizon, float(depth))
        light = self.rng.uniform(0.94, 1.06)
        grain = self.rng.normal(0, 3, (self.height, self.width, 1)).astype(np.float32)
        photo = np.clip(self.photo * light + grain, 0, 255).astype(np.uint8)
        return Scene(photo, self.label, self.instance)

    def paint(self, mask: Mask, klass: int, colour: Floats, instance: int | None = None) -> None:
        """Put a shape into all three layers. `colour` (H, W, 3) or (3,)."""
        self.label[mask] = klass
        self.instance[mask] = klass if instance is None else instance
        self.colour(mask, colour)

    def colour(self, mask: Mask, colour: Floats) -> None:
        """Change only the photo: detail within a shape."""
        self.photo[mask] = np.broadcast_to(colour, self.photo.shape)[mask]

    def box(self, left: float, top: float, right: float, bottom: float) -> Mask:
        across = (self.columns >= left) & (self.columns < right)
        inside: Mask = across & (self.rows >= top) & (self.rows < bottom)
        return inside

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Mask:
        inside: Mask = ((self.columns - x) / max(rx, 0.5)) ** 2 + ((self.rows - y) / max(ry, 0.5)) ** 2 <= 1
        return inside

    def thing(self, klass: int) -> int:
        """The next instance id of a class."""
        self.numbers[klass] += 1
        return klass * 1000 + self.numbers[klass]

    def sky(self) -> None:
        share = (self.rows / self.height)[..., None]
        top, low = rgb([96, 150, 214]), rgb([214, 228, 240])
        self.paint(np.ones_like(self.label, bool), SKY, top + (low - top) * np.minimum(share * 2, 1))

    def houses(self, horizon: float) -> None:
        left = -self.rng.uniform(0, 0.1) * self.width
        while left < self.width:
            wide = self.rng.uniform(0.14, 0.3) * self.width
            if self.rng.random() < 0.82:
                self.house(left, horizon * self.rng.uniform(0.1, 0.6), left + wide, horizon)
            left += wide

    def house(self, left: float, top: float, right: float, bottom: float) -> None:
        # The plaster follows from the height, so a label map tells it.
        colour = rgb(PLASTER[int(4 * top / bottom) % len(PLASTER)])
        wall = self.box(left, top, right, bottom)
        brick = 1 - 0.08 * ((self.rows - top) % 4 < 1)
        self.paint(wall, BUILDING, colour * brick[..., None])
        self.colour(self.box(left, top, right, top + 3), colour * np.float32(0.55))
        step = self.height / 12
        inside = wall & (self.rows < bottom - step * 0.8) & (self.rows > top + step * 0.5)
        column, row = (self.columns - left) % step / step, (self.rows - top) % step / step
        inside &= (self.columns > left + 2) & (self.columns < right - 2)
        pane = inside & (column > 0.3) & (column < 0.8) & (row > 0.3) & (row < 0.85)
        self.colour(pane, rgb([58, 74, 96]) + 46 * (1 - row)[..., None])

    def ground(self, horizon: float) -> None:
        below = self.rows >= horizon
        depth = (self.rows - horizon) / (self.height - horizon)
        tiles = ((self.columns + self.rows * 1.5) % (self.width / 16) < 1.5) | (depth * 24 % 3 < 0.4)
        self.paint(below, SIDEWALK, rgb([176, 168, 160]) - 30 * tiles[..., None])
        centre = self.width * self.rng.uniform(0.42, 0.58)
        half = self.width * (0.06 + 0.5 * depth)
        road = below & (np.abs(self.columns - centre) < half)
        tar = self.rng.normal(0, 5, (self.height, self.width, 1)).astype(np.float32)
        self.paint(road, ROAD, rgb([86, 86, 92]) + 22 * depth[..., None] + tar)
        dash = road & (np.abs(self.columns - centre) < 0.5 + self.width * 0.012 * depth)
        self.colour(dash & (1 / (depth + 0.12) * 3 % 1.2 < 0.7), rgb([236, 232, 214]))
        kerb = below & ~road & (np.abs(self.columns - centre) < half + 2)
        self.colour(kerb, rgb([122, 116, 110]))

    def tree(self, horizon: float) -> None:
        x = self.rng.choice([self.rng.uniform(0, 0.3), self.rng.uniform(0.7, 1)]) * self.width
        crown = self.height * self.rng.uniform(0.1, 0.17)
        foot = horizon + self.height * self.rng.uniform(0.02, 0.08)
        top = foot - crown * 2.2
        self.paint(self.box(x - crown / 8, top, x + crown / 8, foot), VEGETATION, rgb([92, 66, 42]))
        leaves = self.rng.normal(0, 16, (self.height, self.width, 1)).astype(np.float32)
        shade = np.clip((self.rows - top + crown) / (2 * crown), 0, 1)[..., None]
        green = rgb([98, 150, 62]) * (1.1 - 0.5 * shade) + leaves
        self.paint(self.ellipse(x, top, crown, crown * 1.1), VEGETATION, green)

    def car(self, horizon: float, depth: float) -> None:
        high = self.height * (0.07 + 0.16 * depth)
        wide, foot = high * 1.9, horizon + (self.height - horizon) * (0.08 + 0.85 * depth)
        x = self.width * self.rng.uniform(0.12, 0.88)
        number = self.thing(CAR)
        # The paint follows from the place, so the maps tell it.
        paint = rgb(CAR_PAINT[int(x / self.width * len(CAR_PAINT)) % len(CAR_PAINT)])
        top = foot - high
        cabin = self.ellipse(x, top + high * 0.45, wide * 0.34, high * 0.45)
        body = self.box(x - wide / 2, top + high * 0.4, x + wide / 2, foot - high * 0.12)
        shine = 1.15 - 0.5 * np.clip((self.rows - top) / high, 0, 1)[..., None]
        self.paint(cabin | body, CAR, paint * shine, number)
        self.colour(self.ellipse(x, top + high * 0.42, wide * 0.27, high * 0.3) & ~body, rgb([70, 92, 112]))
        for side in (-1, 1):
            wheel = self.ellipse(x + side * wide * 0.3, foot - high * 0.14, high * 0.17, high * 0.17)
            self.paint(wheel, CAR, rgb([24, 24, 26]), number)
        lamp = self.box(x - wide / 2, top + high * 0.5, x - wide * 0.42, top + high * 0.64)
        self.colour(lamp & body, rgb([250, 226, 140]))

    def person(self, horizon: float, depth: float) -> None:
        high = self.height * (0.12 + 0.2 * depth)
        foot = horizon + (self.height - horizon) * (0.06 + 0.75 * depth)
        x = self.width * self.rng.choice([self.rng.uniform(0.04, 0.22), self.rng.uniform(0.78, 0.96)])
        number, top, wide = self.thing(PERSON), foot - high, high * 0.26
        coat = rgb([182, 120, 34] if x < self.width / 2 else [70, 52, 128])
        legs = self.box(x - wide * 0.38, top + high * 0.55, x + wide * 0.38, foot)
        gap = self.box(x - wide * 0.08, top + high * 0.66, x + wide * 0.08, foot)
        self.paint(legs & ~gap, PERSON, rgb([38, 42, 62]), number)
        self.paint(self.ellipse(x, top + high * 0.4, wide * 0.5, high * 0.24), PERSON, coat, number)
        head = self.ellipse(x, top + high * 0.1, wide * 0.3, high * 0.1)
        self.paint(head, PERSON, rgb([222, 176, 142]), number)


def write(folder: str, *, pairs: int, width: int, height: int, seed: int) -> None:
    """Write `pairs` scenes to any location, except those that exist. Raises UserError if these are others."""
    existing, first = set(storage.list_names(storage.join(folder, "instance"))), "scene_00000.png"
    if first in existing:
        there = decode.decode_image(storage.read_bytes(storage.join(folder, "instance", first)), "instances")
        if not np.array_equal(there[..., 0], draw(seed, 0, width, height).instance):
            raise UserError(f"{folder}: holds scenes of another --seed or --size; name another folder")

    def one(number: int) -> None:
        scene, name = draw(seed, number, width, height), f"scene_{number:05d}.png"
        for layer in ("photo", "label", "instance"):  # the instance map last: it marks the scene as complete
            png = encode.encode_png(np.atleast_3d(getattr(scene, layer)))
            storage.write_bytes(storage.join(folder, layer, name), png)

    todo = [number for number in range(pairs) if f"scene_{number:05d}.png" not in existing]
    progress = Progress("sample", total=pairs, unit="scenes", done=pairs - len(todo))
    with progress, ThreadPoolExecutor(4) as pool:
        for _ in pool.map(one, todo):
            progress.advance()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.parser(
        "pipeline.sample", "Draw street-like scenes (photo, label map, instance map) to try the pipeline on."
    )
    text = "where to write: a local folder or a URI such as s3://bucket/sample"
    p.add_argument("folder", type=cli.output, help=text)
    p.add_argument("--pairs", type=cli.count, default=120, metavar="N", help="how many scenes (default: 120)")
    p.add_argument(
        "--size",
        type=partial(cli.size, least=32, most=8192),
        default=(256, 128),
        metavar="WxH",
        help="size of every image (default: 256x128)",
    )
    p.add_argument(
        "--seed",
        type=partial(cli.count, least=0),
        default=0,
        help="another seed draws other scenes (default: 0)",
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    options = parser().parse_args(arguments)
    width, height = options.size
    cli.log_to_stdout()
    return cli.exit_code(
        lambda: write(options.folder, pairs=options.pairs, width=width, height=height, seed=options.seed)
    )


if __name__ == "__main__":
    sys.exit(main())
