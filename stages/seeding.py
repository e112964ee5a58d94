"""Every seed: numbers that are functions of named parts and of nothing else, so that no random state is kept.

A part is a seed, a phase, an epoch, a key; parts are joined by a byte that no key holds.
"""

from __future__ import annotations

from hashlib import blake2b


def digest(*parts: int | str, size: int = 8) -> bytes:
    """`size` bytes that any change of a part changes."""
    text = "\0".join(str(part) for part in parts)
    return blake2b(text.encode(errors="surrogatepass"), digest_size=size).digest()


def number(*parts: int | str) -> int:
    """A seed in [0, 2**63), as torch's and numpy's generators take it."""
    return int.from_bytes(digest(*parts), "little") >> 1


def share(*parts: int | str) -> float:
    """A number in [0, 1), evenly spread: whether a key is among a random share of all keys."""
    return int.from_bytes(digest(*parts), "little") / 2**64
