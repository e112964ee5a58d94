"""One training step: a batch in, both networks updated, named losses out. It is independent of distribution.

pix2pixHD   one forward pass feeds both updates: both losses use the weights from before the step
pix2pix     the discriminator steps first, the generator then faces the updated one

A batch is a list of micro-batches, usually of one: their gradients add up to those of the batch, in the
memory of one micro-batch (gradient accumulation).

The published step computes more; what does not change the result is left out here:
- the fake is discriminated once for both of pix2pixHD's updates, not once for each;
- the generator's backward pass computes no weight gradients of the discriminator;
- frozen parts record no graph;
- the discriminator's graph of the real image is freed before that of the generator is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.models.architecture import LossWeights, Pix2PixHD
from stages.models.fast.adam import Adam
from stages.models.gan import GanState
from stages.models.inputs import DiffAugment, make_condition, translate, unit_range
from stages.models.layers import advance_spectral_norms
from stages.models.losses import (
    PERCEPTUAL_LAYERS,
    Features,
    feature_matching_losses,
    gan_loss,
    generator_gan_loss,
    mean_difference,
    perceptual_losses,
    r1_penalty,
)
from stages.models.pix2pixhd import MultiScaleDiscriminator

Losses = dict[str, Tensor]
"""Detached scalars by name, each as it enters the sum."""


class Average(Protocol):
    """Replaces gradients by their mean over the workers, while something else is computed."""

    def __call__(
        self, parameters: Sequence[nn.Parameter], *, during_backward: bool
    ) -> Iterable[Sequence[nn.Parameter]]:
        """Start to exchange gradients: now or, `during_backward`, as a backward pass completes them.

        Iterating the result, after that pass, waits for each gradient bucket's all-reduce and yields the
        parameters whose gradients are averaged. Called once a network and step, the discriminator first.
        """
        ...


@dataclass(slots=True, kw_only=True)
class Batch:
    """Pairs of one worker. Images may be uint8 (N, C, H, W) for cheap transfers, or float32 in [-1, 1].

    source   (N, C, H, W) image, or (N, 1, H, W) integer class ids for a labels source
    target   (N, C, H, W)
    instance (N, 1, H, W) integer ids, or None
    share    workers * N / (rows of this step over all workers): the weight of this worker's gradients, such
             that their mean over the workers is the mean over rows where batches are short or empty
    """

    source: Tensor
    target: Tensor
    instance: Tensor | None = None
    keys: Sequence[str] = ()
    share: float = 1.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on a device."""

        return self.each(lambda images: images.to(device, non_blocking=non_blocking))

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with other images."""
        return replace(
            self,
            source=change(self.source),
            target=change(self.target),
            instance=None if self.instance is None else change(self.instance),
        )

    def split(self, rows: int | None) -> list[Batch]:
        """Micro-batches of at most `rows` pairs (None: one of all), each with its part of the share."""
        count = self.source.shape[0]
        if rows is None or count <= rows:
            return [self]
        return [
            replace(
                self.each(itemgetter(slice(start, start + rows))),
                keys=self.keys[start : start + rows],
                share=self.share * min(rows, count - start) / count,
            )
            for start in range(0, count, rows)
        ]


def update(
    gan: GanState,
    batch: Batch,
    *,
    weights: LossWeights,
    average: Average | None = None,
    micro_batch: int | None = None,
) -> Losses:
    """One update of both networks. Returns named, detached losses, each as it enters the sum.

    Never waits for the device. A batch without rows (a worker past the end of the data) joins the exchange
    with zero gradients and has no losses.

    micro_batch   pairs in memory at a time; None: the whole batch. The update is the same except for batch
                  norm and dropout, which see each micro-batch apart
    """
    if gan.discriminator is not None:
        advance_spectral_norms(gan.discriminator)
    if batch.source.shape[0] == 0:
        for optimizer in (gan.discriminator_optimizer, gan.generator_optimizer):  # the others' order
            if optimizer is not None and average is not None:
                _update(optimizer, average)
        return {}
    of_arch = _step_pix2pixhd if isinstance(gan.arch, Pix2PixHD) else _step_pix2pix
    return of_arch(gan, batch.split(micro_batch), weights, average)


def random_source(device: torch.device) -> torch.Generator:
    """The generator that draws a step's dropout on this device."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]


