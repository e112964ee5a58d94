"""Scores of a generated image, and sums that turn the scores of a data set into one number.

Images are uint8 arrays (H, W, C). Per-image scores come from torchmetrics where it has them. Parts are added
in the order of the units of work, so that any number of workers gives the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import cast

import numpy as np
import torch
from torch import Tensor

from stages.config.evaluate import SMALLEST_SIDE
from stages.models.copies import to_device

PIXEL_METRICS = ("l1", "psnr", "ssim", "ms_ssim")
SEGMENTATION_SCORES = ("pixel_accuracy", "class_accuracy", "mean_iou")
SET_DISTANCES = ("fid", "kid", "frechet", "kernel")  # of a set of images, not of one
PSNR_OF_IDENTICAL = 100.0
"""The PSNR, in decibels, of two equal images: it is infinite, and would make every mean infinite."""


Distances = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], list[float]]
"""Of each generated image to its target, uint8 (H, W, 3) of one shape."""


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one."""
    return metric.split("_", maxsplit=1)[0] in ("l1", "lpips", *SET_DISTANCES)


# -- scores of one pair of images --------------------------------------------------------------------------


def to_unit(images: Sequence[np.ndarray], device: str = "cpu") -> Tensor:
    """N images (H, W, C) uint8 of one shape -> (N, C, H, W) float32 in [0, 1] on a device, in one copy."""
    stacked = to_device(torch.from_numpy(np.stack(images)), torch.device(device))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 255


