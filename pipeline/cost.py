"""What the steps that are left will take, before anything starts: time, requests, bytes, operations, money.

    work     of each step: pairs by the listing, the pairs or the shards; operations as they are counted by
             `training.operations`
    rates    of the most similar finished step in this workspace; else, for networks, of a few real training
             steps on this machine; else `ASSUMED`
    time     the start of a step + its work, or what the network and the store take if that is longer

Times are those of this machine, or of the cluster that the run has joined. The estimates are kept in
`cost.json` in the workspace: markers and the report say how far off they were.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args

import psutil
import ray
import torch
import yaml
from pydantic import Field, ValidationError

from pipeline.config import BAD_YAML, PipelineConfig
from pipeline.runner import PREDICTED, PlannedStep, changes, read_marker
from stages import storage
from stages.base import Config, Precision, Resources, Role, Split
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, check_size, full_size, phase_size
from stages.errors import UserError, first_invalid, one_line
from stages.infer import source_size
from stages.inference import outputs
from stages.inference.inputs import UNIT_ROWS
from stages.models.fast.process import best_precision, tune_process
from stages.models.step import Batch, update
from stages.parallel.threads import own_cores
from stages.progress import duration
from stages.shard import parts_of, role_specs
from stages.shards import dataset
from stages.shards.dataset import SCORED, DatasetSpec
from stages.shards.order import num_steps
from stages.training import checkpoints, execution, loop
from stages.training.memory import estimate_memory, networks_without_memory
from stages.training.operations import image_operations, step_operations

PRICES = str(Path(__file__).with_name("prices.yaml"))
PROBE_SECONDS = 2.0
PROBE_OPERATIONS = {"cpu": 2e10, "cuda": 1e13}  # of a step, at most: under a second
ROW_GROUP_BYTES = 8 << 20
KEYS_PER_LIST = 1000
NETWORK_BYTES = 1e9  # per second and machine: assumed, as are the next two
REQUEST_SECONDS = 0.02
REQUESTS_AT_ONCE = 64
STORED_SHARE = {"raw": 1.0, "png": 0.6, "jpeg": 0.1, "webp": 0.1}  # of an array's bytes: assumed
WORKERS = (1, 2, 4, 8, 16, 32, 64)

ASSUMED = {
    "ingest": (3.5, 2e-5),  # objects
    "pair": (0.2, 1e-5),  # pairs
    "shard": (0.7, 1.2e-7),  # pixels
    "train": (12.0, 0.0),
    "infer": (4.6, 0.0),
    "evaluate": (9.0, 1e-6),  # pixels
    "report": (0.15, 0.02),  # pictures
    "register": (2.0, 0.0),
}
"""Seconds of a step's start, and core-seconds of a unit of its work: measured on two free cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remainder:
    """What is left of a step: units of work (of `ASSUMED`, or operations), requests, bytes that move."""

    units: float
    reads: float = 0.0
    writes: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Rate:
    """The seconds of a step's start and of a unit of its work, and how they are known."""

    start: float
    each: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a step will take, and what limits it: its start, GPU, cores, network or store."""

    step: PlannedStep
    work: Remainder
    rate: Rate
    seconds: float
    limit: str
    machines: int


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run that is planned, and what the work of its steps depends on."""

    config: PipelineConfig
    planned: Sequence[PlannedStep]
    probes: dict[Precision, float] = field(default_factory=dict)
    """Operations per second of this machine, where they were measured."""

    @cached_property
    def spec(self) -> DatasetSpec:
        """The shards' description, or the expected one."""
        done = next((p for p in self.planned if p.step.name == "shard" and p.done), None)
        if done is not None:
            return dataset.load(done.folder)
        config = self.config.shard
        listed = {location.role for location in self.config.ingest.locations}
        roles: set[Role] = {"source", "target", *config.kinds, *(r for r in get_args(Role) if r in listed)}
        return DatasetSpec(size=config.size, roles=role_specs(config, roles), splits={})

    @cached_property
    def finished(self) -> Mapping[str, Mapping[str, Any]]:
        """The markers of all finished steps in the workspace, by their folders' names."""
        where = self.config.workspace
        found = ((name, read_marker(storage.join(where, name))) for name in storage.list_folders(where))
        return {name: marker for name, marker in found if marker is not None}

    @cached_property
    def pairs(self) -> Mapping[str, float] | None:
        """Pairs of each split: counted, or by the listing and `pair.split`; None if tables list them."""
        markers = {p.step.name: p.marker for p in self.planned if p.marker is not None}
        for name in ("shard", "pair"):
            if name in markers:
                return {split: markers[name]["counts"].get(split, 0) for split in get_args(Split)}
        if not self.seen or self.seen.get("unread"):
            return None
        roles = ["target"] if self.config.pair.derive_source else ["source", "target"]
        total = self.seen.get("role_pair", 0) + min(self.seen.get(f"role_{role}", 0) for role in roles)
        val, test = self.config.pair.split.val, self.config.pair.split.test
        return {"train": total * (1 - val - test), "val": total * val, "test": total * test}

    @cached_property
    def seen(self) -> Mapping[str, float]:
        """Counts of the listing."""
        ingest = next((p for p in self.planned if p.step.name == "ingest"), None)
        if ingest is None or ingest.marker is None:
            return {} if ingest is None else ingest.seen
        return {**ingest.marker["counts"], **ingest.marker["metrics"]}

    @cached_property
    def jobs(self) -> list[PhaseJob]:
        """The phases, in order."""
        return [p.step.config for p in self.planned if isinstance(p.step.config, PhaseJob)]

    @cached_property
    def operations(self) -> dict[str, float]:
        """Operations of a training step for each pair, by phase."""
        return {job.phase.name: step_operations(job, self.spec) for job in self.jobs}

    @property
    def largest(self) -> PhaseJob:
        """The phase whose step has the most operations."""
        return max(self.jobs, key=lambda job: self.operations[job.phase.name])

    @cached_property
    def gpu(self) -> bool:
        """Whether training will use GPUs: as configured, else if this machine has one."""
        configured = self.config.resources.gpu
        return torch.cuda.is_available() if configured is None else configured

    @property
    def device(self) -> str:
        """The device of a probe."""
        return "cuda" if self.gpu and torch.cuda.is_available() else "cpu"

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of this machine's GPU; None without one."""
        return torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else None

    def memory(self, job: PhaseJob, workers: int) -> int:
        """Bytes that each of so many workers needs for a step of a phase."""
        return estimate_memory(job, self.spec, self.config.resources, workers=workers, gpu=self.gpu)

    def fixed_precision(self, p: PlannedStep) -> Precision | None:
        """The precision that a phase began with, or that is configured; None if its start decides."""
        assert isinstance(p.step.config, PhaseJob)
        begun = execution.read(p.folder) if p.done or p.resumes else None
        return begun.precision if begun else p.step.config.precision

    def precision(self, p: PlannedStep) -> Precision:
        """The precision of a phase, or of generating."""
        if p.step.stage == "infer":
            return self.config.infer.precision
        return self.fixed_precision(p) or best_precision(self.device)

    @cached_property
    def speed(self) -> int:
        """How many machines like this one share the steps of training."""
        workers = self.config.resources.train_workers
        return workers if self.gpu else min(workers, machines())


