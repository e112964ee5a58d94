"""The objects of a bucket: listed, matched, read and verified."""

from __future__ import annotations

from typing import NamedTuple


class Listed(NamedTuple):
    """An object of a location.

    path    below the location
    uri     where it is read; of an archive's member a chain of file systems
    size    in bytes; -1: unknown
    etag    its version; "": unknown
    fault   why it cannot be an image ("link", "encrypted", "bad_key"); "" if it can
    """

    path: str
    uri: str
    size: int = -1
    etag: str = ""
    fault: str = ""