# -- the order of updates, once an architecture ---------------------------------


def _step_pix2pixhd(
    gan: GanState, micro_batches: Sequence[Batch], weights: LossWeights, average: Average | None
) -> Losses:
    """Both networks are updated after all forward passes: both losses use the weights from before."""
    total: Losses = {}
    for index, batch in enumerate(micro_batches):
        with _autocast(gan):
            pair = _Pair.of(gan, batch, weights)
            real, real_losses = _train_discriminator(gan, pair, pair.target, weights, real=True)
            image = _generate(gan, pair)
            fake = image.detach().requires_grad_()  # the losses' graph ends here, the generator's starts here
            features, fake_losses = _train_discriminator(
                gan, pair, fake, weights, real=False, keep_graph=True
            )
            loss, losses = _generator_loss(gan, pair, fake, features, real, weights)
        (gradient,) = torch.autograd.grad(loss * batch.share, fake)
        if index < len(micro_batches) - 1:
            torch.autograd.backward(image, gradient)
        else:
            _finish(gan, image, gradient, average, discriminator_waits=True)
        _add(total, real_losses | fake_losses | losses, micro_batches, index)
    return total


def _step_pix2pix(
    gan: GanState, micro_batches: Sequence[Batch], weights: LossWeights, average: Average | None
) -> Losses:
    """The discriminator is updated on all micro-batches first; the generator faces the updated one.

    So with several micro-batches the generator runs twice: keeping the graphs of all of them would need the
    memory of the whole batch.
    """
    total: Losses = {}
    several = len(micro_batches) > 1
    random = random_source(micro_batches[0].target.device)
    seed = random.initial_seed() if several else 0  # a CUDA graph must not ask
    first: tuple[_Pair, Tensor] | None = None

    def generated(index: int) -> tuple[_Pair, Tensor]:
        if several:
            random.manual_seed(seed + index)  # the same dropout and augmentation in both passes
        pair = _Pair.of(gan, micro_batches[index], weights)
        return pair, _generate(gan, pair)

    if gan.discriminator is not None:
        statistics = [buffer.clone() for buffer in gan.generator.buffers()] if several else []
        for index in range(len(micro_batches)):
            with _autocast(gan):
                with torch.set_grad_enabled(not several):
                    first = pair, image = generated(index)
                # batch norm's running statistics depend on the order: the fake first, as published
                _, fake_losses = _train_discriminator(gan, pair, image.detach(), weights, real=False)
                _, real_losses = _train_discriminator(gan, pair, pair.target, weights, real=True)
            _add(total, fake_losses | real_losses, micro_batches, index)
        if several:  # running statistics count each image once
            for buffer, before in zip(gan.generator.buffers(), statistics, strict=True):
                buffer.copy_(before)
        assert gan.discriminator_optimizer is not None
        _update(gan.discriminator_optimizer, average)
    for index, batch in enumerate(micro_batches):
        with _autocast(gan):
            pair, image = generated(index) if several or first is None else first
            fake = image.detach().requires_grad_()
            features = _discriminate_frozen(gan, pair, fake)
            real: Features = []
            if weights.feature_matching > 0:  # by the updated discriminator too, or they would not match
                with torch.no_grad():
                    real = _discriminate(gan, pair, pair.target)
            loss, losses = _generator_loss(gan, pair, fake, features, real, weights)
        (gradient,) = torch.autograd.grad(loss * batch.share, fake)
        if index < len(micro_batches) - 1:
            torch.autograd.backward(image, gradient)
        else:
            _finish(gan, image, gradient, average, discriminator_waits=False)
        _add(total, losses, micro_batches, index)
    return total


