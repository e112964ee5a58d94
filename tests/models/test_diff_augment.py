"""Differentiable augmentation against the paper's steps, image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.models.architecture import DiffAugmentKind
from stages.models.diff_augment import DiffAugment

KINDS: tuple[DiffAugmentKind, ...] = ("colour", "translation", "cutout")


def images(channels: int = 3, count: int = 6, height: int = 16, width: int = 25) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=source, dtype=torch.float64) * 2 - 1


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """(C, H, W) cut out of itself with a border of 0."""
    (_, height, width), most = image.shape, 40
    padded = torch.nn.functional.pad(image, (most,) * 4)
    return padded[:, most - down : most - down + height, most - right : most - right + width]


def test_each_image_is_augmented_as_the_paper_says() -> None:
    x = images()
    torch.manual_seed(0)
    drawn = DiffAugment.draw(KINDS, x)
    assert drawn.factors is not None
    assert drawn.shifts is not None
    assert drawn.holes is not None
    result = drawn.image(x)
    for n, image in enumerate(x):
        brightness, saturation, contrast = drawn.factors[:, n].flatten().tolist()
        expected = image + brightness - 0.5
        grey = expected.mean(0)
        expected = torch.stack([(channel - grey) * saturation * 2 + grey for channel in expected])
        expected = (expected - expected.mean()) * (contrast + 0.5) + expected.mean()
        expected = moved(expected, *drawn.shifts[:, n].tolist()).clone()
        for row in range(8):
            for column in range(13):
                y, z = int(drawn.holes[0, n]) + row, int(drawn.holes[1, n]) + column
                if 0 <= y < 16 and 0 <= z < 25:
                    expected[:, y, z] = 0
        torch.testing.assert_close(result[n], expected)


def test_draws_have_the_papers_ranges_and_are_seeded() -> None:
    x = images(count=2000)
    torch.manual_seed(3)
    drawn = DiffAugment.draw(KINDS, x)
    assert drawn.shifts is not None
    assert drawn.holes is not None
    assert drawn.factors is not None
    assert [(row.min().item(), row.max().item()) for row in drawn.shifts] == [(-2, 2), (-3, 3)]
    # a hole of 8 has its middle in 0 .. 16, one of 13 in 0 .. 24
    assert [(row.min().item(), row.max().item()) for row in drawn.holes] == [(-4, 12), (-6, 18)]
    assert drawn.factors.min() >= 0
    assert drawn.factors.max() < 1
    torch.manual_seed(3)
    assert torch.equal(DiffAugment.draw(KINDS, x).image(x), drawn.image(x))


def test_a_condition_is_moved_and_cut_as_its_image_and_keeps_its_colours() -> None:
    x = images()
    drawn = DiffAugment.draw(("translation", "cutout"), x)
    assert torch.equal(drawn.condition(x), drawn.image(x))
    coloured = DiffAugment.draw(("colour",), x)
    assert torch.equal(coloured.condition(x), x)
    assert not torch.equal(coloured.image(x), x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through(kind: DiffAugmentKind) -> None:
    x = images(count=2, height=4, width=6).requires_grad_()
    assert torch.autograd.gradcheck(DiffAugment.draw((kind,), x).image, (x,))
