"""One phase of training, as every worker runs it: build or resume, step, checkpoint, write the model.

    for epoch: for batch: step            the losses of a window of steps become a point of the curves
    after an epoch or so many images, but not too often: a checkpoint, written while training continues
    at the end: model/, metrics.parquet

The state of a run is a `Position`; order, augmentation and noise are functions of the seed and of it, so a
resumed run gives the numbers of an uninterrupted one: bit for bit on CPUs and under `train.deterministic`,
else within rounding. Knows torch and storage, not Ray: `stages.train` starts it on a cluster, a test in its
own process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from stages import storage
from stages.base import Precision, Resources
from stages.config.train import PhaseJob, discriminators
from stages.errors import PixloomError, StageError, one_line
from stages.images import encode
from stages.models.architecture import InputSpec, Preprocessing
from stages.models.copies import arrival
from stages.models.fast.process import best_precision, deterministic
from stages.models.files.saved import MANIFEST, save_model
from stages.models.gan import GanState, build_gan, learning_rate_at, load_state, set_learning_rate, state_of
from stages.models.layers import synchronise_batch_norms
from stages.models.losses import load_vgg
from stages.models.pix2pixhd import FeatureEncoder
from stages.models.step import Batch, Losses, random_source, update
from stages.models.styles import Styles, collect_styles
from stages.scoring.lpips import load_lpips
from stages.scoring.metrics import lower_is_better
from stages.seeding import number
from stages.shards.order import num_steps
from stages.storage.local import local_file
from stages.storage.retry import away
from stages.training import checkpoints, curves, execution
from stages.training.checkpoints import Checkpoint, Position, Writer
from stages.training.curves import ClosedWindow, Curves, DivergedError, Window
from stages.training.execution import Execution, Part
from stages.training.gradients import GradientAverager, Messages, new_group
from stages.training.graph import CudaGraphs, GraphedStep, Step
from stages.training.news import Advance, Begin, Channel, Note, Order, Points, SampleGrid, Save, Saved, Stop
from stages.training.start import start_from

if TYPE_CHECKING:
    from stages.shards.feed import Feed

PICTURES = 20  # sample grids per phase, at most
SELECTING_SHARE = 0.03  # of a phase's time, at most, to measure what `train.select` chooses by
SELECTING_EVERY = "validation/every_epochs"
"""A curve of one point: how often `train.select` is measured. A resumed phase reads it, and chooses alike."""
ORDERS_S = 2.0  # between two polls for orders, on which all workers have to agree
LOAD_S = 10.0  # between two measurements of a machine's load, as MLflow's own; 64 machines post 6 points each
WARNINGS_S = 5.0  # between two polls for a preemption warning, which cost a round trip


@dataclass(frozen=True, kw_only=True)
class Task:
    """A phase to run. What changes the result is in `job`, `before` and the data; the rest is how.

    name     digest of job, data and previous phase: checkpoints with another one are ignored
    rows     training pairs
    before   folder of the model that it starts from, "" for new weights
    run_id   the phase's run in MLflow
    """

    job: PhaseJob
    name: str
    inputs: InputSpec
    preprocessing: Preprocessing
    rows: int
    output: str
    before: str
    resources: Resources
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which worker this is, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this worker writes checkpoints and news."""
        return self.rank == 0


Preview = Callable[[GanState, bool], tuple[np.ndarray | None, dict[str, float]]]
"""Draws samples, and measures them if it is true: a grid (H, W, 3) uint8, None where no pair is; numbers."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a phase ended on this worker. `stopped` is a reason in one line, or ""."""

    position: Position
    losses: dict[str, float] = field(default_factory=dict)
    model_step: int = 0
    """After which step the model's weights were so (`train.select`)."""
    failure: PixloomError | None = None
    stopped: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


# -- rules --------------------------------------------------------------------


def advance(position: Position, *, rows: int, batch: int) -> Position:
    """The position after one more step."""
    images = min(batch, rows - position.step * batch)
    ends_epoch = position.step + 1 == num_steps(rows, batch)
    return Position(
        epoch=position.epoch + 1 if ends_epoch else position.epoch,
        step=0 if ends_epoch else position.step + 1,
        images=position.images + images,
        steps=position.steps + 1,
    )