def _finish(
    gan: GanState, image: Tensor, gradient: Tensor, average: Average | None, *, discriminator_waits: bool
) -> None:
    """The step's last backward pass and the updates that wait for it.

    Several workers exchange gradients during that pass: first the discriminator's, if its update waits.
    """
    # pix2pixHD's discriminator waits until here: the fake's gradient went through its weights from before
    # the step, and a fused optimizer changes them without autograd noticing.
    waiting = gan.discriminator_optimizer if discriminator_waits else None
    optimizer = gan.generator_optimizer
    if average is None:
        if waiting is not None:
            _update(waiting, None)
        with optimizer.stepping():
            torch.autograd.backward(image, gradient)
    else:
        of_discriminator = () if waiting is None else average(waiting.weights, during_backward=False)
        of_generator = average(optimizer.weights, during_backward=True)
        torch.autograd.backward(image, gradient)
        for parameters in of_discriminator:
            assert waiting is not None
            waiting.update(parameters)
        for parameters in of_generator:
            optimizer.update(parameters)


def _update(optimizer: Adam, average: Average | None) -> None:
    """Average the gradients over the workers, if there are several; step; free the gradients."""
    if average is None:
        optimizer.update(optimizer.weights)
    else:
        for parameters in average(optimizer.weights, during_backward=False):
            optimizer.update(parameters)


# -- forward passes -----------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A micro-batch as the networks see it.

    condition    (N, C, H, W)
    conditions   the discriminator's view of it, per scale; None: it sees the image alone
    target       (N, C_out, H, W) in [-1, 1]
    augment      how the discriminator's view is augmented, conditions already
    """

    condition: Tensor
    conditions: Sequence[Tensor] | None
    target: Tensor
    instance: Tensor | None
    share: float
    augment: DiffAugment | None

    @classmethod
    def of(cls, gan: GanState, batch: Batch, weights: LossWeights) -> _Pair:
        dtype = next(gan.generator.parameters()).dtype
        target = unit_range(batch.target, dtype).contiguous(memory_format=torch.channels_last)
        condition = make_condition(
            batch.source, batch.instance, arch=gan.arch, inputs=gan.inputs, dtype=dtype
        ).contiguous(memory_format=torch.channels_last)
        conditions: Sequence[Tensor] | None = None
        augment = DiffAugment.draw(weights.diff_augment, target) if weights.diff_augment else None
        if gan.arch.conditional and gan.discriminator is not None:
            seen = condition if augment is None else augment.condition(condition)
            conditions = [seen]
            if isinstance(gan.discriminator, MultiScaleDiscriminator):
                conditions = gan.discriminator.pyramid(seen)
        return cls(
            condition=condition,
            conditions=conditions,
            target=target,
            instance=batch.instance,
            share=batch.share,
            augment=augment,
        )


def _autocast(gan: GanState) -> AbstractContextManager[object]:
    device = next(gan.generator.parameters()).device
    return torch.autocast(device.type, torch.bfloat16) if gan.precision == "bf16" else nullcontext()


def _generate(gan: GanState, pair: _Pair) -> Tensor:
    style = None if gan.encoder is None else gan.encoder(pair.target, pair.instance)
    return translate(gan.generator, pair.condition, style)


def _discriminate(gan: GanState, pair: _Pair, image: Tensor) -> Features:
    """The discriminator's features of an image, per scale; a single PatchGAN is one scale."""
    assert gan.discriminator is not None
    if pair.augment is not None:
        image = pair.augment.image(image)
    if isinstance(gan.discriminator, MultiScaleDiscriminator):
        features: Features = gan.discriminator(image, pair.conditions)
        return features
    return [
        gan.discriminator(image if pair.conditions is None else torch.cat([pair.conditions[0], image], 1))
    ]


