"""A Ray cluster whose nodes are processes that a test may kill; each in a network of its own, if asked.

A machine here is a network namespace with its own address on a bridge, its own host name and its own /tmp:
what two of them share is the code, read only in effect, and what they reach over the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.core.generated import gcs_pb2

from stages.base import Resources
from stages.config.train import PhaseJob
from stages.training import checkpoints
from tests.stores.seaweed import free_ports

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 300.0  # for anything that takes seconds on an idle machine

DRIVER = """
import json, sys
from pipeline.cluster import cluster
from pipeline.cli import exit_code, log_to_stdout, stop_on_sigterm
from stages import storage, train
from stages.base import Resources
from stages.tracking.run import Run
from stages.config.train import PhaseJob

given = json.loads(sys.argv[1])
train.RESIZE_S = 5.0

def work():
    resources = Resources.model_validate(given["resources"])
    storage.configure(given["storage"])
    with cluster(resources, given["storage"], {}):
        stop_on_sigterm()
        job = PhaseJob.model_validate(given["job"])
        train.run(job, resources, output=given["output"], track=Run(), shards=given["shards"])

log_to_stdout()
sys.exit(exit_code(work))
"""


@dataclass
class Machine:
    """Where a process runs: this machine's network (no name), or a namespace's."""

    address: str = "127.0.0.1"
    name: str = ""
    folder: Path | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        """The words as they are run there."""
        if not self.name:
            return list(words)
        assert self.folder is not None
        enter = (
            f"mount --bind {self.folder}/hosts /etc/hosts"
            f" && mount --bind {self.folder}/resolv /etc/resolv.conf"
            f' && mount --bind {self.folder}/{self.name} /tmp && hostname {self.name} && exec "$@"'
        )
        return ["ip", "netns", "exec", self.name, "unshare", "-m", "-u", "sh", "-c", enter, "sh", *words]


class Network:
    """Two machines on a bridge, whose own address is this machine's. Needs root and iproute2."""

    def __init__(self, folder: Path) -> None:
        self.tag, self.net = f"px{os.getpid() % 10000}", f"10.{os.getpid() % 200 + 20}.7"
        self.address, self.folder = f"{self.net}.1", folder
        self.machines = [Machine(f"{self.net}.{10 + n}", f"{self.tag}n{n}", folder) for n in (1, 2)]

    def __enter__(self) -> Network:
        names = "\n".join(f"{machine.address} {machine.name}" for machine in self.machines)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")
        (self.folder / "resolv").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        _ip("link", "add", self.tag, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.tag)
        _ip("link", "set", self.tag, "up")
        for number, machine in enumerate(self.machines):
            (self.folder / machine.name).mkdir()  # its /tmp: a driver finds its node's sockets there
            _ip("netns", "add", machine.name)
            link = self.link(number)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("link", "set", link, "master", self.tag, "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", machine.name, "link", "set", device, "up")
            _ip("-n", machine.name, "route", "add", "default", "via", self.address)
        return self

    def __exit__(self, *_: object) -> None:
        for number, machine in enumerate(self.machines):
            subprocess.run(["ip", "link", "del", self.link(number)], check=False)
            subprocess.run(["ip", "netns", "del", machine.name], check=False)
        subprocess.run(["ip", "link", "del", self.tag], check=False)

    def link(self, number: int) -> str:
        """The bridge's end of a machine's cable."""
        return f"{self.tag}v{number}"

    def cut(self, number: int, seconds: float) -> None:
        """Pull a machine's cable out of the bridge and put it back: what was sent meanwhile is lost."""
        _ip("link", "set", self.link(number), "nomaster")
        try:
            time.sleep(seconds)
        finally:
            _ip("link", "set", self.link(number), "master", self.tag)

    def drop(self, number: int, seconds: float) -> None:
        """Have a machine's firewall drop what it and the other one send each other, not what S3 sends."""
        other, firewall = self.machines[1 - number].address, self.firewall(number)
        rules = ("table ip cut {", "chain in {", "type filter hook input priority 0")
        rules += (f"ip saddr {other} drop", "}", "chain out {", "type filter hook output priority 0")
        rules += (f"ip daddr {other} drop", "}", "}")
        firewall("\n".join(rules))
        try:
            time.sleep(seconds)
        finally:
            firewall("delete table ip cut")

    def firewall(self, number: int) -> Callable[[str], object]:
        """A machine's nftables, which take rules or raise CalledProcessError, its `stderr` saying why."""
        command = ["ip", "netns", "exec", self.machines[number].name, "nft", "-f", "-"]
        return lambda rules: subprocess.run(command, input=rules, check=True, capture_output=True, text=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Node:
    """One `ray start --block` and all it started."""

    name: str
    machine: Machine
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def printed(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Its processes."""
        try:
            leader = psutil.Process(self.process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it at once, as a machine that loses its power."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The training workers on it."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in process.name() + "".join(process.cmdline()[:1]):
                    found.append(process)
        return found


class Nodes:
    """The cluster; `start` adds a node, the first is the head."""

    def __init__(self) -> None:
        # Short: Ray's sockets live in it, and their names are limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="pn", dir="/tmp"))
        self.nodes: list[Node] = []
        self.drivers: list[Driver] = []
        self.address = ""
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "RAY_AUTH_MODE": "disabled",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
            "RAY_worker_niceness": "0",  # at Ray's 15, workers hardly run beside other busy processes
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.kill()
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def alive(self) -> list[Node]:
        """The nodes that were not killed."""
        return [node for node in self.nodes if node.process.poll() is None]

    def listed(self) -> list[str]:
        """The ids of the nodes the cluster counts as alive."""
        found = GcsClient(address=self.address).get_all_node_info()
        return [info.node_id.hex() for info in found.values() if info.state == gcs_pb2.GcsNodeInfo.ALIVE]

    @property
    def head_id(self) -> str:
        """The head's id."""
        found = GcsClient(address=self.address).get_all_node_info()
        return next(info.node_id.hex() for info in found.values() if info.is_head_node)

    def start(
        self,
        machine: Machine | None = None,
        *,
        cpus: int = 2,
        port: int | None = None,
        words: Sequence[str] = (),
    ) -> Node:
        """Start a node and wait until the cluster counts it. `port`: the head's; `words`: for `ray start`."""
        machine = machine or Machine()
        head = not self.alive
        ports = free_ports(2)
        ports[0] = port or ports[0]
        if head:
            self.address = f"{machine.address}:{ports[0]}"
        number = len(self.nodes)
        place = f"/tmp/n{number}" if machine.name else f"{self.folder}/{number}"  # noqa: S108  /tmp of its own
        words = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(f"--node-ip-address={machine.address}", f"--num-cpus={cpus}", "--num-gpus=0"),
            *("--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--temp-dir={place}", f"--dashboard-agent-listen-port={ports[1]}"),
            *(["--head", f"--port={ports[0]}", "--include-dashboard=false"] if head else []),
            *([] if head else [f"--address={self.address}"]),
            *words,
        ]
        log = self.folder / f"{number}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                machine.command(words),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = Node(f"node-{number}", machine, process, log)
        self.nodes.append(node)
        until(lambda: "Ray runtime started" in node.printed, node, what=f"{log}")
        return node

    def train(
        self,
        job: PhaseJob,
        shards: str,
        output: str,
        resources: Resources,
        storage: dict[str, Any] | None = None,
    ) -> Driver:
        """Start a driver beside the head: `stages.train` of one phase."""
        given = {
            "job": job.model_dump(mode="json"),
            "shards": shards,
            "output": output,
            "resources": resources.model_dump(mode="json"),
            "storage": storage or {},
        }
        head = self.alive[0]
        driver = Driver(
            head.machine.command([sys.executable, "-c", DRIVER, json.dumps(given)]),
            {**self.environment, "RAY_ADDRESS": self.address},
            output,
        )
        self.drivers.append(driver)
        return driver


class Followed:
    """A command whose output is read line by line while it runs."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line.rstrip("\n"))

    @property
    def printed(self) -> str:
        """What it has said so far."""
        return "\n".join(self.lines)

    def until(self, text: str) -> None:
        """Wait for a line that holds `text`."""
        until(lambda: text in self.printed, self, what=f"no {text!r}")

    def end(self, expect: int = 0) -> str:
        """Wait for its end; what it said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=2 * WAIT_S)
        self.reader.join(timeout=10)
        assert self.process.poll() == expect, self.printed
        return self.printed

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
            self.reader.join(timeout=10)