def may_checkpoint(before: Position, after: Position, every: int | None) -> bool:
    """Whether a checkpoint may follow a step: at an end of epoch, or when `every` more images are full."""
    return after.epoch > before.epoch or (
        every is not None and after.images // every > before.images // every
    )


def epochs_a_picture(epochs: int) -> int:
    """How many epochs are between two sample grids."""
    return math.ceil(epochs / PICTURES)


def is_pictured(epoch: int, epochs: int) -> bool:
    """Whether samples are drawn after an epoch (counted from 1): evenly spread, and after the last."""
    return epoch == epochs or epoch % epochs_a_picture(epochs) == 0


def measured_epochs(epochs: int, every: int) -> set[int]:
    """After which epochs `train.select` is measured: every so many, the first with samples and the last."""
    return {epochs_a_picture(epochs), *range(every, epochs + 1, every), epochs}


def epochs_a_measurement(epochs: int, *, epoch_seconds: float, seconds: float) -> int:
    """How often to measure what `train.select` chooses by, in epochs: as samples are drawn, or more rarely.

    seconds   that one measurement takes
    """
    most = SELECTING_SHARE * epochs * epoch_seconds / max(1e-9, seconds)
    first = epochs_a_picture(epochs)
    return next((n for n in range(first, epochs, first) if len(measured_epochs(epochs, n)) <= most), epochs)


def best_checkpoints(all_curves: Curves, metric: str) -> list[str]:
    """Names of the checkpoints whose validation metric was measured, the best first."""
    metric = metric.replace(":", "_")
    measured = [point for point in all_curves.named(f"validation/{metric}") if math.isfinite(point.value)]
    measured.sort(key=lambda point: point.value, reverse=not lower_is_better(metric))
    return [checkpoints.folder_name(Position(steps=point.step)) for point in measured]


# -- the loop -----------------------------------------------------------------


def train_phase(
    task: Task,
    worker: Worker,
    batches: Feed,
    channel: Channel,
    preview: Preview,
    preempted: Callable[[], bool] = lambda: False,
    load: Callable[[], dict[str, float]] = dict,
    record: CudaGraphs | None = None,
) -> Ending:
    """Run the phase to its end, or until it is stopped. All workers return alike.

    preempted   whether a machine of the phase will be taken away soon; all workers call it together
    load        the load of this worker's machine, by curve
    record      how to record a step, to replay it from then on; None: every step runs as it is
    """
    epochs = task.job.phase.epochs
    with deterministic(task.job.deterministic):
        with channel.storing():
            loop = Loop(task, worker, channel, preview, preempted, load, record)
        try:
            while loop.position.epoch < epochs:
                for batch in loop.timed(batches.epoch(loop.position.epoch, loop.position.step)):
                    loop.step(batch)
                    if loop.stopped is not None:
                        return Ending(loop.position, loop.losses, stopped=loop.stopped.reason)
            with channel.storing():
                model_step = loop.write_outputs(batches.whole_epoch(epochs - 1))
        except DivergedError as error:
            return Ending(loop.position, loop.losses, failure=StageError(f"training diverged at {error}"))
        finally:
            with channel.storing():
                loop.writer.wait()  # whatever happened, a submitted checkpoint is written
        return Ending(loop.position, loop.losses, model_step, notes=loop.execution.notes())


@dataclass
class OrderPoll:
    """Agrees across workers on the driver's order and on preemption warnings."""

    worker: Worker
    messages: Messages
    channel: Channel
    preempted: Callable[[], bool]
    _next_step: int = 0
    _polled: float = field(default_factory=time.monotonic)
    _polled_step: int = 0
    _asked: float = field(default_factory=time.monotonic)
    _warned: bool = False

    def poll(self, steps: int) -> Order | None:
        """The order to follow after so many steps, the same on all workers; `Save` for a fresh warning.

        Costs one all-reduce, so it happens about every `ORDERS_S` seconds, however fast steps are.
        """
        if steps < self._next_step:
            return None
        now, leads = time.monotonic(), self.worker.leads
        stop = self.channel.stop_order() if leads else None
        ask = leads and now - self._asked > WARNINGS_S
        stopping, asking, seconds = self.messages.sums(
            [float(stop is not None), float(ask), now - self._polled]
        )
        step_seconds = max(1e-6, seconds / self.worker.world / max(1, steps - self._polled_step))
        self._polled, self._polled_step = now, steps
        self._next_step = steps + max(1, int(ORDERS_S / step_seconds))
        if stopping:
            return stop or Stop("ordered to stop")
        return Save() if asking and self._is_freshly_warned(now) else None

    def _is_freshly_warned(self, now: float) -> bool:
        self._asked = now
        before, self._warned = self._warned, self.preempted()
        fresh = self._warned and not before
        if fresh and self.worker.leads:
            self.channel.post(Note("a machine will be taken away soon; saving a checkpoint now"))
        return fresh


