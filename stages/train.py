"""Train one phase on the cluster: a Ray Train run whose workers read shards and step the networks together.

in:  shards   {split}-*.parquet and dataset.parquet (stages.shards.dataset)
     before   the folder of the previous phase; the first may start from a model (`train.start_from`)
out: model/               weights, averages, discriminator, model.json (stages.models.files.saved)
     metrics.parquet      the curves: step, images, epoch, name, value, time_ms
     samples/             epoch-XXXX.png: source | generated | target of a few validation pairs
     execution.json       precision, micro-batch, workers (stages.training.execution)
     checkpoints/         what a killed phase resumes from (stages.training.checkpoints)

A phase resumes from its newest checkpoint after any loss: of a worker (Ray restarts the group), of a node, of
the driver (run the same command again). Workers never wait for MLflow, nor the driver for workers
(stages.training.control).
"""

from __future__ import annotations

import faulthandler
import hashlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import ray
import ray.train
import ray.train.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from stages import storage
from stages.base import Outcome, Resources
from stages.config.evaluate import InceptionConfig, LpipsConfig
from stages.config.train import PhaseJob
from stages.errors import PixloomError, StageError, UserError, cause
from stages.models.architecture import Picture, Preprocessing
from stages.models.fast.process import gpu_environment, tune_process
from stages.parallel.cluster import in_order, service, uses_gpu
from stages.parallel.threads import own_cores
from stages.scoring import efficientnet
from stages.seeding import number
from stages.shards import dataset
from stages.shards.dataset import DatasetSpec
from stages.shards.feed import Feed, read_here
from stages.shards.prepare import Preparation, StoredPair, Unit
from stages.shards.row_groups import read_units
from stages.training.checkpoints import Position
from stages.training.control import Courier, LostWorkers, NewsRecorder, reading
from stages.training.gradients import failing_together
from stages.training.graph import CudaGraphs
from stages.training.loop import Ending, Preview, Task, Worker, train_phase
from stages.training.memory import estimate_memory, out_of_memory, shortage
from stages.training.news import Channel, Mailbox, Note
from stages.training.previews import Samples, pairs_to_choose_by
from stages.training.start import check_start

if TYPE_CHECKING:
    from stages.tracking.run import Run

VERSION = 3
RESIZE_S = 30.0  # between two checks for machines that joined, if the number of workers may vary
GPU_DECODERS = 16  # threads; each has a batch in memory
CPU_DECODERS = 4
UNITS_PER_TASK = 4  # row groups of about 8 MiB that a task reads: its start costs little beside them
READERS = 2  # tasks of one worker that read at once, and so 64 MiB of Ray's store at most
STOP_S = 25.0  # for a last checkpoint after SIGTERM; `ray job stop` kills after 30 s (cluster/)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What Ray Train sends to every worker."""

    task: Task
    shards: str
    mailbox: Any
    gpu: bool


# -- rules --------------------------------------------------------------------


def job_name(job: PhaseJob, shards: str, before: str) -> str:
    """A digest of settings and inputs' names (a workspace may move): checkpoints of others are ignored."""
    names = (folder.rstrip("/").rpartition("/")[2] for folder in (shards, before))
    text = "\n".join([job.model_dump_json(), *names])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def preprocessing(job: PhaseJob, spec: DatasetSpec) -> Preprocessing:
    """How inference has to prepare images so that they are as in this phase."""
    return Preprocessing(
        size=job.size(spec.size),
        pictures={
            role: Picture.model_validate(one.model_dump(exclude={"encoding"}))
            for role, one in spec.roles.items()
        },
    )


