"""Styles: instances found without loops, clusters that are right and repeatable, draws that travel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stages.models.pix2pixhd import FeatureEncoder
from stages.models.step import Batch
from stages.models.styles import (
    Styles,
    collect_styles,
    find_instances,
    fit_styles,
    from_reference,
    k_means,
    mean_features,
    style_map,
)


def scene(pictures: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, instance ids and labels of a small batch: cells of 8 pixels, three classes."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 6, (pictures, 1, 3, 4), generator=generator)
    instance = cells.repeat_interleave(8, 2).repeat_interleave(8, 3).int() + 1000
    return torch.randn(pictures, 3, 24, 32, generator=generator), instance, (instance % 3).to(torch.uint8)


def test_means_equal_the_plain_loop_over_instances() -> None:
    features, instance, label = scene()
    instances = find_instances(instance, label)
    spread = style_map(mean_features(features, instances), instances)
    expected = torch.empty_like(features)
    for n in range(len(features)):
        for number in instance[n].unique():
            where = instance[n, 0] == number
            expected[n, :, where] = features[n, :, where].mean(1, keepdim=True)
    torch.testing.assert_close(spread, expected)
    assert instances.area.sum().item() == pytest.approx(2)


def test_an_instance_has_the_class_of_most_of_its_pixels() -> None:
    instance = torch.tensor([[7, 7, 7, 9, 9]], dtype=torch.int32).view(1, 1, 1, 5)
    label = torch.tensor([[4, 2, 2, 5, 1]], dtype=torch.uint8).view(1, 1, 1, 5)
    instances = find_instances(instance, label)
    assert instances.number.tolist() == [7, 9]
    assert instances.classes.tolist() == [2, 1]  # a tie goes to the lower class


def test_k_means_finds_separate_clouds() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    points = torch.cat(
        [
            centre + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
            for centre, n in zip(truth, (50, 30, 20), strict=True)
        ]
    )
    centers, sizes = k_means(points, 3, generator)
    torch.testing.assert_close(centers, truth, atol=0.1, rtol=0)
    assert sizes.tolist() == [50, 30, 20]


def test_fewer_vectors_than_clusters_give_one_cluster_each() -> None:
    points = torch.tensor([[1.0], [1.0], [2.0]], dtype=torch.float64)
    centers, sizes = k_means(points, 10, torch.Generator().manual_seed(0))
    assert centers.flatten().tolist() == [1, 2]
    assert sizes.tolist() == [2, 1]


def test_styles_are_fitted_per_class_and_repeatably() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(200, 3, generator=generator)
    classes = torch.randint(0, 3, (200,), generator=generator) * 2  # classes 0, 2, 4
    first = fit_styles(features, classes, num_classes=6, clusters=4)
    second = fit_styles(features, classes, num_classes=6, clusters=4)
    assert torch.equal(first.centers, second.centers)
    assert first.counts[1::2].sum() == 0
    for number in (0, 2, 4):
        assert first.counts[number].sum() == (classes == number).sum()
        mine = features[classes == number]
        nearest = torch.cdist(mine, first.centers[number]).argmin(1)
        means = torch.stack([mine[nearest == k].mean(0) for k in range(4)])
        torch.testing.assert_close(first.centers[number], means)


def styles() -> Styles:
    counts = torch.tensor([[5, 3, 1], [2, 2, 0], [0, 0, 0]])
    return Styles(centers=torch.arange(9.0).view(3, 3, 1) + 1, counts=counts)


def test_the_encoder_gives_one_vector_an_instance() -> None:
    encoder = FeatureEncoder(3, 3, width=4, downsamplings=1)
    image, instance, label = scene()
    found = find_instances(instance, label)
    vectors = mean_features(encoder.features(image), found)
    torch.testing.assert_close(style_map(vectors, found), encoder(image, instance))


def test_styles_are_collected_over_batches_up_to_a_limit() -> None:
    encoder = FeatureEncoder(3, 3, width=4, downsamplings=1)
    taken = []

    def batches() -> Iterator[Batch]:
        for seed in range(5):
            _, instance, label = scene(seed=seed)
            taken.append(seed)
            target = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8)
            yield Batch(source=label, target=target, instance=instance)

    found = collect_styles(encoder, batches(), num_classes=3)
    assert found.counts.sum() == sum(len(find_instances(*scene(seed=seed)[1:]).number) for seed in range(5))
    taken.clear()
    collect_styles(encoder, batches(), num_classes=3, limit=1)
    assert taken == [0]
    with pytest.raises(ValueError, match="no pairs"):
        collect_styles(encoder, [], num_classes=3)


def test_a_chosen_cluster_is_the_style_of_every_instance_of_its_class() -> None:
    _, instance, label = scene(1)
    instances = find_instances(instance, label)
    chosen = style_map(styles().choose(instances, 2), instances)
    expected = torch.tensor([3.0, 4.0, 0.0])[label.long()]  # class 1 has two clusters, class 2 none
    torch.testing.assert_close(chosen, expected)


def test_a_sample_does_not_depend_on_the_batch_it_is_drawn_in() -> None:
    _, instance, label = scene(3)
    seeds = torch.tensor([11, 22, 33])
    together = find_instances(instance, label)
    whole = style_map(styles().sample(together, seeds), together)
    alone = find_instances(instance[1:2], label[1:2])
    torch.testing.assert_close(whole[1:2], style_map(styles().sample(alone, seeds[1:2]), alone))


def test_samples_take_every_cluster_about_as_often() -> None:
    instance = torch.arange(3000, dtype=torch.int32).view(1, 1, 30, 100)
    instances = find_instances(instance, torch.zeros_like(instance))
    drawn = styles().sample(instances, torch.tensor([0])).flatten().long().bincount(minlength=4)
    assert drawn[0] == 0
    assert (drawn[1:] > 850).all()


def test_a_reference_lends_its_classes_styles() -> None:
    features = torch.tensor([[1.0], [3.0], [8.0]])
    reference = find_instances(
        torch.tensor([1, 1, 1, 2, 3, 3], dtype=torch.int32).view(1, 1, 1, 6),
        torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.uint8).view(1, 1, 1, 6),
    )
    instances = find_instances(
        torch.tensor([5, 6, 7], dtype=torch.int32).view(1, 1, 1, 3),
        torch.tensor([0, 1, 2], dtype=torch.uint8).view(1, 1, 1, 3),
    )
    taken = from_reference(features, reference, instances)
    # class 0: (3 * 1 + 1 * 3) / 4; class 2 is not shown: the mean of the picture
    torch.testing.assert_close(taken.flatten(), torch.tensor([1.5, 8.0, 22 / 6]))


def test_saved_tensors_give_the_styles_again_and_others_are_refused() -> None:
    again = Styles.from_tensors(styles().tensors())
    assert torch.equal(again.counts, styles().counts)
    with pytest.raises(ValueError, match="styles are the tensors centers and counts"):
        Styles.from_tensors({"centers": torch.zeros(1, 1, 1)})
    with pytest.raises(ValueError, match="no styles"):
        Styles.from_tensors({"centers": torch.zeros(1, 1, 1), "counts": torch.zeros(2, 1, dtype=torch.int64)})
