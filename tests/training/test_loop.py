"""The loop of a phase, in this process: resume is exact, phases hand over, what is not finite stops it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from stages import storage
from stages.base import Resources
from stages.config.augment import AugmentConfig
from stages.config.train import PhaseJob, TrainConfig, jobs
from stages.errors import UserError
from stages.models.architecture import InputSpec, Preprocessing
from stages.models.files.saved import load_model
from stages.models.gan import GanState
from stages.models.step import Batch
from stages.shards.order import num_steps
from stages.training import checkpoints, curves, loop
from stages.training.checkpoints import Checkpoint, Position, Writer
from stages.training.loop import Ending, Task, Worker, train_phase
from stages.training.news import Advance, Begin, Channel, Mailbox, Note, Points, SampleGrid, Saved

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, BATCH = 10, 4
HD = {
    "kind": "pix2pixhd",
    "width": 2,
    "enhancers": 1,
    "downsamplings": 1,
    "blocks": 1,
    "enhancer_blocks": 1,
    "discriminator_width": 2,
    "discriminator_layers": 1,
    "discriminators": 2,
    "instance_edges": False,
}
PHASES = [
    {"name": "global", "kind": "global", "epochs": 3, "decay_epochs": 2, "batch": BATCH, "discriminators": 1},
    {"name": "local", "kind": "local", "enhancers": 1, "epochs": 1, "batch": BATCH},
    {"name": "joint", "kind": "joint", "enhancers": 1, "epochs": 1, "batch": BATCH},
]


def phase_jobs(**changes: Any) -> tuple[PhaseJob, ...]:
    values = {"model": HD, "phases": PHASES, "log_every": 1, "ema": 0.9, "precision": "float32", **changes}
    return jobs(TrainConfig.model_validate(values), AugmentConfig())


class Rows:
    """Batches of random pairs, each a function of epoch and row; one may be damaged on its way."""

    def __init__(self, size: int, *, spoil: int | None = None, cut: int | None = None) -> None:
        self.size, self.spoil, self.cut, self.served = size, spoil, cut, 0

    def row(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(epoch * 1000 + index)
        return tuple(torch.rand(3, self.size, self.size, generator=random) * 2 - 1 for _ in range(2))  # type: ignore[return-value]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step in range(start_step, num_steps(ROWS, BATCH)):
            if self.served == self.cut:
                raise KeyboardInterrupt
            rows = [self.row(epoch, index) for index in range(step * BATCH, min(ROWS, (step + 1) * BATCH))]
            source, target = (torch.stack(images) for images in zip(*rows, strict=True))
            if self.served == self.spoil:
                target = target * float("nan")
            self.served += 1
            yield Batch(source=source, target=target)

    def whole_epoch(self, epoch: int) -> Iterator[Batch]:
        return self.epoch(epoch)


def task(output: Path, job: PhaseJob, *, before: str = "", name: str = "name", **resources: Any) -> Task:
    return Task(
        job=job,
        name=name,
        inputs=InputSpec(),
        preprocessing=Preprocessing(),
        rows=ROWS,
        output=str(output),
        before=before,
        resources=Resources(**{"checkpoint_images": BATCH, "checkpoint_seconds": 0, **resources}),
    )


class PatientWriter(Writer):
    """Writes every checkpoint, also on a slow disk: none that waits is replaced by the next."""

    def submit(self, checkpoint: Checkpoint) -> None:
        self.wait()
        super().submit(checkpoint)


def nothing(gan: GanState, measure: bool) -> tuple[np.ndarray | None, dict[str, float]]:
    return None, {}


def train(
    task: Task, rows: Rows, preview: Callable[[GanState, bool], Any] = nothing, **options: Any
) -> tuple[Ending, Mailbox]:
    mailbox = Mailbox()
    return train_phase(task, Worker(), rows, Channel(mailbox.post), preview, **options), mailbox


def losses(output: Path) -> list[tuple[int, int, int, str, float]]:
    """The curves without what depends on the clock."""
    rows = curves.from_table(pq.read_table(output / "metrics.parquet"))
    without_clock = ("generator/", "discriminator/", "learning_rate/", "gradient_norm/")
    return [row[:5] for row in rows if row.name.startswith(without_clock)]


def weights(output: Path, **options: Any) -> dict[str, Tensor]:
    return load_model(output / "model", **options).generator.state_dict()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(one[name].equal(other[name]) for name in one)


def test_a_position_counts_epochs_steps_and_images() -> None:
    position, seen = Position(), []
    for _ in range(4):
        position = loop.advance(position, rows=ROWS, batch=BATCH)
        seen.append((position.epoch, position.step, position.images, position.steps))
    assert seen == [(0, 1, 4, 1), (0, 2, 8, 2), (1, 0, 10, 3), (1, 1, 14, 4)]


def test_checkpoints_come_at_epoch_ends_and_after_so_many_images() -> None:
    position, due = Position(), []
    for _ in range(6):
        after = loop.advance(position, rows=ROWS, batch=BATCH)
        due.append((loop.may_checkpoint(position, after, 8), loop.may_checkpoint(position, after, None)))
        position = after
    by_images = [False, True, True, False, True, True]
    by_epoch = [False, False, True, False, False, True]
    assert due == list(zip(by_images, by_epoch, strict=True))


@pytest.fixture
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training waits for each checkpoint, so that no newer one replaces it."""
    submit = checkpoints.Writer.submit

    def submit_and_wait(writer: checkpoints.Writer, checkpoint: Checkpoint) -> None:
        submit(writer, checkpoint)
        writer.wait()

    monkeypatch.setattr(checkpoints.Writer, "submit", submit_and_wait)


