"""Every kind of fault: what it does to a run, and how it is undone."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from chaos.schedule import Fault
from chaos.world import BUCKET, World
from tests.stores.faults import Fault as Spoil, FaultProxy
from tests.support.nodes import ROOT, Node

Undo = Callable[[], None]
Strike = Callable[[World, Fault], Undo | None]


class MissedError(Exception):
    """There was nothing for the fault to hit at that moment."""


PROCESSES = {
    "training worker": r"RayTrainWorker",
    "generating worker": r"MapWorker\(.*infer",
    "scoring worker": r"MapWorker\(.*evaluate",
    "task": r"^ray::\w*Map\((?!.*Worker)|^ray::(ingest|pair|shard)",
    "training controller": r"TrainController",
    "raylet": r"/raylet/raylet",
}
"""Whom the process faults hit, by the titles that Ray gives its processes."""


def _victim(world: World, fault: Fault, pattern: str) -> tuple[Node, psutil.Process]:
    found = world.processes(pattern)
    if not found:
        raise MissedError(f"no process {pattern}")
    return found[int(fault.victim * len(found))]


# -- processes ---------------------------------------------------------------------------------------


def _signal(number: int, pattern: str, world: World, fault: Fault) -> None:
    node, process = _victim(world, fault, pattern)
    if pattern == PROCESSES["raylet"] and world.nodes is not None and node is world.nodes.nodes[0]:
        raise MissedError("the head's raylet is `head lost`")
    process.send_signal(number)


def _stopped(pattern: str, world: World, fault: Fault) -> Undo:
    process = _victim(world, fault, pattern)[1]
    process.suspend()
    return partial(_resume, process)


def _resume(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.resume()


def _slow(pattern: str, world: World, fault: Fault) -> Undo:
    """Stopped half of the time."""
    process, end = _victim(world, fault, pattern)[1], threading.Event()

    def alternate() -> None:
        with suppress(psutil.Error):
            while not end.is_set():
                process.suspend()
                time.sleep(0.2)
                process.resume()
                time.sleep(0.2)

    thread = threading.Thread(target=alternate, daemon=True)
    thread.start()
    return lambda: (end.set(), thread.join(), _resume(process))[0]


def _ordered(order: str, pattern: str, world: World, fault: Fault) -> None:
    node, process = _victim(world, fault, pattern)
    world.order(node, process, f"{order} {fault.lasts}")


def _no_memory(pattern: str, world: World, fault: Fault) -> Undo:
    """Whatever the process allocates from now on fails."""
    process = _victim(world, fault, pattern)[1]
    limits = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))

    def undo() -> None:
        with suppress(psutil.Error):
            process.rlimit(psutil.RLIMIT_AS, limits)

    return undo


def _two_workers(world: World, fault: Fault) -> None:
    """Whatever works for the run at the moment, two at once."""
    found = world.processes(r"RayTrainWorker|MapWorker|^ray::\w*Map\(")
    if len(found) < 2:
        raise MissedError("there are no two workers")
    for _, process in found[:2]:
        process.kill()


def _node_lost(world: World, fault: Fault) -> Undo:
    """A machine without power, and another one in its place."""
    others = world.nodes.alive[1:] if world.nodes else []
    if not others:
        raise MissedError("the head is the only node")
    others[0].kill()
    return world.add_node


def _head_lost(world: World, fault: Fault) -> None:
    """The cluster is gone with it; the person makes a new one before the next start."""
    assert world.nodes is not None
    world.nodes.alive[0].kill()


# -- services ----------------------------------------------------------------------------------------


def _store_lost(world: World, fault: Fault) -> Undo:
    world.store.kill()
    return lambda: (world.store.start(), None)[1]


def _mlflow_lost(world: World, fault: Fault) -> Undo:
    world.mlflow.kill()
    return world.mlflow.start


def _spoiled(which: Callable[[World], FaultProxy], spoils: tuple[Spoil, ...], world: World, _: Fault) -> Undo:
    proxy = which(world)
    # Of its own, since a fault counts what it did.
    mine = [Spoil(**{f: getattr(s, f) for f in s.__dataclass_fields__ if f != "done"}) for s in spoils]
    proxy.faults[:0] = mine

    def undo() -> None:
        for spoil in mine:
            proxy.faults.remove(spoil)

    return undo


def _locked_database(world: World, fault: Fault) -> Undo:
    """Another program holds MLflow's SQLite file."""
    connection = sqlite3.connect(world.mlflow.database, timeout=5, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        connection.close()
        raise MissedError(str(error)) from error
    return lambda: (connection.rollback(), connection.close())[0]


STORE: dict[str, tuple[Spoil, ...]] = {
    "store: 10 % fail": (Spoil("status", share=0.1, code=500, error="InternalError"),),
    "store: 50 % slow down": (Spoil("status", share=0.5, code=503),),
    "store: 90 % reset": (Spoil("reset", share=0.9),),
    "store: 500 after a write": (Spoil("status_after", share=0.5, method="PUT", code=500),),
    "store: answers lost": (Spoil("reset_after", share=0.3),),
    "store: cut bodies": (Spoil("truncate", share=0.3, method="GET"),),
    "store: flipped bits": (Spoil("flip", share=0.3, method="GET", path=r"\.(png|parquet|safetensors)"),),
    "store: writes twice": (Spoil("twice", method="PUT"),),
    "store: latency": (Spoil("delay", seconds=0.2),),
    "store: 1 MB/s": (Spoil("throttle", seconds=1.0),),
    "store: black hole": (Spoil("hang", share=0.3),),
    "store: listings lag": (Spoil("stale", method="GET", path=r"list-type=2"),),
    "store: credentials expired": (Spoil("status", code=403, error="ExpiredToken"),),
}
MLFLOW: dict[str, tuple[Spoil, ...]] = {
    "mlflow: 500": (Spoil("status", share=0.7, code=500),),
    "mlflow: slow": (Spoil("delay", seconds=2.0),),
    "mlflow: resets": (Spoil("reset_after", share=0.5),),
    "mlflow: black hole": (Spoil("hang"),),
}


# -- network, disk, clock --------------------------------------------------------------------------------


def _cut(world: World, fault: Fault) -> Undo:
    """The second machine's cable."""
    thread = threading.Thread(target=world.network.cut, args=(1, fault.lasts), daemon=True)
    thread.start()
    return thread.join


def _filtered(rule: str, world: World, fault: Fault) -> Undo:
    """What the second machine's firewall does to what arrives from the first."""
    firewall = world.network.firewall(1)
    other = world.network.machines[0].address
    lines = ("table ip chaos {", "chain in {", "type filter hook input priority 1")
    firewall("\n".join((*lines, f"ip saddr {other} {rule}", "}", "}")))
    return lambda: (firewall("delete table ip chaos"), None)[1]


def _late(world: World, fault: Fault) -> Undo:
    """What the second machine sends to the first arrives 100 ms later."""
    first, second = world.network.machines
    words = [sys.executable, "-m", "chaos.late", "eth0", first.address, "0.1"]
    return _helper(second.command(words), dict(os.environ))


def _helper(words: list[str], environment: dict[str, str]) -> Undo:
    """Start a process of ours and wait until it says that it has begun; it ends with the fault."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, text=True, **pipes)

    def undo() -> None:
        process.kill()
        process.communicate()

    assert process.stdout is not None
    if not process.stdout.readline():
        undo()
        raise MissedError("its process did not begin")
    return undo


def _disk(world: World, fault: Fault) -> Path:
    machines = world.network.machines
    return world.folder / machines[int(fault.victim * len(machines))].name


def _disk_full(world: World, fault: Fault) -> Undo:
    return _filled(_disk(world, fault))


def _filled(disk: Path) -> Undo:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 22))
    return partial(filler.unlink, missing_ok=True)


HOARD = """
import sys, time, numpy, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
held = []
print("begins", flush=True)
try:
    while True:
        held.append(ray.put(numpy.ones(5_000_000, numpy.uint8)))
except Exception:
    time.sleep(600)
"""


def _spill_full(world: World, fault: Fault) -> Undo:
    """Ray's object store on the head's machine is full, and so is the disk to which it spills."""
    assert world.nodes is not None
    machine = world.network.machines[0]
    words = machine.command([sys.executable, "-c", HOARD, world.nodes.address])
    end = _helper(words, world.nodes.environment)
    free = _filled(world.folder / machine.name)
    return lambda: (free(), end())[1]


def _no_inodes(world: World, fault: Fault) -> Undo:
    folder = _disk(world, fault) / "fillers"
    folder.mkdir()
    with suppress(OSError):
        number = 0
        while True:
            os.close(os.open(folder / str(number), os.O_CREAT))
            number += 1
    return partial(shutil.rmtree, folder)


def _read_only(world: World, fault: Fault) -> Undo:
    """A machine's disk takes no new files and no changes; what is open for writing stays so."""
    nodes = world.nodes.alive if world.nodes else []
    node = nodes[int(fault.victim * len(nodes))]
    enter = ["nsenter", "-t", str(node.process.pid), "-m", "sh", "-c"]
    mount = [*enter, "mount --bind /tmp /tmp && mount -o remount,ro,bind /tmp"]
    subprocess.run(mount, check=True, capture_output=True)
    return lambda: (subprocess.run([*enter, "umount -l /tmp"], check=False, capture_output=True), None)[1]


def _clock(seconds: int, world: World, fault: Fault) -> Undo:
    """Another time of day in every Python process of a machine's node."""
    path = _disk(world, fault) / "chaos" / "clock"
    path.write_text(str(seconds))
    return partial(path.unlink, missing_ok=True)


# -- people ------------------------------------------------------------------------------------------


def _to_the_command(*numbers: int) -> Strike:
    def strike(world: World, fault: Fault) -> None:
        assert world.command is not None
        if world.command.process.poll() is not None:
            raise MissedError("the command does not run")
        for number in numbers:
            world.command.signal(number)
            time.sleep(min(fault.lasts, 2.0) if len(numbers) > 1 else 0)

    return strike


def _started_twice(world: World, fault: Fault) -> Undo:
    """The same command again beside the first."""
    second = world.start()
    return lambda: (second.wait(300), second.kill())[1]


def _changed_and_back(world: World, fault: Fault) -> None:
    """Stopped, started with another seed, stopped, and on with the first config."""
    with world.hands:
        assert world.command is not None
        world.command.signal(signal.SIGINT)
        if world.command.wait(60) is None:
            world.command.kill()
        _not_at_its_end(world)
        other = world.start("--set", "train.seed=1")
        if other.wait(fault.lasts + 10) is None:
            other.signal(signal.SIGINT)
        if other.wait(60) is None:
            other.kill()


def _moved(world: World, fault: Fault) -> None:
    """Killed, and its workspace copied to another place, where it goes on."""
    with world.hands:
        assert world.command is not None
        world.command.kill()
        _not_at_its_end(world)
        client, old = world.store.client(), world.workspace.removeprefix("s3://")
        world.workspace = f"s3://{BUCKET}/{world.experiment}-moved-{int(fault.victim * 1000)}"
        if client.exists(old):
            client.copy(f"{old}/", world.workspace.removeprefix("s3://") + "/", recursive=True)
        world.write_config()


def _not_at_its_end(world: World) -> None:
    if world.command is not None and world.command.process.returncode == 0:
        raise MissedError("the command has come to its end")


SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT, "term": signal.SIGTERM}