class Driver(Followed):
    """A training driver."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], output: str) -> None:
        super().__init__(command, environment)
        self.output = output

    def steps(self) -> int:
        """Steps of the newest checkpoint, 0 if there is none."""
        names = checkpoints.names(f"{self.output}/checkpoints")
        return int(names[-1].rpartition("-")[2]) if names else 0

    def until_step(self, steps: int) -> int:
        """Wait until so many steps are in a checkpoint; how many are by then."""
        until(lambda: self.steps() >= steps, self, what=f"no checkpoint of step {steps}")
        return self.steps()


def until(ready: Callable[[], bool], running: Node | Followed, *, what: str) -> None:
    """Wait for a condition as long as a process runs."""
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert running.process.poll() is None, f"ended; {running.printed}"
        assert time.monotonic() < deadline, f"{what}; {running.printed}"
        time.sleep(0.05)


@contextlib.contextmanager
def cluster(*cpus: int) -> Iterator[Nodes]:
    """A head and more nodes with so many CPUs each."""
    with Nodes() as nodes:
        for count in cpus:
            nodes.start(cpus=count)
        yield nodes


@contextlib.contextmanager
def autoscaling(*, most: int) -> Iterator[Nodes]:
    """A head with one CPU, and Ray's autoscaler, which starts as many as `most` nodes like it when asked for.

    `ray.cluster_utils.AutoscalingCluster` would end every Ray of this machine, and lacks a file it reads.
    """
    machine = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    lists += ("setup_commands", "head_setup_commands", "worker_setup_commands")
    lists += ("head_start_ray_commands", "worker_start_ray_commands")
    with Nodes() as nodes:
        port = free_ports(1)[0]
        config = {
            "cluster_name": "test",
            "max_workers": most,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 5,
            "provider": {
                "type": "fake_multinode",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": f"127.0.0.1:{port}",
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
                "more": {**machine, "min_workers": 0, "max_workers": most},
            },
            **{name: {} for name in ("auth", "head_node", "worker_nodes", "file_mounts")},
            **{name: [] for name in lists},
            "file_mounts_sync_continuously": False,
        }
        path = nodes.folder / "autoscaling.json"
        path.write_text(json.dumps(config))
        nodes.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        nodes.start(cpus=1, port=port, words=[f"--autoscaling-config={path}"])
        yield nodes
