"""Random crop and mirror: the same for every image of a pair, another one each epoch.

in:  (seed, epoch, key), the stored size, the size to crop; then an array (H, W, C)
out: Draw; then the crop as a view of the array, without a copy

The jitter of pix2pix (section 6.2): shards are stored at 286x286, a 256x256 crop is taken, mirrored with
probability one half. A draw is a function of its arguments alone: it does not depend on workers or order.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages import seeding
from stages.config.augment import AugmentConfig
from stages.images.kinds import Array

Size = tuple[int, int]

NONE = AugmentConfig(mirror=False)
"""Neither crop nor mirror."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Left edge and upper edge of the crop, in stored pixels, and whether it is mirrored afterwards."""

    x: int
    y: int
    flip: bool


def draw(seed: int, epoch: int, key: str, load: Size, crop: Size | None = None, mirror: bool = True) -> Draw:
    """The draw of one pair in one epoch; `load` and `crop` are (width, height), the crop within the load."""
    digest = seeding.digest(seed, epoch, key, size=17)
    width, height = crop or load
    assert width <= load[0], "the crop fits the stored image: the config checks it"
    assert height <= load[1], "the crop fits the stored image: the config checks it"
    x = int.from_bytes(digest[:8], "big") % (load[0] - width + 1)
    y = int.from_bytes(digest[8:16], "big") % (load[1] - height + 1)
    return Draw(x, y, mirror and bool(digest[16] & 1))


def centre(load: Size, crop: Size | None = None) -> Draw:
    """The middle of the image, not mirrored: for previews."""
    width, height = crop or load
    return Draw((load[0] - width) // 2, (load[1] - height) // 2, flip=False)


def apply(array: Array, drawn: Draw, load: Size, crop: Size | None = None) -> Array:
    """The crop of an image (H, W, C), mirrored if drawn so, as a view."""
    width, height = crop or load
    out = array[drawn.y : drawn.y + height, drawn.x : drawn.x + width]
    return out[:, ::-1] if drawn.flip else out
