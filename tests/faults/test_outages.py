"""Services a phase leans on go away while it trains, and come back: S3, the local disk, the MLflow server."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from stages import storage, train
from stages.config.augment import AugmentConfig
from stages.config.tracking import TrackingConfig
from stages.config.train import PhaseJob
from stages.models.step import Batch
from stages.shards.feed import Feed
from stages.tracking.run import open_parent
from stages.training import checkpoints
from stages.training.news import Mailbox, Note
from tests.faults.test_train_faults import ONE, phase_job
from tests.stores.seaweed import SeaweedS3
from tests.support.mlflow_server import MlflowServer
from tests.support.nodes import Driver, Nodes
from tests.support.shards import make_shards
from tests.support.undisturbed import PLAIN_NAME, Losses, losses, train_here, undisturbed

EPOCHS = 12
Event = Callable[[], None]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, {"train": [14, 8], "val": [2]})
    return str(folder)


@pytest.fixture(scope="module")
def job() -> PhaseJob:
    return phase_job(epochs=EPOCHS)


@pytest.fixture(scope="module")
def expected(job: PhaseJob, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return undisturbed(job, shards, tmp_path_factory.mktemp("one"))


class Eventful(Feed):
    """A feed that lets something happen before a step."""

    events: dict[int, Event]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(super().epoch(epoch, start_step), start_step):
            self.events.pop(epoch * self.steps_per_epoch + step, lambda: None)()
            yield batch


def trained(
    job: PhaseJob, shards: str, output: str, events: dict[int, Event], mailbox: Mailbox | None = None
) -> tuple[Losses, str]:
    """Losses of a phase, a checkpoint after every step, and its messages."""
    mailbox, left = mailbox or Mailbox(), dict(events)

    def prepare(feed: Feed) -> None:
        assert isinstance(feed, Eventful)
        feed.events = left

    train_here(
        job,
        shards,
        output,
        feed_type=Eventful,
        mailbox=mailbox,
        prepare=prepare,
        checkpoint_images=1,
        keep_checkpoints=2,
    )
    assert not left, "something was to happen and did not"
    return losses(output), notes(mailbox)


def notes(mailbox: Mailbox) -> str:
    """The messages of a phase so far."""
    return "\n".join(one.text for one in mailbox.news if isinstance(one, Note))


def wait_for(ready: Callable[[], bool], mailbox: Mailbox) -> None:
    """Hold training here until something is so."""
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, notes(mailbox)
        time.sleep(0.01)


@pytest.mark.s3
def test_s3_is_down_while_checkpoints_are_written(
    s3_store: SeaweedS3, s3_bucket: str, job: PhaseJob, shards: str, expected: Losses
) -> None:
    """Killed at step 10, there again at step 20: the losses are the same, and so is what is left."""
    output = f"s3://{s3_bucket}/phase"
    storage.configure({"s3": s3_store.options()})
    try:
        found, _ = trained(job, shards, output, {10: s3_store.kill, 20: lambda: (s3_store.start(), None)[1]})
        assert found == expected
        assert storage.exists(f"{output}/model/model.json")
        # What the outage left half-written is no checkpoint; the newest is whole, and of the last step.
        newest = checkpoints.load_newest(f"{output}/checkpoints", job=PLAIN_NAME)
        assert newest is not None
        assert newest.position.steps == max(step for step, _ in expected)
    finally:
        storage.configure({"s3": {}})


@pytest.fixture
def small_disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 16 MB, or as many as the test asks for."""
    if os.getuid() != 0:
        pytest.skip("NOT RUN: needs root, to mount a small file system")
    folder = Path(tempfile.mkdtemp(prefix="px-disk"))
    size = f"size={getattr(request, 'param', 16)}m"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False)
    if made.returncode:
        pytest.skip("NOT RUN: this container may not mount file systems")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
    folder.rmdir()


