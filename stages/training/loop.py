"""One phase of training, as every worker runs it: build or go on, step, checkpoint, hand on the model.

    for epoch: for batch: step            the losses of a window of steps become a point of the curves
    after an epoch (and every so many images): a checkpoint, written while training goes on
    at the end: model/, metrics.parquet

Where training stands is a `Position`; order, augmentation and noise are functions of the seed and of it, so
that going on from a checkpoint gives the same numbers as never having stopped. Knows torch and storage only:
Ray starts it (`stages.train`), a test may call it.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stages import storage
from stages.config.train import PhaseJob, discriminators
from stages.errors import StageError
from stages.images import encode
from stages.models.architecture import InputSpec, Pix2PixHD
from stages.models.build import grow_discriminator, grow_generator
from stages.models.ema import Ema
from stages.models.fast.process import best_precision
from stages.models.files.saved import MANIFEST, Preprocessing, load_discriminator, load_model, save_model
from stages.models.files.vgg import load_vgg
from stages.models.layers import synchronise_norms
from stages.models.pix2pixhd import FeatureEncoder
from stages.models.step import (
    Arriving,
    Batch,
    GanState,
    build_gan,
    learning_rate_at,
    learning_rates,
    load_state,
    set_learning_rate,
    settle,
    state_of,
    step,
)
from stages.models.styles import Styles, collect_styles
from stages.tracking.run import system_metrics
from stages.training import checkpoints, curves, gradients
from stages.training.checkpoints import Checkpoint, Position, Writer
from stages.training.control import SAVE, Event, Poster
from stages.training.curves import DivergedError, Point, Window

PICTURES = 20  # sample grids per phase, at most
LOOK_S = 2.0  # between two looks for an order, on which all workers have to agree
WARNED = "warned"  # of a preemption
ASK_S = 5.0  # between two looks for a preemption warning, which cost a round trip


@dataclass(frozen=True, kw_only=True)
class Task:
    """A phase to run. What changes the result is in `job`, `before` and the data; the rest is how."""

    job: PhaseJob
    name: str  # digest of job, data and phase before: whose checkpoints may be taken up
    inputs: InputSpec
    preprocessing: Preprocessing
    rows: int  # training pairs
    output: str
    before: str  # folder of the phase before, "" for the first
    run_id: str = ""  # of MLflow
    checkpoint_images: int | None = None
    keep_checkpoints: int = 2
    checkpointing: bool = False
    compiled: bool = False
    pairs_at_once: int | None = None


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which worker this is, and on what."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Feed(Protocol):
    """Batches of this worker. `stages.shards.feed` reads them from shards."""

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""


class Preview(Protocol):
    """Draws sample pictures and measures them."""

    def __call__(self, gan: GanState) -> tuple[np.ndarray | None, dict[str, float]]:
        """A grid, (H, W, 3) uint8, or None where there is nothing to draw; numbers by name."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a phase ended on this worker: `failure` and `stopped` are one line, or "" ."""

    position: Position
    losses: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    stopped: str = ""
    checkpoint_seconds: float = 0.0


# -- rules --------------------------------------------------------------------


def steps_per_epoch(rows: int, batch: int) -> int:
    """Steps that see every pair once; the last may be short."""
    return math.ceil(rows / batch)


def advance(position: Position, *, rows: int, batch: int) -> Position:
    """Where training stands after one more step."""
    seen = min(batch, rows - position.step * batch)
    last = position.step + 1 == steps_per_epoch(rows, batch)
    return Position(
        epoch=position.epoch + last,
        step=0 if last else position.step + 1,
        images=position.images + seen,
        steps=position.steps + 1,
    )


