"""One training step: a batch in, both networks updated, named losses out. It knows nothing of distribution.

pix2pixHD   one forward pass feeds both updates: both losses use the weights from before the step
pix2pix     the discriminator steps first, the generator then faces the updated one

What the published step computes for nothing is left out, with the same maths:
- the fake is judged once for both updates, not once for each;
- no weight gradients of the discriminator in the generator's backward pass;
- no graph through frozen parts;
- the discriminator's graph of the real image is gone before the generator's is made.

With several workers, a step can leave the generator's last means to arrive while pix2pixHD's next one judges
its real images, for which it needs only the discriminator: no worker waits for one that is a little behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stages.base import Precision
from stages.models.architecture import InputSpec, Parts, Pix2Pix, Pix2PixHD, uses_edges
from stages.models.build import build_discriminator, build_encoder, build_generator, trainable_parts
from stages.models.ema import Ema
from stages.models.fast.adam import Adam
from stages.models.inputs import instance_edges, one_hot
from stages.models.losses import (
    PERCEPTUAL_LAYERS,
    Features,
    discriminator_losses,
    feature_matching_losses,
    generator_gan_loss,
    mean_difference,
    perceptual_losses,
)
from stages.models.objective import LossWeights
from stages.models.pix2pixhd import MultiScaleDiscriminator

Arriving = Callable[[], Iterable[Sequence[nn.Parameter]]]
"""Called once, when the gradients are made. Of what it returns, each waits for means of gradients, and gives
parameters whose means are there."""


class Average(Protocol):
    """Replaces gradients by their mean over the workers, while something else is computed."""

    def __call__(self, parameters: Sequence[nn.Parameter], *, coming: bool) -> Arriving:
        """Begin; called once a network and step. `coming`: a backward pass is about to make the gradients."""
        ...


@dataclass(slots=True, kw_only=True)
class Batch:
    """Pairs of one worker. Images may be uint8 (N, C, H, W) for cheap transfers, or float32 in [-1, 1].

    source   (N, C, H, W) image, or (N, 1, H, W) integer class ids for a labels source
    target   (N, C, H, W)
    instance (N, 1, H, W) integer ids, or None
    label    (N, 1, H, W) class ids for evaluation, or None; a step does not read them
    share    workers * N / (rows of this step over all workers): a worker whose batch is short, or empty,
             counts for as much as it has, and the mean of the gradients is the mean over rows
    """

    source: Tensor
    target: Tensor
    instance: Tensor | None = None
    label: Tensor | None = None
    keys: Sequence[str] = ()
    share: float = 1.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            source=self.source.to(device, non_blocking=non_blocking),
            target=self.target.to(device, non_blocking=non_blocking),
            instance=move(self.instance),
            label=move(self.label),
        )

    def split(self, rows: int) -> list[Batch]:
        """The same pairs in parts of at most `rows`, each counting for as much as it has."""
        count = self.source.shape[0]
        if count <= rows:
            return [self]
        return [
            replace(
                self,
                source=self.source[start : start + rows],
                target=self.target[start : start + rows],
                instance=None if self.instance is None else self.instance[start : start + rows],
                label=None if self.label is None else self.label[start : start + rows],
                keys=self.keys[start : start + rows],
                share=self.share * min(rows, count - start) / count,
            )
            for start in range(0, count, rows)
        ]


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
    precision: Precision = "float32"
    unsettled: Callable[[], None] | None = None  # the generator's update, where a step left it to `settle`


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
    checkpointing: bool = False,
    compiled: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> GanState:
    """A fresh translator for one phase; `grow_generator` and `grow_discriminator` put in the phase before.

    checkpointing   keep only the inputs of the generator's layers and compute the rest again: less memory
    compiled        torch.compile both networks, for GPUs; CPUs are faster without (benchmarks/README.md)

    Raises ValueError where the perceptual loss has no network.
    """
    if weights.perceptual > 0 and perceptual is None:
        raise ValueError("the perceptual loss needs VGG19 weights")
    generator = _placed(build_generator(arch, inputs, enhancers=enhancers, seed=seed), device)
    encoder = build_encoder(arch, inputs, seed=seed)
    trained = trainable_parts(generator, parts)
    if not isinstance(arch, Pix2Pix):
        generator.checkpointing = checkpointing
    if encoder is not None:
        trained += trainable_parts(_placed(encoder, device), "all") if parts == "all" else []
        encoder.requires_grad_(requires_grad=parts == "all")
    discriminator: nn.Module | None = None
    discriminator_optimizer: Adam | None = None
    if weights.uses_discriminator:
        discriminator = _placed(
            build_discriminator(arch, inputs, discriminators=discriminators, seed=seed), device
        )
        discriminator_optimizer = Adam(trainable_parts(discriminator, "all"), lr=learning_rate, betas=betas)
    if compiled:
        generator.compile()
        if discriminator is not None:
            discriminator.compile()
    return GanState(
        generator=generator.train(),
        generator_optimizer=Adam(trained, lr=learning_rate, betas=betas),
        discriminator=discriminator,
        discriminator_optimizer=discriminator_optimizer,
        encoder=encoder,
        ema=None if ema_decay is None else Ema.of(generator, decay=ema_decay),
        arch=arch,
        inputs=inputs,
        perceptual=perceptual,
        precision=precision,
    )


Network = TypeVar("Network", bound=nn.Module)


def _placed(network: Network, device: torch.device | str) -> Network:
    """On the device, channels last: the faster layout on CPUs and GPUs alike (benchmarks/README.md)."""
    network.to(device)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def learning_rate_at(epoch: float, *, rate: float, epochs: int, decay_epochs: int) -> float:
    """Constant for `epochs`, then linear to 0 over `decay_epochs` (0: no decay). Epochs count from 0."""
    if decay_epochs == 0 or epoch <= epochs:
        return rate
    return rate * max(0.0, 1 - (epoch - epochs) / decay_epochs)


def set_learning_rate(gan: GanState, rate: float) -> None:
    """Of both optimizers, from the next step on."""
    for optimizer in (gan.generator_optimizer, gan.discriminator_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = rate


def learning_rates(gan: GanState) -> dict[str, float]:
    """The rates the optimizers will really use."""
    rates = {"generator": float(gan.generator_optimizer.param_groups[0]["lr"])}
    if gan.discriminator_optimizer is not None:
        rates["discriminator"] = float(gan.discriminator_optimizer.param_groups[0]["lr"])
    return rates


# -- state --------------------------------------------------------------------


def state_of(gan: GanState) -> dict[str, Any]:
    """All that resuming needs, as nested dicts of tensors and numbers (references, not copies)."""
    assert gan.unsettled is None, "an update is on its way"
    state: dict[str, Any] = {
        "generator": gan.generator.state_dict(),
        "generator_optimizer": gan.generator_optimizer.state_dict(),
    }
    if gan.discriminator is not None and gan.discriminator_optimizer is not None:
        state["discriminator"] = gan.discriminator.state_dict()
        state["discriminator_optimizer"] = gan.discriminator_optimizer.state_dict()
    if gan.encoder is not None:
        state["encoder"] = gan.encoder.state_dict()
    if gan.ema is not None:
        state["ema"] = gan.ema.network.state_dict()
        state["ema_updates"] = gan.ema.updates
    return state


def load_state(gan: GanState, state: Mapping[str, Any]) -> None:
    """Put back what `state_of` gave for a translator built the same way."""
    gan.generator.load_state_dict(state["generator"])
    gan.generator_optimizer.load_state_dict(state["generator_optimizer"])
    if gan.discriminator is not None and gan.discriminator_optimizer is not None:
        gan.discriminator.load_state_dict(state["discriminator"])
        gan.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
    if gan.encoder is not None:
        gan.encoder.load_state_dict(state["encoder"])
    if gan.ema is not None:
        gan.ema.network.load_state_dict(state["ema"])
        gan.ema.updates = state["ema_updates"]


# -- inputs -------------------------------------------------------------------


def unit_range(image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [0, 255] -> [-1, 1]; floating images are in that range already."""
    return image.to(dtype) if image.is_floating_point() else image.to(dtype) / 127.5 - 1


