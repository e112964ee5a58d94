"""Steps that are recorded and replayed give the numbers of steps that run, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stages.models.gan import GanState, state_of
from stages.training.curves import from_table
from stages.training.graph import WARM_UP
from stages.training.loop import Loop, Worker
from stages.training.news import Channel, Mailbox, Note
from tests.support.pretended_graph import PretendedGraphs
from tests.training.test_loop import Rows, nothing, phase_jobs, task

pytestmark = pytest.mark.usefixtures("one_thread")

PIX2PIX = {
    "model": {
        "kind": "pix2pix",
        "levels": 4,
        "width": 4,
        "dropout": "paper",
        "discriminator_layers": 1,
        "discriminator_width": 4,
    },
    "phases": [{"name": "whole", "kind": "whole", "epochs": 3, "decay_epochs": 2, "batch": 4}],
}


def tensors_of(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        yield from itertools.chain.from_iterable(map(tensors_of, state.values()))
    elif isinstance(state, list):
        yield from itertools.chain.from_iterable(map(tensors_of, state))


def trained(output: Path, *, graphed: bool, **changes: Any) -> tuple[Loop, Mailbox, PretendedGraphs]:
    mailbox = Mailbox()
    micro_batch = changes.pop("micro_batch", None)
    one = task(output, phase_jobs(log_every=2, **changes)[0], micro_batch=micro_batch)
    gans: list[GanState] = []
    record = PretendedGraphs(lambda: tensors_of(state_of(gans[0])))
    loop = Loop(
        one,
        Worker(),
        Channel(mailbox.post),
        nothing,
        lambda: False,
        dict,
        record if graphed else None,
    )
    gans.append(loop.gan)
    for epoch in range(one.job.phase.epochs):
        for batch in Rows(16).epoch(epoch):
            loop.step(batch)
    loop.writer.finish()
    return loop, mailbox, record


@pytest.mark.parametrize("changes", [PIX2PIX, {}], ids=["pix2pix", "pix2pixhd"])
def test_replayed_steps_are_those_that_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Rates decay, dropout draws, norms are measured, the last batch of an epoch is short."""
    expected, _, _ = trained(tmp_path / "eager", graphed=False, **changes)
    got, _, record = trained(tmp_path / "graphed", graphed=True, **changes)
    assert record.recordings == 2  # with norms and without
    assert record.replays == 2 * got.task.job.phase.epochs - WARM_UP  # two full batches an epoch
    rows, others = ([point[:5] for point in from_table(loop.curves.table())] for loop in (got, expected))
    assert [row for row in rows if "throughput" not in row[3]] == [
        row for row in others if "throughput" not in row[3]
    ]
    for one, other in zip(tensors_of(state_of(got.gan)), tensors_of(state_of(expected.gan)), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_run_as_they_are_and_it_is_said(tmp_path: Path) -> None:
    loop, mailbox, record = trained(tmp_path, graphed=True, micro_batch=2)
    assert record.recordings == 0
    notes = [news.text for news in mailbox.take() if isinstance(news, Note)]
    assert any("without a CUDA graph" in text for text in notes)
    assert loop.position.epoch == 3