def test_checkpoints_are_some_time_apart_but_follow_sample_images_and_the_end(
    tmp_path: Path, written_at_once: None
) -> None:
    """Of 22 epochs every second has samples; at 1000 s apart, no other checkpoint is written."""
    job = phase_jobs(phases=[{**PHASES[0], "epochs": 22}, *PHASES[1:]])[0]
    for seconds, count in ((0.0, 22), (1000.0, 11)):
        folder = tmp_path / str(seconds)
        changes = {"checkpoint_images": None, "checkpoint_seconds": seconds, "keep_checkpoints": 99}
        train(task(folder, job, **changes), Rows(16))
        assert len(checkpoints.names(str(folder / "checkpoints"))) == count
    assert losses(tmp_path / "0.0") == losses(tmp_path / "1000.0")


@pytest.mark.parametrize("epochs", [1, 7, 20, 21, 200])
def test_pictures_are_few_and_one_is_of_the_last_epoch(epochs: int) -> None:
    drawn = [epoch for epoch in range(1, epochs + 1) if loop.is_pictured(epoch, epochs)]
    assert drawn[-1] == epochs
    assert min(epochs, 10) <= len(drawn) <= loop.PICTURES + 1


def test_a_phase_leaves_a_model_its_curves_and_checkpoints(tmp_path: Path) -> None:
    job = phase_jobs()[0]
    ending, mailbox = train(task(tmp_path, job), Rows(16))
    assert ending.position == Position(epoch=3, images=30, steps=9)
    assert load_model(tmp_path / "model").weights == "ema"
    rates = [row[4] for row in losses(tmp_path) if row[3] == "learning_rate/generator"]
    assert rates[:3] == [2e-4] * 3
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 1e-4
    assert len(checkpoints.names(str(tmp_path / "checkpoints"))) == 2
    assert {type(news) for news in mailbox.take()} == {Begin, Points, Advance, Saved}


