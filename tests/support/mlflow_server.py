"""A real MLflow tracking server on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.stores.seaweed import free_ports


class MlflowServer:
    """`start` it, `kill` it; what it has written stays in `folder`."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.address = folder, (host, free_ports(1)[0])
        self.url = "http://{}:{}".format(*self.address)
        self.database = folder / "mlflow.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        host, port = self.address
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"),
            *("--artifacts-destination", str(self.folder / "artifacts"), "--allowed-hosts", "*"),
        ]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        until = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:  # noqa: S310
                    if answer.status == 200:
                        return
            except (OSError, urllib.error.URLError):
                pass
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < until, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
