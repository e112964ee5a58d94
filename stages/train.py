"""Train one phase on the cluster: a Ray Train run whose workers read shards and step the networks together.

in:  shards   {split}-*.parquet and dataset.json (stages.dataset);   before: the folder of the phase before
out: model/               weights, averages, discriminator, model.json (stages.models.saved)
     metrics.parquet      the curves: step, images, epoch, name, value, time_ms
     samples/             epoch-XXXX.png: source | generated | target of a few validation pairs
     checkpoints/         what a killed phase goes on from (stages.checkpoints)

The phase goes on where it was, whatever was killed: a worker (Ray starts the group again), a node, the
driver (the same command again). Workers never wait for MLflow, nor the driver for workers (stages.board).
"""

from __future__ import annotations

import faulthandler
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from stages import storage
from stages.base import Outcome, Resources
from stages.config.train import (
    PhaseConfig,
    PhaseJob,
    TrainConfig,
    check_size,
    check_workers,
    downscale,
    full_size,
    jobs,
    phase_size,
)
from stages.errors import PixloomError, StageError, UserError
from stages.models.architecture import Pix2PixHD
from stages.models.fast.process import tune_process
from stages.models.files.saved import Picture, Preprocessing
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.shards.feed import Feed
from stages.tracking.run import Run
from stages.training import control, phases
from stages.training.checkpoints import Position
from stages.training.control import Event, Poster
from stages.training.loop import Ending, Task, Worker, phase_seed, train_phase
from stages.training.previews import Samples
from stages.training.relay import Reader, reading

__all__ = ["VERSION", "PhaseConfig", "PhaseJob", "TrainConfig", "jobs", "run"]

VERSION = 1
RESIZE_S = 30.0  # between two looks for machines that joined, where the number of workers may vary
STOP_S = 25.0  # for a last checkpoint after SIGTERM; `ray job stop` kills after 30 s (cluster/)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every worker is sent."""

    task: Task
    shards: str
    spec: DatasetSpec
    board: Any
    gpu: bool
    threads: int | None
    stall_s: float


# -- rules --------------------------------------------------------------------


