"""Sources made from their targets: grey, lightness, edges, sketch, holes to fill in, low resolution.

in:  the target (H, W, 3) uint8 at the load size, a recipe, the pair's key
out: the source (H, W, 3) uint8, a function of these alone

| recipe        | what the network learns                                                |
|---------------|------------------------------------------------------------------------|
| grey          | colour from lightness, in RGB                                          |
| lab_lightness | colour from CIE Lab lightness; use kinds lab_l and lab_ab (pix2pix)    |
| edges         | photo from thin black edges on white                                   |
| sketch        | photo from a pencil drawing                                            |
| inpaint       | what was in one to four white rectangles of 1/8 to 1/2 of a side       |
| downscale     | detail that is lost at 1/n of the resolution                           |
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from stages import seeding
from stages.base import Kind
from stages.images.colour import lab_channels
from stages.images.geometry import resize
from stages.images.kinds import Array


def derive(target: Array, recipe: str, *, key: str, kind: Kind, factor: int = 4) -> Array:
    """The source of `kind` ("rgb", "grey" or "lab_l") that `recipe` makes of a target (H, W, 3).

    `factor`: of recipe `downscale`.
    """
    match recipe:
        case "grey":
            source = grey(target)
        case "lab_lightness":
            source = target  # its L is taken below, or shown as grey
            if kind != "lab_l":
                source = np.repeat(lab_channels(target, "lab_l"), 3, axis=2)
        case "edges":
            source = edges(target)
        case "sketch":
            source = sketch(target)
        case "inpaint":
            source = inpaint(target, key)
        case "downscale":
            source = downscale(target, factor)
        case _:
            raise AssertionError(f"unknown recipe {recipe!r}: the pair stage checks it")
    if kind == "lab_l":
        return lab_channels(source, "lab_l")
    return np.asarray(Image.fromarray(source).convert("L"))[:, :, None] if kind == "grey" else source


def grey(target: Array) -> Array:
    """Luma (ITU-R 601), in three equal channels."""
    return np.asarray(Image.fromarray(target).convert("L").convert("RGB"))


def edges(target: Array) -> Array:
    """Thin black edges on white: gradient maxima of a smoothed image; weak ones only next to strong ones."""
    smooth = Image.fromarray(target).convert("L").filter(ImageFilter.GaussianBlur(1.4))
    values = np.pad(np.asarray(smooth, dtype=np.float32), 1, mode="edge")
    right, left, down, up = values[1:-1, 2:], values[1:-1, :-2], values[2:, 1:-1], values[:-2, 1:-1]
    dx, dy = right - left, down - up
    strength = np.hypot(dx, dy)
    padded = np.pad(strength, 1)
    # Neighbours along the gradient, in four directions: an edge is where neither is stronger.
    turn = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    thin = np.zeros(strength.shape, bool)
    for direction, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        height, width = strength.shape
        ahead = padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]
        behind = padded[1 - y : 1 - y + height, 1 - x : 1 - x + width]
        thin |= (turn == direction) & (strength > ahead) & (strength >= behind)
    strong, weak = thin & (strength > 24), thin & (strength > 10)
    for _ in range(16):  # weak edges within 16 pixels of a strong one, along weak ones
        grown = np.asarray(Image.fromarray(strong).convert("L").filter(ImageFilter.MaxFilter(3))) > 0
        grown &= weak
        if (grown == strong).all():
            break
        strong = grown
    return np.repeat(np.where(strong, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def sketch(target: Array) -> Array:
    """A pencil drawing: lightness divided by its surroundings (colour dodge)."""
    image = Image.fromarray(target).convert("L")
    radius = max(2.0, min(image.size) / 64)
    around = np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)
    drawn = np.clip(np.asarray(image, dtype=np.float32) / np.maximum(around, 1) * 255, 0, 255)
    return np.repeat(np.rint(drawn).astype(np.uint8)[:, :, None], 3, axis=2)


def inpaint(target: Array, key: str) -> Array:
    """One to four white rectangles at places drawn from the key."""
    draw = np.random.default_rng(int.from_bytes(seeding.digest("inpaint", key), "big"))
    source = target.copy()
    height, width = target.shape[:2]
    for _ in range(int(draw.integers(1, 5))):
        h = max(1, int(height * draw.uniform(1 / 8, 1 / 2)))
        w = max(1, int(width * draw.uniform(1 / 8, 1 / 2)))
        y, x = int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1))
        source[y : y + h, x : x + w] = 255
    return source


def downscale(target: Array, factor: int) -> Array:
    """Reduced to 1/`factor` of the resolution and enlarged to the size it had."""
    height, width = target.shape[:2]
    small = resize(target, (max(1, width // factor), max(1, height // factor)), "rgb")
    return resize(small, (width, height), "rgb")