def threads(configured: int | None, workers_here: int, gpu: bool) -> int:
    """Torch threads of a worker. Ray sets OMP_NUM_THREADS to 1, which torch would otherwise obey."""
    if configured is not None:
        return configured
    return 1 if gpu else max(1, own_cores() // max(1, workers_here))


def decode_threads(workers_here: int, gpu: bool) -> int:
    """Threads of a worker that decode: its share of the cores; few on a CPU, where the step needs them."""
    share = max(1, own_cores() // max(1, workers_here))
    return min(share, GPU_DECODERS if gpu else CPU_DECODERS)


# -- wiring -------------------------------------------------------------------


def run(
    config: PhaseJob,
    resources: Resources,
    *,
    output: str,
    track: Run,
    shards: str,
    before: str = "",
) -> Outcome:
    """Train one phase to its end.

    Raises UserError for data the networks cannot take, StageError when training diverges, when workers were
    lost more than `resources.max_failures` times, or when memory does not suffice.
    """
    label = f"train-{config.phase.name}"
    spec = dataset.load(shards)
    _check(config, spec, shards)
    # Always there: Ray Train does not count attempts that end because a node was taken away with notice, so
    # workers without a mailbox would be restarted forever.
    mailbox = service(Mailbox)
    task = Task(
        job=config,
        name=job_name(config, shards, before),
        inputs=spec.inputs(),
        preprocessing=preprocessing(config, spec),
        rows=spec.rows("train"),
        output=output,
        before=before or config.start_from or "",
        run_id=track.run_id(wait=1.0),
        resources=resources,
    )
    setup = Setup(task=task, shards=shards, mailbox=mailbox, gpu=uses_gpu(resources))
    track.params(config.compared([config.phase], config.size(spec.size)))
    track.tags({"pixloom.phase": config.phase.name})
    track.curves(output)
    track.artifact("phase.json", config.model_dump_json(indent=1).encode())
    track.dataset("shards", uri=shards, digest=spec.digest(), context="training", counts=spec.counts())
    recorder = NewsRecorder(label, output, task.rows * config.phase.epochs, track)
    try:
        with reading(mailbox, recorder.handle):
            ending = _fit(setup, label)
    finally:
        recorder.finish()
    if ending.failure:
        kept = f"the last good checkpoint is in {output}/checkpoints"
        raise type(ending.failure)(f"{label}: {ending.failure}; {kept}")
    if ending.stopped:
        images = f"{ending.position.images:,} images"
        raise StageError(f"{label}: {ending.stopped} at {images}; run the same command again to resume")
    track.params({"precision": ending.notes["precision"]})
    track.model(label, folder=output, step=ending.model_step)
    return Outcome(
        counts={"images": ending.position.images, "steps": ending.position.steps},
        metrics={name: value for name, value in ending.losses.items() if name.count("/") == 1},
        notes=ending.notes,
    )


def check(config: PhaseJob) -> None:
    """Raise UserError for weights that are not there, or that a phase cannot start from."""
    if config.start_from is not None:
        check_start(config)
    for key, uri in weights(config).items():
        storage.require(uri, key)
    if config.select == "frechet:efficientnet_lite0":
        efficientnet.weights()


def weights(config: PhaseJob) -> dict[str, str]:
    """The files of the networks that a phase's losses and `train.select` use, by the config's key."""
    files: dict[str, str | None] = {}
    if config.losses.perceptual > 0:
        files["train.vgg_weights"] = config.vgg_weights
    lpips = {"train": config.lpips if config.losses.lpips > 0 else None, "evaluate": config.scorer}
    for section, network in lpips.items():
        match network:
            case LpipsConfig(backbone=backbone, linear=linear):
                files |= {f"{section}.lpips.backbone": backbone, f"{section}.lpips.linear": linear}
            case InceptionConfig(weights=uri):
                files[f"{section}.inception.weights"] = uri
    return {key: uri for key, uri in files.items() if uri is not None}


def digest(config: PhaseJob) -> str:
    """A digest of the model and the weights that a phase reads from outside; "" if there are none."""
    start = [check_start(config)] if config.start_from else []
    return "\n".join(start + [f"{key} {storage.file_version(uri)}" for key, uri in weights(config).items()])


def _check(config: PhaseJob, spec: DatasetSpec, shards: str) -> None:
    """Raises UserError where the phase cannot train on these shards."""
    if spec.rows("train") == 0:
        raise UserError(f"{shards}: no pair is in the train split (pair.split, or {{split}} in the pattern)")
    if config.start_from is not None:
        check_start(config, spec.inputs())
    needed = pairs_to_choose_by(config)[0]
    if config.select is not None and spec.rows("val") < needed:
        raise UserError(
            f"train.select: {config.select} needs {needed} pairs in the val split, {shards} has "
            f"{spec.rows('val')}; raise pair.split.val, or choose by another metric or by null"
        )


def _fit(setup: Setup, label: str) -> Ending:
    """One Ray Train run. Raises StageError, in one line, if its workers failed too often."""
    resources = setup.task.resources
    most, least = resources.train_workers, resources.train_workers_min
    trainer = TorchTrainer(
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
            # Ray keeps nothing for us: a folder in the controller's memory cannot fail, as a store can.
            storage_path="/ray",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            logging_config=LoggingConfig("WARNING"),
            callbacks=[LostWorkers(setup.mailbox)],
            worker_runtime_env={"env_vars": gpu_environment()} if setup.gpu else None,
        ),
    )
    # After so long Ray Train restarts a worker whose process does not answer at all, e.g. a stopped one.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(resources.collective_timeout_s)
    fitting = _in_thread(trainer)
    try:
        result = fitting.result()
    except KeyboardInterrupt:
        _stop(setup.mailbox, fitting, label)
        raise
    except ray.train.TrainingFailedError as error:
        reason = f"{label}: {cause(error)}"
        if isinstance(error, ray.train.WorkerGroupError):  # others end the phase at once
            reason += f" (after {resources.max_failures} restarts)"
        advice = out_of_memory(error, setup.task.job)
        raise StageError(f"{reason}; {advice}" if advice else reason) from error
    ending: Ending = result.return_value
    return ending


def _in_thread(trainer: TorchTrainer) -> Future[Any]:
    """`fit` in a thread: the main thread stays free for SIGTERM and Ctrl-C, on which Ray Train aborts."""
    fitting: Future[Any] = Future()

    def fit() -> None:
        try:
            fitting.set_result(trainer.fit())
        except BaseException as error:
            fitting.set_exception(error)

    threading.Thread(target=fit, name="train-fit", daemon=True).start()
    return fitting


def _stop(mailbox: Any, fitting: Future[Any], label: str) -> None:
    """Order the workers to end with a checkpoint; wait for it, but no longer than a scheduler would."""
    logger.warning("%-13s stopping: the workers save a checkpoint first", label)
    with suppress(ray.exceptions.RayError, ray.train.TrainingFailedError, TimeoutError):
        ray.get(mailbox.stop.remote("stopped"), timeout=STOP_S)
        ending = fitting.result(timeout=STOP_S).return_value
        logger.warning(
            "%-13s stopped; a checkpoint holds all %s images", label, f"{ending.position.images:,}"
        )


def _work(config: dict[str, Any]) -> Ending:
    """Train in a worker's process.

    What would fail again after a restart (bad data, too little memory) is left in the mailbox, where the next
    attempt finds it and ends: a loop that returns is not restarted, one that raises is.
    """
    setup: Setup = config["setup"]
    failure = ray.get(setup.mailbox.permanent_failure.remote())
    if failure:
        return Ending(Position(), failure=failure)
    with failing_together():
        try:
            return _train(setup)
        except (PixloomError, RuntimeError, MemoryError) as error:
            advice = out_of_memory(error, setup.task.job)
            failure = error if isinstance(error, PixloomError) else StageError(advice) if advice else None
            if failure:
                ray.get(setup.mailbox.give_up.remote(type(failure)(str(failure))))
            raise


def _train(setup: Setup) -> Ending:
    task, job, resources = setup.task, setup.task.job, setup.task.resources
    context, workers_here = ray.train.get_context(), ray.train.get_context().get_local_world_size()
    device = ray.train.torch.get_device() if setup.gpu else torch.device("cpu")
    worker = Worker(rank=context.get_world_rank(), world=context.get_world_size(), device=device)
    tune_process(device, save_memory=resources.checkpointing)
    torch.set_num_threads(threads(resources.threads_per_worker, workers_here, setup.gpu))
    spec = dataset.load(setup.shards)
    feed = Feed(
        setup.shards,
        spec,
        split="train",
        seed=number(job.seed, job.phase.name),  # of order and augmentation: phases differ
        batch=job.phase.batch,
        rank=worker.rank,
        world=worker.world,
        augment=job.augment,
        scale=job.scale,
        device=device,
        threads=decode_threads(workers_here, setup.gpu),
        epochs=job.phase.epochs,
        read=read_here if storage.is_local(setup.shards) else read_with_ray,
    )
    # only the worker that leads draws: the others need no networks to measure by
    samples: Preview = Samples(setup.shards, spec, job, device) if worker.leads else lambda *_: (None, {})
    channel = Channel(Courier(setup.mailbox))
    if worker.leads and (shortage := memory_shortage(task, spec, worker)):
        channel.post(Note(shortage))
    with _watched(channel, worker.rank, resources.collective_timeout_s):
        return train_phase(
            task,
            worker,
            feed,
            channel,
            samples,
            preempted=lambda: ray.train.get_preemption_info() is not None,
            load=lambda: machine_metrics(device, worker.rank if worker.world > 1 else None),
            record=CudaGraphs() if resources.cuda_graph and device.type == "cuda" else None,
        )


def read_with_ray(preparation: Preparation, units: Iterator[Unit]) -> Iterator[StoredPair]:
    """The pairs of each read unit, in order, read ahead by Ray's tasks: views of Ray's object store."""
    columns = preparation.columns()
    chunks = iter(lambda: list(itertools.islice(units, UNITS_PER_TASK)), [])
    jobs = ((preparation.folder, columns, chunk) for chunk in chunks)
    for unit, table in in_order(read_units, jobs, stage="train-input", at_once=READERS):
        yield from preparation.pairs(unit, table)


def memory_shortage(task: Task, spec: DatasetSpec, worker: Worker) -> str:
    """A warning if a step is expected to need more memory than the worker's GPU has; else ""."""
    if worker.device.type != "cuda":
        return ""
    needed = estimate_memory(task.job, spec, task.resources, workers=worker.world, gpu=True)
    there = torch.cuda.get_device_properties(worker.device).total_memory
    return shortage(needed, there, task.job)


def machine_metrics(device: torch.device, worker: int | None = None) -> dict[str, float]:
    """The load of a worker's machine, under the names MLflow's page shows as system metrics.

    worker   its rank, part of the names, if there are several
    """
    memory = psutil.virtual_memory()
    load = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        load |= {
            "gpu_0_memory_usage_megabytes": (total - free) / 1e6,
            "gpu_0_memory_usage_percentage": 100 * (1 - free / total),
            "gpu_0_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / 1e6,
        }
        # Without nvidia-ml-py, or with errors of its own: a part of a GPU (MIG) has no utilisation.
        with suppress(Exception):
            load["gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    prefix = "system/" if worker is None else f"system/worker_{worker}/"
    return {prefix + name: value for name, value in load.items()}


@contextmanager
def _watched(channel: Channel, rank: int, seconds: float) -> Iterator[None]:
    """Kill this process if the block makes no progress for so long: Ray Train restarts it.

    Workers that wait for one another notice a lost one by their collectives; one that waits for its data, or
    alone, would wait forever.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, seconds / 4)):
            if not channel.stores and time.monotonic() - channel.last_alive > seconds:
                channel.post(Note(f"worker {rank} made no progress for {seconds:.0f} s; killing its process"))
                faulthandler.dump_traceback(all_threads=True)  # into the worker's log: what it hung in
                over.wait(1)  # for the note to leave
                os.kill(os.getpid(), signal.SIGKILL)

    channel.alive()
    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()
