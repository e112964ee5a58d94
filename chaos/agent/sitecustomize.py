"""Lets `chaos` trouble a Python process from inside: one more thread, which looks for orders in a folder.

Imported by every Python of the nodes at its start, since this folder is on their PYTHONPATH.
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


def _obey() -> None:
    path = Path(FOLDER) / str(os.getpid())
    while True:
        time.sleep(0.1)
        try:
            name, seconds = path.read_text(encoding="ascii").split()
            path.unlink()
        except (OSError, ValueError):
            continue
        ORDERS[name](float(seconds))


if FOLDER and "ray" in " ".join(sys.orig_argv):
    threading.Thread(target=_obey, daemon=True, name="chaos").start()
