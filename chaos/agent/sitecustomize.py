"""Lets `chaos` trouble a Python process from inside: one more thread, which looks for orders in a folder.

Imported by every Python of the nodes at its start, since this folder is on their PYTHONPATH. The wall clock
is shifted here, not by libfaketime 0.9.10, which shifts the monotonic clock too or else breaks `time.sleep`.
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

FOLDER = os.environ.get("PIXLOOM_CHAOS", "")


def _hold_the_lock(seconds: float) -> None:
    """Sleep in C without giving up the interpreter lock: no other thread of the process goes on."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def _raise_in_main(_: float) -> None:
    """Raise an error in the main thread, wherever it is."""
    thread = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(RuntimeError))


ORDERS = {"hold": _hold_the_lock, "raise": _raise_in_main}


_time, _time_ns, CLOCK = time.time, time.time_ns, {"ahead": 0}


def _shift_clock() -> None:
    """Read how many seconds this machine's wall clock is ahead."""
    try:
        CLOCK["ahead"] = int((Path(FOLDER) / "clock").read_text(encoding="ascii") or 0)
    except (OSError, ValueError):
        CLOCK["ahead"] = 0


def _obey() -> None:
    path = Path(FOLDER) / str(os.getpid())
    while True:
        time.sleep(0.1)
        _shift_clock()
        try:
            name, seconds = path.read_text(encoding="ascii").split()
            path.unlink()
        except (OSError, ValueError):
            continue
        ORDERS[name](float(seconds))


if FOLDER and "ray" in " ".join(sys.orig_argv):
    time.time = lambda: _time() + CLOCK["ahead"]
    time.time_ns = lambda: _time_ns() + CLOCK["ahead"] * 1_000_000_000
    threading.Thread(target=_obey, daemon=True, name="chaos").start()
