"""What this CPU can do at best: products and convolutions of the shapes that matter, in GFLOP/s.

python -m benchmarks.ceiling
python -m benchmarks.ceiling --repeats 1 --shrink 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Convolution(NamedTuple):
    """A layer of G1 at 256x256: channels in and out, side of the output, kernel, stride."""

    inner: int
    outer: int
    side: int
    kernel: int
    stride: int = 1

    def __str__(self) -> str:
        return f"conv{self.kernel} {self.inner} -> {self.outer}, {self.side}x{self.side} out"


CONVOLUTIONS = (
    Convolution(36, 64, 256, 7),
    Convolution(64, 128, 128, 3, stride=2),
    Convolution(1024, 1024, 16, 3),
    Convolution(64, 3, 256, 7),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each shape; the best counts")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sides of images and matrices")
    options = parser.parse_args(arguments)
    repeats, shrink = options.repeats, options.shrink
    side = 4096 // shrink
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {repeats}")
    print("| GFLOP/s: forward / input gradient / weight gradient | float32 | bf16 |")
    print("|---|---|---|")
    row(f"matrix product {side}^3", lambda dtype: [product(side, side, side, dtype, repeats)])
    row("256 x 9216 x 1024, a residual block", lambda dtype: [product(256, 9216, 1024, dtype, repeats)])
    for published in CONVOLUTIONS:
        shape = published._replace(side=published.side // shrink)
        for layout in (torch.contiguous_format, torch.channels_last):
            name = f"{shape}, {'channels last' if layout == torch.channels_last else 'contiguous'}"
            row(name, lambda dtype, shape=shape, layout=layout: convolution(shape, dtype, layout, repeats))


def row(name: str, measure: Callable[[torch.dtype], list[float]]) -> None:
    """One shape in both precisions."""
    cells = [
        " / ".join(f"{rate:.0f}" for rate in measure(dtype)) for dtype in (torch.float32, torch.bfloat16)
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def product(rows: int, inner: int, columns: int, dtype: torch.dtype, repeats: int) -> float:
    """GFLOP/s of a matrix product."""
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: F.linear(a, b), repeats) / 1e9


def convolution(
    shape: Convolution, dtype: torch.dtype, layout: torch.memory_format, repeats: int
) -> list[float]:
    """GFLOP/s of a convolution without padding: forward, input gradient, weight gradient."""
    side = shape.side * shape.stride + shape.kernel - shape.stride
    x = torch.randn(1, shape.inner, side, side, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(shape.outer, shape.inner, shape.kernel, shape.kernel, dtype=dtype)
    weight = weight.contiguous(memory_format=layout)
    y = F.conv2d(x, weight, stride=shape.stride)

    def gradient(*, of_x: bool) -> Tensor:
        strides, mask = [shape.stride] * 2, [of_x, not of_x, False]
        of = torch.ops.aten.convolution_backward(
            y, x, weight, None, strides, [0, 0], [1, 1], False, [0, 0], 1, mask
        )
        return of[0] if of_x else of[1]  # type: ignore[no-any-return]

    operations = 2 * y.numel() * shape.inner * shape.kernel**2
    runs = (
        lambda: F.conv2d(x, weight, stride=shape.stride),
        lambda: gradient(of_x=True),
        lambda: gradient(of_x=False),
    )
    return [operations / best(run, repeats) / 1e9 for run in runs]


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several runs, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[2:])


if __name__ == "__main__":
    main()
