#!/usr/bin/env python3
"""A Ray cluster of several nodes on this machine, with dashboard and token authentication (Linux and macOS).

    python cluster/local.py start --workers 2     a head and two workers, each with its share of the cores
    eval "$(python cluster/local.py env)"         where it is and its token, for this shell
    cluster/submit.sh --here                      a job on it: python -m pipeline.run
    python cluster/local.py status
    python cluster/local.py stop

One folder (`--folder`) holds its state: cluster.json (addresses, process ids), token, the nodes' logs and
Ray's own session files. Two clusters with two folders and other ports run side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
FOLDER = Path("/tmp") / f"pixloom-{os.getuid()}"  # noqa: S108  made with mode 700, and its owner is checked
LONGEST_FOLDER = 28  # Ray puts sockets deep below it, and a socket's path is limited to 103 bytes
START_SECONDS = 90.0
STARTS = 3
STOP_SECONDS = 8.0


class LocalClusterError(Exception):
    """An error as one line for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Node:
    """One `ray start --block`, which leads its own process group. `created` guards against a reused id."""

    name: str
    pid: int
    created: float

    def process(self) -> psutil.Process | None:
        """The node's process, if it is still that one and alive."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


@dataclass(frozen=True, slots=True)
class Cluster:
    """What `cluster.json` holds."""

    folder: str
    port: int
    dashboard_port: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def token(self) -> Path:
        """The file that holds the cluster's token."""
        return Path(self.folder) / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to submit jobs here, or to run the pipeline on the cluster directly."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": f"{HOST}:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{self.dashboard_port}",
        }

    def save(self) -> None:
        """Write `cluster.json` at once."""
        partial = Path(self.folder) / "cluster.json.partial"
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(Path(self.folder) / "cluster.json")


def load(folder: Path) -> Cluster | None:
    """The cluster that a folder describes, running or not; None if there is none, or its file is damaged."""
    try:
        values = json.loads((folder / "cluster.json").read_text())
        return Cluster(**(values | {"nodes": [Node(**node) for node in values["nodes"]]}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def start(options: argparse.Namespace) -> Cluster:
    """Start head and workers and wait until the dashboard counts them all. Raises LocalClusterError."""
    folder = _own_folder(options.folder)
    previous = load(folder)
    if previous and any(node.process() for node in previous.nodes):
        raise LocalClusterError(f"{folder} holds a running cluster; stop it first, or name another --folder")
    cluster = Cluster(str(folder), _port(options.port, 6379), _port(options.dashboard_port, 8265))
    _write_token(cluster.token)
    for session in [folder / "head", *folder.glob("worker-*/")]:  # of the cluster before
        shutil.rmtree(session, ignore_errors=True)
    names = ["head", *(f"worker-{number}" for number in range(1, options.workers + 1))]
    cores = options.cpus_per_node or share_of_cores(_cores(), len(names))
    gpus = share_of_gpus(_gpus(), len(names))
    memory = options.object_store_memory << 20 or share_of_memory(psutil.virtual_memory().total, len(names))
    try:
        for name, own_gpus in zip(names, gpus, strict=True):
            _bring_up(cluster, name, cores, own_gpus, memory)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: Cluster) -> None:
    """End the nodes, workers first, and all that they started, jobs too. Running twice is fine.

    A head under SIGTERM may take half a minute to drain; whatever is left after a few seconds is killed.
    """
    _end(cluster, cluster.nodes, patience=STOP_SECONDS)
    Path(cluster.folder, "cluster.json").unlink(missing_ok=True)


def _end(cluster: Cluster, nodes: Sequence[Node], *, patience: float) -> None:
    """SIGTERM to the nodes, the last first; after `patience` seconds SIGKILL to all they started."""
    family: list[psutil.Process] = []
    for node in reversed(nodes):
        process = node.process()
        if process is None:
            family += _orphans(cluster, node)
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            family += [*process.children(recursive=True), process]
            process.terminate()
    # A job's driver and its watcher lead their own sessions: they are descendants, but not in the group.
    _, alive = psutil.wait_procs(family, timeout=patience)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)


