"""Command line of `chaos`; exit code 1 if a run left anything other than a calm one."""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from chaos import catalogue, check, schedule
from chaos.check import Remains
from chaos.schedule import Fault
from chaos.world import World

NOTICED = r"(?i)warning|error|again|restart|lost|stopped|does not answer|retry|killed|failed|ends?ed with"
AGAIN = r"([\d,]+) images are done again"
RECOVERY_S = 60.0
"""Images that are done again within so many seconds of a fault are counted as its own."""
GOES_ON = r"\d+/\d+ |\d/s|done in|starts \("


@dataclass
class Result:
    """One run: its faults, those that struck, how often the command was started, what is wrong."""

    faults: Sequence[Fault]
    struck: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    harness: str = ""  # a failure of ours


def main() -> int:
    """Run seeds, print a line each and a table of kinds."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", default="0", metavar="N[,N...]", help="seeds, each of them a run")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="go on after the last one with the next for so long"
    )
    parser.add_argument("--count", type=int, default=8, help="faults of a run")
    parser.add_argument("--epochs", type=int, default=2, help="of each phase; faults hit long ones midway")
    parser.add_argument("--kinds", default="", help="only kinds that contain one of these words, by commas")
    parser.add_argument("--faults", default="", help="only these faults of the schedule, by number: 0,3")
    parser.add_argument("--shrink", action="store_true", help="find the fewest faults that still fail")
    parser.add_argument("--out", default="", help="folder of the histories")
    words = parser.parse_args()
    if lacking := catalogue.missing():
        print(f"chaos needs {lacking}", file=sys.stderr)
        return 2
    wanted = [word for word in words.kinds.split(",") if word]
    kinds = [k for k in catalogue.CATALOGUE if not wanted or any(word in k for word in wanted)]
    out = Path(words.out or tempfile.mkdtemp(prefix="chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    print(f"histories in {out}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    end, named = time.monotonic() + 60 * words.minutes, [int(seed) for seed in words.seed.split(",")]
    results: list[Result] = []
    with World(out, words.epochs) as world, printed_table(results):
        calm = calm_run(world)
        for seed in chain(named, count(named[-1] + 1)):
            if len(results) >= len(named) and time.monotonic() > end:
                break
            faults = schedule.draw(seed, kinds, words.count)
            chosen = [int(n) for n in words.faults.split(",")] if words.faults else range(len(faults))
            result = one_run(world, calm, f"seed-{seed}", [faults[n] for n in chosen])
            results.append(result)
            command = f"python -m chaos --seed {seed} --count {words.count}"
            command += f" --epochs {words.epochs}" if words.epochs != parser.get_default("epochs") else ""
            command += f" --kinds '{words.kinds}'" if words.kinds else ""
            say(seed, result, command)
            if words.shrink and result.problems:
                fewest = shrink(world, calm, seed, faults, list(chosen))
                print(f"fewest: {command} --faults {','.join(map(str, fewest))}", flush=True)
    return int(any(r.problems for r in results))


@contextmanager
def printed_table(results: Sequence[Result]) -> Iterator[None]:
    """Print the table of kinds at the end, also after Ctrl-C or SIGTERM."""
    try:
        yield
    finally:
        print(table(results), flush=True)


def calm_run(world: World) -> Remains:
    """A run that nothing disturbs."""
    world.begin("calm")
    began = time.monotonic()
    world.run_to_the_end()
    print(f"calm: {time.monotonic() - began:.0f} s", flush=True)
    return remains(world)


def remains(world: World) -> Remains:
    """What the world's run left."""
    return check.collect(world.store.client(), world.workspace, world.mlflow.url, world.experiment)


def one_run(world: World, calm: Remains, name: str, faults: Sequence[Fault]) -> Result:
    """A run with faults, and what is wrong with what it left."""
    result, began, done = Result(faults), time.monotonic(), threading.Event()
    world.begin(name)
    threads = [
        threading.Thread(target=befall, args=(world, faults, number, done, result), daemon=True)
        for number in range(len(faults))
    ]
    with harness(world, result):
        world.heal()
        for thread in threads:
            thread.start()
        result.starts = world.run_to_the_end()
    done.set()
    for thread in threads:
        thread.join(60)
    catalogue.tidy(world)
    with suppress(Exception):
        world.heal()
    if not result.harness and not result.problems:
        with harness(world, result):
            result.problems += check.differences(calm, remains(world))
            result.problems += [f"a process is left: {process}" for process in world.left_over()]
    result.seconds = time.monotonic() - began
    for entry in result.struck:
        noticed = world.log.first(NOTICED, entry["seconds"])
        entry["noticed"] = None if noticed is None else noticed - entry["seconds"]
        on = world.log.first(GOES_ON, noticed or entry["seconds"])
        entry["goes_on"] = None if on is None else on - entry["seconds"]
        entry["again"] = world.log.number(AGAIN, entry["seconds"], entry["seconds"] + RECOVERY_S)
        world.history.write("what it cost", **entry)
    world.history.write("the run ended", starts=result.starts, problems=result.problems)
    (world.out / f"{name}.log").write_text("\n".join(f"{t:8.2f} {line}" for t, line in world.log.lines))
    return result


