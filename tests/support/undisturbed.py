"""The losses of a phase that nothing disturbs: the loop of `stages.train` in plain processes, no Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from stages import storage, train
from stages.base import Resources
from stages.config.train import PhaseJob
from stages.seeding import number
from stages.shards import dataset
from stages.shards.feed import Feed
from stages.training import curves
from stages.training.loop import Ending, Preview, Task, Worker, train_phase
from stages.training.news import Channel, Mailbox

Losses = dict[tuple[int, str], float]
PLAIN_NAME = "here"  # whose checkpoints they are
COMPARED = ("generator/", "discriminator/", "learning_rate/", "gradient_norm/")


def losses(output: str | Path) -> Losses:
    """The curves of a finished phase without what depends on the clock, by step and name."""
    rows = curves.from_table(storage.read_parquet(storage.join(str(output), "metrics.parquet")))
    return {(row.step, row.name): row.value for row in rows if row.name.startswith(COMPARED)}


def images(output: str | Path) -> int:
    """How many images a finished phase has seen."""
    rows = curves.from_table(storage.read_parquet(storage.join(str(output), "metrics.parquet")))
    return max(row.images for row in rows)


def undisturbed(job: PhaseJob, shards: str, output: Path, *, workers: int = 1) -> Losses:
    """Train a phase with so many workers of one thread each; its losses."""
    if workers == 1:
        train_here(job, shards, str(output))
    else:
        with tempfile.TemporaryDirectory() as store:
            text = job.model_dump_json()
            torch.multiprocessing.spawn(_work, (workers, store, text, shards, str(output)), nprocs=workers)
    return losses(output)


def _work(rank: int, world: int, store: str, job: str, shards: str, output: str) -> None:
    """One of several processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}/meet", rank=rank, world_size=world)
    train_here(PhaseJob.model_validate_json(job), shards, output, Worker(rank=rank, world=world))
    dist.destroy_process_group()


def train_here(
    job: PhaseJob,
    shards: str,
    output: str,
    worker: Worker | None = None,
    *,
    before: str = "",
    threads: int = 1,
    feed_type: type[Feed] = Feed,
    mailbox: Mailbox | None = None,
    prepare: Callable[[Feed], None] = lambda _: None,
    preview: Preview = lambda *_: (None, {}),
    **how: Any,
) -> Ending:
    """A phase in this process. `how`: of its resources; `prepare` may change the feed."""
    worker = worker or Worker()
    spec = dataset.load(shards)
    task = Task(
        job=job,
        name=PLAIN_NAME,
        inputs=spec.inputs(),
        preprocessing=train.preprocessing(job, spec),
        rows=spec.rows("train"),
        output=output,
        before=before,
        resources=Resources(**{"checkpoint_seconds": 0, **how}),
    )
    feed = feed_type(
        shards,
        spec,
        seed=number(job.seed, job.phase.name),
        batch=job.phase.batch,
        rank=worker.rank,
        world=worker.world,
        augment=job.augment,
        scale=job.scale,
        epochs=job.phase.epochs,
    )
    prepare(feed)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with feed:
        ending = train_phase(task, worker, feed, Channel((mailbox or Mailbox()).post), preview)
    torch.set_num_threads(threads_before)
    return ending
