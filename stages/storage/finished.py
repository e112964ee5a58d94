"""Which of many numbered work units are finished, and their sum: a thousand units in one file.

    <folder>/<n>.json   the sum of the units 1000 n to 1000 n + 999, written when all of them are finished

A unit's own marker says that it is finished. A resumed run that read every marker would send 200,000 requests
for 200,000 units. It reads 200 files instead, and looks only at the units of an unfinished thousand alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stages.storage import join, list_names, read_json, write_json

GROUP = 1000
READERS = 32


class Finished:
    """The finished thousands of `units` in a folder."""

    def __init__(self, folder: str, units: Iterable[int]) -> None:
        self.folder = folder
        self.unfinished: dict[int, set[int]] = {}
        for unit in units:
            self.unfinished.setdefault(unit // GROUP, set()).add(unit)

    def read(self, marked: Collection[int] | None = None) -> list[Any]:
        """The sums of the finished thousands. Their units are left out of `left` from now on.

        marked   units whose own marker is there, where it is known: a thousand that lacks one is not finished
        """
        there = set(list_names(self.folder))
        known = None if marked is None else set(marked)
        groups = [
            group
            for group, units in sorted(self.unfinished.items())
            if self._name(group) in there and (known is None or units <= known)
        ]
        with ThreadPoolExecutor(READERS) as threads:
            sums = list(threads.map(lambda group: read_json(join(self.folder, self._name(group))), groups))
        for group in groups:
            del self.unfinished[group]
        return sums

    @property
    def left(self) -> set[int]:
        """The units of unfinished thousands."""
        return set().union(*self.unfinished.values())

    def finish(self, unit: int) -> bool:
        """Note that a unit is finished; whether it was the last one of its thousand."""
        units = self.unfinished[unit // GROUP]
        units.remove(unit)
        return not units

    def write(self, unit: int, value: Any) -> None:
        """Write the sum of the thousand that this unit was the last one of."""
        write_json(join(self.folder, self._name(unit // GROUP)), value)

    def _name(self, group: int) -> str:
        return f"{group:05d}.json"