def job_name(job: PhaseJob, shards: str, before: str) -> str:
    """A digest of the phase's settings and inputs: a checkpoint of another digest is not gone on from."""
    text = "\n".join([job.model_dump_json(), shards.rstrip("/"), before.rstrip("/")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def preprocessing(job: PhaseJob, spec: DatasetSpec) -> Preprocessing:
    """What inference has to know of the pictures this phase saw."""
    full = full_size(spec.size, job.augment)
    return Preprocessing(
        size=phase_size(job.model, job.phase, full),
        pictures={
            role: Picture(kind=known.kind, classes=known.classes) for role, known in spec.roles.items()
        },
    )


def threads(resources: Resources, workers_here: int, gpu: bool) -> int:
    """Torch threads of a worker. Ray sets OMP_NUM_THREADS to 1, which torch would otherwise obey."""
    if resources.threads_per_worker is not None:
        return resources.threads_per_worker
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if gpu else max(1, cores // max(1, workers_here))


def out_of_memory(error: BaseException, job: PhaseJob) -> str:
    """What to lower, if an error says that memory did not suffice; else ""."""
    text = str(error)
    known = ("can't allocate memory", "low on memory", "OutOfMemoryError")
    if not isinstance(error, torch.OutOfMemoryError) and not any(words in text for words in known):
        return ""
    lower = ["resources.micro_batch"] if job.phase.batch > 1 else ["shard.size or augment.crop"]
    lower.append("train.model.width")
    if isinstance(job.model, Pix2PixHD):
        lower.append("set resources.checkpointing")
    if job.precision == "float32":
        lower.append("take train.precision: bf16")
    return f"out of memory ({text.splitlines()[0][:160]}); lower {' or '.join(lower)}"


# -- wiring -------------------------------------------------------------------


def run(
    config: PhaseJob, resources: Resources, *, output: str, track: Run, shards: str, before: str = ""
) -> Outcome:
    """Train one phase to its end.

    Raises UserError for data the networks cannot take, StageError when training diverges, when workers died
    more than `resources.max_failures` times, or when memory does not suffice.
    """
    label = f"train-{config.phase.name}"
    spec = dataset.load(shards)
    rows = spec.rows("train")
    if rows == 0:
        raise UserError(f"{shards}: no pair is in the train split (pair.split, or {{split}} in the pattern)")
    try:
        check_workers(config.phase, resources, key="train")
        check_size(config.model, config.phase, full_size(spec.size, config.augment), key="train")
    except ValueError as error:
        raise UserError(str(error)) from error
    notices = control.open_board()
    task = Task(
        job=config,
        name=job_name(config, shards, before),
        inputs=phases.input_spec(spec),
        preprocessing=preprocessing(config, spec),
        rows=rows,
        output=output,
        before=before,
        run_id=track.run_id(wait=1.0),
        checkpoint_images=resources.checkpoint_images,
        keep_checkpoints=resources.keep_checkpoints,
        checkpointing=resources.checkpointing,
        compiled=resources.compile,
        pairs_at_once=resources.micro_batch,
    )
    gpu = resources.gpu if resources.gpu is not None else ray.cluster_resources().get("GPU", 0) >= 1
    setup = Setup(
        task=task,
        shards=shards,
        spec=spec,
        board=notices,
        gpu=gpu,
        threads=resources.threads_per_worker,
        stall_s=resources.collective_timeout_s,
    )
    seen = phase_size(config.model, config.phase, full_size(spec.size, config.augment))
    track.params(phases.compared(config, [config.phase], seen))
    track.tags({"pixloom.phase": config.phase.name})
    track.artifact("phase.json", config.model_dump_json(indent=1).encode())
    track.dataset("shards", uri=shards, digest=spec.digest(), context="training", counts=spec.counts())
    reader = Reader(label, rows * config.phase.epochs, track)
    try:
        with reading(notices, reader.handle):
            ending = _fit(setup, resources, label)
    finally:
        reader.finish()
    if ending.failure:
        raise StageError(f"{label}: {ending.failure}; its last good checkpoint is in {output}/checkpoints")
    if ending.stopped:
        raise StageError(
            f"{label}: {ending.stopped} at {ending.position.images:,} images; run again to go on"
        )
    return Outcome(
        counts={"images": ending.position.images, "steps": ending.position.steps},
        metrics={name: value for name, value in ending.losses.items() if name.count("/") == 1},
    )


def _fit(setup: Setup, resources: Resources, label: str) -> Ending:
    """One Ray Train run; what happened to its workers becomes one line."""
    most, least = resources.train_workers, resources.train_workers_min
    fs, path = storage.filesystem(storage.join(setup.task.output, "checkpoints", "ray"))
    local = storage.is_local(setup.task.output)
    trainer = _Trainer(
        _work,
        train_loop_config={"setup": setup},
        scaling_config=ScalingConfig(
            num_workers=most if least in (None, most) else (least, most),
            use_gpu=setup.gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if setup.gpu else {}),
            placement_strategy="PACK" if setup.gpu else "SPREAD",
            elastic_resize_monitor_interval_s=RESIZE_S,
        ),
        torch_config=TorchConfig(timeout_s=resources.collective_timeout_s),
        run_config=RunConfig(
            name=setup.task.name,
            storage_path=path,
            storage_filesystem=None if local else PyFileSystem(FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            logging_config=LoggingConfig("WARNING"),
            callbacks=[control.Teller(setup.board), control.Saver(setup.board)],
        ),
    )
    # A worker whose process does not answer at all, not even to say that it hangs.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(resources.collective_timeout_s)
    fitting = _in_thread(trainer)
    try:
        result = fitting.result()
    except KeyboardInterrupt:
        _stop(setup.board, fitting, label)
        raise
    except ray.train.TrainingFailedError as error:
        told = f"{label}: {control.cause(error)} (after {resources.max_failures} restarts)"
        lower = out_of_memory(error, setup.task.job)
        raise StageError(f"{told}; {lower}" if lower else told) from error
    ending: Ending = result.return_value
    return ending


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Without two of Ray Train's actors, each of which wakes 100 times a second beside what trains.

    One hands out Ray Data's datasets, the other frees workers whose controller died while the driver goes on:
    here the driver ends with it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        needless = DatasetsCallback, PlacementGroupCleanerCallback
        return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]


def _in_thread(trainer: TorchTrainer) -> Future[Any]:
    """`fit` in a thread: this one stays free for SIGTERM and Ctrl-C, which Ray Train answers by aborting."""
    fitting: Future[Any] = Future()

    def fit() -> None:
        try:
            fitting.set_result(trainer.fit())
        except BaseException as error:
            fitting.set_exception(error)

    threading.Thread(target=fit, name="train-fit", daemon=True).start()
    return fitting


def _stop(notices: Any, fitting: Future[Any], label: str) -> None:
    """Have the workers end with a checkpoint, and wait for them, but no longer than a scheduler would."""
    logger.warning("%-13s told to stop: makes a checkpoint first", label)
    with suppress(ray.exceptions.RayError, ray.train.TrainingFailedError, TimeoutError):
        ray.get(notices.stop.remote("told to stop"), timeout=STOP_S)
        ending = fitting.result(timeout=STOP_S).return_value
        logger.warning("%-13s stopped at %s images, all of them kept", label, f"{ending.position.images:,}")


def _work(config: dict[str, Any]) -> Ending:
    """A worker's process: find out who and where it is, then train.

    What would fail again after a restart (bad data, too little memory) is left on the board, where the next
    attempt finds it and ends: a loop that returns is not started again, one that raises is.
    """
    setup: Setup = config["setup"]
    failure = ray.get(setup.board.why_not.remote())
    if failure:
        return Ending(Position(), failure=failure)
    try:
        return _train(setup)
    except (PixloomError, RuntimeError) as error:
        reason = str(error) if isinstance(error, PixloomError) else out_of_memory(error, setup.task.job)
        if reason:
            ray.get(setup.board.give_up.remote(reason))
        raise


def _train(setup: Setup) -> Ending:
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if setup.gpu else torch.device("cpu")
    worker = Worker(rank=context.get_world_rank(), world=context.get_world_size(), device=device)
    tune_process(device, save_memory=setup.task.checkpointing)
    torch.set_num_threads(
        threads(Resources(threads_per_worker=setup.threads), context.get_local_world_size(), setup.gpu)
    )
    task, job = setup.task, setup.task.job
    feed = Feed(
        setup.shards,
        setup.spec,
        split="train",
        seed=phase_seed(job.seed, job.phase.name),
        batch=job.phase.batch,
        rank=worker.rank,
        world=worker.world,
        augment=job.augment,
        scale=downscale(job.model, job.phase),
        device=device,
        epochs=job.phase.epochs,
    )
    samples = Samples(setup.shards, setup.spec, job, device)
    poster = Poster(setup.board)
    with _watched(poster, worker.rank, setup.stall_s):
        return train_phase(
            task, worker, feed, poster, samples, lambda: ray.train.get_preemption_info() is not None
        )


@contextmanager
def _watched(poster: Poster, rank: int, seconds: float) -> Iterator[None]:
    """End this process if the block makes no progress for so long: started again, it goes on.

    Workers that wait for one another learn it from their collectives; one that waits for its data, or alone,
    would wait for ever.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, seconds / 4)):
            if time.monotonic() - poster.seen_alive > seconds:
                poster.post(Event("note", f"worker {rank} has done nothing for {seconds:.0f} s: ends it"))
                faulthandler.dump_traceback(all_threads=True)  # into the worker's log: what it hung in
                over.wait(1)  # for the note to leave
                os.kill(os.getpid(), signal.SIGKILL)

    poster.alive()
    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