def pixel_scores_of(
    generated: Sequence[np.ndarray], targets: Sequence[np.ndarray], device: str = "cpu"
) -> list[dict[str, float]]:
    """L1, PSNR, SSIM and MS-SSIM of each pair of uint8 images (H, W, C), all of one shape.

    L1 is the mean absolute difference on the [0, 1] scale. PSNR is in decibels, at most `PSNR_OF_IDENTICAL`.
    SSIM (Wang et al. 2004: Gaussian window of sigma 1.5, K 0.01 and 0.03) and MS-SSIM (Wang et al. 2003, five
    scales) are absent where the image is smaller than their windows: never a number under a wrong name.
    """
    # imported here: it takes 3 s, for SciPy's signals and Matplotlib, which no other stage need pay
    import torchmetrics.functional.image as tmi  # noqa: PLC0415

    fake, real = (to_unit(side, device) for side in (generated, targets))
    psnr = tmi.peak_signal_noise_ratio(fake, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
    columns = {
        "l1": (fake.double() - real.double()).abs().flatten(1).sum(1) / fake[0].numel(),
        "psnr": psnr.clamp(max=PSNR_OF_IDENTICAL),
    }
    side = min(fake.shape[2:])
    if side >= SMALLEST_SIDE["ssim"]:
        columns["ssim"] = tmi.structural_similarity_index_measure(
            fake, real, data_range=1.0, reduction="none"
        )
    if side >= SMALLEST_SIDE["ms_ssim"]:
        columns["ms_ssim"] = tmi.multiscale_structural_similarity_index_measure(
            fake, real, data_range=1.0, reduction="none"
        )
    rows = torch.stack([column.reshape(-1).double() for column in columns.values()], 1).tolist()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def sharpness(image: np.ndarray) -> float:
    """Mean length of the lightness gradient per pixel, on the [0, 1] scale: low for blurred images.

    Central differences inside the image; 0 for one narrower than three pixels.
    """
    if min(image.shape[:2]) < 3:
        return 0.0
    light = image.astype(np.float64).mean(axis=2) / 255
    across = (light[1:-1, 2:] - light[1:-1, :-2]) / 2
    down = (light[2:, 1:-1] - light[:-2, 1:-1]) / 2
    return float(np.hypot(across, down).mean())


def l1(generated: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[float]:
    """The mean absolute difference of each pair of uint8 images, on the [0, 1] scale."""
    pairs = zip(generated, targets, strict=True)
    return [float(np.abs(one.astype(np.int16) - other).mean()) / 255 for one, other in pairs]


def diversity(samples: Sequence[np.ndarray], distances: Distances = l1) -> float:
    """Mean distance over all pairs of two or more samples of one input, as BicycleGAN measures it."""
    return fmean(distances([one], [other])[0] for one, other in combinations(samples, 2))


# -- sums over images --------------------------------------------------------------------------------------


@dataclass(slots=True)
class MeanImage:
    """The sum of images uint8 of one size; their mean is the best guess that ignores the source."""

    total: np.ndarray | int = 0  # (H, W, C) int64: exact, so the order of merging cannot matter
    count: int = 0

    def add(self, image: np.ndarray) -> None:
        """Add one image."""
        self.merge(MeanImage(image.astype(np.int64), 1))

    def merge(self, other: MeanImage) -> None:
        """Add another sum."""
        self.total += other.total
        self.count += other.count

    def image(self) -> np.ndarray:
        """The mean (H, W, C) uint8 of at least one image, rounded to the nearest value."""
        return ((np.asarray(self.total) * 2 + self.count) // (2 * self.count)).astype(np.uint8)


# -- segmentation ------------------------------------------------------------------------------------------


def confusion(
    predicted: np.ndarray, actual: np.ndarray, classes: int, ignore: int | None = None
) -> np.ndarray:
    """(classes, classes) int64: pixels of each actual class (row) by predicted class (column).

    Pixels whose actual id is `ignore` or outside 0..classes-1 are not counted. A predicted id outside the
    range counts as a miss: it goes to another class's column. With a single class there is none, so such a
    pixel is a hit: scores of one class say nothing anyway.
    """
    actual, predicted = actual.reshape(-1).astype(np.int64), predicted.reshape(-1).astype(np.int64)
    counted = (actual >= 0) & (actual < classes)
    if ignore is not None:
        counted &= actual != ignore
    actual, predicted = actual[counted], predicted[counted]
    outside = (predicted < 0) | (predicted >= classes)
    if outside.any():  # any class but the right one: the pixel stays in its row's sum and is never a hit
        predicted = np.where(outside, (actual + 1) % classes, predicted)
    return np.bincount(actual * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def confusion_picture(matrix: np.ndarray) -> np.ndarray:
    """A confusion matrix as a picture (H, W, 3) uint8: a square per pair of classes, dark for many pixels.

    Each row is a share of its class's pixels; class 0 is at the top and at the left.
    """
    share = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    side = max(8, 512 // len(matrix))
    cells = np.kron(share, np.ones((side, side)))[:, :, None]
    picture = 255 - cells * (255 - np.array([8, 48, 107]))  # white to dark blue
    picture[::side], picture[:, ::side] = 220, 220
    return cast(np.ndarray, picture.round().astype(np.uint8))


def segmentation_counts(matrix: np.ndarray) -> np.ndarray:
    """(3, classes): the hits of each class, its pixels and those that were predicted as it."""
    return np.stack([np.diag(matrix), matrix.sum(1), matrix.sum(0)])


def segmentation_scores(counts: np.ndarray) -> dict[str, float]:
    """Per-pixel accuracy, per-class accuracy and mean IoU (FCN, Long et al. 2015) of `segmentation_counts`.

    Means are over the classes that occur. Without pixels there are no scores.
    """
    hits, rows, columns = counts
    if not rows.sum():
        return {}
    present, union = rows > 0, rows + columns - hits
    return {
        "pixel_accuracy": float(hits.sum() / rows.sum()),
        "class_accuracy": float((hits[present] / rows[present]).mean()),
        "mean_iou": float((hits[union > 0] / union[union > 0]).mean()),
    }


# -- distances between sets of features --------------------------------------------------------------------


@dataclass(slots=True)
class Moments:
    """First and second moments of feature vectors (float64), for the Frechet distance."""

    count: int = 0
    total: np.ndarray | float = 0.0  # (D,)
    outer: np.ndarray | float = 0.0  # (D, D)

    def add(self, features: np.ndarray) -> None:
        """Add vectors (N, D)."""
        wide = features.astype(np.float64)
        self.count += len(wide)
        self.total += wide.sum(0)
        self.outer += wide.T @ wide

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D); needs two vectors."""
        mean = np.asarray(self.total / self.count)
        return mean, (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017, eq. 6); needs two vectors a side."""
    (mean1, cov1), (mean2, cov2) = one.mean_and_covariance(), other.mean_and_covariance()
    # AB has the eigenvalues of H'BH, where HH' = A: symmetric, which is faster, and negative only by rounding
    values, vectors = np.linalg.eigh(cov1)
    half = vectors * np.sqrt(values.clip(0))
    roots = np.sqrt(np.linalg.eigvalsh(half.T @ cov2 @ half).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots)


def frechet_distance_of(one: np.ndarray, other: np.ndarray) -> float:
    """`frechet_distance` of vectors (N, D), (M, D). Of fewer than D it takes a fraction of the time."""
    count, size = max(len(one), len(other)), one.shape[1]
    if count > size:
        moments = [Moments(), Moments()]
        for side, vectors in zip(moments, (one, other), strict=True):
            side.add(vectors)
        return frechet_distance(*moments)
    x, y = one.astype(np.float64), other.astype(np.float64)
    apart = x.mean(0) - y.mean(0)
    x, y = ((side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (x, y))
    # with covariances x'x and y'y, the eigenvalues of their product are the squares of xy's singular values
    products = x @ y.T
    roots = np.sqrt(np.linalg.eigvalsh(products @ products.T).clip(0)).sum()
    return float((apart**2).sum() + (x**2).sum() + (y**2).sum() - 2 * roots)


class KernelDistance:
    """Unbiased squared MMD with the kernel (x.y/D + 1)^3 (KID, Binkowski et al. 2018).

    The published tools average random subsets of 1,000; over all vectors the estimate is the same in
    expectation and needs no seed. Needs two vectors on each side.
    """

    def __init__(self, one: np.ndarray, other: np.ndarray, blocks: np.ndarray | None = None) -> None:
        """Compare vectors (N, D) and (M, D). `blocks`: the block of each image, for N = M."""
        sides = [side.astype(np.float64) for side in (one, other)]
        numbers = [np.zeros(len(side), np.int64) if blocks is None else blocks for side in sides]
        self.counts = np.stack([np.bincount(of_side) for of_side in numbers])
        size, block = one.shape[1], self.counts.shape[1]

        def sums(x: int, y: int) -> np.ndarray:
            """(blocks, blocks): the kernels' sums between the blocks of two sides."""
            total, (rows, columns) = np.zeros((block, block)), (np.eye(block)[numbers[n]] for n in (x, y))
            for start in range(0, len(rows), 1000):  # N * M kernels do not fit into memory
                part = slice(start, start + 1000)
                kernels = (sides[x][part] @ sides[y].T / size + 1) ** 3
                total += rows[part].T @ (kernels @ columns)
            return total

        self.within = [sums(0, 0), sums(1, 1)]
        self.across = sums(0, 1)
        for n in (0, 1):
            own = ((sides[n] ** 2).sum(1) / size + 1) ** 3
            self.within[n] -= np.diag(np.bincount(numbers[n], weights=own))

    def __call__(self, kept: np.ndarray | None = None) -> float:
        """The distance of the vectors in the blocks that are kept, (number of blocks,) bool; None: of all."""
        weights = np.ones(self.counts.shape[1]) if kept is None else kept.astype(np.float64)
        n, m = self.counts @ weights
        first, second, both = (weights @ sums @ weights for sums in (*self.within, self.across))
        return float(first / (n * (n - 1)) + second / (m * (m - 1)) - 2 * both / (n * m))
