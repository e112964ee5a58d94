"""Means over workers: every gradient, of any size and layout, by two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from stages.models.architecture import InputSpec, LossWeights, Pix2Pix
from stages.models.gan import build_gan, state_of
from stages.models.step import Batch, update
from stages.training import gradients


def test_buckets_keep_order_and_dtype_and_are_of_about_the_given_size() -> None:
    tensors = [torch.zeros(n) for n in (3, 3, 10, 1)] + [torch.zeros(2, dtype=torch.float64)]
    groups = [[t.numel() for t in group] for group in gradients.buckets(tensors, size=24)]
    assert groups == [[3, 3], [10], [1], [2]]
    assert list(gradients.buckets([], size=24)) == []


def work(rank: int, world: int, folder: str) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    gradients.CPU_BUCKET_BYTES = 64
    planar = torch.arange(24.0).view(1, 2, 3, 4) * (rank + 1)
    last = planar.clone(memory_format=torch.channels_last)
    scalar = torch.tensor(float(rank))
    weights = [nn.Parameter(torch.zeros_like(one)) for one in (planar, last, scalar)]
    for weight, gradient in zip(weights, (planar, last, scalar), strict=True):
        weight.grad = gradient
    averaged = gradients.Exchange(weights).start(during_backward=False)
    assert [weight for bucket in averaged for weight in bucket] == weights[::-1]
    expected = torch.arange(24.0).view(1, 2, 3, 4) * 1.5
    for weight, mean in zip(weights, (expected, expected, torch.tensor(0.5)), strict=True):
        assert weight.grad is not None
        assert weight.grad.equal(mean)
        assert weight.grad.stride() == weight.stride()  # a fused optimizer pairs elements by address

    first, unused, last = (nn.Parameter(torch.full((8,), value)) for value in (2.0, 3.0, 5.0))
    exchange = gradients.Exchange([first, unused, last])
    (first * (rank + 7)).sum().backward()  # a pass whose gradients are not exchanged yet
    first.grad = None
    averaged = exchange.start(during_backward=True)
    ((first * last).sum() * (rank + 1)).backward()  # the unused weight never has a gradient
    assert sum(len(bucket) for bucket in averaged) == 3
    assert [None if p.grad is None else p.grad[0].item() for p in (first, unused, last)] == [7.5, 0.0, 3.0]
    memory = [p.grad.data_ptr() for p in (first, unused, last) if p.grad is not None]
    averaged = exchange.start(during_backward=True)
    (first * (rank + 1)).sum().backward()  # accumulated: the sum is sent
    assert sum(len(bucket) for bucket in averaged) == 3
    assert [None if p.grad is None else p.grad[0].item() for p in (first, unused, last)] == [9.0, 0.0, 3.0]
    assert [p.grad.data_ptr() for p in (first, unused, last) if p.grad is not None] == memory

    rough = gradients.Exchange([first], wire=torch.bfloat16)
    first.grad = torch.full((8,), 1.0 + rank / 4 + 2**-10)
    assert sum(len(bucket) for bucket in rough.start(during_backward=False)) == 1
    assert first.grad.dtype == torch.float32
    assert first.grad[0].item() == 1.125  # what bf16 has no digits for is lost

    messages = gradients.Messages(world, torch.device("cpu"), 60)
    assert messages.broadcast({"rank": rank}) == {"rank": 0}
    assert messages.total(torch.tensor([1.0])).item() == world
    assert messages.any(rank == 1)
    assert not messages.any(False)
    dist.destroy_process_group()
    Path(folder, f"done-{rank}").touch()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_two_processes_have_the_same_mean_afterwards(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (2, str(tmp_path)), nprocs=2)
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


SHARED = Pix2Pix(
    levels=4,
    width=2,
    norm="instance",
    discriminator_width=4,
    discriminator_layers=1,
    discriminator_spectral_norm=True,
)


def train_unequal_shares(rank: int, folder: str) -> None:
    """Two steps of one of two workers: of two micro-batches and of one, then of three rows and of none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    weights = LossWeights()
    gan = build_gan(SHARED, InputSpec(), weights=weights, learning_rate=0.01)
    averager = gradients.GradientAverager(2)
    for shares in ((2, 1), (3, 0)):
        images = torch.rand((2, shares[rank], 3, 32, 32), generator=torch.Generator().manual_seed(rank))
        batch = Batch(source=images[0], target=images[1], share=2 * shares[rank] / 3)
        update(gan, batch, weights=weights, average=averager, micro_batch=1)
    torch.save(state_of(gan), Path(folder, f"state-{rank}"))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_workers_of_unequal_shares_have_the_same_networks_with_spectral_norm(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_unequal_shares, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"state-{rank}") for rank in range(2))
    for network in ("generator", "discriminator"):
        assert one[network].keys() == other[network].keys()
        for name, value in one[network].items():
            assert value.equal(other[network][name]), (network, name)


def test_one_worker_exchanges_nothing() -> None:
    messages = gradients.Messages(1, torch.device("cpu"), 60)
    assert messages.broadcast("name") == "name"
    assert messages.total(torch.tensor([1.5])).item() == 1.5
    assert messages.any(True)
    assert not messages.any(False)
