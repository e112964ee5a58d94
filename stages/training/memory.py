"""How much memory the steps of a phase will take in a training worker, estimated before anything starts.

The networks are built without memory (torch's meta device) and run on images without pixels; the tensors that
autograd saves are counted. `SLACK` stands for the workspace of convolutions and the allocator's losses. Not
counted: the process itself, read-ahead, and the copy of a checkpoint on its way to the store, which takes the
machine's memory (three times the weights), not the GPU's. What is assumed of GPUs was never measured;
`benchmarks.gpu_check` measures the peak of a step.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from stages.base import Resources
from stages.config.train import PhaseJob, discriminators
from stages.errors import one_line
from stages.models.architecture import InputSpec, Parts, Pix2PixHD, discriminator_channels, generator_channels
from stages.models.build import build_discriminator, build_encoder, build_generator, trainable_parts
from stages.models.pix2pixhd import CoarseToFineGenerator, ConvNormReLU, FeatureEncoder, Head, ResidualBlock
from stages.shards.dataset import DatasetSpec

FLOAT = 4  # bytes
SLACK = 1.2
GPU_BYTES = 1.6e9  # CUDA's context and libraries, and the workspace of convolutions: assumed

OUT_OF_MEMORY = re.compile(
    "out of memory|OutOfMemory|ALLOC_FAILED|cudaErrorMemoryAllocation|allocate memory|low on memory", re.I
)
"""In the texts of CUDA, cuDNN, cuBLAS, NCCL, Triton, torch's allocator for CPUs, and Ray."""


def advice(job: PhaseJob) -> str:
    """What to change for a step that needs less memory."""
    size = "resources.micro_batch" if job.phase.batch > 1 else "shard.size or augment.crop"
    changes = [f"lower {size} or train.model.width"]
    if isinstance(job.model, Pix2PixHD):
        changes.append("set resources.checkpointing: true")
    if job.precision == "float32":
        changes.append("set train.precision: bf16")
    return ", or ".join(changes)


def out_of_memory(error: BaseException, job: PhaseJob) -> str:
    """What to change if an error says that memory did not suffice; else ""."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not OUT_OF_MEMORY.search(str(error)):
        return ""
    return f"out of memory ({one_line(error, limit=160)}); {advice(job)}"


def shortage(needed: int, available: int, job: PhaseJob) -> str:
    """A warning if a step needs more memory than a GPU has; "" if it does not. Both in bytes."""
    if needed <= available:
        return ""
    return (
        f"a step of '{job.phase.name}' is expected to need {needed / 1e9:.1f} GB, the GPU has "
        f"{available / 1e9:.1f} GB; if memory does not suffice, {advice(job)}"
    )


def estimate_memory(
    job: PhaseJob,
    spec: DatasetSpec,
    resources: Resources,
    *,
    workers: int = 1,
    gpu: bool = False,
) -> int:
    """Bytes that each of so many workers needs for a step of this phase.

    On a GPU an open precision is bf16, of which autocast keeps a copy of the weights.
    """
    bf16 = job.precision == "bf16" or (gpu and job.precision is None)
    inputs = spec.inputs()
    width, height = job.size(spec.size)
    rows = -(-job.phase.batch // workers)
    rows = min(rows, resources.micro_batch or rows)
    generator, encoder, discriminator = networks_without_memory(job, inputs, resources.checkpointing)
    networks = _states(generator, job.phase.parts, job.ema is not None)
    activations = _activations(job, inputs, generator, discriminator, (rows, height, width), bf16=bf16)
    if encoder is not None:
        networks += _states(encoder, "all", False)
    if job.losses.uses_discriminator:
        networks += _states(discriminator, "all", False)
    if gpu and bf16:
        networks += FLOAT // 2 * sum(p.numel() for n in (generator, discriminator) for p in n.parameters())
    return int(SLACK * (networks + activations) + gpu * GPU_BYTES)


def _saved_by(network: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves for the backward pass, each block of memory once."""
    saved: dict[int, Tensor] = {}  # by address; kept, so that no other block gets the same one

    def save(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        network(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def networks_without_memory(
    job: PhaseJob, inputs: InputSpec, checkpointing: bool = False
) -> tuple[nn.Module, FeatureEncoder | None, nn.Module]:
    """Generator, encoder and discriminator of a phase on the meta device, which computes shapes only."""
    model, phase = job.model, job.phase
    with torch.device("meta"):
        return (
            build_generator(model, inputs, enhancers=phase.enhancers, checkpointing=checkpointing),
            build_encoder(model, inputs),
            build_discriminator(model, inputs, discriminators=discriminators(model, phase)),
        )


def _states(network: nn.Module, parts: Parts, averaged: bool) -> int:
    """Weights; of those that are trained also the gradient and Adam's two moments; a copy for the average."""
    trained = sum(parameter.numel() for parameter in trainable_parts(network, parts))
    weights = sum(parameter.numel() for parameter in network.parameters())
    return FLOAT * (weights * (2 if averaged else 1) + 3 * trained)


def _activations(
    job: PhaseJob,
    inputs: InputSpec,
    generator: nn.Module,
    discriminator: nn.Module,
    shape: tuple[int, int, int],
    *,
    bf16: bool,
) -> int:
    """Tensors saved between forward and backward: the generator's, and both passes of the discriminator's.

    With checkpointing the generator's are its layers' inputs, and what the largest layer saves when it is
    computed again; by then those of the discriminator are gone.
    """
    rows, height, width = shape
    share = 0.55 if bf16 else 1.0  # some values stay float32

    def images(channels: int) -> Tensor:
        return torch.empty(rows, channels, height, width, device="meta")

    condition = images(generator_channels(job.model, inputs))
    layers = list[tuple[nn.Module, Tensor]]()
    for module in generator.modules():
        if isinstance(module, ConvNormReLU | ResidualBlock | Head):
            module.register_forward_pre_hook(lambda layer, args: layers.append((layer, args[0])))
    total, largest = share * _saved_by(generator, condition), 0
    if isinstance(generator, CoarseToFineGenerator) and generator.checkpointing:
        largest = max(_saved_by(layer, x.detach().requires_grad_()) for layer, x in tuple(layers))
    judged = 0
    if job.losses.uses_discriminator:
        judged = 2 * _saved_by(
            discriminator, images(discriminator_channels(job.model, inputs)).requires_grad_()
        )
    total += share * max(judged, largest)
    if job.losses.perceptual > 0:
        total += share * 2 * FLOAT * rows * height * width * 64 * 4  # relu1_1 .. relu5_1, about 4 x the first
    return int(total + FLOAT * (condition.numel() + 4 * images(inputs.target_channels).numel()))