def _orphans(cluster: Cluster, node: Node) -> list[psutil.Process]:
    """The processes of a killed node's session; the cluster's token distinguishes them from others."""
    orphans = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ours = os.getsid(process.pid) == node.pid
            if ours and process.environ().get("RAY_AUTH_TOKEN_PATH") == str(cluster.token):
                orphans.append(process)
    return orphans


def status(cluster: Cluster | None) -> str:
    """One line per node, and where the dashboard is."""
    if cluster is None:
        return "no cluster is running\n"
    lines = [
        f"{node.name:<10} pid {node.pid:<8} {'running' if node.process() else 'gone'}"
        for node in cluster.nodes
    ]
    return "\n".join([*lines, f"dashboard  {cluster.environment['RAY_API_SERVER_ADDRESS']}"]) + "\n"


# -- each node's share ---------------------------------------------------------


def share_of_cores(cores: int, nodes: int) -> int:
    """Logical CPUs of one node: an equal share, but two at least, so that reading is not starved."""
    return max(2, -(-cores // nodes))


def share_of_gpus(gpus: Sequence[str], nodes: int) -> list[list[str]]:
    """Whose GPU is whose (every node would claim them all): dealt to the workers, or to a lone head."""
    if nodes == 1:
        return [list(gpus)]
    return [[], *([gpu for i, gpu in enumerate(gpus) if i % (nodes - 1) == n] for n in range(nodes - 1))]


def share_of_memory(total: int, nodes: int) -> int:
    """Bytes of one node's object store: Ray's usual 30 % of the memory, shared, and 80 MB to 2 GiB each."""
    return max(80_000_000, min(2 << 30, int(total * 0.3) // nodes))


# -- processes, ports, files ---------------------------------------------------


def _bring_up(cluster: Cluster, name: str, cores: int, gpus: Sequence[str], memory: int) -> None:
    """Start a node and wait for it to join; again if `ray start` times out, as on a busy machine."""
    before = len(cluster.nodes)
    for attempt in range(STARTS):
        cluster.nodes[before:] = [_start_node(cluster, name, cores, gpus, memory)]
        cluster.save()
        try:
            _wait(cluster, lambda: _alive(cluster) == before + 1, f"{name} has not joined")
        except LocalClusterError:
            if attempt == STARTS - 1:
                raise
            _end(cluster, cluster.nodes[before:], patience=0)
        else:
            return


def _start_node(cluster: Cluster, name: str, cores: int, gpus: Sequence[str], memory: int) -> Node:
    # Free ports for what has a fixed default, and the system's choice for Ray's workers: on one address,
    # two nodes would want the same.
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={HOST}"),
        *(f"--num-cpus={cores}", f"--num-gpus={len(gpus)}", f"--object-store-memory={memory}"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={_port(0, 0)}"),
        # A place of its own: in a shared one, each node deletes uploaded folders that others still use.
        f"--temp-dir={cluster.folder}/{name}",
    ]
    if name == "head":
        command += [
            *("--head", f"--port={cluster.port}", "--include-dashboard=true"),
            f"--ray-client-server-port={_port(0, 0)}",
            *(f"--dashboard-host={HOST}", f"--dashboard-port={cluster.dashboard_port}"),
        ]
    else:
        command += [f"--address={HOST}:{cluster.port}"]
    with Path(cluster.folder, f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=node_environment(os.environ, cluster, gpus),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in this terminal is not for the cluster
        )
    return Node(name, process.pid, psutil.Process(process.pid).create_time())


def node_environment(shell: Mapping[str, str], cluster: Cluster, gpus: Sequence[str]) -> dict[str, str]:
    """A node's environment, which its jobs inherit: the shell's credentials, this Python first in PATH."""
    inherited = {
        name: value for name, value in shell.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    }
    ours = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), shell.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",  # a stopped run says goodbye to MLflow; Ray would wait 3 s
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return inherited | ours | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def _wait(cluster: Cluster, ready: Any, complaint: str) -> None:
    """Until `ready()`; an early death or the end of patience shows the last words of the log concerned."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        dead = [node.name for node in cluster.nodes if node.process() is None]
        if dead or time.monotonic() > deadline:
            name = dead[0] if dead else cluster.nodes[-1].name
            log = Path(cluster.folder, f"{name}.log")
            last = log.read_text(errors="replace").strip().splitlines()[-12:]
            why = f"{name} ended" if dead else f"{complaint} after {START_SECONDS:.0f} s"
            raise LocalClusterError("\n".join([f"{why}; {log} ends:", *last]))
        time.sleep(0.5)


def _listens(port: int) -> bool:
    """Whether something is there already."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _alive(cluster: Cluster) -> int:
    """How many nodes the dashboard counts as alive; 0 while it does not answer."""
    connection = http.client.HTTPConnection(HOST, cluster.dashboard_port, timeout=5)
    try:
        headers = {"Authorization": f"Bearer {cluster.token.read_text()}"}
        connection.request("GET", "/nodes?view=summary", headers=headers)
        answer = json.loads(connection.getresponse().read())
        return sum(node["raylet"].get("state") == "ALIVE" for node in answer["data"]["summary"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return 0
    finally:
        connection.close()


def _port(wanted: int | None, default: int) -> int:
    """The requested port, the default if it is free, or any free one (0)."""
    if wanted or (wanted is None and not _listens(default)):
        return wanted or default
    if wanted is None:
        raise LocalClusterError(f"port {default} is taken; name another one, or 0 for any that is free")
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _own_folder(folder: Path) -> Path:
    """The state folder, made for this user alone: it holds the token."""
    folder = folder.expanduser().resolve() if folder != FOLDER else folder
    if len(str(folder)) > LONGEST_FOLDER:
        raise LocalClusterError(f"--folder {folder}: at most {LONGEST_FOLDER} characters, for Ray's sockets")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = any(folder.iterdir()) and not (folder / "token").exists()
    except OSError as error:
        raise LocalClusterError(f"--folder {folder}: cannot be used: {error}") from error
    if folder.stat().st_uid != os.getuid():
        raise LocalClusterError(f"--folder {folder}: belongs to another user")
    if others:
        raise LocalClusterError(f"--folder {folder}: holds files that are no cluster's; name an empty folder")
    folder.chmod(0o700)
    return folder


def _write_token(path: Path) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> list[str]:
    """The GPUs this shell may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [
        str(i) for i, _ in enumerate(line for line in listing.stdout.splitlines() if line.startswith("GPU "))
    ]


def _exports(environment: Mapping[str, str]) -> Iterable[str]:
    return (f"export {name}={shlex.quote(value)}" for name, value in environment.items())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="cluster/local.py"
    )
    p.add_argument("--folder", type=Path, default=FOLDER, help=f"the cluster's state (default: {FOLDER})")
    commands = p.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("start", help="start head and workers; returns when all have joined")
    begin.add_argument(
        "--workers", type=int, default=2, metavar="N", help="number of workers besides the head (default: 2)"
    )
    begin.add_argument(
        "--cpus-per-node", type=int, default=0, metavar="N", help="default: the cores, shared; 2 at least"
    )
    begin.add_argument("--object-store-memory", type=int, default=0, metavar="MB", help="of one node")
    begin.add_argument("--port", type=int, help="of the head (default: 6379; 0: any free one)")
    begin.add_argument("--dashboard-port", type=int, help="default: 8265; 0: any free one")
    commands.add_parser("stop", help="end it, its jobs too")
    commands.add_parser("status", help="its nodes and its dashboard")
    commands.add_parser("env", help='for the shell: eval "$(python cluster/local.py env)"')
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 2 for what the caller can fix."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "start":
            sys.stdout.write(status(start(options)))
            return 0
        cluster = load(options.folder.expanduser())
        if options.command == "status":
            sys.stdout.write(status(cluster))
            return 0 if cluster else 1
        if cluster is None:
            raise LocalClusterError(f"no cluster is running (nothing in {options.folder})")
        if options.command == "stop":
            stop(cluster)
        else:
            sys.stdout.write("\n".join(_exports(cluster.environment)) + "\n")
    except LocalClusterError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
