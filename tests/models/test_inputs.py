"""Inputs: one-hot, edges, instance means, padding, each against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.images import kinds
from stages.models.architecture import DiffAugmentKind
from stages.models.inputs import DiffAugment, instance_edges, one_hot, padded_size, reflect_to, unit_range
from stages.models.layers import instance_mean, instance_segments


def ids(*shape: int, high: int = 5) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def test_one_hot_marks_each_pixels_class() -> None:
    labels = ids(2, 1, 3, 4).to(torch.uint8)
    expected = torch.nn.functional.one_hot(labels[:, 0].long(), 5).permute(0, 3, 1, 2).float()
    assert torch.equal(one_hot(labels, 5), expected)


def test_ids_outside_the_range_are_no_class_and_no_crash() -> None:
    hot = one_hot(torch.tensor([[[[255, 3, -1]]]]), 4)
    assert hot[0, :, 0, 0].sum() == 0
    assert hot[0, :, 0, 2].sum() == 0
    assert hot[0, 3, 0, 1] == 1


def test_edges_are_where_a_neighbour_is_another_instance() -> None:
    instance = ids(2, 1, 6, 7, high=3)
    edges = instance_edges(instance)
    for n, y, x in np.ndindex(2, 6, 7):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [(i, j) for i, j in around if 0 <= i < 6 and 0 <= j < 7]
        other = any(instance[n, 0, i, j] != instance[n, 0, y, x] for i, j in inside)
        assert edges[n, 0, y, x] == float(other)


def test_means_are_taken_over_each_instance_of_each_sample_with_any_ids() -> None:
    instance = ids(2, 1, 6, 7) * 33_001 - 7  # ids beyond 16 bits, and negative ones
    features = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    means = instance_mean(features, instance)
    for n in range(2):
        for value in instance[n].unique():
            inside = instance[n, 0] == value
            expected = features[n][:, inside].mean(1, keepdim=True)
            torch.testing.assert_close(means[n][:, inside], expected.expand(-1, int(inside.sum())))


def test_the_mean_of_a_large_instance_is_exact() -> None:
    features = torch.full((1, 1, 1024, 1024), 0.3)
    means = instance_mean(features, torch.zeros(features.shape, dtype=torch.int32))
    assert means.unique().tolist() == pytest.approx([0.3])


def test_segments_are_equal_exactly_within_an_instance_of_a_sample() -> None:
    instance = ids(2, 1, 4, 4)
    segments = instance_segments(instance)
    flat = instance.reshape(2, -1)
    same = segments[:, :, None] == segments[:, None, :]
    assert torch.equal(same, flat[:, :, None] == flat[:, None, :])
    assert not set(segments[0].tolist()) & set(segments[1].tolist())
    assert segments.max() < segments.numel()


def test_gradients_flow_through_the_means() -> None:
    features = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: instance_mean(x, ids(1, 1, 3, 3)), (features,))


@pytest.mark.parametrize("kind", ["rgb", "grey", "grey16", "lab_l", "lab_ab"])
def test_amounts_are_normalised_as_arrays_are(kind: kinds.Kind) -> None:
    stored = np.arange(0, 256, dtype=np.uint8)
    values = stored.astype(np.int32) * 257 if kind == "grey16" else stored
    expected = torch.from_numpy(kinds.normalise(values, kind))
    assert torch.equal(unit_range(torch.from_numpy(values), kind=kind), expected)
    assert torch.equal(unit_range(expected, kind=kind), expected)


def test_sizes_are_rounded_up_and_never_below_the_minimum() -> None:
    assert padded_size(256, multiple=32, minimum=64) == 256
    assert padded_size(257, multiple=32, minimum=64) == 288
    assert padded_size(1, multiple=32, minimum=64) == 64


def test_reflection_padding_takes_any_amount_and_dtype() -> None:
    for height, width in ((1, 1), (1, 3), (2, 5), (4, 3)):
        picture = ids(1, 2, height, width, high=100).to(torch.uint8)
        padded = reflect_to(picture, 9, 11)
        pads = ((0, 0), (0, 0), (0, 9 - height), (0, 11 - width))
        assert np.array_equal(padded.numpy(), np.pad(picture.numpy(), pads, mode="reflect"))
        assert torch.equal(padded[:, :, :height, :width], picture)


# -- augmentation against the paper's steps, image by image ----------------------

KINDS: tuple[DiffAugmentKind, ...] = ("colour", "translation", "cutout")


def images(channels: int = 3, count: int = 6, height: int = 16, width: int = 25) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, height, width, generator=source, dtype=torch.float64) * 2 - 1


def moved(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
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
