"""How a config names images: locations, archives, tables, and the patterns of keys below a location.

A pattern is the path with its variable parts named (`{split}/{group}/{key}_leftImg8bit.png`):

    {key}            anything, "/" included      {x} {y}   a number: the position of a map tile, a frame
    {split} {group}  one segment                 *  **     anything within a segment; across segments

A pair's key is everything captured, joined by "/" in the order split, group, key, x, y, so that locations
whose names differ in their fixed parts or in their order meet under one key. `stages.objects.patterns`
matches paths.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from stages.base import absolute

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIP_SUFFIXES = (".zip",)
READ_ONLY = ("http", "https", "tar", "zip", "libarchive", "data", "git", "github", "parquet", "reference")
Column = Literal["source", "target", "label", "instance", "features", "key", "split", "group"]
"""What a column of a table holds: a role's images, or what the row's images share."""
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NUMBER = r"-?[0-9]{1,15}(?:\.[0-9]{1,9})?"
_CAPTURES = {"split": r"[^/]+", "group": r"[^/]+", "key": r"(?s:.+)", "x": _NUMBER, "y": _NUMBER}
_TOKEN = re.compile(r"\{([^{}]*)\}|(\*\*)|(\*)|([^{}*]+)|(.)", re.DOTALL)


def holds(location: str, folder: str) -> bool:
    """Whether a folder is in a location, or is the location itself."""
    outer, inner = (absolute(uri.removeprefix("file://")).rstrip("/") + "/" for uri in (location, folder))
    return inner.startswith(outer)


def is_archive(uri: str) -> bool:
    """Whether a location is an archive, by its chain or its suffix."""
    return uri.startswith(("tar://", "zip://")) or plain_name(uri).endswith(TAR_SUFFIXES + ZIP_SUFFIXES)


def plain_name(uri: str) -> str:
    """A location in lower case, of a web address without its query."""
    web = uri.startswith(("http://", "https://"))
    return (uri.partition("?")[0] if web else uri).lower()


def expand_ranges(uri: str) -> list[str]:
    """The archives that a range of numbers stands for: `{000..099}` as WebDataset writes it; or the one.

    Raises ValueError if the range ends before it starts.
    """
    match = _RANGE.search(uri)
    if match is None:
        return [uri]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise ValueError(f"{match[0]} ends before it starts")
    before, after = uri[: match.start()], expand_ranges(uri[match.end() :])
    numbers = (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    return [f"{before}{number}{rest}" for number in numbers for rest in after]


def archive_parts(uri: str) -> tuple[str, str, str]:
    """Protocol ("tar" or "zip"), folder inside, the archive's own location. Raises ValueError without one."""
    if uri.startswith(("tar://", "zip://")):
        protocol, _, rest = uri.partition("://")
        inside, chained, outer = rest.partition("::")
        if not chained or not outer:
            raise ValueError(
                f"name the archive after '::', as in {protocol}://::https://host/images.{protocol}"
            )
        return protocol, inside.strip("/"), outer
    name = plain_name(uri)
    return "zip" if name.endswith(ZIP_SUFFIXES) else "tar", "", uri


def table_format(uri: str) -> str:
    """How a table is written, by its suffix (also before `.gz`). Raises ValueError if it is unknown."""
    name = plain_name(uri).removesuffix(".gz")
    for suffix, kind in FORMATS.items():
        if name.endswith(suffix):
            return kind
    raise ValueError(f"a table ends in one of {' '.join(FORMATS)}")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled key pattern: its RE2 expression and the names it captures, in the order of a key."""

    regex: str
    names: tuple[str, ...]
    images_only: bool  # the suffix is left open, so the path itself has to say that it is an image


def compile_pattern(text: str) -> Pattern:
    """Compile a key pattern. Raises ValueError that says what is wrong with it."""
    names: list[str] = []
    parts: list[str] = []
    for match in _TOKEN.finditer(text):
        name, across, within, literal, stray = match.groups()
        if name is not None:
            if name not in _CAPTURES:
                raise ValueError(f"'{{{name}}}' is not one of {{{'}, {'.join(_CAPTURES)}}} in {text!r}")
            if name in names:
                raise ValueError(f"'{{{name}}}' comes twice in {text!r}")
            names.append(name)
            parts.append(f"(?P<{name}>{_CAPTURES[name]})")
        elif across is not None:
            parts.append(r"(?s:.*)")
        elif within is not None:
            parts.append(r"[^/]*")
        elif literal is not None:
            parts.append(re.escape(literal))
        else:
            raise ValueError(f"unbalanced {stray!r} in {text!r}")
    if not set(names) - {"split"}:
        raise ValueError(f"{text!r} captures nothing that could tell one image from another: add {{key}}")
    if text.startswith("/") or ".." in text.split("/"):
        raise ValueError(f"{text!r} must be a path below the location")
    expression = unicodedata.normalize("NFC", "".join(parts))
    return Pattern(
        rf"\A{expression}\z",
        tuple(name for name in _CAPTURES if name in names),
        images_only=text.endswith(("*", "}")),
    )


def given(uri: str) -> str:
    """The location. Raises ValueError if it is empty: that would be the current folder."""
    if not os.path.expandvars(uri.removeprefix("file://")).strip():
        raise ValueError("an empty location; name a folder, a file or a URI")
    return uri


def writable(uri: str) -> str:
    """The location. Raises ValueError if it is empty, or takes no files."""
    protocol = uri.partition("://")[0]
    if "::" in uri or (protocol in READ_ONLY and protocol != uri):
        raise ValueError("a web server, an archive or a chain takes no files; name a folder or a bucket")
    return given(uri)


Location = Annotated[str, AfterValidator(given)]
"""A path or a URI."""


def _compiles(text: str) -> str:
    compile_pattern(text)
    return text


KeyPattern = Annotated[str, AfterValidator(_compiles)]
