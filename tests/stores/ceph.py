"""Ceph's S3 gateway on this machine: a monitor, an OSD on a file and radosgw, as Debian packages them.

Another implementation than SeaweedFS, and the one that many own clouds run: no checksum comes with what it
returns, and its refusals have other words. Up in about 10 s; it keeps what it acknowledged over SIGKILL.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Self

from tests.stores.s3 import ACCESS_KEY, SECRET_KEY, S3Store
from tests.stores.seaweed import free_ports

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "monmaptool")
POOLS = (
    *(".rgw.root", "default.rgw.log", "default.rgw.control", "default.rgw.meta"),
    *("default.rgw.buckets.index", "default.rgw.buckets.data", "default.rgw.buckets.non-ec"),
)

CONF = """\
[global]
fsid = {fsid}
run dir = {folder}
pid file =
admin socket = {folder}/$cluster-$name.asok
crash dir = {folder}/crash
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
mon host = {monitor}
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
auth allow insecure global id reclaim = false
mon max pg per osd = 1000
debug ms = 0/0
[mon]
mon data = {folder}/mon.a
mon data avail crit = 1
mon data avail warn = 2
paxos propose interval = 0.05
paxos min wait = 0.01
mgr initial modules =
[osd]
osd data = {folder}/osd.0
osd objectstore = bluestore
osd class load list = *
osd class default list = *
bluestore block size = 21474836480
bluestore block db size = 0
bluestore block wal size = 0
bluestore fsck on mount = false
bluestore prefer deferred size hdd = 65536
osd memory target = 939524096
osd max object name len = 1024
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw data = {folder}/rgw
rgw enable usage log = false
rgw enable ops log = false
rgw thread pool size = 128
rgw cache enabled = true
"""

CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *"),
    "client.rgw.a": ("mon", "allow rw", "osd", "allow rwx"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
}


def missing() -> list[str]:
    """Which of Ceph's programs are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class CephS3(S3Store):
    """The gateway and what is behind it; data stay in `folder` from `kill` to `start`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "ceph.conf"
        self.ports = free_ports(3)
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.ports[0]

    @property
    def running(self) -> bool:
        """Whether the gateway's process is there."""
        return bool(self.processes) and self.processes[-1].poll() is None

    def start(self, timeout: float = 90.0) -> Self:
        fresh = not self.conf.exists()
        if fresh:
            self._prepare()
        self._begin("ceph-mon", "-i", "a")
        if fresh:
            osd = str(uuid.uuid4())
            self._do("ceph", "--connect-timeout", "20", "osd", "new", osd)
            self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._begin("ceph-osd", "-i", "0")
        if fresh:
            # One process of the command line reads them all: each start of it takes a second.
            pools = [f"osd pool create {p} 8\nosd pool application enable {p} rgw" for p in POOLS]
            self._do("ceph", "--connect-timeout", "20", text="\n".join(pools) + "\n")
            keys = ("--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
            self._do("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)
        self._begin("radosgw", "-n", "client.rgw.a")
        until = time.monotonic() + timeout
        while not self._ready():
            if not self.running or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"radosgw did not start: see the logs in {self.folder}")
            time.sleep(0.1)
        return self

    def _prepare(self) -> None:
        fsid = str(uuid.uuid4())
        monitor = f"[v2:127.0.0.1:{self.ports[1]},v1:127.0.0.1:{self.ports[2]}]"
        for name in ("mon.a", "osd.0", "rgw", "crash"):
            (self.folder / name).mkdir(parents=True)
        values = {"fsid": fsid, "folder": self.folder, "monitor": monitor, "port": self.ports[0]}
        self.conf.write_text(CONF.format(**values))
        keyring = str(self.folder / "keyring")
        for number, (name, caps) in enumerate(CAPS.items()):
            granted = [word for at in range(0, len(caps), 2) for word in ("--cap", caps[at], caps[at + 1])]
            create = ("--create-keyring",) if number == 0 else ()
            _do("ceph-authtool", *create, keyring, "--gen-key", "-n", name, *granted)
        monmap = str(self.folder / "monmap")
        _do("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", monitor, monmap)
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)

    def _do(self, program: str, *arguments: str, text: str = "") -> None:
        _do(program, "-c", str(self.conf), *arguments, text=text)

    def _begin(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [program, "-c", str(self.conf), *arguments, "-f"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=1):  # noqa: S310 - our own address
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """SIGKILL to all of it."""
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()


def _do(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, text=True, capture_output=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
