"""Colours: profiles, CIE Lab, and palettes for label maps.

in:  pictures, sRGB (H, W, 3) uint8, or maps of ids
out: sRGB; Lab or its stored channels; ids of colours; pictures of ids
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from stages.base import Kind, Palette
from stages.images.kinds import Array, ImageRejected, settled
from stages.models.architecture import Picture

# sRGB (D65) to XYZ, IEC 61966-2-1; divided by the white point, so that white is (1, 1, 1)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The image in sRGB; as it is if its profile is sRGB already, is damaged, or is of another mode."""
    opacity = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    plain = image.convert("L") if image.mode == "LA" else image
    plain = image.convert("RGB") if image.mode in ("P", "PA", "RGBA") else plain
    transform = _srgb_transform(profile, plain.mode)
    if transform is None:
        return image
    seen = ImageCms.applyTransform(plain, transform)
    assert seen is not None
    if opacity is not None:
        seen.putalpha(opacity)
    return seen


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None: colours of this mode differ by a level at most, or cannot be converted."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode in ("L", "RGB"):
        cube = np.stack(np.meshgrid(*3 * [np.arange(0, 256, 15).astype(np.uint8)]), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(cube).convert(mode)
        seen = ImageCms.applyTransform(probe, transform)
        assert seen is not None
        change = np.asarray(seen).astype(int) - np.asarray(probe.convert("RGB"))
        if np.abs(change).max() <= 1:
            return None
    return transform


def rgb_to_lab(rgb: Array) -> npt.NDArray[np.float32]:
    """uint8 sRGB (..., 3) to CIE Lab under D65: L in [0, 100], a and b within about [-110, 110]."""
    ramp = np.arange(256) / 255
    linear = np.where(ramp <= 0.04045, ramp / 12.92, ((ramp + 0.055) / 1.055) ** 2.4).astype(np.float32)
    xyz = linear[rgb] @ (_XYZ / _WHITE[:, None]).T.astype(np.float32)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def lab_to_rgb(lab: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """CIE Lab (..., 3) to uint8 sRGB; colours outside sRGB are clipped."""
    y = (lab[..., 0].astype(np.float64) + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return settled(srgb * 255, np.dtype("u1"))


def lab_channels(rgb: Array, kind: Kind) -> Array:
    """The stored form of kind `lab_l` (H, W, 1) or `lab_ab` (H, W, 2) of an RGB image."""
    lab = rgb_to_lab(rgb)
    if kind == "lab_l":
        return settled(lab[..., :1] * 2.55, np.dtype("u1"))
    return settled(lab[..., 1:] + 128, np.dtype("u1"))


# The first ids in the colours most people know from Cityscapes' label ids.
_CITYSCAPES = (
    (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (111, 74, 0), (81, 0, 81), (128, 64, 128),
    (244, 35, 232), (250, 170, 160), (230, 150, 140), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (180, 165, 180), (150, 100, 100), (150, 120, 90), (153, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32), (0, 0, 142),
)  # fmt: skip


def rgb_palette(colours: Palette) -> npt.NDArray[np.uint8]:
    """Colours (classes, 3) of a palette; one number is a grey."""
    return np.array([(c, c, c) if isinstance(c, int) else c for c in colours], np.uint8)


def nearest_class(image: Array, colours: Palette, *, exact: bool = False) -> npt.NDArray[np.uint8]:
    """Class ids (H, W) of a label picture (H, W, 3): the nearest of `colours` in RGB.

    Raises ImageRejected `label_range` if `exact` and a colour is none of them.
    """
    codes = image.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    present, inverse = np.unique(codes, return_inverse=True)
    seen = np.stack([present >> 16, present >> 8 & 255, present & 255], axis=1)
    best = np.zeros(len(seen), np.uint8)
    least = np.full(len(seen), np.iinfo(np.int32).max, np.int32)
    # Class by class, so that memory holds one distance, not all of them.
    for index, colour in enumerate(rgb_palette(colours).astype(np.int32)):
        distance = ((seen - colour) ** 2).sum(1, dtype=np.int32)
        closer = distance < least
        best[closer], least[closer] = index, distance[closer]
    if exact and least.any():
        found = seen[int(least.argmax())].tolist()
        raise ImageRejected("label_range", f"the colour {found} is not in the palette of {len(colours)}")
    return best[inverse].reshape(image.shape[:2])


def class_ids(image: Array, how: Picture, *, exact: bool = True) -> Array:
    """Label ids (H, W, 1) as training and inference both take them.

    Colours (H, W, 3) become their places in `how.palette`; `how.ignore_label` becomes `how.void_class`.
    Raises ImageRejected `label_range` for a colour or id that is no class.
    """
    if how.palette is not None and image.shape[2] == 3:
        image = nearest_class(image, how.palette, exact=exact)[:, :, None]
    if how.classes is None:
        return image
    if how.ignore_label is not None:
        void = how.classes - 1 if how.void_class is None else how.void_class
        image = np.where(image == how.ignore_label, image.dtype.type(void), image)
    if image.size and int(image.max()) >= how.classes:
        raise ImageRejected("label_range", f"id {int(image.max())}, classes are 0..{how.classes - 1}")
    return image


def palette(classes: int) -> npt.NDArray[np.uint8]:
    """Colours (classes, 3) for label pictures: Cityscapes' own for its 34 or 35 ids, else distinct ones."""
    if classes in (34, 35):
        return np.array(_CITYSCAPES[:classes], np.uint8)
    return distinct_colours(np.arange(classes))


def distinct_colours(ids: Array) -> npt.NDArray[np.uint8]:
    """A colour (..., 3) for any id: 0 is black, neighbours differ in hue by the golden angle."""
    ids = ids.astype(np.int64)
    hue = (ids * 0.6180339887498949) % 1.0 * 6
    value = 0.95 - 0.3 * ((ids // 13) % 3) / 2
    saturation = 0.85 - 0.35 * ((ids // 5) % 3) / 2
    wheel = np.stack(
        [
            np.clip(np.abs(hue - 3) - 1, 0, 1),
            np.clip(2 - np.abs(hue - 2), 0, 1),
            np.clip(2 - np.abs(hue - 4), 0, 1),
        ],
        axis=-1,
    )
    colours = value[..., None] * (1 - saturation[..., None] * (1 - wheel))
    return np.where(ids[..., None] == 0, 0, np.rint(colours * 255)).astype(np.uint8)


def colorize(ids: Array, classes: int | None = None) -> npt.NDArray[np.uint8]:
    """Label or instance ids (H, W[, 1]) as a picture (H, W, 3)."""
    flat = ids[:, :, 0] if ids.ndim == 3 else ids
    if classes is None:
        return distinct_colours(flat)
    return palette(max(classes, int(flat.max(initial=0)) + 1))[flat]
