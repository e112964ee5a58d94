"""The GPU path: what a CPU cannot show. Skips, and says so, where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from stages.base import Precision
from stages.models.architecture import InputSpec, LossWeights, Pix2PixHD
from stages.models.fast.process import tune_process
from stages.models.gan import GanState, build_gan
from stages.models.step import Batch
from tests.support.steps import step

pytestmark = pytest.mark.gpu

ARCH = Pix2PixHD(
    enhancers=1,
    width=4,
    downsamplings=2,
    blocks=2,
    enhancer_blocks=1,
    discriminator_width=4,
    discriminators=2,
    feature_encoder=True,
    feature_width=4,
    feature_downsamplings=2,
)
INPUTS = InputSpec(source="labels", classes=5, instances=True)
WEIGHTS = LossWeights()


def build(device: torch.device, precision: Precision = "float32", *, compiled: bool = False) -> GanState:
    tune_process(device)
    return build_gan(
        ARCH, INPUTS, weights=WEIGHTS, precision=precision, device=device, compiled=compiled, ema_decay=0.99
    )


def batch(device: torch.device) -> Batch:
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 1, 32, 32), generator=source, dtype=torch.uint8)
    target = torch.randint(0, 256, (2, 3, 32, 32), generator=source, dtype=torch.uint8)
    return Batch(source=labels, target=target, instance=labels.to(torch.int32)).to(device)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_never_waits_for_the_device(device: torch.device, precision: Precision) -> None:
    gan, pairs = build(device, precision), batch(device)
    step(gan, pairs, weights=WEIGHTS)  # optimizers make their state, cuDNN its choices
    torch.cuda.set_sync_debug_mode("error")
    losses = step(gan, pairs, weights=WEIGHTS)
    flag = torch.stack(list(losses.values())).isfinite().all()
    torch.cuda.set_sync_debug_mode("default")
    assert bool(flag)


def test_float32_products_use_tf32(cuda: torch.device) -> None:
    build(cuda)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_weights_and_gradients_are_channels_last(device: torch.device) -> None:
    gan = build(device)
    for _ in range(2):
        step(gan, batch(device), weights=WEIGHTS)
    for parameter in gan.generator.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
            if parameter.requires_grad:
                state = gan.generator_optimizer.state[parameter]
                assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_bf16_stays_close_to_float32(device: torch.device) -> None:
    exact, rough = (step(build(device, p), batch(device), weights=WEIGHTS) for p in ("float32", "bf16"))
    for name, value in exact.items():
        assert rough[name].item() == pytest.approx(value.item(), rel=0.1, abs=0.05), name


def test_a_compiled_step_gives_the_same_losses_and_compiles_once(cuda: torch.device) -> None:
    plain, compiled = build(cuda), build(cuda, compiled=True)
    pairs = batch(cuda)
    for _ in range(3):
        expected = step(plain, pairs, weights=WEIGHTS)
        losses = step(compiled, pairs, weights=WEIGHTS)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=0.02, abs=0.02), name
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(compiled, pairs, weights=WEIGHTS)


def test_the_cpu_and_the_gpu_agree(device: torch.device) -> None:
    on_gpu = step(build(device), batch(device), weights=WEIGHTS)
    gan = build_gan(ARCH, INPUTS, weights=WEIGHTS)
    on_cpu = step(gan, batch(torch.device("cpu")), weights=WEIGHTS)
    for name, value in on_cpu.items():
        assert on_gpu[name].item() == pytest.approx(value.item(), rel=0.02, abs=0.02), name