@pytest.mark.parametrize("cut", [1, 3, 5, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, cut: int) -> None:
    job = phase_jobs(model={"kind": "pix2pix", "levels": 3, "width": 2, "discriminator_layers": 1,
                            "discriminator_width": 2},
                     phases=[{"name": "whole", "kind": "whole", "epochs": 3, "decay_epochs": 1,
                              "batch": BATCH}])[0]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    undisturbed, _ = train(task(whole, job), Rows(16))
    with pytest.raises(KeyboardInterrupt):
        train(task(parts, job), Rows(16, cut=cut))
    resumed, _ = train(task(parts, job), Rows(16))
    assert resumed == undisturbed
    assert losses(parts) == losses(whole)
    assert_equal(weights(parts), weights(whole))
    assert_equal(weights(parts, weights="raw"), weights(whole, weights="raw"))


def test_a_phase_asks_for_deterministic_operators_and_a_cpus_numbers_stay(tmp_path: Path) -> None:
    asked = []

    def preview(gan: GanState, measure: bool) -> tuple[np.ndarray | None, dict[str, float]]:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return None, {}

    for wanted in (False, True):
        train(task(tmp_path / str(wanted), phase_jobs(deterministic=wanted)[0]), Rows(16), preview)
    assert asked == [False] * 3 + [True] * 3
    assert losses(tmp_path / "True") == losses(tmp_path / "False")


def test_a_finished_phase_run_again_is_the_same_and_trains_nothing(tmp_path: Path) -> None:
    job = phase_jobs()[0]
    first, _ = train(task(tmp_path, job), Rows(16))
    before = losses(tmp_path)
    again = Rows(16)
    ending, mailbox = train(task(tmp_path, job), again)
    assert again.served == 0
    assert not [news for news in mailbox.take() if isinstance(news, Points)]  # there may be millions
    assert first.losses
    assert ending == first
    assert losses(tmp_path) == before


def test_checkpointing_changes_memory_and_no_number(tmp_path: Path) -> None:
    joint = phase_jobs(phases=[{**PHASES[2], "kind": "joint"}])[0]
    for name, checkpointing in (("plain", False), ("sparing", True)):
        train(task(tmp_path / name, joint, checkpointing=checkpointing), Rows(16))
    assert losses(tmp_path / "plain") == losses(tmp_path / "sparing")


def test_phases_hand_over_and_only_the_joint_one_changes_g1(tmp_path: Path) -> None:
    before, folders = "", []
    for job, size in zip(phase_jobs(), (8, 16, 16), strict=True):
        folder = tmp_path / job.phase.name
        train(task(folder, job, before=before), Rows(size))
        before = str(folder)
        folders.append(folder)
    first, local, joint = (
        {name: t for name, t in weights(folder, weights="raw").items() if name.startswith("coarse.")}
        for folder in folders
    )
    assert first
    assert_equal(first, local)
    trained = [name for name in first if not local[name].equal(joint[name])]
    assert any(name.endswith("weight") for name in trained)


def test_other_losses_resume_to_the_last_bit_and_hand_their_discriminator_over(tmp_path: Path) -> None:
    others = {"r1": 1.0, "diff_augment": ["colour", "translation", "cutout"]}
    model = {**HD, "discriminator_spectral_norm": True}
    first, local, _ = phase_jobs(model=model, losses=others, phases=[{**PHASES[0], "epochs": 2}, *PHASES[1:]])
    train(task(tmp_path / "whole", first), Rows(16))
    with pytest.raises(KeyboardInterrupt):
        train(task(tmp_path / "cut", first), Rows(16, cut=4))
    train(task(tmp_path / "cut", first), Rows(16))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    ending, _ = train(task(tmp_path / "local", local, before=str(tmp_path / "cut")), Rows(16))
    assert ending.losses["discriminator/r1"] > 0
    assert first.depends_on_micro_batch


def test_a_loss_that_is_not_a_number_stops_the_phase_and_keeps_the_last_good_checkpoint(
    tmp_path: Path,
) -> None:
    job = phase_jobs(log_every=5)[0]
    ending, _ = train(task(tmp_path, job), Rows(16, spoil=5))
    assert "step 6" in str(ending.failure)
    assert "nan" in str(ending.failure)
    assert "learning rate" in str(ending.failure)
    good = checkpoints.load_newest(str(tmp_path / "checkpoints"), job="name")
    assert good is not None
    assert good.position.steps == 5
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("network", ["generator", "discriminator", "encoder"])
def test_a_broken_weight_is_never_checkpointed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    """A gradient that overflows breaks the weights while that step's losses are still finite."""
    original = loop.update

    def overflow(gan: GanState, batch: Batch, **named: Any) -> dict[str, Tensor]:
        values = original(gan, batch, **named)
        gan.encoder = nn.Linear(1, 1)
        with torch.no_grad():
            next(getattr(gan, network).parameters()).fill_(float("inf"))
        return values

    monkeypatch.setattr(loop, "update", overflow)
    ending, _ = train(task(tmp_path, phase_jobs()[0]), Rows(16))
    assert "a weight is not finite" in str(ending.failure)
    assert checkpoints.names(str(tmp_path / "checkpoints")) == []


def test_a_checkpoint_of_other_settings_is_ignored(tmp_path: Path) -> None:
    job = phase_jobs()[0]
    train(task(tmp_path, job), Rows(16))
    feed = Rows(16)
    train(task(tmp_path, job, name="other"), feed)
    assert feed.served == 9


def test_samples_are_drawn_into_the_phases_folder(tmp_path: Path) -> None:
    grid = np.zeros((4, 4, 3), np.uint8)
    _, mailbox = train(task(tmp_path, phase_jobs()[0]), Rows(16), lambda *_: (grid, {}))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "epoch-0001.png",
        "epoch-0002.png",
        "epoch-0003.png",
    ]
    assert [news.images for news in mailbox.take() if isinstance(news, SampleGrid)] == [10, 20, 30]


