"""Floating-point operations of a training step and of a generated image, counted and not timed.

They are counted on the meta device, which computes shapes only. A multiply-add counts as two. Only products
and convolutions are counted, by torch's `FlopCounterMode`, as nearly all of a network's time is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.config.train import PhaseJob
from stages.models.architecture import Pix2PixHD, discriminator_channels, generator_channels
from stages.models.build import trainable_parts
from stages.shards.dataset import DatasetSpec
from stages.training.memory import networks_without_memory

VGG_PER_PIXEL = 7.2e5
"""Of a forward pass of VGG19 up to relu5_1: the sum of its 13 convolutions."""


def step_operations(job: PhaseJob, spec: DatasetSpec) -> float:
    """Operations of a training step for each pair."""
    width, height = job.size(spec.size)
    inputs = spec.inputs()
    generator, encoder, discriminator = networks_without_memory(job, inputs)

    def images(channels: int, *, gradient: bool = False) -> Tensor:
        return torch.empty(1, channels, height, width, device="meta", requires_grad=gradient)

    trainable_parts(generator, job.phase.parts)
    total = _operations(generator, images(generator_channels(job.model, inputs)))
    if encoder is not None:
        encoder.requires_grad_(job.phase.parts == "all")
        total += _operations(encoder.get_submodule("features"), images(inputs.target_channels))
    if job.losses.uses_discriminator:
        channels = discriminator_channels(job.model, inputs)
        real, fake = images(channels), images(channels, gradient=True)
        total += _operations(discriminator, real) + _operations(discriminator, fake)
        # The generator's own pass back; Pix2Pix runs the updated discriminator again, also for features.
        of_fake = _operations(discriminator.requires_grad_(False), fake)
        again = -1 if isinstance(job.model, Pix2PixHD) else int(job.losses.feature_matching > 0)
        total += of_fake + again * _forward(discriminator, fake)
    if job.losses.perceptual > 0:
        total += 3 * VGG_PER_PIXEL * height * width
    return total


def image_operations(job: PhaseJob, spec: DatasetSpec, size: tuple[int, int]) -> float:
    """Operations of one generated image of a size."""
    inputs = spec.inputs()
    generator, _, _ = networks_without_memory(job, inputs)
    channels = generator_channels(job.model, inputs)
    return _forward(generator, torch.empty(1, channels, size[1], size[0], device="meta"))


def _forward(network: nn.Module, x: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return float(counter.get_total_flops())


def _operations(network: nn.Module, x: Tensor) -> float:
    """Operations of a forward and a backward pass to whatever requires a gradient."""
    with FlopCounterMode(display=False) as counter:
        outputs = network(x)
        tensors = _tensors(outputs)
        if any(tensor.requires_grad for tensor in tensors):
            torch.autograd.backward(tensors, [torch.empty_like(tensor) for tensor in tensors])
    return float(counter.get_total_flops())


def _tensors(outputs: Tensor | list[Tensor] | list[list[Tensor]]) -> list[Tensor]:
    """What a network returns, as a flat list: discriminators return the features of each scale."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for inner in outputs for tensor in _tensors(inner)]
