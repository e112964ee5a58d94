"""A picture computed layer by layer, in bands, is the picture that is computed whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stages.inference import tiled
from stages.inference.tiled import FeatureMap, LayerByLayer
from stages.models.fast.frozen import freeze
from stages.models.layers import initialise, noise_sources
from stages.models.pix2pix import UNet
from stages.models.pix2pixhd import CoarseToFineGenerator


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "IN_MEMORY", 1 << 14)  # larger maps are files


def read_from(x: Tensor) -> FeatureMap:
    _, channels, height, width = x.shape
    return FeatureMap(
        channels=channels,
        height=height,
        width=width,
        read=lambda start, stop: x[:, :, start:stop].contiguous(memory_format=torch.channels_last),
        work=channels * width,
    )


def in_bands(network: nn.Module, x: Tensor, values: int, seeds: list[int] | None = None) -> Iterator[Tensor]:
    walk = LayerByLayer(values, x.shape[2])
    out = walk.generate(network, read_from(x), noise_sources(seeds) if seeds else None)
    for start, stop in walk.bands(out):
        yield out.read(start, stop)


def trained(network: nn.Module) -> nn.Module:
    """Weights of another size than initial ones: each layer's output is far from its bias."""
    initialise(network, seed=1, role="generator")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    return network.eval()


def u_net(**settings: object) -> UNet:
    return UNet(3, 3, levels=5, width=8, **settings)  # type: ignore[arg-type]


def hd(enhancers: int, **settings: object) -> CoarseToFineGenerator:
    given: dict[str, object] = {"global_width": 8, "downsamplings": 2, "blocks": 2, "enhancer_blocks": 2}
    return CoarseToFineGenerator(3, 3, enhancers=enhancers, **(given | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "network",
    [
        pytest.param(hd(0), id="G1"),
        pytest.param(hd(0, upsampling="resize"), id="G1-resize"),
        pytest.param(hd(1), id="G2"),
        pytest.param(hd(2), id="G3"),
        pytest.param(u_net(), id="U-Net"),
        pytest.param(u_net(norm="instance", upsampling="resize"), id="U-Net-instance-resize"),
        pytest.param(u_net(skips=False), id="no-skips"),
    ],
)
def test_a_picture_in_bands_is_the_picture_at_once(network: nn.Module, fast: bool) -> None:
    network = trained(network)
    if fast:
        network = freeze(network, device="cpu", dtype=torch.float32)
    x = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        whole = network(x.contiguous(memory_format=torch.channels_last))
        for values in (1, 3000, 1 << 30):  # a row, several rows, the whole map
            bands = list(in_bands(network, x, values))
            assert (torch.cat(bands, 2) - whole).abs().max() < 2e-5
            assert (len(bands) == 1) == (values == 1 << 30)


def test_noise_is_that_of_the_whole_picture_and_samples_stay_apart() -> None:
    network = trained(UNet(3, 3, levels=7, width=8, dropout="paper"))
    x = torch.rand(2, 3, 256, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        whole = network(x, noise_sources([3, 4]))
        bands = torch.cat(list(in_bands(network, x, 20_000, [3, 4])), 2)
    assert (bands - whole).abs().max() < 2e-5
    assert (bands - network(x, noise_sources([5, 6]))).abs().max() > 0.01


@pytest.mark.parametrize(("enhancers", "most"), [(0, 1.35), (1, 1.6)])
def test_little_is_computed_twice(enhancers: int, most: float) -> None:
    network = hd(enhancers, global_width=16, downsamplings=4, blocks=9, enhancer_blocks=3)
    x = torch.zeros(1, 3, 256, 128)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as whole:
            network(x)
        with FlopCounterMode(display=False) as bands:
            list(in_bands(network, x, 32 * 128 * 16))
    assert 1 <= bands.get_total_flops() / whole.get_total_flops() < most