def noise_seed(seed: int, phase: str, steps: int, rank: int) -> int:
    """The seed of a step's dropout on one worker: of nothing but these, so no random state is kept."""
    digest = blake2b(f"{seed}\0{phase}\0{steps}\0{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def phase_seed(seed: int, phase: str) -> int:
    """The seed of a phase's order and augmentation: another one than the phase before had."""
    digest = blake2b(f"{seed}\0{phase}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_due(before: Position, after: Position, every: int | None) -> bool:
    """Whether a checkpoint comes here: at an end of epoch, or when `every` more images are full."""
    return after.epoch > before.epoch or (
        every is not None and after.images // every > before.images // every
    )


def is_pictured(epoch: int, epochs: int) -> bool:
    """Whether samples are drawn after an epoch (counted from 1): evenly spread, and after the last."""
    return epoch == epochs or epoch % math.ceil(epochs / PICTURES) == 0


def best_checkpoint(points: Sequence[Point]) -> str:
    """Name of the checkpoint with the lowest validation L1 so far; "" if none was measured."""
    measured = [point for point in points if point.name == "validation/l1"]
    if not measured:
        return ""
    best = min(measured, key=lambda point: point.value)
    return checkpoints.folder_name(Position(steps=best.step))


# -- the loop -----------------------------------------------------------------


def train_phase(
    task: Task,
    worker: Worker,
    feed: Feed,
    poster: Poster,
    preview: Preview,
    preempted: Callable[[], bool] = lambda: False,
) -> Ending:
    """Run the phase to its end, or to where it has to stop. Every worker returns alike.

    `preempted` tells whether a machine of the phase is about to be taken away; all workers ask it together.
    """
    loop = Loop(task, worker, poster, preview, preempted)
    try:
        while loop.position.epoch < task.job.phase.epochs:
            for batch in loop.timed(feed.epoch(loop.position.epoch, loop.position.step)):
                loop.step(batch)
                if loop.stopped:
                    return loop.ending(stopped=loop.stopped)
        loop.hand_on(feed.epoch(task.job.phase.epochs - 1))
    except DivergedError as error:
        return loop.ending(failure=f"training diverged at {error}")
    finally:
        loop.writer.wait()  # whatever happened, a checkpoint in hand is not dropped
    return loop.ending()


class Loop:
    """All that changes while a phase runs."""

    def __init__(
        self,
        task: Task,
        worker: Worker,
        poster: Poster,
        preview: Preview,
        preempted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.task, self.worker, self.poster, self.preview = task, worker, poster, preview
        self.preempted, self._warned, self._asked = preempted, False, time.monotonic()
        self._looked, self._looked_at, self._next_look = time.monotonic(), 0, 0
        self.leads = worker.rank == 0
        self.folder = storage.join(task.output, "checkpoints")
        self.gan = build(task, worker.device)
        self._counts = 1.0  # whether this worker's pictures count in synchronised norms
        if task.job.synchronised_norms and worker.world > 1:
            for network in (self.gan.generator, self.gan.discriminator):
                if network is not None:
                    synchronise_norms(network, self._over_all)
        self.position, self.points = Position(), list[Point]()
        self.losses: dict[str, float] = {}
        self.stopped = ""
        self.writer = Writer(self.folder, task.keep_checkpoints, self._tell)
        self._take_up()
        self.norms = Norms(worker.world)
        several = worker.world > 1
        self.window = Window(
            worker.device,
            total=gradients.total if several else None,
            workers=worker.world,
            agree=gradients.broadcast_object if several else list,
        )
        self._waited = self._paused = 0.0
        self._since, self._since_images = time.monotonic(), self.position.images

    def _take_up(self) -> None:
        """Go on from the newest whole checkpoint, the same on every worker; else from the phase before."""
        several = self.worker.world > 1
        found: Checkpoint | None = None
        if self.leads:
            found = checkpoints.load_newest(self.folder, job=self.task.name, tell=self._tell)
        place = found.position if found else None
        if several:
            place = gradients.broadcast_object(place)
            if place is not None and not self.leads:
                where = storage.join(self.folder, checkpoints.folder_name(place))
                found = checkpoints.load(where, job=self.task.name)
        if found is None:
            if self.task.before:
                grow(self.gan, self.task.before, self.worker.device)
            return
        load_state(self.gan, found.state)
        for optimizer in (self.gan.generator_optimizer, self.gan.discriminator_optimizer):
            if optimizer is not None:
                lay_out(optimizer)
        self.position = found.position
        if self.leads:
            self.points = curves.from_table(found.curves)
            self.poster.post(Event("points", [tuple(point) for point in self.points]))
            at = f"epoch {self.position.epoch}, step {self.position.step}, {self.position.images:,} images"
            self._tell(f"goes on from its checkpoint ({at})")

    def _tell(self, text: str) -> None:
        """Have a line in the run's log, which is the driver's."""
        self.poster.post(Event("note", text))

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long they were waited for is kept."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.poster.alive()
            self._waited += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def step(self, batch: Batch) -> None:
        """One step, and what is due after it."""
        task, job, phase = self.task, self.task.job, self.task.job.phase
        rate = learning_rate_at(
            self.position.images / task.rows,
            rate=phase.learning_rate,
            epochs=phase.epochs - phase.decay_epochs,
            decay_epochs=phase.decay_epochs,
        )
        set_learning_rate(self.gan, rate)
        torch.manual_seed(noise_seed(job.seed, phase.name, self.position.steps, self.worker.rank))
        self.norms.wanted = (self.position.steps + 1) % job.log_every == 0
        # Alone and unobserved, a gradient can be dropped as soon as its weight is updated.
        seen = self.norms if self.norms.wanted or self.worker.world > 1 else None
        batch = batch.to(self.worker.device, non_blocking=True)
        if job.synchronised_norms and self.worker.world > 1:
            batch, self._counts = takes_part(batch)
        losses = step(
            self.gan, batch, weights=job.losses, average=seen, at_once=task.pairs_at_once, leave=True
        )
        before, self.position = self.position, advance(self.position, rows=task.rows, batch=phase.batch)
        self.window.add(self.position.steps, losses, batch.share)
        due = is_due(before, self.position, task.checkpoint_images)
        order = self._heed() if self.position.steps >= self._next_look else ""
        if due or order or self.position.steps % job.log_every == 0:
            settle(self.gan)
            self._close_window(before.epoch, rate)
        if due or order:
            self._verify()
            if self.position.epoch > before.epoch and is_pictured(self.position.epoch, phase.epochs):
                self._picture(before.epoch)
            self._checkpoint()
        if order == SAVE:
            self._say_saved()
        elif order not in ("", WARNED):
            self.stopped = order

    def _close_window(self, epoch: int, rate: float) -> None:
        """One point of every curve, and a progress line."""
        values = self.window.close(rate)
        self.losses = values
        if not self.leads:
            return
        now = time.monotonic()
        seconds, images = now - self._since, self.position.images - self._since_images
        rates = {f"learning_rate/{name}": value for name, value in learning_rates(self.gan).items()}
        health = {
            "throughput/images_per_second": images / seconds if seconds > 0 else 0.0,
            "throughput/data_wait_fraction": self._waited / seconds if seconds > 0 else 0.0,
            "throughput/checkpoint_fraction": self._paused / seconds if seconds > 0 else 0.0,
            **curves.balance(values),
            **self.norms.take(),
            **system_metrics(),
            **gpu_metrics(self.worker.device),
        }
        waited = health["throughput/data_wait_fraction"]
        self._since, self._since_images = now, self.position.images
        self._waited = self._paused = 0.0
        fresh = curves.points(self.position, epoch, values | rates | health)
        self.points += fresh
        text = f"epoch {epoch + 1}/{self.task.job.phase.epochs}  {curves.note(values)}"
        if waited > 0.05:
            text += f"  waits for data {100 * waited:.0f} % of the time"
        self.poster.post(
            Event("points", [tuple(point) for point in fresh]),
            Event("progress", (self.position.images, text)),
        )

    def _heed(self) -> str:
        """Look for an order or a fresh warning that asks for a checkpoint, alike on all workers; "" for none.

        Once in about `LOOK_S` seconds, however fast steps are: to agree costs the workers a message.
        """
        now, order = time.monotonic(), ""
        if self.leads:
            order = self.poster.order()
        ask = self.leads and now - self._asked > ASK_S
        stop = order not in ("", SAVE)
        flags = torch.tensor([float(stop), float(order == SAVE), float(ask), now - self._looked])
        if self.worker.world > 1:
            flags = gradients.total(flags.to(self.worker.device)).cpu()
        steps = max(1, self.position.steps - self._looked_at)
        seconds = max(1e-6, float(flags[3]) / self.worker.world / steps)
        self._looked, self._looked_at = now, self.position.steps
        self._next_look = self.position.steps + max(1, int(LOOK_S / seconds))
        if flags[0]:
            return order or "ordered to stop"
        warned = ""
        if flags[2]:
            self._asked = now
            before, self._warned = self._warned, self.preempted()
            warned = WARNED if self._warned and not before else ""
            if warned and self.leads:
                self._tell("a machine is about to be taken away: makes a checkpoint first")
        return SAVE if flags[1] else warned

    def _over_all(self, sums: Tensor) -> Tensor:
        """For synchronised norms: sums over all workers, without one that has no pairs of its own."""
        return gradients.total_with_gradient(sums * self._counts)

    def _verify(self) -> None:
        """Raises DivergedError, alike on all workers, for weights that are not finite: never checkpointed."""
        if not all_finite(self.gan.generator) or not all_finite(self.gan.discriminator):
            raise DivergedError(f"step {self.position.steps:,}: a weight is not finite")

    def _checkpoint(self) -> None:
        """Have the state written; training goes on meanwhile."""
        started = time.monotonic()
        if self.leads:
            checkpoint = Checkpoint(
                self.task.name,
                self.position,
                checkpoints.copied(state_of(self.gan)),
                curves.to_table(self.points),
                self.task.run_id,
                best_checkpoint(self.points),
            )
            self.writer.submit(checkpoint)
        self._paused += time.monotonic() - started

    def _say_saved(self) -> None:
        """Tell who ordered the checkpoint that it is written."""
        if self.leads:
            self.writer.wait()
            self.poster.saved()

    def _picture(self, epoch: int) -> None:
        """Samples and their numbers, at the end of an epoch."""
        if not self.leads:
            return
        grid, values = self.preview(self.gan)
        fresh = curves.points(self.position, epoch, values)
        self.points += fresh
        self.poster.post(Event("points", [tuple(point) for point in fresh]))
        if grid is not None:
            save_picture(self.task.output, self.position.epoch, grid)
            self.poster.post(Event("picture", (self.position.images, self.position.steps, grid)))

    def hand_on(self, batches: Iterator[Batch]) -> None:
        """Write what the phase is for: the model, with the styles in these batches, and its curves."""
        if not self.leads:
            return
        self.writer.finish()
        publish(self.task, self.gan, styles_in(self.timed(batches), self.gan, self.worker.device))
        storage.write_parquet(storage.join(self.task.output, "metrics.parquet"), curves.to_table(self.points))

    def ending(self, *, failure: str = "", stopped: str = "") -> Ending:
        """Where it ended."""
        return Ending(self.position, self.losses, failure, stopped, self.writer.seconds)


def takes_part(batch: Batch) -> tuple[Batch, float]:
    """The batch and 1; in place of an empty one, a blank pair and 0: shared norms wait for everyone."""
    if batch.source.shape[0]:
        return batch, 1.0

    def blank(images: Tensor | None) -> Tensor | None:
        return None if images is None else images.new_zeros((1, *images.shape[1:]))

    source, target = blank(batch.source), blank(batch.target)
    assert source is not None
    assert target is not None
    return replace(batch, source=source, target=target, instance=blank(batch.instance), share=0.0), 0.0


@dataclass
class Norms:
    """Averages gradients over the workers; where wanted, keeps their norms (discriminator first)."""

    world: int
    wanted: bool = False
    _norms: list[Tensor] = field(default_factory=list)

    def __call__(self, parameters: Sequence[nn.Parameter], *, coming: bool) -> Arriving:
        """Begin to average; see `step.Average`."""
        sent = gradients.send(parameters, coming=coming) if self.world > 1 else None

        def arriving() -> Iterable[Sequence[nn.Parameter]]:
            means: Iterable[Sequence[nn.Parameter]] = [parameters] if sent is None else sent()
            return self._measured(means) if self.wanted else means

        return arriving

    def _measured(self, means: Iterable[Sequence[nn.Parameter]]) -> Iterator[Sequence[nn.Parameter]]:
        norms: list[Tensor] = []
        for some in means:
            norms += torch._foreach_norm([p.grad for p in some if p.grad is not None])
            yield some
        self._norms.append(torch.stack(norms).norm())

    def take(self) -> dict[str, float]:
        """The norms of the last step they were wanted for."""
        names = ("discriminator", "generator")[-len(self._norms) :] if self._norms else ()
        values = {f"gradient_norm/{n}": float(v) for n, v in zip(names, self._norms, strict=True)}
        self._norms.clear()
        return values


def gpu_metrics(device: torch.device) -> dict[str, float]:
    """The load of a worker's GPU, under the names MLflow's page shows as system metrics; {} on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    metrics = {
        "system/gpu_0_memory_usage_megabytes": (total - free) / 1e6,
        "system/gpu_0_memory_usage_percentage": 100 * (1 - free / total),
        "system/gpu_0_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6,
    }
    with suppress(ImportError, RuntimeError):  # without nvidia-ml-py
        metrics["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return metrics


def all_finite(network: nn.Module | None) -> bool:
    """Whether every trained weight is a number."""
    if network is None:
        return True
    trained = [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]
    return not trained or bool(torch.stack(torch._foreach_norm(trained)).isfinite().all())


def lay_out(optimizer: Optimizer) -> None:
    """Give restored moments the memory layout of their weights: fused kernels walk both side by side.

    Files hold tensors row by row; weights may be channels last.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# -- models -------------------------------------------------------------------


def build(task: Task, device: torch.device) -> GanState:
    """A fresh translator, its weights a function of the seed."""
    job, phase = task.job, task.job.phase
    layered = isinstance(job.model, Pix2PixHD)
    perceptual = None
    if job.losses.perceptual > 0:
        assert job.vgg_weights is not None
        with local_file(job.vgg_weights) as path:
            perceptual = load_vgg(path).to(device)
    return build_gan(
        job.model,
        task.inputs,
        weights=job.losses,
        enhancers=phase.enhancers if layered else None,
        discriminators=discriminators(job.model, phase) if layered else None,
        parts=phase.parts,
        learning_rate=phase.learning_rate,
        betas=job.optimizer.betas,
        ema_decay=job.ema,
        precision=job.precision or best_precision(device),
        perceptual=perceptual,
        checkpointing=task.checkpointing,
        compiled=task.compiled,
        device=device,
        seed=job.seed,
    )


def grow(gan: GanState, before: str, device: torch.device) -> None:
    """Start from what the phase before trained. Raises StageError if its model is damaged."""
    with local_folder(storage.join(before, "model")) as folder:
        try:
            model = load_model(folder, weights="raw", device=device)
            judge = load_discriminator(folder, device=device) if gan.discriminator is not None else None
        except ValueError as error:
            raise StageError(f"the phase before left no usable model: {error}") from error
    if isinstance(gan.arch, Pix2PixHD):
        grow_generator(gan.generator, model.generator)  # type: ignore[arg-type]
        if gan.discriminator is not None:
            grow_discriminator(gan.discriminator, judge)  # type: ignore[arg-type]
    else:
        gan.generator.load_state_dict(model.generator.state_dict())
        if gan.discriminator is not None and judge is not None:
            gan.discriminator.load_state_dict(judge.state_dict())
    if gan.encoder is not None and model.encoder is not None:
        gan.encoder.load_state_dict(model.encoder.state_dict())
    if gan.ema is not None:
        gan.ema = Ema.of(gan.generator, decay=gan.ema.decay)


def styles_in(batches: Iterator[Batch], gan: GanState, device: torch.device) -> Styles | None:
    """The styles that a trained feature encoder sees; None without one, or without classes."""
    if not isinstance(gan.encoder, FeatureEncoder) or gan.inputs.classes is None:
        return None
    placed = (batch.to(device, non_blocking=True) for batch in batches)
    return collect_styles(gan.encoder, placed, num_classes=gan.inputs.classes)


def publish(task: Task, gan: GanState, styles: Styles | None) -> None:
    """Write the phase's model folder, `model.json` last."""
    target = storage.join(task.output, "model")
    fs, path = storage.filesystem(target)
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        local = Path(path) if storage.is_local(target) else Path(temporary)
        save_model(
            local,
            gan.generator,
            architecture=gan.arch,
            inputs=gan.inputs,
            preprocessing=task.preprocessing,
            ema=None if gan.ema is None else gan.ema.network.state_dict(),
            discriminator=gan.discriminator,
            encoder=gan.encoder,
            styles=styles,
            extra={"phase": task.job.phase.name, "run": task.run_id},
        )
        if not storage.is_local(target):
            names = sorted((file.name for file in local.iterdir()), key=lambda name: name == MANIFEST)
            for name in names:
                fs.put_file(str(local / name), f"{path}/{name}")


def save_picture(output: str, epoch: int, grid: np.ndarray) -> None:
    """Keep a sample grid in the phase's folder."""
    storage.write_bytes(storage.join(output, "samples", f"epoch-{epoch:04d}.png"), encode.encode_png(grid))


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """The files of a folder on this machine, copied for as long as they are needed if it is elsewhere."""
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        for name in storage.list_names(uri):
            fs.get_file(f"{path}/{name}", f"{temporary}/{name}")
        yield Path(temporary)


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """A file on this machine, copied for as long as it is needed if it is elsewhere."""
    fs, path = storage.filesystem(uri)
    if storage.is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as temporary:
        local = Path(temporary) / path.rsplit("/", 1)[-1]
        fs.get_file(path, str(local))
        yield local