@dataclass
class Throughput:
    """Images per second since the last point of the curves, and what they waited for."""

    images: int
    waited: float = 0.0
    """Seconds without a batch."""
    paused: float = 0.0
    """Seconds of copying a checkpoint."""
    _since: float = field(default_factory=time.monotonic)

    def take(self, images: int) -> dict[str, float]:
        """The rates since the last call; `images` is the phase's total."""
        seconds = max(1e-9, time.monotonic() - self._since)
        values = {
            "throughput/images_per_second": (images - self.images) / seconds,
            "throughput/data_wait_fraction": self.waited / seconds,
            "throughput/checkpoint_fraction": self.paused / seconds,
        }
        self.images, self.waited, self.paused, self._since = images, 0.0, 0.0, time.monotonic()
        return values


class Loop:
    """All that changes while a phase runs."""

    def __init__(
        self,
        task: Task,
        worker: Worker,
        channel: Channel,
        preview: Preview,
        preempted: Callable[[], bool],
        load: Callable[[], dict[str, float]],
        record: CudaGraphs | None = None,
    ) -> None:
        self.task, self.worker, self.channel, self.preview = task, worker, channel, preview
        self.load, self._load_measured = load, -math.inf
        self._checkpointed = time.monotonic()
        self._last_window: tuple[ClosedWindow, Position, int, dict[str, float]] | None = None
        """A point of the curves whose losses may be on their way: its position, epoch and other values."""
        timeout_s = task.resources.collective_timeout_s
        self.messages = Messages(worker.world, worker.device, timeout_s)
        self._has_rows = True  # whether this worker's pairs count in synchronised norms
        self.position, self.curves = Position(), Curves(curves.SCHEMA.empty_table())
        self.losses: dict[str, float] = {}
        self.stopped: Stop | None = None
        folder = storage.join(task.output, "checkpoints")
        self.writer = Writer(
            folder,
            task.resources.keep_checkpoints,
            self._note,
            lambda seconds: channel.post(Saved(seconds)),
            keeps_best=task.job.select is not None,
        )
        checkpoint, position, self.execution = self._begin(folder)
        self.gan = build(
            task.job,
            task.inputs,
            worker.device,
            self.execution.precision,
            checkpointing=task.resources.checkpointing,
            compiled=task.resources.compile,
        )
        if position is not None:
            self._resume(
                checkpoint or checkpoints.load(f"{folder}/{checkpoints.folder_name(position)}", job=task.name)
            )
        elif task.before:
            start_from(self.gan, task.before, worker.device, self._note)
        if task.job.synchronised_norms and worker.world > 1:  # last: averages copy the generator
            for network in (self.gan.generator, self.gan.discriminator):
                if network is not None:
                    synchronise_batch_norms(network, self._over_all)
        self.messages.meet()
        self.averager = GradientAverager(
            worker.world,
            wire=torch.bfloat16 if task.job.gradient_dtype == "bf16" else None,
            group=new_group(worker.device, timeout_s) if worker.world > 1 else None,
        )
        self.update = self._update if record is None else self._graphed(record)
        self.window = Window(self.messages)
        self.orders = OrderPoll(worker, self.messages, channel, preempted, _polled_step=self.position.steps)
        self.throughput = Throughput(self.position.images)

    def _graphed(self, record: CudaGraphs) -> Step:
        """Steps as recordings, where that gives the same numbers."""
        batch, micro_batch = self.task.job.phase.batch, self.execution.micro_batch
        if self.worker.world > 1 or (micro_batch is not None and micro_batch < batch):
            self._note("steps run without a CUDA graph: it is for one worker without micro-batches")
            return self._update
        return GraphedStep(self._update, rows=batch, record=record)

    def _begin(self, folder: str) -> tuple[Checkpoint | None, Position | None, Execution]:
        """The newest whole checkpoint, on the worker that leads; on all, its position and how to compute."""
        checkpoint, begun = None, None
        if self.worker.leads:
            checkpoint = checkpoints.load_newest(folder, job=self.task.name, tell=self._note)
            position = None if checkpoint is None else checkpoint.position
            begun = position, self._decide(position)
        self.messages.meet()
        return checkpoint, *self.messages.broadcast(begun)

    def _decide(self, position: Position | None) -> Execution:
        """How the phase is computed from this position on. Records it."""
        task, worker, micro_batch = self.task, self.worker, self.task.resources.micro_batch
        images = 0 if position is None else position.images
        begun = None if position is None else execution.read(task.output)
        part = Part(images=images, workers=worker.world, device=worker.device.type)
        decided = execution.decide(task.job, begun, micro_batch, best_precision(worker.device), part)
        if decided != begun:
            execution.write(task.output, decided)
        self.channel.post(Begin(decided.notes()))
        if decided.micro_batch != micro_batch:
            self._note(
                f"continues with micro_batch {decided.micro_batch}, as it began: the result depends on it "
                f"(resources.micro_batch is {micro_batch})"
            )
        return decided

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint."""
        load_state(self.gan, checkpoint.state)
        position = self.position = checkpoint.position
        if self.worker.leads:
            self.curves = Curves(checkpoint.curves)
            self.losses = curves.last_losses(checkpoint.curves)
            self.channel.post(Advance(position.images, ""))  # the driver reads the points from the checkpoint
            workers = f"{self.worker.world} worker{'s' if self.worker.world > 1 else ''}"
            at = f"epoch {position.epoch}, step {position.step}, {position.images:,} images"
            self._note(f"resumed from its checkpoint with {workers} ({at})")

    def _note(self, text: str) -> None:
        self.channel.post(Note(text))

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the seconds without one are counted."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self.channel.alive()
            self.throughput.waited += time.monotonic() - started
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
        # Dropout's noise is a function of these alone, so no random state is kept.
        seed = number(job.seed, phase.name, self.position.steps, self.worker.rank)
        random_source(self.worker.device).manual_seed(seed)
        batch = batch.to(self.worker.device, non_blocking=True)
        if job.synchronised_norms and self.worker.world > 1:
            self._has_rows = batch.source.shape[0] > 0
            if not self._has_rows:  # synchronised norms need every worker: one blank pair with weight 0
                batch = replace(
                    batch.each(lambda images: images.new_zeros((1, *images.shape[1:]))), share=0.0
                )
        measured = (self.position.steps + 1) % job.log_every == 0
        with self._compilation(batch):
            losses, self._norms = self.update(batch, measured)
        if self.gan.ema is not None:
            self.gan.ema.update(self.gan.generator)
        before, self.position = self.position, advance(self.position, rows=task.rows, batch=phase.batch)
        self.window.add(self.position.steps, losses, batch.share)
        order = self.orders.poll(self.position.steps)
        pictured = self.position.epoch > before.epoch and is_pictured(self.position.epoch, phase.epochs)
        possible = order is not None or may_checkpoint(
            before, self.position, task.resources.checkpoint_images
        )
        if possible or self.position.steps % job.log_every == 0:
            self._close_window(before.epoch, rate)
        if possible and (order is not None or pictured or self._is_checkpoint_old()):
            self._add_last_window()
            self._verify()
            with self.channel.storing():
                if pictured:
                    self._picture(before.epoch)
                self._checkpoint()
                self.messages.meet()  # with the worker that drew samples, or waited for the writer
        self.stopped = order if isinstance(order, Stop) else None

    def _update(self, batch: Batch, measured: bool) -> tuple[Losses, Losses]:
        """Update both networks. Returns the losses and, if `measured`, the norms of the gradients."""
        self.averager.measure = measured
        # With one worker and no norm to log, gradients are freed during the backward pass.
        average = self.averager if measured or self.worker.world > 1 else None
        losses = update(
            self.gan,
            batch,
            weights=self.task.job.losses,
            average=average,
            micro_batch=self.execution.micro_batch,
        )
        return losses, self.averager.take_norms()

    def _compilation(self, batch: Batch) -> AbstractContextManager[object]:
        """Run short batches of a compiled phase as they are: compiling for their shape takes a minute."""
        rows = self.task.job.phase.batch // self.worker.world
        if not self.task.resources.compile or batch.source.shape[0] >= rows:
            return nullcontext()
        eagerly: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eagerly

    def _is_checkpoint_old(self) -> bool:
        """Whether the last checkpoint is `checkpoint_seconds` old, by the clock of the worker that leads."""
        seconds, leads = self.task.resources.checkpoint_seconds, self.worker.leads
        return seconds == 0 or self.messages.any(leads and time.monotonic() - self._checkpointed >= seconds)

    def _close_window(self, epoch: int, rate: float) -> None:
        """Start one point of every curve. A GPU's losses are read when they are there, a window later."""
        self._add_last_window()
        window = self.window.close(rate, self._norms)
        networks = ("generator",) if self.gan.discriminator is None else ("generator", "discriminator")
        values = {f"learning_rate/{name}": rate for name in networks}
        if self.worker.leads:
            values |= self.throughput.take(self.position.images)
        if time.monotonic() - self._load_measured >= LOAD_S:
            load, self._load_measured = self.load(), time.monotonic()
            values |= load
            if not self.worker.leads:  # whose values are the curves
                self.channel.post(Points(curves.points(self.position, epoch, load)))
        self._last_window = window, self.position, epoch, values
        if window.arrived is None:
            self._add_last_window()

    def _add_last_window(self) -> None:
        """Add the last window to the curves, and post a progress line."""
        if self._last_window is None:
            return
        (window, position, epoch, others), self._last_window = self._last_window, None
        self.losses, norms = window.means()
        if not self.worker.leads:
            return
        values = self.losses | others | curves.balance(self.losses) | norms
        self._add_points(position, epoch, values)
        text = f"epoch {epoch + 1}/{self.task.job.phase.epochs}  {curves.note(self.losses)}"
        waited = values["throughput/data_wait_fraction"]
        if waited > 0.05:
            text += f"  waits for data {100 * waited:.0f} % of the time"
        self.channel.post(Advance(position.images, text))

    def _add_points(self, position: Position, epoch: int, values: dict[str, float]) -> None:
        fresh = curves.points(position, epoch, values)
        self.curves.add(fresh)
        self.channel.post(Points(fresh))

    def _over_all(self, sums: Tensor) -> Tensor:
        """For synchronised norms: sums over all workers, without one that has no pairs of its own."""
        return self.messages.total_with_gradient(sums * float(self._has_rows))

    def _verify(self) -> None:
        """Raises DivergedError, on all workers alike, if a weight is not finite: it is never checkpointed."""
        if not all(map(all_finite, (self.gan.generator, self.gan.discriminator, self.gan.encoder))):
            raise DivergedError(f"step {self.position.steps:,}: a weight is not finite")

    def _checkpoint(self) -> None:
        """Copy the state and have it written while training continues."""
        started = self._checkpointed = time.monotonic()
        if not self.worker.leads:
            return
        checkpoint = Checkpoint(
            self.task.name,
            self.position,
            checkpoints.copied(state_of(self.gan)),
            self.curves.table(),
            self.task.run_id,
            best_checkpoints(self.curves, self.task.job.select or "l1"),
            arrival(self.worker.device),
        )
        self.writer.submit(checkpoint)
        self.throughput.paused += time.monotonic() - started

    def _picture(self, epoch: int) -> None:
        """Samples and their numbers, at the end of an epoch."""
        if not self.worker.leads:
            return
        every = next((int(point.value) for point in self.curves.named(SELECTING_EVERY)), None)
        chooses, epochs = self.task.job.select is not None, self.task.job.phase.epochs
        due = not chooses or every is None or self.position.epoch in measured_epochs(epochs, every)
        started = time.monotonic()
        try:
            grid, values = self.preview(self.gan, due)
        except PixloomError as error:
            if chooses or not away(error):  # what chooses the model is measured, or the phase ends
                raise
            reason = one_line(error.__cause__ or error)
            self._note(f"no samples after epoch {self.position.epoch} ({reason}); training continues")
            return
        if chooses and every is None:
            values |= {SELECTING_EVERY: self._pace(time.monotonic() - started)}
        self._add_points(self.position, epoch, values)
        if grid is not None:
            self.channel.post(SampleGrid(self.position.images, self.position.steps, grid))
            name = f"samples/epoch-{self.position.epoch:04d}.png"
            try:
                storage.write_bytes(storage.join(self.task.output, name), encode.encode_png(grid))
            except PixloomError as error:
                self._note(f"{name} not written ({one_line(error.__cause__ or error)}); training continues")

    def _pace(self, seconds: float) -> int:
        """After how many epochs `train.select` is measured; `seconds` is what its first time took."""
        rates = [point.value for point in self.curves.named("throughput/images_per_second")]
        epochs, epoch_seconds = self.task.job.phase.epochs, self.task.rows / float(np.median(rates))
        every = epochs_a_measurement(epochs, epoch_seconds=epoch_seconds, seconds=seconds)
        times = len(measured_epochs(epochs, every))
        self._note(
            f"train.select: {self.task.job.select} takes {seconds:.1f} s, an epoch {epoch_seconds:.1f} s; "
            f"measured after every {every} epochs, {times} times in all, "
            f"{100 * times * seconds / epochs / epoch_seconds:.1f} % of the time"
        )
        return every

    def _select(self) -> int:
        """Go back to the state that `train.select` chooses, the best that was kept; returns its step."""
        if (metric := self.task.job.select) is None:
            return self.position.steps
        for name in best_checkpoints(self.curves, metric):
            place = storage.join(self.task.output, "checkpoints", name)
            try:
                chosen = checkpoints.load(place, job=self.task.name)
            except checkpoints.DamagedError as damage:
                self._note(f"train.select: {place} cannot be used: {damage}; trying the next best")
                continue
            load_state(self.gan, chosen.state)
            self._note(f"train.select: the model is that of {name}, the best by {metric}")
            return chosen.position.steps
        self._note(f"train.select: {metric} was not measured; the model is that of the last epoch")
        return self.position.steps

    def write_outputs(self, batches: Iterator[Batch]) -> int:
        """Write the phase's outputs: the model, the styles in these batches, the curves. The model's step."""
        if not self.worker.leads:
            return self.position.steps
        self.writer.finish()
        model_step = self._select()
        task, gan = self.task, self.gan
        styles = styles_in(self.timed(batches), gan)
        with checkpoints.new_folder(storage.join(task.output, "model"), last=MANIFEST) as folder:
            save_model(
                folder,
                gan.generator,
                architecture=gan.arch,
                inputs=gan.inputs,
                preprocessing=task.preprocessing,
                ema=None if gan.ema is None else gan.ema.network.state_dict(),
                discriminator=gan.discriminator,
                encoder=gan.encoder,
                styles=styles,
                extra={
                    "phase": task.job.phase.name,
                    "run": task.run_id,
                    "precision": self.execution.precision,
                },
            )
        storage.write_parquet(storage.join(task.output, "metrics.parquet"), self.curves.table())
        return model_step