# -- work ----------------------------------------------------------------------


def work_left(run: PlannedRun, p: PlannedStep) -> Remainder | None:
    """What a step has left to do; None if that is not known yet."""
    config, pairs = run.config, run.pairs
    stored = not storage.is_local(config.workspace)
    remote = not all(storage.is_local(location.uri) for location in config.ingest.locations)
    objects, area, per_pair = run.seen.get("objects", 0), math.prod(run.spec.size), pair_bytes(run.spec)
    if p.step.stage == "register":
        return Remainder(units=0)
    if p.step.stage == "ingest":
        return Remainder(units=objects, writes=remote * objects / KEYS_PER_LIST) if objects else None
    if pairs is None:
        return None
    total = sum(pairs.values())
    scored = next((pairs[split] for split in (config.infer.split, *SCORED) if split and pairs[split]), 0.0)
    match p.step.stage, p.step.config:
        case "pair", _:
            return Remainder(units=total)
        case "shard", _:
            total *= 1 - shards_done(p)
            return Remainder(
                units=total * area,
                reads=remote * max(objects, total),
                writes=stored * total * (1 / config.pair.pairs_per_shard + per_pair / ROW_GROUP_BYTES),
                bytes=run.seen.get("bytes", 0) + total * per_pair,
            )
        case "train", PhaseJob() as job:
            images = max(0.0, pairs["train"] * job.phase.epochs - images_done(p, job, pairs["train"]))
            reads = stored * images * per_pair / ROW_GROUP_BYTES
            units = images * run.operations[job.phase.name]
            return Remainder(units=units, reads=reads, bytes=images * per_pair)
        case "infer", _ if run.jobs and not (config.infer.model or config.infer.input):
            left = max(0.0, scored - p.resumes * UNIT_ROWS * len(outputs.finished_units(p.folder)))
            return Remainder(
                units=left * config.infer.samples * generating(run.jobs[-1], run.spec, config.infer.size),
                reads=stored * left * per_pair / ROW_GROUP_BYTES,
                writes=stored * left * config.infer.samples,
                bytes=left * per_pair,
            )
        case "evaluate", _ if not config.evaluate.images:
            return Remainder(units=scored * area, reads=stored * scored, bytes=scored * per_pair)
        case "report", _:
            return Remainder(units=min(scored, config.report.max_images))
    return None


