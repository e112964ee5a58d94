"""Averages over NCCL, with the one rank that one GPU allows: calls, dtypes and layouts are those of many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD, paper_weights
from stages.models.fast.process import tune_process
from stages.models.gan import build_gan
from stages.models.layers import BatchNorm, synchronise_batch_norms
from stages.models.step import Batch
from stages.training.gradients import Exchange, GradientAverager, Messages, new_group
from tests.support.steps import step

pytestmark = pytest.mark.gpu

NCCL = "nccl"
SEVERAL = 2  # workers that the code is to expect, so that it exchanges


@pytest.fixture
def group(cuda: torch.device, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    torch.cuda.set_device(cuda)
    dist.init_process_group(NCCL, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield new_group(cuda, 60)
    dist.destroy_process_group()


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_means_keep_values_layout_and_memory(
    device: torch.device, group: dist.ProcessGroup, wire: torch.dtype | None
) -> None:
    weight = nn.Parameter(
        torch.zeros(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    )
    bias = nn.Parameter(torch.zeros(3, device=device))
    exchange = Exchange([weight, bias], wire=wire, group=group)
    values = torch.arange(120.0, device=device).view(2, 3, 4, 5)
    addresses = set()
    for _ in range(2):
        means = exchange.start(during_backward=True)
        ((weight * values).sum() + bias.sum()).backward()
        assert sum(len(parameters) for parameters in means) == 2
        assert weight.grad is not None
        assert bias.grad is not None
        assert weight.grad.equal(values)
        assert bias.grad.tolist() == [1.0] * 3
        assert weight.grad.stride() == weight.stride()
        if wire is None:
            addresses.add(weight.grad.data_ptr())
        weight.grad = bias.grad = None
    assert len(addresses) <= 1


def test_messages_have_their_own_group(device: torch.device, group: dist.ProcessGroup) -> None:
    messages = Messages(SEVERAL, device, 60)
    assert messages.broadcast({"step": 3}) == {"step": 3}
    assert messages.any(True)
    assert not messages.any(False)
    assert messages.total(torch.ones(2, device=device)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "arch", [Pix2Pix(levels=5, width=8), Pix2PixHD(width=8, enhancers=0, blocks=1)], ids=str
)
def test_a_step_with_an_exchange_is_one_without(
    device: torch.device, group: dist.ProcessGroup, arch: Pix2Pix | Pix2PixHD
) -> None:
    tune_process(device)
    pairs = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device=device)
    results = []
    for averager in (None, GradientAverager(SEVERAL, group=group)):
        gan = build_gan(arch, InputSpec(), weights=paper_weights(arch), device=device)
        for _ in range(3):
            torch.manual_seed(0)
            losses = step(
                gan, Batch(source=pairs, target=pairs), weights=paper_weights(arch), average=averager
            )
        results.append(losses)
    for name, value in results[0].items():
        assert results[1][name].item() == pytest.approx(value.item(), rel=0.01, abs=0.01), name


def test_synchronised_norms_of_one_worker_are_batch_norms(
    device: torch.device, group: dist.ProcessGroup
) -> None:
    messages = Messages(SEVERAL, device, 60)
    images = torch.randn(4, 8, 16, 16, device=device)
    outputs, gradients = [], []
    for synchronised in (False, True):
        network = nn.Sequential(BatchNorm(8).to(device)).train()
        if synchronised:
            synchronise_batch_norms(network, messages.total_with_gradient)
        leaf = images.clone().requires_grad_()
        output = network(leaf)
        output.square().mul(torch.linspace(0, 1, 16, device=device)).sum().backward()
        outputs.append(output.detach())
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