def test_samples_that_cannot_be_written_or_read_end_no_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(uri: str, data: bytes) -> None:
        if uri.endswith(".png"):
            raise UserError(f"{uri}: cannot reach the store")
        write_bytes(uri, data)

    def preview(gan: GanState, measure: bool) -> tuple[np.ndarray | None, dict[str, float]]:
        if len(drawn) == 1:
            raise UserError("shards: cannot reach the store") from ConnectionError("no route")
        drawn.append(np.zeros((4, 4, 3), np.uint8))
        return drawn[-1], {}

    drawn: list[np.ndarray] = []
    write_bytes = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", write)
    ending, mailbox = train(task(tmp_path, phase_jobs()[0]), Rows(16), preview)
    assert ending.position.images == 30
    notes = [news.text for news in mailbox.take() if isinstance(news, Note)]
    assert len(notes) == 3
    assert notes[0].startswith("samples/epoch-0001.png not written (")
    assert notes[1].startswith("no samples after epoch 2 (no route)")
    with pytest.raises(UserError, match="cannot reach the store"):  # which chooses the model
        train(task(tmp_path / "chosen", phase_jobs(select="l1")[0]), Rows(16), preview)


def test_the_best_checkpoint_by_validation_stays_whatever_its_age(
    tmp_path: Path, written_at_once: None
) -> None:
    measured = iter([0.2, 0.1, 0.3, 0.4, 0.5])
    job = phase_jobs(phases=[{**PHASES[0], "epochs": 5}, *PHASES[1:]])[0]
    train(
        task(tmp_path, job, checkpoint_images=None),
        Rows(16),
        lambda *_: (None, {"validation/l1": next(measured)}),
    )
    assert checkpoints.names(str(tmp_path / "checkpoints")) == [
        "step-00000006",
        "step-00000012",
        "step-00000015",
    ]