def make_condition(
    source: Tensor,
    instance: Tensor | None,
    *,
    arch: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the networks see of the source: (N, condition_channels, H, W), one-hot labels then edges."""
    if inputs.source == "labels":
        assert inputs.classes is not None
        condition = one_hot(source, inputs.classes, dtype)
    else:
        condition = unit_range(source, dtype)
    if uses_edges(arch, inputs):
        assert instance is not None, "the input spec says that pairs carry instances"
        condition = torch.cat([condition, instance_edges(instance, dtype)], 1)
    return condition


# -- the step -----------------------------------------------------------------


def step(
    gan: GanState,
    batch: Batch,
    *,
    weights: LossWeights,
    average: Average | None = None,
    at_once: int | None = None,
    leave: bool = False,
) -> dict[str, Tensor]:
    """One update of both networks. Returns named, detached losses, each as it enters the sum.

    Never waits for the device. The caller looks at `all_finite(losses)` as often as it can afford to. A batch
    without rows (a worker beyond the end of the data) takes part with zero gradients.

    at_once   pairs that are in memory at a time: a larger batch is done in turns whose gradients add up. The
              same update but for batch norm and dropout, which then see the turns' pairs apart
    leave     with `average`: leave the generator's update to the next step, or to `settle`
    """
    if batch.source.shape[0] == 0:
        settle(gan)
        _empty_step(gan, average)
        return {}
    if at_once is not None and batch.source.shape[0] > at_once:
        settle(gan)
        losses = _step_in_turns(gan, batch.split(at_once), weights, average)
    else:
        losses = _step_at_once(gan, batch, weights, average)
    if not leave:
        settle(gan)
    return losses


def settle(gan: GanState) -> None:
    """Make the generator's update that a step has left."""
    if gan.unsettled is not None:
        gan.unsettled()
        gan.unsettled = None


def _step_at_once(
    gan: GanState, batch: Batch, weights: LossWeights, average: Average | None
) -> dict[str, Tensor]:
    condition, target = _inputs(gan, batch)
    losses: dict[str, Tensor] = {}
    layered = isinstance(gan.arch, Pix2PixHD)
    with _autocast(gan.precision, target.device):
        conditions = _conditions(gan, condition)
        judge = partial(_judge_to_train, gan, conditions, share=batch.share, weights=weights, losses=losses)
        if layered:
            real_features = judge(target, real=True)
    settle(gan)
    with _autocast(gan.precision, target.device):
        generated = _generate(gan, condition, target, batch.instance)
        fake = generated.detach().requires_grad_()  # the losses end here; the generator's graph starts here
        if layered:
            fake_features = judge(fake, real=False, keep_graph=True)
        else:  # batch norm's running statistics remember the order: the fake first, as published
            judge(fake.detach(), real=False)
            real_features = judge(target, real=True)
            _step_discriminator(gan, average)
            fake_features = _judge_frozen(gan, conditions, fake)
        loss = _generator_loss(gan, fake_features, real_features, fake, target, weights, losses)
    (fake_gradient,) = torch.autograd.grad(loss * batch.share, fake)
    _finish(gan, generated, fake_gradient, average)
    return {name: value.detach() for name, value in losses.items()}


def _inputs(gan: GanState, batch: Batch) -> tuple[Tensor, Tensor]:
    """Condition and target as the networks see them."""
    dtype = next(gan.generator.parameters()).dtype
    target = unit_range(batch.target, dtype)
    condition = make_condition(batch.source, batch.instance, arch=gan.arch, inputs=gan.inputs, dtype=dtype)
    condition = condition.contiguous(memory_format=torch.channels_last)
    return condition, target.contiguous(memory_format=torch.channels_last)


def _step_in_turns(
    gan: GanState, parts: Sequence[Batch], weights: LossWeights, average: Average | None
) -> dict[str, Tensor]:
    """The same step over parts of a batch, with the memory of one part.

    pix2pix's discriminator steps before the generator is judged, so its generator runs twice: its graphs of
    all parts would be what the turns are to save.
    """
    seed, layered = torch.initial_seed(), isinstance(gan.arch, Pix2PixHD)
    total: dict[str, Tensor] = {}
    whole = sum(part.share for part in parts)

    def generated(index: int, condition: Tensor, target: Tensor) -> Tensor:
        torch.manual_seed(seed + index)  # the same dropout whenever this part is generated
        with _autocast(gan.precision, target.device):
            return _generate(gan, condition, target, parts[index].instance)

    def count(losses: Mapping[str, Tensor], part: Batch) -> None:
        for name, value in losses.items():
            held = value.detach() * (part.share / whole)
            total[name] = total[name] + held if name in total else held

    real_features: list[Features] = [[] for _ in parts]
    if not layered and gan.discriminator is not None:
        buffers = [buffer.clone() for buffer in gan.generator.buffers()]
        for index, part in enumerate(parts):
            condition, target = _inputs(gan, part)
            losses: dict[str, Tensor] = {}
            with torch.no_grad():
                fake = generated(index, condition, target)
            with _autocast(gan.precision, target.device):
                conditions = _conditions(gan, condition)
                judge = partial(
                    _judge_to_train, gan, conditions, share=part.share, weights=weights, losses=losses
                )
                judge(fake, real=False)
                real_features[index] = judge(target, real=True)
            count(losses, part)
        for buffer, before in zip(gan.generator.buffers(), buffers, strict=True):
            buffer.copy_(before)  # running statistics count each picture once
        _step_discriminator(gan, average)
    for index, part in enumerate(parts):
        condition, target = _inputs(gan, part)
        losses = {}
        with _autocast(gan.precision, target.device):
            conditions = _conditions(gan, condition)
            judge = partial(
                _judge_to_train, gan, conditions, share=part.share, weights=weights, losses=losses
            )
            real = judge(target, real=True) if layered else real_features[index]
        image = generated(index, condition, target)
        fake = image.detach().requires_grad_()
        with _autocast(gan.precision, target.device):
            if layered:
                fake_features = judge(fake, real=False, keep_graph=True)
            else:
                fake_features = _judge_frozen(gan, conditions, fake)
            loss = _generator_loss(gan, fake_features, real, fake, target, weights, losses)
        (fake_gradient,) = torch.autograd.grad(loss * part.share, fake)
        if index < len(parts) - 1:
            torch.autograd.backward(image, fake_gradient)
        else:
            _finish(gan, image, fake_gradient, average)
        count(losses, part)
    return total


def _finish(gan: GanState, generated: Tensor, gradient: Tensor, average: Average | None) -> None:
    """The last backward pass of a step, and the updates that wait for it; with `average`, see `settle`."""
    # pix2pixHD's discriminator is not updated before: the fake's gradient went through its weights from
    # before the step, and a fused optimizer changes them without autograd noticing.
    left = gan.discriminator_optimizer if isinstance(gan.arch, Pix2PixHD) else None
    if average is None:
        if left is not None:
            _update(left)
        with gan.generator_optimizer.stepping_in_backward():
            torch.autograd.backward(generated, gradient)
        if gan.ema is not None:
            gan.ema.update(gan.generator)
        return
    left_arriving = None if left is None else _averaging(left, average)
    arriving = _averaging(gan.generator_optimizer, average, coming=True)
    torch.autograd.backward(generated, gradient)
    if left is not None:
        _update(left, left_arriving)
    means = arriving()
    rate = learning_rates(gan)["generator"]  # the caller may set the next step's before

    def update() -> None:
        for parameters in means:
            gan.generator_optimizer.update(parameters, rate)
        if gan.ema is not None:
            gan.ema.update(gan.generator)

    gan.unsettled = update


def all_finite(losses: Mapping[str, Tensor]) -> Tensor:
    """A boolean on the losses' device: reading it waits, so on a GPU do that every few steps."""
    return torch.stack([value.float() for value in losses.values()]).isfinite().all()


def _autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _generate(gan: GanState, condition: Tensor, target: Tensor, instance: Tensor | None) -> Tensor:
    if gan.encoder is not None:
        assert instance is not None
        condition = torch.cat([condition, gan.encoder(target, instance)], 1)
    image: Tensor = gan.generator(condition)
    return image


def _judge(gan: GanState, conditions: Sequence[Tensor] | None, image: Tensor) -> Features:
    """The discriminator's features per scale; a single PatchGAN is one scale."""
    assert gan.discriminator is not None
    if isinstance(gan.discriminator, MultiScaleDiscriminator):
        several: Features = gan.discriminator(image, conditions)
        return several
    return [gan.discriminator(image if conditions is None else torch.cat([conditions[0], image], 1))]


def _conditions(gan: GanState, condition: Tensor) -> list[Tensor] | None:
    """What the discriminator sees of the condition, per scale; None: it judges the image alone."""
    if not gan.arch.conditional or gan.discriminator is None:
        return None
    if isinstance(gan.discriminator, MultiScaleDiscriminator):
        return gan.discriminator.pyramid(condition)
    return [condition]


def _judge_to_train(
    gan: GanState,
    conditions: Sequence[Tensor] | None,
    image: Tensor,
    share: float,
    weights: LossWeights,
    losses: dict[str, Tensor],
    *,
    real: bool,
    keep_graph: bool = False,
) -> Features:
    """An image kind's part of the discriminator's gradients; its features, if a loss uses them.

    keep_graph   leave the features their graph, for the generator's loss; else they are detached
    """
    if gan.discriminator is None:
        return []
    features = _judge(gan, conditions, image)
    loss = discriminator_losses(features, weights.gan, real=real)
    total = torch.stack(loss).sum() * (0.5 * share)
    torch.autograd.backward(total, inputs=_trained(gan.discriminator), retain_graph=keep_graph)
    _note(losses, "discriminator/real" if real else "discriminator/fake", loss)
    if keep_graph:
        return features
    if weights.feature_matching == 0:
        return []  # nothing compares them
    return [[feature.detach() for feature in scale] for scale in features]


def _step_discriminator(gan: GanState, average: Average | None) -> None:
    optimizer = gan.discriminator_optimizer
    if optimizer is not None:
        _update(optimizer, None if average is None else _averaging(optimizer, average))


def _judge_frozen(gan: GanState, conditions: Sequence[Tensor] | None, fake: Tensor) -> Features:
    """Features of the fake, with a graph that ends at the fake."""
    if gan.discriminator is None:
        return []
    with _frozen(gan.discriminator):
        return _judge(gan, conditions, fake)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _generator_loss(
    gan: GanState,
    fake_features: Features,
    real_features: Features,
    fake: Tensor,
    target: Tensor,
    weights: LossWeights,
    losses: dict[str, Tensor],
) -> Tensor:
    """The weighted sum the generator minimises; its parts go into `losses`. No features: no such loss."""
    total = fake.new_zeros((), dtype=torch.promote_types(fake.dtype, torch.float32))
    if fake_features and weights.gan_weight > 0:
        fooled = [weights.gan_weight * generator_gan_loss(scale[-1], weights.gan) for scale in fake_features]
        _note(losses, "generator/gan", fooled)
        total = total + losses["generator/gan"]
    if fake_features and weights.feature_matching > 0:
        matched = feature_matching_losses(fake_features, real_features)
        table = weights.feature_matching * torch.stack([torch.stack(scale) for scale in matched])
        losses["generator/feature_matching"] = table.sum()
        for index, part in enumerate(table.sum(1)):
            losses[f"generator/feature_matching/scale{index}"] = part
        for index, part in enumerate(table.sum(0)):
            losses[f"generator/feature_matching/layer{index}"] = part
        total = total + losses["generator/feature_matching"]
    if weights.l1 > 0:
        losses["generator/l1"] = weights.l1 * mean_difference(fake, target)
        total = total + losses["generator/l1"]
    if weights.perceptual > 0:
        assert gan.perceptual is not None
        parts = perceptual_losses(fake, target, gan.perceptual)
        for name, part in zip(PERCEPTUAL_LAYERS, parts, strict=True):
            losses[f"generator/perceptual/{name}"] = weights.perceptual * part
        losses["generator/perceptual"] = weights.perceptual * torch.stack(parts).sum()
        total = total + losses["generator/perceptual"]
    return total


def _note(losses: dict[str, Tensor], name: str, scales: Sequence[Tensor]) -> None:
    losses[name] = torch.stack(list(scales)).sum()
    if len(scales) > 1:
        for index, value in enumerate(scales):
            losses[f"{name}/scale{index}"] = value


def _averaging(optimizer: Adam, average: Average, *, coming: bool = False) -> Arriving:
    """Begin to average the gradients of what an optimizer updates."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return average(parameters, coming=coming)


def _update(optimizer: Adam, arriving: Arriving | None = None) -> None:
    """Step, with means as they arrive, and drop the gradients: till the next step they only take memory."""
    if arriving is None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    else:
        for parameters in arriving():
            optimizer.update(parameters)


def _empty_step(gan: GanState, average: Average | None) -> None:
    """A worker without rows: it only takes part in the averages, in the same order as the others."""
    for optimizer in (gan.discriminator_optimizer, gan.generator_optimizer):
        if optimizer is not None and average is not None:
            _update(optimizer, _averaging(optimizer, average))
    if gan.ema is not None:
        gan.ema.update(gan.generator)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No gradients for the network's own weights inside; they still flow through it."""
    parameters = _trained(network)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
