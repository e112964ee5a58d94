"""Scores against formulas written out here and against scikit-image's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from stages.scoring import metrics


def pictures(side: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(side), np.arange(side))[..., None] * np.array([1, 2, 3]) % 256
    noisy = np.clip(smooth + rng.normal(0, 25, smooth.shape), 0, 255)
    return noisy.astype(np.uint8), smooth.astype(np.uint8)


def pixel_scores(generated: np.ndarray, target: np.ndarray) -> dict[str, float]:
    (scores,) = metrics.pixel_scores_of([generated], [target])
    return scores


def test_pairs_scored_together_have_the_scores_of_each() -> None:
    pairs = [pictures(192, seed) for seed in range(3)]
    together = metrics.pixel_scores_of([fake for fake, _ in pairs], [real for _, real in pairs])
    for scores, (fake, real) in zip(together, pairs, strict=True):
        assert scores == pytest.approx(pixel_scores(fake, real), rel=1e-6)


def test_l1_and_psnr_agree_with_the_written_formulas_and_scikit_image() -> None:
    fake, real = pictures()
    scores = pixel_scores(fake, real)
    difference = fake.astype(float) - real.astype(float)
    assert scores["l1"] == pytest.approx(np.abs(difference).mean() / 255, rel=1e-6)
    assert scores["psnr"] == pytest.approx(10 * math.log10(255**2 / (difference**2).mean()), rel=1e-5)
    assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(real, fake), rel=1e-5)


def test_ssim_agrees_with_scikit_image_away_from_the_border() -> None:
    """The two tools mirror the border differently; five pixels inside, the maps are the same."""
    import torchmetrics.functional.image as tmi

    fake, real = pictures()
    _, theirs = structural_similarity(
        real, fake, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    mean, ours = tmi.structural_similarity_index_measure(
        metrics.to_unit([fake]), metrics.to_unit([real]), data_range=1.0, return_full_image=True
    )
    inside = ours[0].permute(1, 2, 0).numpy()[5:-5, 5:-5]
    assert np.abs(inside - theirs[5:-5, 5:-5]).max() < 1e-3
    assert pixel_scores(fake, real)["ssim"] == pytest.approx(float(mean))


def test_ssim_is_the_formula_of_the_paper() -> None:
    fake, real = (x[..., :1].astype(np.float64) / 255 for x in pictures(24))
    axis = np.arange(-5, 6)
    window = np.exp(-np.add.outer(axis**2, axis**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        views = np.lib.stride_tricks.sliding_window_view(np.pad(image[..., 0], 5, mode="reflect"), (11, 11))
        return np.asarray((views * window).sum((2, 3)))

    mx, my = blur(fake), blur(real)
    vx, vy, vxy = blur(fake**2) - mx**2, blur(real**2) - my**2, blur(fake * real) - mx * my
    index = ((2 * mx * my + 0.01**2) * (2 * vxy + 0.03**2)) / (
        (mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)
    )
    ours = pixel_scores(*(x[..., :1] for x in pictures(24)))["ssim"]
    assert ours == pytest.approx(index.mean(), abs=1e-4)


def test_ms_ssim_of_one_image_with_itself_is_one_and_falls_with_noise() -> None:
    fake, real = pictures(176)
    assert pixel_scores(real, real)["ms_ssim"] == pytest.approx(1, abs=1e-5)
    assert 0 < pixel_scores(fake, real)["ms_ssim"] < 1


def test_a_window_that_does_not_fit_gives_no_number() -> None:
    fake, real = pictures(5)
    assert set(pixel_scores(fake, real)) == {"l1", "psnr"}
    assert "ms_ssim" not in pixel_scores(*pictures(175))


def test_equal_images_have_a_finite_psnr() -> None:
    _, real = pictures()
    assert pixel_scores(real, real)["psnr"] == metrics.PSNR_OF_IDENTICAL


def test_the_mean_image_is_exact_in_any_order() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (4, 5, 3), np.uint8) for _ in range(9)]
    one, other = metrics.MeanImage(), metrics.MeanImage()
    for index, image in enumerate(images):
        (one if index % 2 else other).add(image)
    one.merge(other)
    assert np.array_equal(one.image(), np.floor(np.mean(images, axis=0) + 0.5).astype(np.uint8))


def test_sharpness_falls_with_blur() -> None:
    fake, _ = pictures()
    blurred = ((fake[:-1, :-1].astype(int) + fake[1:, 1:] + fake[:-1, 1:] + fake[1:, :-1]) // 4).astype(
        np.uint8
    )
    assert metrics.sharpness(fake) > metrics.sharpness(blurred) > 0
    ramp = np.repeat(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], 5, 0)
    assert metrics.sharpness(ramp) == pytest.approx(2 / 255)


def test_diversity_is_the_mean_distance_of_all_pairs_of_samples() -> None:
    flat = [np.full((2, 2, 3), value, np.uint8) for value in (0, 51, 102)]
    assert metrics.diversity(flat) == pytest.approx((0.2 + 0.4 + 0.2) / 3)


def test_segmentation_scores_of_a_matrix_worked_by_hand() -> None:
    actual = np.array([0, 0, 0, 1, 1, 2, 255, 9])
    predicted = np.array([0, 0, 1, 1, 7, 2, 0, 0])  # one id that no class has; 255 is ignored, 9 unknown
    matrix = metrics.confusion(predicted, actual, 4, ignore=255)
    assert matrix.sum() == 6
    scores = metrics.segmentation_scores(metrics.segmentation_counts(matrix))
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert scores["class_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert metrics.segmentation_scores(np.zeros((3, 3))) == {}


def test_the_frechet_distance_of_features_in_parts_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(60, 8)), rng.normal(0.5, 2, size=(80, 8))
    generated = metrics.Moments()
    generated.add(one[:20])
    generated.add(one[20:])
    real = metrics.Moments()
    real.add(other)
    cov1, cov2 = np.cov(one.T), np.cov(other.T)
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(
        cov1 + cov2 - 2 * scipy.linalg.sqrtm(cov1 @ cov2).real
    )
    assert metrics.frechet_distance(generated, real) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance_of(one, other) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_of_fewer_images_than_features_is_that_of_their_moments() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(5, 24)), rng.normal(0.5, 2, size=(7, 24))
    moments = [metrics.Moments() for _ in range(2)]
    for side, vectors in zip(moments, (one, other), strict=True):
        side.add(vectors)
    assert metrics.frechet_distance_of(one, other) == pytest.approx(
        metrics.frechet_distance(*moments), rel=1e-6
    )


def test_the_kernel_distance_agrees_with_the_loop_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)), rng.normal(1, 1, size=(5, 4))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1) ** 3)

    expected = (
        sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 30
        + sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
        - 2 * sum(k(a, b) for a in x for b in y) / 30
    )
    assert metrics.KernelDistance(x, y)() == pytest.approx(expected)


def test_the_kernel_distance_of_blocks_is_that_of_their_vectors() -> None:
    rng = np.random.default_rng(0)
    x, y, blocks = (
        rng.normal(size=(9, 4)),
        rng.normal(1, 1, size=(9, 4)),
        np.array([0, 0, 1, 1, 1, 2, 2, 0, 1]),
    )
    kept = np.array([True, False, True])
    rows = kept[blocks]
    assert metrics.KernelDistance(x, y, blocks)(kept) == pytest.approx(
        metrics.KernelDistance(x[rows], y[rows])()
    )


def test_a_confusion_matrix_is_drawn_row_by_row() -> None:
    drawn = metrics.confusion_picture(np.array([[8, 0], [5, 5]]))
    assert drawn.shape == (512, 512, 3)
    cells = [drawn[y, x, 0] for y in (128, 384) for x in (128, 384)]
    assert cells[0] == 8  # all of class 0
    assert cells[1] == 255
    assert cells[2] == cells[3] == 132  # half of class 1 each
    assert metrics.confusion_picture(np.zeros((3, 3), np.int64)).min() == 220