def all_finite(network: nn.Module | None) -> bool:
    """Whether every trained weight is a number."""
    if network is None:
        return True
    trained = [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]
    return not trained or bool(torch.stack(torch._foreach_norm(trained)).isfinite().all())


# -- models -------------------------------------------------------------------


def build(
    job: PhaseJob,
    inputs: InputSpec,
    device: torch.device,
    precision: Precision,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> GanState:
    """The networks and optimizers of a phase, the weights a function of the seed."""
    phase = job.phase
    perceptual = None
    if job.losses.perceptual > 0:
        assert job.vgg_weights is not None
        with local_file(job.vgg_weights) as path:
            perceptual = load_vgg(path).to(device)
    lpips = None if job.losses.lpips == 0 or job.lpips is None else load_lpips(job.lpips, "train.lpips")
    return build_gan(
        job.model,
        inputs,
        weights=job.losses,
        enhancers=phase.enhancers,
        discriminators=discriminators(job.model, phase),
        parts=phase.parts,
        learning_rate=phase.learning_rate,
        betas=job.optimizer.betas,
        ema_decay=job.ema,
        precision=precision,
        perceptual=perceptual,
        lpips=None if lpips is None else lpips.to(device),
        checkpointing=checkpointing,
        compiled=compiled,
        device=device,
        seed=job.seed,
    )


def styles_in(batches: Iterator[Batch], gan: GanState) -> Styles | None:
    """Clusters of what a trained feature encoder sees; None without an encoder or without classes."""
    if not isinstance(gan.encoder, FeatureEncoder) or gan.inputs.classes is None:
        return None
    return collect_styles(gan.encoder, batches, num_classes=gan.inputs.classes)
