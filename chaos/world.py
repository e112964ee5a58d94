"""What a run needs: two machines, a cluster, a store, a tracking server, and the person who starts it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from chaos.history import History
from pipeline import sample
from stages import storage
from tests.stores.faults import Fault as Spoil, FaultProxy
from tests.stores.s3 import ACCESS_KEY, SECRET_KEY
from tests.stores.seaweed import SeaweedS3
from tests.support.mlflow_server import MlflowServer
from tests.support.nodes import ROOT, Network, Node, Nodes

BUCKET = "chaos"
PAIRS = 24
DISK = "size=3g,nr_inodes=60000"  # of each machine
MOST_STARTS = 15  # of the command in one run
LONGEST_START_S = 420.0
STEPS = (
    "ingest",
    "pair",
    "shard",
    "train-global",
    "train-local",
    "train-joint",
    "infer",
    "evaluate",
    "report",
)

CONFIG: dict[str, Any] = {
    "extends": str(ROOT / "pipeline.yaml"),
    "pair": {"split": {"val": 0.1, "test": 0.3, "seed": 0}, "pairs_per_shard": 4},
    "shard": {"size": [64, 32], "row_group_rows": 2, "max_reject_fraction": 0.1},
    "train": {
        "log_every": 1,
        "model": {
            "kind": "pix2pixhd",
            "width": 4,
            "enhancers": 1,
            "downsamplings": 2,
            "blocks": 1,
            "enhancer_blocks": 1,
            "discriminator_width": 4,
            "discriminators": 2,
        },
        "phases": [
            {"name": "global", "kind": "global", "enhancers": 0, "discriminators": 1},
            {"name": "local", "kind": "local", "enhancers": 1, "discriminators": 2},
            {"name": "joint", "kind": "joint", "enhancers": 1, "discriminators": 2},
        ],
    },
    # Ray's own defaults are for jobs of days: a step here takes milliseconds.
    "resources": {"max_failures": 20, "collective_timeout_s": 20, "checkpoint_seconds": 1.0},
}


class Command:
    """The pipeline's command as a process; every line with the time at which it came."""

    def __init__(self, words: list[str], environment: dict[str, str], history: History, log: Log) -> None:
        self.history, self.log = history, log
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.log.add(self.history.now(), line.rstrip("\n"))

    def signal(self, number: int) -> None:
        """A signal to the command itself, as a terminal or a batch system sends it."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self, timeout: float) -> int | None:
        """Its exit code; None if it still runs after `timeout` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
            self.reader.join(5)
        return self.process.poll()

    def kill(self) -> None:
        """SIGKILL to it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Log:
    """The lines of every start of the command, with their seconds."""

    def __init__(self) -> None:
        self.lines: list[tuple[float, str]] = []

    def add(self, seconds: float, line: str) -> None:
        """Keep a line."""
        self.lines.append((seconds, line))

    def first(self, pattern: str, since: float = 0.0) -> float | None:
        """When the first line that matches came, at or after a time."""
        found = re.compile(pattern)
        return next((t for t, line in list(self.lines) if t >= since and found.search(line)), None)

    def number(self, pattern: str, since: float, until: float) -> int | None:
        """The number in the first line that matches between two times."""
        found = [re.search(pattern, line) for t, line in list(self.lines) if since <= t <= until]
        return next((int(match[1].replace(",", "")) for match in found if match), None)

    @property
    def last(self) -> str:
        """The last line that is not empty."""
        return next((line for _, line in reversed(list(self.lines)) if line.strip()), "")


class World:
    """Everything a run needs; made once for many runs, mended between them.

    epochs   of each phase; the checkpoints are as many however long the phases are
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.out, self.epochs = folder, epochs
        # Short: Ray's sockets live in it, and their names are limited to 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ch", dir="/tmp"))
        self.network = Network(self.folder)
        self.nodes: Nodes | None = None
        self.store = SeaweedS3(self.folder, self.network.address)
        self.mlflow = MlflowServer(self.folder, self.network.address)
        self.store_proxy = FaultProxy(self.store.address, host=self.network.address)
        self.mlflow_proxy = FaultProxy(self.mlflow.address, host=self.network.address)
        self.history = History(folder / "history.jsonl")
        self.log = Log()
        self.command: Command | None = None
        self.hands = threading.Lock()
        """A person who changes the config or moves the workspace does not start the command meanwhile."""
        self.workspace = ""
        self.experiment = ""
        self.config = self.folder / "chaos.yaml"
        self.checkpoint_seen = Spoil("delay", method="PUT", path=r"tensors\.safetensors", seconds=0.0)
        self._stack = ExitStack()

    def __enter__(self) -> World:
        enter = self._stack.enter_context
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        enter(self.network)
        for machine in self.network.machines:
            disk = self.folder / machine.name
            subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", disk], check=True)
            self._stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)
            (disk / "chaos").mkdir()
        enter(self.store)
        self.mlflow.start()
        self._stack.callback(self.mlflow.kill)
        enter(self.store_proxy)
        enter(self.mlflow_proxy)
        self._stack.callback(self._end_nodes)
        storage.configure({"s3": self.store.options()})
        client = self.store.client()
        client.call_s3("create_bucket", Bucket=BUCKET)
        data = self.folder / "data"
        sample.write(str(data), pairs=PAIRS, width=64, height=32, seed=0)
        (data / "photo" / "scene_00003.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
        client.put(str(data), f"{BUCKET}/data", recursive=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end_nodes(self) -> None:
        if self.command is not None:
            self.command.kill()
        if self.nodes is not None:
            self.nodes.__exit__()
            self.nodes = None

    def begin(self, name: str) -> None:
        """A new run: its own workspace, experiment and history."""
        self.history = History(self.out / f"{name}.jsonl")
        self.log = Log()
        self.workspace, self.experiment = f"s3://{BUCKET}/{name}", name
        self.write_config()
        self.store_proxy.faults[:] = [self.checkpoint_seen]
        self.mlflow_proxy.faults.clear()
        self.checkpoint_seen.done = 0

    def write_config(self) -> None:
        """The config as it is now; `workspace` may have moved."""
        data = f"s3://{BUCKET}/data"
        roles = {"label": "source", "photo": "target", "instance": "instance"}
        locations = [{"uri": f"{data}/{d}", "role": r, "pattern": "{key}.png"} for d, r in roles.items()]
        train, each = CONFIG["train"], {"epochs": self.epochs, "batch": 2}
        values = CONFIG | {
            "train": train | {"phases": [phase | each for phase in train["phases"]]},
            "resources": CONFIG["resources"] | {"checkpoint_images": 2 * self.epochs},
            "workspace": self.workspace,
            "ingest": {"locations": locations},
            "tracking": {"uri": self.mlflow_proxy.url, "experiment": self.experiment},
            "storage": {"s3": {"endpoint_url": self.store_proxy.url}},
        }
        self.config.write_text(yaml.safe_dump(values))

    def heal(self) -> None:
        """What a person mends before starting the command again: a lost node is replaced, a lost head too."""
        if self.store.process is None or self.store.process.poll() is not None:
            self.store.start()
        if self.mlflow.process is None or self.mlflow.process.poll() is not None:
            self.mlflow.start()
        if self.nodes is not None and (
            not self.nodes.nodes or self.nodes.nodes[0].process.poll() is not None
        ):
            self.nodes.__exit__()
            self.nodes = None
        if self.nodes is None:
            self.nodes = Nodes()
            self.nodes.environment |= {
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "PYTHONPATH": f"{ROOT / 'chaos' / 'agent'}{os.pathsep}{ROOT}",
                "PIXLOOM_CHAOS": "/tmp/chaos",  # noqa: S108  of the machine's own
                "OMP_NUM_THREADS": "1",
            }
            self.add_node()
        while len(self.nodes.alive) < 2:
            self.add_node()

    def add_node(self) -> None:
        """One more node; the first is the head. One that a fault hits while it starts is started again."""
        assert self.nodes is not None
        for attempts_left in (2, 1, 0):
            head = not self.nodes.alive
            try:
                self.nodes.start(self.network.machines[0 if head else 1], cpus=2)
                return
            except AssertionError:
                if not attempts_left:
                    raise
                self.nodes.nodes[-1].kill()

    def start(self, *words: str) -> Command:
        """Start the pipeline beside the head."""
        assert self.nodes is not None
        line = [sys.executable, "-m", "pipeline.run", "-c", str(self.config), *words]
        # The config is in this machine's /tmp, which a machine of the network has covered by its own.
        shutil.copy(self.config, self.folder / self.network.machines[0].name / "chaos.yaml")
        line[4] = "/tmp/chaos.yaml"  # noqa: S108
        environment = {**self.nodes.environment, "RAY_ADDRESS": self.nodes.address}
        environment["PYTHONPATH"] = str(ROOT)
        return Command(self.network.machines[0].command(line), environment, self.history, self.log)

    def processes(self, pattern: str) -> list[tuple[Node, psutil.Process]]:
        """The nodes' processes whose title matches."""
        found = []
        for node in self.nodes.alive if self.nodes else []:
            for process in node.family():
                with suppress(psutil.Error):
                    if re.search(pattern, " ".join(process.cmdline()[:3]) or process.name()):
                        found.append((node, process))
        return found

    def order(self, node: Node, process: psutil.Process, text: str) -> None:
        """Have a process do something to itself: see `agent/sitecustomize.py`."""
        path = self.folder / node.machine.name / "chaos" / str(process.pid)
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").rename(path)

    def run_to_the_end(self, on_start: Callable[[int], None] = lambda _: None) -> int:
        """Start the command until it ends with 0; how often it was started. Raises TimeoutError."""
        for number in range(1, MOST_STARTS + 1):
            with self.hands:
                self.heal()
                self.command = self.start()
            on_start(number)
            code = self.command.wait(LONGEST_START_S)
            if code is None:
                self.command.kill()
            self.history.write("the command ended", code=code, last=self.log.last)
            if code == 0:
                with self.hands:  # what a person has begun with the workspace ends first
                    return number
            time.sleep(1.0)
        raise TimeoutError(f"{MOST_STARTS} starts did not come to the end; the last line: {self.log.last}")

    def left_over(self) -> list[str]:
        """Processes of a run that stay after its end; a little time is theirs to go."""
        pattern = r"RayTrainWorker|MapWorker|TrainController|Mailbox|^ray::Map"
        for _ in range(60):
            left = self.processes(pattern)
            if not left:
                return []
            time.sleep(0.5)
        return [f"{process.pid} {' '.join(process.cmdline()[:1])}" for _, process in left]
