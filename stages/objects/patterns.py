"""Key patterns: which objects of a location are images of the data set, and their keys.

in:  paths below a location                     "aachen/aachen_000001_leftImg8bit.png"
out: per path, null where it does not match     {key, split, group, x, y}

`stages.config.locations` says what a pattern is. Matching runs in Arrow's RE2: vectorised, and linear in the
length of a path whatever the pattern, so that no name can stall it.
"""

from __future__ import annotations

import re
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc

from stages.config.locations import Pattern

# HEIC and JPEG XL too, which decoding refuses: they are rejected with a reason, not ignored.
_IMAGE = r"(?i)\.(?:avif|bmp|gif|hei[cf]|j2k|jfif|jp2|jpe|jpg|jpeg|jpx|jxl|npy|p[bgpn]m|png|tiff?|webp)\z"

MAX_KEY_BYTES = 512
"""A key names the image made from it, and its percent-encoded form has to fit a file name's path."""

_HIDDEN = r"(?:\A|/)\.[^./]"  # .DS_Store, and the ._ files that macOS adds to archives


def is_image(path: str) -> bool:
    """Whether a path has the suffix of an image."""
    return re.search(_IMAGE.removesuffix(r"\z") + r"\Z", path) is not None


def match(pattern: Pattern, paths: pa.Array) -> pa.Table:
    """What each path captures: {key string, split string, group string, x double, y double}; null: no match.

    Args:
        pattern: from `compile_pattern`.
        paths: n strings, below the location.

    Returns:
        A table of n rows. What is captured is in Unicode's composed form (NFC), for macOS writes names
        decomposed. Hidden files never match; a pattern that leaves the suffix open matches images only.
    """
    paths = compose(paths)
    groups = pc.extract_regex(paths, pattern.regex)
    counts = pc.and_(groups.is_valid(), pc.invert(pc.match_substring_regex(paths, _HIDDEN)))
    if pattern.images_only:
        counts = pc.and_(counts, pc.match_substring_regex(paths, _IMAGE))
    captured = {name: pc.if_else(counts, groups.field(name), None) for name in pattern.names}
    columns = list(captured.values())
    key = columns[0] if len(columns) == 1 else pc.binary_join_element_wise(*columns, "/")
    none = pa.nulls(len(paths), pa.string())
    return pa.table(
        {
            "key": key,
            "split": captured.get("split", none),
            "group": captured.get("group", none),
            "x": captured.get("x", none).cast(pa.float64()),
            "y": captured.get("y", none).cast(pa.float64()),
        }
    )


def compose(text: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Text in Unicode's composed form (NFC).

    By Python where it is not ASCII: pyarrow 25's `utf8_normalize` decomposes when asked for NFC.
    """
    if isinstance(text, pa.ChunkedArray):
        text = text.combine_chunks()
    plain = pc.fill_null(pc.string_is_ascii(text), True)
    if pc.all(plain).as_py() in (True, None):
        return text
    odd = text.filter(pc.invert(plain)).to_pylist()
    composed = pa.array([unicodedata.normalize("NFC", one) for one in odd], pa.string())
    return pc.replace_with_mask(text, pc.invert(plain), composed)


def bad_keys(keys: pa.Array) -> pa.Array:
    """Whether each key is unsafe as a name.

    A key becomes part of paths and of reports, so it may hold no empty, `.` or `..` segment, no control
    character, no "::" (fsspec would read a chain of file systems into it), and at most 512 bytes.
    """
    unsafe = pc.match_substring_regex(keys, r"(?:\A|/)\.{0,2}(?:/|\z)|\p{Cc}|\p{Zl}|\p{Zp}|::")
    return pc.or_(unsafe, pc.greater(pc.binary_length(keys), MAX_KEY_BYTES))


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of splits in paths and tables."""


def canonical_splits(splits: pa.Array) -> pa.Array:
    """`train`, `val` or `test` for every known name of a split, whatever its case; other text unchanged."""
    names = pa.array(list(SPLITS))
    index = pc.index_in(pc.utf8_lower(splits), value_set=names)
    return pc.coalesce(pc.take(pa.array(list(SPLITS.values())), index), splits)