CATALOGUE: dict[str, Strike] = {
    **{
        f"{name}: {who}": partial(_signal, number, pattern)
        for who, pattern in PROCESSES.items()
        for name, number in SIGNALS.items()
    },
    **{f"stopped: {who}": partial(_stopped, pattern) for who, pattern in PROCESSES.items()},
    **{f"slow: {who}": partial(_slow, pattern) for who, pattern in PROCESSES.items()},
    **{
        f"{name}: {who}": partial(strike, PROCESSES[who])
        for who in ("training worker", "generating worker", "scoring worker", "task")
        for name, strike in {
            "interpreter lock held": partial(_ordered, "hold"),
            "foreign exception": partial(_ordered, "raise"),
            "no memory": _no_memory,
        }.items()
    },
    "two workers killed": _two_workers,
    "node lost": _node_lost,
    "head lost": _head_lost,
    "store lost": _store_lost,
    **{name: partial(_spoiled, lambda w: w.store_proxy, spoils) for name, spoils in STORE.items()},
    "mlflow lost": _mlflow_lost,
    "mlflow: database locked": _locked_database,
    **{name: partial(_spoiled, lambda w: w.mlflow_proxy, spoils) for name, spoils in MLFLOW.items()},
    "network cut": _cut,
    "network: one way": partial(_filtered, "drop"),
    "network: 20 % lost": partial(_filtered, "numgen random mod 5 == 0 drop"),
    "network: 100 ms later": _late,
    "disk full": _disk_full,
    "spill full": _spill_full,
    "no inodes": _no_inodes,
    "disk read-only": _read_only,
    "clock: an hour ahead": partial(_clock, 3600),
    "clock: an hour back": partial(_clock, -3600),
    "command: killed": _to_the_command(signal.SIGKILL),
    "command: terminated": _to_the_command(signal.SIGTERM),
    "command: Ctrl-C": _to_the_command(signal.SIGINT),
    "command: Ctrl-C twice": _to_the_command(signal.SIGINT, signal.SIGINT),
    "command: started twice": _started_twice,
    "config changed and back": _changed_and_back,
    "workspace moved": _moved,
}


def missing() -> str:
    """What this machine lacks for the catalogue, "" if nothing."""
    if os.getuid() != 0:
        return "root, for network namespaces and mounts"
    lacking = [name for name in ("ip", "nft", "nsenter", "weed") if not _found(name)]
    return ", ".join(lacking)


def _found(program: str) -> bool:
    from tests.stores.seaweed import executable

    return bool(executable() if program == "weed" else shutil.which(program))


def tidy(world: World) -> None:
    """Undo what a lost undo may have left between machines."""
    for number in (0, 1):
        with suppress(subprocess.CalledProcessError):
            world.network.firewall(number)("delete table ip chaos")