def _train_discriminator(
    gan: GanState, pair: _Pair, image: Tensor, weights: LossWeights, *, real: bool, keep_graph: bool = False
) -> tuple[Features, Losses]:
    """Accumulate the discriminator's gradients of real or fake images; their features, and the losses.

    Features are detached, and left out where no loss compares them. `keep_graph`: they keep their graph, for
    the generator's loss.
    """
    if gan.discriminator is None:
        return [], {}
    penalised = real and weights.r1 > 0
    if penalised:
        image = image.detach().requires_grad_()
    features = _discriminate(gan, pair, image)
    scales = [gan_loss(scale[-1], weights.gan, real=real) for scale in features]
    total = torch.stack(scales).sum()
    losses = _by_scale("discriminator/real" if real else "discriminator/fake", scales)
    if penalised:
        # a blank pair of a worker without rows is no part of others' gradients through shared statistics
        penalties = torch.stack([r1_penalty(scale[-1] * (pair.share > 0), image) for scale in features])
        losses["discriminator/r1"] = weights.r1 * penalties.sum()
        total = total + losses["discriminator/r1"]
    trained = _trained(gan.discriminator)
    torch.autograd.backward(total * (0.5 * pair.share), inputs=trained, retain_graph=keep_graph)
    if keep_graph:
        return features, losses
    if weights.feature_matching == 0:
        return [], losses
    return [[feature.detach() for feature in scale] for scale in features], losses


def _discriminate_frozen(gan: GanState, pair: _Pair, fake: Tensor) -> Features:
    """Features of the fake, with a graph that ends at the fake."""
    if gan.discriminator is None:
        return []
    with _frozen(gan.discriminator):
        return _discriminate(gan, pair, fake)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


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


# -- losses -------------------------------------------------------------------


def _generator_loss(
    gan: GanState, pair: _Pair, fake: Tensor, fake_features: Features, real: Features, weights: LossWeights
) -> tuple[Tensor, Losses]:
    """The weighted sum that the generator minimises, and its parts. Without features: no such part."""
    total = fake.new_zeros((), dtype=torch.promote_types(fake.dtype, torch.float32))
    losses: Losses = {}
    if fake_features and weights.gan_weight > 0:
        scales = [weights.gan_weight * generator_gan_loss(scale[-1], weights.gan) for scale in fake_features]
        losses |= _by_scale("generator/gan", scales)
        total = total + losses["generator/gan"]
    if fake_features and weights.feature_matching > 0:
        matched = feature_matching_losses(fake_features, real)
        table = weights.feature_matching * torch.stack([torch.stack(scale) for scale in matched])
        losses["generator/feature_matching"] = table.sum()
        for index, part in enumerate(table.sum(1)):
            losses[f"generator/feature_matching/scale{index}"] = part
        for index, part in enumerate(table.sum(0)):
            losses[f"generator/feature_matching/layer{index}"] = part
        total = total + losses["generator/feature_matching"]
    if weights.l1 > 0:
        losses["generator/l1"] = weights.l1 * mean_difference(fake, pair.target)
        total = total + losses["generator/l1"]
    if weights.perceptual > 0:
        assert gan.perceptual is not None
        parts = perceptual_losses(fake, pair.target, gan.perceptual)
        for name, part in zip(PERCEPTUAL_LAYERS, parts, strict=True):
            losses[f"generator/perceptual/{name}"] = weights.perceptual * part
        losses["generator/perceptual"] = weights.perceptual * torch.stack(parts).sum()
        total = total + losses["generator/perceptual"]
    if weights.lpips > 0:
        assert gan.lpips is not None
        losses["generator/lpips"] = weights.lpips * gan.lpips(fake, pair.target).mean()
        total = total + losses["generator/lpips"]
    return total, losses


def _by_scale(name: str, scales: Sequence[Tensor]) -> Losses:
    """The sum over scales and, where there are several, each scale."""
    losses = {name: torch.stack(list(scales)).sum()}
    if len(scales) > 1:
        losses |= {f"{name}/scale{index}": value for index, value in enumerate(scales)}
    return losses


def _add(total: Losses, losses: Losses, micro_batches: Sequence[Batch], index: int) -> None:
    """Add a micro-batch's losses, weighted by its rows, to those of the batch."""
    rows = [batch.source.shape[0] for batch in micro_batches]
    for name, value in losses.items():
        weighted = value.detach() * (rows[index] / sum(rows))
        total[name] = total[name] + weighted if name in total else weighted