@pytest.mark.parametrize(
    ("select", "name", "best"),
    [
        ("ssim", "ssim", 2),
        ("l1", "l1", 3),
        ("frechet:efficientnet_lite0", "frechet_efficientnet_lite0", 3),
        (None, "ssim", 5),
        ("psnr", "ssim", 5),
    ],
)
def test_the_model_is_that_of_the_epoch_that_is_chosen(
    tmp_path: Path, select: str | None, name: str, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the best value there; by what was not measured, or by nothing, that of the last epoch."""
    monkeypatch.setattr(loop, "SELECTING_SHARE", 1e9)  # every epoch, however slow this machine is
    measured = iter([0.2, 0.9, 0.1, 0.4, 0.5])
    seen: list[dict[str, Tensor]] = []

    def preview(gan: GanState, measure: bool) -> tuple[None, dict[str, float]]:
        assert measure
        assert gan.ema is not None
        networks = {"raw": gan.generator, "ema": gan.ema.network}
        seen.append({f"{w}.{n}": v.clone() for w, g in networks.items() for n, v in g.state_dict().items()})
        return None, {f"validation/{name}": next(measured)}

    job = phase_jobs(phases=[{**PHASES[0], "epochs": 5}, *PHASES[1:]], select=select)[0]
    _, mailbox = train(task(tmp_path, job, checkpoint_images=None), Rows(16), preview)
    for kind in ("raw", "ema"):
        made = {f"{kind}.{n}": value for n, value in weights(tmp_path, weights=kind).items()}
        assert_equal(made, {n: seen[best - 1][n] for n in made})
    messages = [
        news.text for news in mailbox.take() if isinstance(news, Note) and "train.select" in news.text
    ]
    assert len(messages) == 2 * (select is not None)
    assert all("measured after every 1 epochs, 5 times in all" in text for text in messages[:1])
    assert all(("was not measured" in text) == (name == "ssim" != select) for text in messages[1:])


def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next_best(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop, "Writer", PatientWriter)
    measured = iter([0.1, 0.2, 0.3])
    damaged = tmp_path / "checkpoints/step-00000003/tensors.safetensors"

    def preview(gan: GanState, measure: bool) -> tuple[None, dict[str, float]]:
        value = next(measured)
        if value == 0.3:
            damaged.write_bytes(b"torn")
        return None, {"validation/l1": value}

    job = phase_jobs(phases=[{**PHASES[0], "epochs": 3}, *PHASES[1:]], select="l1")[0]
    _, mailbox = train(task(tmp_path, job, checkpoint_seconds=0, keep_checkpoints=9), Rows(16), preview)
    texts = [news.text for news in mailbox.take() if isinstance(news, Note) and "train.select" in news.text]
    assert "step-00000003 cannot be used" in texts[-2]
    assert texts[-1] == "train.select: the model is that of step-00000006, the best by l1"


def test_what_chooses_is_measured_as_often_as_its_share_of_the_time_allows() -> None:
    def every(epochs: int, seconds: float) -> int:
        return loop.epochs_a_measurement(epochs, epoch_seconds=10, seconds=seconds)

    assert every(20, 0.2) == 1
    assert every(20, 0.3) == 1  # 20 times 0.3 s are 3 % of 200 s
    assert every(20, 0.6) == 3  # after 1, 3, 6 ... 18 and 20
    assert every(200, 0.3) == 10  # never more often than samples are drawn
    assert every(60, 4.0) == 21  # after 3, 21, 42 and 60
    assert every(200, 30) == 200
    assert every(3, 100) == 3
    for epochs in (7, 30, 60, 200):
        for seconds in (0.01, 0.1, 1, 3, 4):
            times = len(loop.measured_epochs(epochs, every(epochs, seconds)))
            assert times * seconds <= 0.03 * epochs * 10 or times == 2


def test_a_resumed_phase_keeps_the_pace_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SELECTING_SHARE", 0)  # the first epoch and the last
    measured: list[bool] = []

    def preview(gan: GanState, measure: bool) -> tuple[None, dict[str, float]]:
        measured.append(measure)
        return None, {"validation/ssim": 0.5} if measure else {}

    job = phase_jobs(phases=[{**PHASES[0], "epochs": 5}, *PHASES[1:]], select="ssim")[0]
    with pytest.raises(KeyboardInterrupt):
        train(task(tmp_path, job, checkpoint_images=None), Rows(16, cut=8), preview)
    assert measured == [True, False]
    monkeypatch.setattr(loop, "SELECTING_SHARE", 1e9)
    train(task(tmp_path, job, checkpoint_images=None), Rows(16), preview)
    assert measured == [True, False, False, False, True]


def test_health_is_in_the_curves(tmp_path: Path) -> None:
    train(task(tmp_path, phase_jobs()[0]), Rows(16), load=lambda: {"system/cpu_utilization_percentage": 1.0})
    names = {row.name for row in curves.from_table(pq.read_table(tmp_path / "metrics.parquet"))}
    assert names >= {
        *("throughput/images_per_second", "throughput/data_wait_fraction", "throughput/checkpoint_fraction"),
        *("gradient_norm/generator", "gradient_norm/discriminator", "health/discriminator_over_generator"),
        *("learning_rate/generator", "learning_rate/discriminator"),
        "system/cpu_utilization_percentage",
    }


def test_a_network_with_a_weight_that_is_not_finite_is_noticed() -> None:
    layer = nn.Linear(2, 2)
    assert loop.all_finite(layer)
    layer.weight.data[0, 0] = float("nan")
    assert not loop.all_finite(layer)
    assert loop.all_finite(None)