def pair_bytes(spec: DatasetSpec) -> float:
    """Bytes that a pair takes in a shard."""
    deep = ("grey16", "instances")
    channels = sum(
        STORED_SHARE[role.encoding] * role.channels * (2 if role.kind in deep else 1)
        for role in spec.roles.values()
    )
    return channels * math.prod(spec.size)


def generating(job: PhaseJob, spec: DatasetSpec, configured: tuple[int, int] | None) -> float:
    """Operations of an image that is generated from shards."""
    size = source_size(spec.size, full_size(spec.size, job.augment), configured) or spec.size
    return image_operations(job, spec, size)


def shards_done(p: PlannedStep) -> float:
    """The share of the shard stage's parts that an earlier run finished."""
    if not p.resumes:
        return 0.0
    done = sum(name.endswith(".json") for name in storage.list_names(storage.join(p.folder, "_parts")))
    return done / max(1, len(parts_of(p.inputs["pairs"])))


def images_done(p: PlannedStep, job: PhaseJob, rows: float) -> float:
    """Images that a phase has seen at its newest checkpoint."""
    names = checkpoints.names(storage.join(p.folder, "checkpoints")) if p.resumes else []
    steps = int(names[-1].rpartition("-")[2]) if names else 0
    return rows * steps / num_steps(max(1, round(rows)), job.phase.batch)


# -- rates ---------------------------------------------------------------------


def rate_of(run: PlannedRun, p: PlannedStep) -> Rate | None:
    """How fast a step will be; None if this machine's memory is too small to find out."""
    if (known := earlier_rate(run, p)) is not None:
        return known
    start, each = ASSUMED[p.step.stage]
    if p.step.stage not in ("train", "infer"):
        return Rate(start, each / cores(), "assumed")
    precision = run.precision(p)
    if precision not in run.probes:
        run.probes[precision] = probe(run, precision)
    speed = run.probes[precision] * (run.speed if p.step.stage == "train" else machines())
    return Rate(start, 1 / speed, "probe") if speed else None


def earlier_rate(run: PlannedRun, p: PlannedStep) -> Rate | None:
    """The rate of the finished step of this stage whose config is the most similar; of several, the longest.

    Left out are phases of another precision, number of workers or device, and other steps that were resumed,
    whose time is of a part of the work.
    """
    notes = {}
    if p.step.stage == "train":
        workers = f"{run.config.resources.train_workers} on {'cuda' if run.gpu else 'cpu'}"
        notes = {"precision": run.precision(p), "workers": workers}
    similar = [
        (-len(changes(marker, p.step, {})), marker["seconds"], name, marker)
        for name, marker in run.finished.items()
        if name.startswith(f"{p.step.stage}-")
        and marker.get("notes", {}) == notes
        and (notes or not marker.get("resumed"))
    ]
    if not similar:
        return None
    *_, name, marker = max(similar, key=lambda one: one[:3])
    return Rate(*split_time(run, p.step.stage, name, marker), name)


