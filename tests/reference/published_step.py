"""The training step as published, written from the papers: ours is measured and tested against it.

Slow on purpose, in the ways of the published code: each layer a module of its own, biases in front of norms
added and trained, three discriminator passes, weight gradients of the discriminator in the generator's
backward pass, frozen parts back-propagated, one Adam update per tensor, float32, contiguous.

`copy_weights` puts the weights of one of our networks into its plain counterpart, by the published names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.models.files.nvidia_names import layer_names, renamed


class ResnetBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def global_layers(channels: int, width: int, downsamplings: int, blocks: int) -> list[nn.Module]:
    def normed(conv: nn.Module, out: int) -> list[nn.Module]:
        return [conv, nn.InstanceNorm2d(out), nn.ReLU(True)]

    layers = [nn.ReflectionPad2d(3), *normed(nn.Conv2d(channels, width, 7), width)]
    for level in range(downsamplings):
        inner = width * 2**level
        layers += normed(nn.Conv2d(inner, 2 * inner, 3, stride=2, padding=1), 2 * inner)
    layers += [ResnetBlock(width * 2**downsamplings) for _ in range(blocks)]
    for level in reversed(range(downsamplings)):
        inner = width * 2**level
        up = nn.ConvTranspose2d(2 * inner, inner, 3, stride=2, padding=1, output_padding=1)
        layers += normed(up, inner)
    return layers


def head_layers(width: int, out: int) -> list[nn.Module]:
    return [nn.ReflectionPad2d(3), nn.Conv2d(width, out, 7), nn.Tanh()]


class PlainGenerator(nn.Module):
    """G1, alone or inside enhancers, under the published names."""

    def __init__(
        self,
        channels: int,
        out: int = 3,
        *,
        global_width: int = 64,
        downsamplings: int = 4,
        blocks: int = 9,
        enhancers: int = 0,
        enhancer_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.enhancers = enhancers
        layers = global_layers(channels, global_width, downsamplings, blocks)
        self.model = nn.Sequential(*layers, *([] if enhancers else head_layers(global_width, out)))
        for n in range(1, enhancers + 1):
            width = global_width // 2**n
            down = global_layers(channels, width, 1, 0)[:7]
            up = [ResnetBlock(2 * width) for _ in range(enhancer_blocks)]
            up += global_layers(channels, width, 1, 0)[7:]
            setattr(self, f"model{n}_1", nn.Sequential(*down))
            last = head_layers(width, out) if n == enhancers else []
            setattr(self, f"model{n}_2", nn.Sequential(*up, *last))
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for _ in range(self.enhancers):
            pyramid.append(self.downsample(pyramid[-1]))
        x = self.model(pyramid[-1])
        for n in range(1, self.enhancers + 1):
            down, up = getattr(self, f"model{n}_1"), getattr(self, f"model{n}_2")
            x = up(down(pyramid[self.enhancers - n]) + x)
        return x


class PlainMultiScale(nn.Module):
    def __init__(self, channels: int, *, scales: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.num_scales, self.num_blocks = scales, layers + 2
        for scale in range(scales):
            before = channels
            for block in range(layers + 2):
                after = (width if block == 0 else min(2 * before, 512)) if block <= layers else 1
                conv = nn.Conv2d(before, after, 4, stride=2 if block < layers else 1, padding=2)
                norm = [nn.InstanceNorm2d(after)] if 0 < block <= layers else []
                activation = [nn.LeakyReLU(0.2, True)] if block <= layers else []
                setattr(self, f"scale{scale}_layer{block}", nn.Sequential(conv, *norm, *activation))
                before = after
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        result = []
        for scale in reversed(range(self.num_scales)):
            features = [x]
            for block in range(self.num_blocks):
                features.append(getattr(self, f"scale{scale}_layer{block}")(features[-1]))
            result.append(features[1:])
            x = self.downsample(x)
        return result


class UnetBlock(nn.Module):
    def __init__(
        self,
        outer: int,
        inner: int,
        *,
        channels: int,
        inside: nn.Module | None,
        outermost: bool,
        dropout: bool,
    ) -> None:
        super().__init__()
        down = nn.Conv2d(channels, inner, 4, 2, 1, bias=False)
        width = inner if inside is None else 2 * inner
        up = nn.ConvTranspose2d(width, outer, 4, 2, 1, bias=outermost)
        self.outermost = outermost
        if outermost:
            assert inside is not None
            layers = [down, inside, nn.ReLU(True), up, nn.Tanh()]
        elif inside is None:
            layers = [nn.LeakyReLU(0.2, True), down, nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        else:
            layers = [nn.LeakyReLU(0.2, True), down, nn.BatchNorm2d(inner), inside]
            layers += [nn.ReLU(True), up, nn.BatchNorm2d(outer)]
        self.model = nn.Sequential(*layers, *([nn.Dropout(0.5)] if dropout else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class PlainUnet(nn.Module):
    def __init__(self, channels: int, out: int, *, levels: int, width: int, noisy: set[int]) -> None:
        super().__init__()
        widths = [width * 2 ** min(level, 3) for level in range(levels)]
        block: nn.Module | None = None
        for level in reversed(range(levels)):
            outer = widths[level - 1] if level else out
            block = UnetBlock(
                outer,
                widths[level],
                channels=widths[level - 1] if level else channels,
                inside=block,
                outermost=level == 0,
                dropout=level in noisy,
            )
        assert block is not None
        self.model = block

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class PlainPatch(nn.Module):
    def __init__(self, channels: int, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for block in range(1, layers + 1):
            before, after = width * 2 ** min(block - 1, 3), width * 2 ** min(block, 3)
            modules.append(nn.Conv2d(before, after, 4, 2 if block < layers else 1, 1, bias=False))
            modules += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, True)]
        modules.append(nn.Conv2d(width * 2 ** min(layers, 3), 1, 4, 1, 1))
        self.model = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def copy_weights(ours: nn.Module, plain: nn.Module) -> None:
    plain.load_state_dict(renamed(ours.state_dict(), layer_names(ours)))


@dataclass
class Plain:
    """Both networks and their optimizers. `local`: only the outermost enhancer is stepped."""

    generator: nn.Module
    discriminator: nn.Module
    local: bool = False
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        outermost = f"model{getattr(self.generator, 'enhancers', 0)}_"
        named = self.generator.named_parameters()
        parameters = [p for name, p in named if not self.local or name.startswith(outermost)]
        self.generator_optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.5, 0.999))
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.learning_rate, betas=(0.5, 0.999)
        )


def pix2pixhd_step(
    gan: Plain, condition: Tensor, target: Tensor, feature_weight: float = 10
) -> dict[str, Tensor]:
    """Three discriminator passes, then the generator's backward pass through everything, then D's."""
    fake = gan.generator(condition)
    on_detached = gan.discriminator(torch.cat([condition, fake.detach()], 1))
    on_real = gan.discriminator(torch.cat([condition, target], 1))
    on_fake = gan.discriminator(torch.cat([condition, fake], 1))
    zero, one = target.new_zeros(()), target.new_ones(())

    def gan_loss(predictions: list[list[Tensor]], goal: Tensor) -> Tensor:
        return sum((F.mse_loss(p[-1], goal.expand_as(p[-1])) for p in predictions), zero)

    d_fake, d_real, g_gan = gan_loss(on_detached, zero), gan_loss(on_real, one), gan_loss(on_fake, one)
    matching = zero
    for of_fake, of_real in zip(on_fake, on_real, strict=True):
        for x, y in zip(of_fake[:-1], of_real[:-1], strict=True):
            matching = (
                matching + 4 / (len(of_fake) - 1) / len(on_fake) * F.l1_loss(x, y.detach()) * feature_weight
            )
    gan.generator_optimizer.zero_grad()
    (g_gan + matching).backward()
    gan.generator_optimizer.step()
    gan.discriminator_optimizer.zero_grad()
    ((d_fake + d_real) * 0.5).backward()
    gan.discriminator_optimizer.step()
    return {
        "generator/gan": g_gan.detach(),
        "generator/feature_matching": matching.detach(),
        "discriminator/real": d_real.detach(),
        "discriminator/fake": d_fake.detach(),
    }


def pix2pix_step(gan: Plain, source: Tensor, target: Tensor, l1_weight: float = 100) -> dict[str, Tensor]:
    """The discriminator first, then the generator against the updated one."""
    fake = gan.generator(source)
    gan.discriminator.requires_grad_(True)
    gan.discriminator_optimizer.zero_grad()
    on_fake = gan.discriminator(torch.cat([source, fake.detach()], 1))
    d_fake = F.binary_cross_entropy_with_logits(on_fake, torch.zeros_like(on_fake))
    on_real = gan.discriminator(torch.cat([source, target], 1))
    d_real = F.binary_cross_entropy_with_logits(on_real, torch.ones_like(on_real))
    ((d_fake + d_real) * 0.5).backward()
    gan.discriminator_optimizer.step()
    gan.discriminator.requires_grad_(False)
    gan.generator_optimizer.zero_grad()
    logits = gan.discriminator(torch.cat([source, fake], 1))
    g_gan = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    l1 = F.l1_loss(fake, target) * l1_weight
    (g_gan + l1).backward()
    gan.generator_optimizer.step()
    return {
        "generator/gan": g_gan.detach(),
        "generator/l1": l1.detach(),
        "discriminator/real": d_real.detach(),
        "discriminator/fake": d_fake.detach(),
    }