def fill_up(filler: Path) -> None:
    """Leave no room on a disk."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


@pytest.mark.parametrize("where", ["the folder itself", "the spill of an upload"])
@pytest.mark.s3
def test_the_disk_is_full_while_checkpoints_are_written(
    where: str,
    small_disk: Path,
    s3_store: SeaweedS3,
    s3_bucket: str,
    job: PhaseJob,
    shards: str,
    expected: Losses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Training goes on without, says so, and writes again once there is room.

    The disk is full from a moment in which nothing is being written, until a message says that a checkpoint
    was not written: a checkpoint that ends meanwhile would free room for the next one.
    """
    output = str(small_disk / "phase")
    if where != "the folder itself":
        output = f"s3://{s3_bucket}/phase"
        monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    storage.configure({"s3": s3_store.options()})
    folder, filler, mailbox = f"{output}/checkpoints", small_disk / "filler", Mailbox()

    def whole() -> list[str]:
        """The checkpoints that are finished."""
        found = checkpoints.names(folder)
        return [name for name in found if storage.exists(f"{folder}/{name}/{checkpoints.MANIFEST}")]

    def at_rest() -> bool:
        """Whether the checkpoint of the sixth step is written, and older ones are cleared away.

        SeaweedFS keeps an empty folder if it was looked at while what was in it was deleted.
        """
        found = checkpoints.names(folder)
        held = [name for name in found if storage.exists(f"{folder}/{name}/{checkpoints.TENSORS}")]
        return whole()[-1:] == ["step-00000006"] and len(held) <= 2

    def fill() -> None:
        wait_for(at_rest, mailbox)
        fill_up(filler)

    def empty() -> None:
        wait_for(lambda: "not written" in notes(mailbox), mailbox)
        assert whole()[-1] == "step-00000006"
        filler.unlink()

    try:
        found, messages = trained(job, shards, output, {6: fill, 36: empty}, mailbox)
        newest = checkpoints.load_newest(folder, job=PLAIN_NAME)
    finally:
        storage.configure({"s3": {}})
    assert found == expected
    assert re.search(r"checkpoint step-\d+ not written \(.*No space left on device", messages)
    assert "training continues" in messages
    assert newest is not None
    assert newest.position.steps == max(step for step, _ in expected)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("small_disk", [400], indirect=True)
def test_rays_own_disk_is_full(small_disk: Path, s3_store: SeaweedS3, s3_bucket: str, tmp_path: Path) -> None:
    """The row groups that are read ahead do not fit Ray's object store, nor the disk it spills to.

    One line says what to mend, nothing is left half-written, and with room the same command does the work.
    """
    options = {"s3": s3_store.options()}
    make_shards(tmp_path / "shards", {"train": [128], "val": [2]}, size=(512, 512))
    job = phase_job(epochs=2, decay_epochs=1)
    job = job.model_copy(update={"augment": AugmentConfig(crop=(64, 64))})
    expected = undisturbed(job, str(tmp_path / "shards"), tmp_path / "one")
    s3_store.client().put(str(tmp_path / "shards"), f"{s3_bucket}/shards", recursive=True)
    output = tmp_path / "phase"
    at_once = ONE.model_copy(update={"max_failures": 0, "collective_timeout_s": 200})
    fill_up(small_disk / "filler")
    with Nodes() as nodes:
        nodes.start(words=[f"--object-spilling-directory={small_disk}"])

        def start() -> Driver:
            return nodes.train(job, f"s3://{s3_bucket}/shards", str(output), at_once, options)

        last = start().end(expect=1).splitlines()[-1]
        assert re.search(r"train-global: Ray's object store on \S+ is full, and so is the disk", last)
        assert "--object-spilling-directory" in last
        assert not (output / "model").exists()
        assert not checkpoints.names(f"{output}/checkpoints")
        (small_disk / "filler").unlink()
        start().end()
    assert losses(output) == expected


@pytest.mark.long
@pytest.mark.ray
def test_the_mlflow_server_is_down_for_a_minute(
    ray_local: None, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on meanwhile, and every step's value arrives, once."""
    import threading

    long = phase_job(epochs=200)
    server = MlflowServer(tmp_path)
    server.start()
    output = tmp_path / "phase"
    went_on: list[int] = []

    def outage() -> None:
        while not checkpoints.names(str(output / "checkpoints")):
            time.sleep(0.05)
        server.kill()
        before = checkpoints.names(str(output / "checkpoints"))[-1]
        time.sleep(60)
        now = checkpoints.names(str(output / "checkpoints"))[-1]
        went_on.append(int(now.rpartition("-")[2]) - int(before.rpartition("-")[2]))
        server.start()

    try:
        track = open_parent(TrackingConfig(uri=server.url), "test", None, str(tmp_path)).child("train-global")
        track.run_id()
        breaking = threading.Thread(target=outage)
        breaking.start()
        outcome = train.run(long, ONE, output=str(output), track=track, shards=shards)
        breaking.join()
        assert track.flush(wait=120)
        client = MlflowClient(server.url)
        for name in ("generator/gan", "discriminator/real", "gradient_norm/generator", "images"):
            history = client.get_metric_history(track.run_id(), name)
            assert sorted(point.step for point in history) == list(range(1, outcome.counts["steps"] + 1)), (
                name
            )
    finally:
        server.kill()
    assert went_on[0] > 0
    assert "does not answer" in caplog.text
    assert "MLflow answers again" in caplog.text
