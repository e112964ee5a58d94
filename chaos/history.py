"""What happened in a run, as JSON lines: when, what, to whom, what was seen."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class History:
    """Appends to a file; any thread may write. Seconds count from the run's start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._lock = threading.Lock()
        path.unlink(missing_ok=True)

    def now(self) -> float:
        """Seconds since the run's start."""
        return time.monotonic() - self._began

    def write(self, what: str, **more: Any) -> None:
        """Note that something happened."""
        with self._lock:
            entry = {"seconds": round(self.now(), 2), "what": what} | more
            self.entries.append(entry)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=str) + "\n")