@contextmanager
def harness(world: World, result: Result) -> Iterator[None]:
    """Note what fails in the block: a run that does not end is the product's fault, all else ours."""
    try:
        yield
    except TimeoutError as error:
        result.problems.append(str(error))
    except Exception as error:
        result.harness = f"{type(error).__name__}: {error}"
        world.history.write("the harness failed", error=result.harness)


def befall(world: World, faults: Sequence[Fault], number: int, done: threading.Event, result: Result) -> None:
    """Wait for a fault's moment, let it happen, undo it."""
    fault = faults[number]
    before = faults[number - 1] if number else None
    while not moment(world, fault, before, result):
        if done.wait(0.1):
            world.history.write("not reached", fault=str(fault))
            return
    why = ""
    while True:
        if done.wait(0.3 if why else fault.after):
            world.history.write("missed" if why else "not reached", fault=str(fault), why=why)
            return
        entry = {"seconds": world.history.now(), "kind": fault.kind, "at": str(fault)}
        try:
            undo = catalogue.CATALOGUE[fault.kind](world, fault)
            break
        except Exception as error:  # there is no victim yet, or it went while it was looked for: wait for one
            why = (
                str(error) if isinstance(error, catalogue.MissedError) else f"{type(error).__name__}: {error}"
            )
    result.struck.append(entry)
    world.history.write("struck", fault=str(fault))
    if undo is not None:
        done.wait(fault.lasts)
        try:
            undo()
            world.history.write("undone", fault=str(fault))
        except Exception as error:
            world.history.write("not undone", fault=str(fault), why=f"{type(error).__name__}: {error}")


def moment(world: World, fault: Fault, before: Fault | None, result: Result) -> bool:
    """Whether a fault's moment has come."""
    if fault.moment == "start":
        return True
    if fault.moment == "checkpoint":
        return world.checkpoint_seen.done > 0
    if fault.moment == "recovery":
        struck = [e["seconds"] for e in result.struck if before is None or e["kind"] == before.kind]
        return bool(struck) and world.log.first(NOTICED, struck[-1]) is not None
    return world.log.first(rf"\b{fault.moment}\s+starts \(") is not None


def shrink(world: World, calm: Remains, seed: int, faults: Sequence[Fault], chosen: list[int]) -> list[int]:
    """The fewest of the faults with which the run still fails."""
    for fewer in schedule.halves(chosen):
        result = one_run(world, calm, f"seed-{seed}-{'-'.join(map(str, fewer))}", [faults[n] for n in fewer])
        print(f"  {fewer}: {'fails' if result.problems else 'well'}", flush=True)
        if result.problems:
            return shrink(world, calm, seed, faults, fewer)
    return chosen


def say(seed: int, result: Result, command: str) -> None:
    """One line of a run, more if it failed."""
    state = f"harness: {result.harness}" if result.harness else "FAILED" if result.problems else "well"
    print(
        f"seed {seed}: {len(result.struck)} of {len(result.faults)} faults, {result.starts} starts, "
        f"{result.seconds:.0f} s: {state}",
        flush=True,
    )
    if result.problems or result.harness:
        print("\n".join([*(f"    {p}" for p in result.problems[:12]), f"    {command}"]), flush=True)


def table(results: Sequence[Result]) -> str:
    """By kind: how often; seconds until it was noticed and until work went on, and training images that the
    same start of the command did again, median and worst."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        for entry in result.struck:
            kinds[entry["kind"]].append(entry)
    lines = [f"{'fault':<42} {'times':>5} {'noticed, s':>14} {'goes on, s':>14} {'done again':>12}"]
    for kind in catalogue.CATALOGUE:
        if entries := kinds.get(kind):
            lines.append(
                f"{kind:<42} {len(entries):>5} {_two(entries, 'noticed'):>14} {_two(entries, 'goes_on'):>14}"
                f" {_two(entries, 'again'):>12}"
            )
    struck = sum(len(r.struck) for r in results)
    wrong = sum(bool(r.problems) for r in results)
    lines.append(f"{len(results)} runs, {struck} faults; {wrong} runs left something else than a calm run")
    return "\n".join(lines)


def _two(entries: Sequence[dict[str, Any]], name: str) -> str:
    values = [entry[name] for entry in entries if entry.get(name) is not None]  # one may strike late
    return f"{statistics.median(values):.1f} / {max(values):.1f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
