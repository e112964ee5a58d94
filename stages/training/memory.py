"""How much memory a training worker of a phase will need, before anything is started.

The networks are built without memory (torch's meta device) and run on images without pixels; what autograd
keeps of that is counted. Not counted: the workspace of convolutions and what the allocator loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.config.train import PhaseJob, discriminators, full_size, phase_size
from stages.models.architecture import InputSpec, Parts, Pix2PixHD, discriminator_channels, generator_channels
from stages.models.build import build_discriminator, build_encoder, build_generator, trainable_parts
from stages.shards.dataset import DatasetSpec
from stages.training import phases

FLOAT = 4  # bytes
SLACK = 1.2


@dataclass
class _Kept:
    """Bytes that autograd keeps for the backward pass, each block of memory once."""

    bytes_: int = 0
    _seen: set[int] = field(default_factory=set)
    _alive: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor) -> Tensor:
        block = tensor.untyped_storage()
        if block._cdata not in self._seen:
            self._seen.add(block._cdata)
            self._alive.append(tensor)  # so that no other block gets the same address
            self.bytes_ += block.nbytes()
        return tensor


@contextmanager
def _counting() -> Iterator[_Kept]:
    kept = _Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


def estimate_memory(job: PhaseJob, spec: DatasetSpec, *, workers: int = 1, at_once: int | None = None) -> int:
    """Bytes one worker needs for a step of this phase, all told. `at_once`: `resources.micro_batch`."""
    inputs = phases.input_spec(spec)
    width, height = phase_size(job.model, job.phase, full_size(spec.size, job.augment))
    rows = -(-job.phase.batch // workers)
    rows = rows if at_once is None else min(rows, at_once)
    layered = isinstance(job.model, Pix2PixHD)
    with torch.device("meta"):
        generator: nn.Module = build_generator(
            job.model, inputs, enhancers=job.phase.enhancers if layered else None
        )
        encoder = build_encoder(job.model, inputs)
        discriminator: nn.Module = build_discriminator(
            job.model,
            inputs,
            discriminators=discriminators(job.model, job.phase) if layered else None,
        )
    networks = _states(generator, job.phase.parts, job.ema is not None)
    activations = _activations(job, inputs, generator, discriminator, (rows, height, width))
    if encoder is not None:
        networks += _states(encoder, "all", False)
    if job.losses.uses_discriminator:
        networks += _states(discriminator, "all", False)
    return int(SLACK * (networks + activations))


def _states(network: nn.Module, parts: Parts, averaged: bool) -> int:
    """Weights; of what is trained also the gradient and Adam's two moments; a copy for the average."""
    trained = sum(parameter.numel() for parameter in trainable_parts(network, parts))
    weights = sum(parameter.numel() for parameter in network.parameters())
    return FLOAT * (weights * (2 if averaged else 1) + 3 * trained)


def _activations(
    job: PhaseJob,
    inputs: InputSpec,
    generator: nn.Module,
    discriminator: nn.Module,
    shape: tuple[int, int, int],
) -> int:
    """What is kept between forward and backward: the generator's, and both passes of the discriminator."""
    rows, height, width = shape
    share = 0.55 if job.precision == "bf16" else 1.0  # float32 if it is left open: the more of the two

    def images(channels: int) -> Tensor:
        return torch.empty(rows, channels, height, width, device="meta")

    condition = images(generator_channels(job.model, inputs))
    with _counting() as drawn:
        generator(condition)
    kept = share * drawn.bytes_
    if job.losses.uses_discriminator:
        with _counting() as judged:
            discriminator(images(discriminator_channels(job.model, inputs)).requires_grad_())
        kept += share * 2 * judged.bytes_
    if job.losses.perceptual > 0:
        kept += share * 2 * FLOAT * rows * height * width * 64 * 4  # relu1_1 .. relu5_1, about 4 x the first
    return int(kept + FLOAT * (condition.numel() + 4 * images(inputs.target_channels).numel()))