def split_time(run: PlannedRun, stage: str, name: str, marker: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of a finished step's start, and of each unit of its work.

    A phase's curves say how long its steps took. Of other steps the start is assumed.
    """
    seconds, units = marker["seconds"], units_done(run, stage, marker) or 1.0
    if stage != "train":
        start = min(ASSUMED[stage][0], 0.8 * seconds)
        return start, (seconds - start) / units
    table = storage.read_parquet(storage.join(run.config.workspace, name, "metrics.parquet"))
    rows = [row for row in table.to_pylist() if row["name"] == "throughput/images_per_second"]
    points = [(0, 0.0), *((row["images"], row["value"]) for row in rows)]
    stepping = sum((end - begin) / rate for (begin, _), (end, rate) in pairwise(points) if rate)
    return max(0.0, seconds - stepping), stepping / units


def units_done(run: PlannedRun, stage: str, marker: Mapping[str, Any]) -> float:
    """The units of work that a finished step did."""
    workspace, counts, config = run.config.workspace, marker["counts"], marker["config"]
    shards = storage.join(workspace, marker["inputs"].get("shards", ""))
    spec = dataset.load(shards) if "shards" in marker["inputs"] and dataset.exists(shards) else run.spec
    each = 1.0
    match stage:
        case "shard":
            each = math.prod(config["size"])
        case "train":
            each = step_operations(PhaseJob.model_validate(config), spec)
        case "infer":
            phase = read_marker(storage.join(workspace, marker["inputs"].get("model", "")))
            job = PhaseJob.model_validate(phase["config"]) if phase else run.jobs[-1]
            each = generating(job, spec, config["size"])
        case "evaluate":
            each = math.prod(spec.size)
    return each * next((counts[name] for name in ("objects", "pairs", "images") if name in counts), 0)


def probe(run: PlannedRun, precision: Precision) -> float:
    """Operations per second of real training steps of the largest phase here; 0 if memory does not suffice.

    Where a step would take long, of fewer pairs, then of smaller images.
    """
    resources, job = run.config.resources, run.largest
    each, spec = run.operations[job.phase.name], replace(run.spec, size=full_size(run.spec.size, job.augment))
    rows = -(-job.phase.batch // resources.train_workers)
    rows = min(rows, resources.micro_batch or rows)
    losses = job.losses.model_copy(update={"perceptual": 0.0, "lpips": 0.0})  # whose networks are files
    job = job.model_copy(update={"losses": losses, "augment": AugmentConfig(), "precision": precision})
    with suppress(ValueError):  # the networks take no smaller images
        while rows * each > PROBE_OPERATIONS[run.device]:
            if rows > 1:
                rows = 1
                continue
            half = spec.size[0] // 2, spec.size[1] // 2
            check_size(job.model, job.phase, half, key="")
            spec, each = replace(spec, size=half), each / 4
    device, threads_before = torch.device(run.device), torch.get_num_threads()
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if estimate_memory(job, spec, Resources(micro_batch=rows), gpu=device.type == "cuda") > free:
        return 0.0
    tune_process(device)
    torch.set_num_threads(resources.threads_per_worker or (1 if run.gpu else own_cores()))
    try:
        gan = loop.build(job, spec.inputs(), device, precision)
        batch = noise(spec, rows, phase_size(job.model, job.phase, spec.size)).to(device)
        ends = list[float]()
        while len(ends) < 3 or (len(ends) < 12 and ends[-1] - ends[0] < PROBE_SECONDS):
            update(gan, batch, weights=losses)
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
    finally:
        torch.set_num_threads(threads_before)
    return rows * each / statistics.median(end - begin for begin, end in pairwise(ends))


def noise(spec: DatasetSpec, rows: int, size: tuple[int, int]) -> Batch:
    """Pairs of noise in the shape of the data set's."""
    source, target = (
        torch.rand(rows, spec.roles[role].channels, size[1], size[0]) * 2 - 1 for role in ("source", "target")
    )
    ids = torch.zeros(rows, 1, size[1], size[0], dtype=torch.int32)
    return Batch(
        source=ids if spec.roles["source"].kind == "labels" else source,
        target=target,
        instance=ids if "instance" in spec.roles else None,
    )


def cores() -> float:
    """Cores of the cluster, or of this machine."""
    return float(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else own_cores()


def machines() -> int:
    """Machines of the cluster."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


# -- the estimate --------------------------------------------------------------


def estimate(run: PlannedRun, chosen: Sequence[PlannedStep]) -> list[Estimate]:
    """What each step that is not done will take, if its work is known."""
    found = []
    for p in chosen:
        work = None if p.done else work_left(run, p)
        rate = None if work is None else rate_of(run, p)
        if work is None or rate is None:
            continue
        count = run.config.resources.train_workers if p.step.stage == "train" and run.gpu else machines()
        on_gpu = run.gpu and p.step.stage in ("train", "infer", "evaluate")
        busy = {"GPU" if on_gpu else "cores": work.units * rate.each}
        if work.reads + work.writes:
            busy["network"] = work.bytes / NETWORK_BYTES / count
            busy["store"] = (work.reads + work.writes) * REQUEST_SECONDS / REQUESTS_AT_ONCE / count
        seconds, limit = max((value, name) for name, value in busy.items())
        limit = limit if seconds > rate.start else "start"
        seconds += rate.start
        found.append(Estimate(step=p, work=work, rate=rate, seconds=seconds, limit=limit, machines=count))
    return found


# -- money ---------------------------------------------------------------------

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Requests(Config):
    """Dollars of a million requests to a store: `read` of GET, `write` of PUT and LIST."""

    read: Price
    write: Price


class Prices(Config):
    """A price list: dollars an hour of machines by name, and of requests by the protocol of a URI."""

    date: str
    machines: dict[str, Price]
    stores: dict[str, Requests]

    def hourly(self, machine: str) -> float:
        """The price of a machine. Raises UserError with the names that there are."""
        if machine not in self.machines:
            raise UserError(f"--machine {machine}: no price is known; there are {', '.join(self.machines)}")
        return self.machines[machine]


def read_prices(path: str) -> Prices:
    """The price list of a YAML file. Raises UserError that names it, in one line."""
    try:
        return Prices.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UserError(f"--prices {path}: {first_invalid(error)}") from error
    except (OSError, *BAD_YAML) as error:
        raise UserError(f"--prices {path}: cannot be read: {one_line(error)}") from error


def of_requests(run: PlannedRun, found: Sequence[Estimate], prices: Prices) -> float:
    """Dollars of all requests, at the price of the workspace's store or else of the first location's."""
    uris = [run.config.workspace, *(location.uri for location in run.config.ingest.locations)]
    protocols = [uri.rpartition("::")[2].partition("://")[0] for uri in uris]
    store = next((prices.stores[name] for name in protocols if name in prices.stores), None)
    if store is None:
        return 0.0
    return sum(store.read * one.work.reads + store.write * one.work.writes for one in found) / 1e6


# -- what the plan says --------------------------------------------------------


def report(run: PlannedRun, chosen: Sequence[PlannedStep], prices: Prices, machine: str) -> str:
    """The estimates of the steps that are left, as text; they are kept in the workspace.

    machine   a name of the price list, or ""
    """
    if all(p.done for p in chosen):
        return ""
    found = {one.step.step.name: one for one in estimate(run, chosen)}
    kept = {one.step.folder.rpartition("/")[2]: round(one.seconds, 1) for one in found.values()}
    with suppress(OSError, UserError):  # who may only read the workspace sees the plan too
        storage.write_json(storage.join(run.config.workspace, PREDICTED), kept)
    lines = [
        "",
        f"{'left':<15} {'time':>12}  {'limit':<8} {'operations':>10} {'requests':>9} {'bytes':>9}  known by",
    ]
    why = "of other inputs, or too large for this memory" if run.pairs else "its pairs are not counted yet"
    for name in (p.step.name for p in chosen if not p.done):
        lines.append(row(found[name]) if name in found else f"{name:<15} {'unknown':>12}  {why}")
    total = sum(one.seconds for one in found.values())
    gpu = torch.cuda.get_device_name() if run.device == "cuda" else "no GPU"
    lines.append(f"{'together':<15} {duration(total):>12}  on this machine: {cores():.0f} cores, {gpu}")
    lines.append(f"{'error':<15} {expected_error(run)}")
    if machine:
        hours = sum(one.seconds * one.machines for one in found.values()) / 3600
        price, sent = prices.hourly(machine), of_requests(run, list(found.values()), prices)
        lines.append(
            f"{'money':<15} {f'${hours * price + sent:,.2f}':>12}  {hours:.2f} hours of {machine} at "
            f"${price:.2f}, were it as fast as this machine; requests ${sent:.2f}; prices of {prices.date}"
        )
    return "\n".join([*lines, *choices(run, list(found.values()))]) + "\n"


def expected_error(run: PlannedRun) -> str:
    """How far off the times of finished steps were that a plan had estimated."""
    estimated = [marker for marker in run.finished.values() if marker.get("predicted")]
    off = [abs(marker["seconds"] / marker["predicted"] - 1) for marker in estimated]
    if not off:
        return f"{'unknown':>12}  no step here was estimated before it ran"
    middle = f"{statistics.median(off):.0%}"
    return f"{middle:>12}  median of {len(off)} earlier estimates of steps here, at most {max(off):.0%}"


def row(one: Estimate) -> str:
    """A step's line."""
    work, stage = one.work, one.step.step.stage
    operations = f"{work.units:.1e}" if stage in ("train", "infer") else ""
    requests = f"{work.reads + work.writes:,.0f}" if work.reads + work.writes else ""
    moved = f"{work.bytes / 1e9:,.2f} GB" if work.bytes else ""
    text = f"{one.step.step.name:<15} {duration(one.seconds):>12}  {one.limit:<8} {operations:>10}"
    return f"{text} {requests:>9} {moved:>9}  {one.rate.source}"


def choices(run: PlannedRun, found: Sequence[Estimate]) -> list[str]:
    """A line for each number of workers, each on its own machine, and precision that training could have.

    Workers share the work evenly and wait for the exchange of their gradients.
    """
    trained = [(one, job) for one in found if isinstance(job := one.step.step.config, PhaseJob)]
    if not trained:
        return []
    batch = min(job.phase.batch for _, job in trained)
    memory = run.gpu_memory or psutil.virtual_memory().total
    rows = []
    for precision, ratio in relative_speeds(run, trained[0][0].step).items():
        asked = run.largest.model_copy(update={"precision": precision})
        for workers in (count for count in WORKERS if count <= batch):
            seconds = 0.0
            for one, job in trained:
                steps = one.work.units / run.operations[job.phase.name] / job.phase.batch
                exchanged = gradient_bytes(job, run.spec) * 2 * (workers - 1) / workers
                computed = one.work.units * one.rate.each * run.speed / workers / ratio
                seconds += one.rate.start + computed + steps * exchanged / NETWORK_BYTES
            rows.append((seconds * workers, seconds, workers, precision, run.memory(asked, workers)))
    cheapest = min((one for one in rows if one[-1] <= memory), default=None)
    return [
        f"{f'{one[2]} x {one[3]}':<15} {duration(one[1]):>12}  training, {one[0] / 3600:.2f} worker hours, "
        f"{one[4] / 1e9:.1f} GB each"
        + ("" if one[4] <= memory else ": does not fit in memory")
        + (", the cheapest" if one is cheapest else "")
        for one in rows
        if len(rows) > 1
    ]


def relative_speeds(run: PlannedRun, p: PlannedStep) -> dict[Precision, float]:
    """The speed of training's precision, 1, and of the other one if this machine is made for both."""
    own = run.precision(p)
    if not run.probes.get(own) or best_precision(run.device) != "bf16":
        return {own: 1.0}
    for one in get_args(Precision):
        run.probes.setdefault(one, probe(run, one))
    return {one: rate / run.probes[own] for one, rate in run.probes.items() if rate}


def gradient_bytes(job: PhaseJob, spec: DatasetSpec) -> float:
    """Bytes of a step's gradients."""
    networks = networks_without_memory(job, spec.inputs())
    weights = sum(p.numel() for network in networks if network is not None for p in network.parameters())
    return weights * (2.0 if job.gradient_dtype == "bf16" else 4.0)
