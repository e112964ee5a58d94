"""Everything a training step changes, as one plain state object: built, saved and restored here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.base import Precision
from stages.models.architecture import InputSpec, LossWeights, Parts, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator, trainable_parts
from stages.models.fast.accelerate import accelerate
from stages.models.fast.adam import Adam


@dataclass(slots=True, kw_only=True)
class GanState:
    """Everything a step changes, and what it reads. Nothing else keeps a reference to its members."""

    generator: nn.Module
    generator_optimizer: Adam
    discriminator: nn.Module | None  # None: no loss needs one
    discriminator_optimizer: Adam | None
    encoder: nn.Module | None = None  # trained by the generator's optimizer
    ema: Ema | None = None
    arch: Pix2Pix | Pix2PixHD
    inputs: InputSpec
    perceptual: nn.Module | None = None  # VGG19 up to relu5_1, frozen
    lpips: nn.Module | None = None  # (N,) distances of two images, frozen
    precision: Precision = "float32"


def build_gan(
    arch: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    *,
    weights: LossWeights,
    enhancers: int | None = None,
    discriminators: int | None = None,
    parts: Parts = "all",
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    ema_decay: float | None = None,
    precision: Precision = "float32",
    perceptual: nn.Module | None = None,
    lpips: nn.Module | None = None,
    checkpointing: bool = False,
    compiled: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> GanState:
    """A fresh state for one phase; `grow_generator` and `grow_discriminator` copy the previous phase into it.

    checkpointing   keep only the inputs of the generator's layers and compute the rest again: less memory
    compiled        torch.compile both networks, for GPUs; CPUs are faster without (benchmarks/README.md)

    Raises ValueError if a loss by a network has a weight and no network.
    """
    if (weights.perceptual > 0 and perceptual is None) or (weights.lpips > 0 and lpips is None):
        raise ValueError("the losses perceptual and lpips need their networks")
    in_backward = checkpointing or torch.device(device).type == "cpu"

    def optimizer(weights: list[nn.Parameter]) -> Adam:
        return Adam(weights, lr=learning_rate, betas=betas, in_backward=in_backward)

    generator: nn.Module = build_generator(
        arch, inputs, enhancers=enhancers, seed=seed, checkpointing=checkpointing
    )
    generator = accelerate(generator.to(device), device=device)
    trained = trainable_parts(generator, parts)
    encoder: nn.Module | None = build_encoder(arch, inputs, seed=seed)
    if encoder is not None:
        encoder = accelerate(encoder.to(device), device=device)
        trained += trainable_parts(encoder, "all") if parts == "all" else []
        encoder.requires_grad_(requires_grad=parts == "all")
    discriminator: nn.Module | None = None
    discriminator_optimizer: Adam | None = None
    if weights.uses_discriminator:
        discriminator = build_discriminator(arch, inputs, discriminators=discriminators, seed=seed)
        discriminator = discriminator.to(device)
        if weights.r1 == 0:  # the faster modules' gradients have no gradients
            discriminator = accelerate(discriminator, device=device)
        discriminator_optimizer = optimizer(trainable_parts(discriminator, "all"))
    if compiled:
        generator.compile()
        if discriminator is not None and weights.r1 == 0:  # nor have compiled ones
            discriminator.compile()
    return GanState(
        generator=generator.train(),
        generator_optimizer=optimizer(trained),
        discriminator=discriminator,
        discriminator_optimizer=discriminator_optimizer,
        encoder=encoder,
        ema=None if ema_decay is None else Ema.of(generator, decay=ema_decay),
        arch=arch,
        inputs=inputs,
        perceptual=perceptual,
        lpips=lpips,
        precision=precision,
    )


# -- the moving average of weights ---------------------------------------------


@dataclass(slots=True, kw_only=True)
class Ema:
    """The exponential moving average of a network's weights, and the number of its updates.

    Averaged weights usually give better images (Yazici et al. 2018). Both are saved; the averaged ones are
    evaluated.

    network   the averaged one, frozen, in evaluation mode
    """

    network: nn.Module
    decay: float
    updates: int = 0

    @classmethod
    def of(cls, network: nn.Module, *, decay: float) -> Ema:
        """Start from a copy of the network."""
        average = copy.deepcopy(network).eval()
        average.requires_grad_(requires_grad=False)
        return cls(network=average, decay=decay)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """average += (1 - decay) * (network - average), for trained parameters; buffers are copied.

        Early on the decay is (1 + n) / (10 + n): the average forgets where it started.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [pair for pair in pairs if pair[1].requires_grad]
        if trained:
            averages, weights = zip(*trained, strict=True)
            torch._foreach_lerp_(averages, weights, 1 - decay)
        if buffers := list(network.buffers()):
            torch._foreach_copy_(list(self.network.buffers()), buffers)
        self.updates += 1


# -- learning rates -----------------------------------------------------------


def learning_rate_at(epoch: float, *, rate: float, epochs: int, decay_epochs: int) -> float:
    """Constant for `epochs`, then linear to 0 over `decay_epochs` (0: no decay). Epochs count from 0."""
    if decay_epochs == 0 or epoch <= epochs:
        return rate
    return rate * max(0.0, 1 - (epoch - epochs) / decay_epochs)


def set_learning_rate(gan: GanState, rate: float) -> None:
    """Set the rate of both optimizers from the next step on."""
    for optimizer in (gan.generator_optimizer, gan.discriminator_optimizer):
        if optimizer is not None:
            optimizer.set_rate(rate)


# -- checkpoints --------------------------------------------------------------


def state_of(gan: GanState) -> dict[str, Any]:
    """All that resuming needs, as nested dicts of tensors and numbers (references, not copies)."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in _parts(gan).items()}
    return state if gan.ema is None else state | {"ema_updates": gan.ema.updates}


def load_state(gan: GanState, state: Mapping[str, Any]) -> None:
    """Restore what `state_of` returned, into a state that was built with the same arguments."""
    for name, part in _parts(gan).items():
        part.load_state_dict(state[name])
    if gan.ema is not None:
        gan.ema.updates = state["ema_updates"]


def _parts(gan: GanState) -> dict[str, nn.Module | Adam]:
    """What has a state, by its name in checkpoints."""
    parts: dict[str, nn.Module | Adam | None] = {
        "generator": gan.generator,
        "generator_optimizer": gan.generator_optimizer,
        "discriminator": gan.discriminator,
        "discriminator_optimizer": gan.discriminator_optimizer,
        "encoder": gan.encoder,
        "ema": None if gan.ema is None else gan.ema.network,
    }
    return {name: part for name, part in parts.items() if part is not None}
