"""Styles: the feature vectors of instances, clustered by class (Wang et al. 2018, section 3.4).

The encoder gives every instance one feature vector. After training, k-means over the vectors of all instances
of a class leaves a few typical ones (10 in the paper): at inference an instance is generated in one of its
class's clusters, sampled or chosen, or in the style of a reference image.

Shapes: N images, F feature channels, M instances in all N images together, L classes, K clusters a class.
Nothing here loops over instances. k-means is written out here because this package needs torch only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.models.inputs import unit_range
from stages.models.layers import segment_means, spread
from stages.models.pix2pixhd import FeatureEncoder
from stages.models.step import Batch

RADIX = 1 << 32
"""Ids are below this: two of them make one int64 key."""

RESTARTS = 4
"""Runs of k-means from different starts, of which the tightest clustering counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """Every instance of a batch, once."""

    index: Tensor
    """(N,H,W) int64: which instance, 0 .. M-1, a pixel belongs to."""
    picture: Tensor
    """(M,) int64: the instance's image in the batch."""
    number: Tensor
    """(M,) int64: its id in the instance map."""
    classes: Tensor
    """(M,) int64: the class most of its pixels have."""
    area: Tensor
    """(M,) float32: its share of the image, 0-1."""


def find_instances(instance: Tensor, label: Tensor) -> Instances:
    """The instances of a batch: `instance` (N,1,H,W) integer ids, `label` (N,1,H,W) integer class ids."""
    count, _, height, width = instance.shape
    picture = torch.arange(count, device=instance.device).view(-1, 1, 1).expand(count, height, width)
    pixels = picture * RADIX + instance[:, 0].long() % RADIX  # one key: sorting pairs is far slower
    keys, index, areas = torch.unique(pixels, return_inverse=True, return_counts=True)
    # One vote per (instance, class); the most pixels win, the lower class on a tie.
    votes, size = torch.unique(index * RADIX + label[:, 0].long() % RADIX, return_counts=True)
    voter, vote = votes // RADIX, votes % RADIX
    most = torch.zeros_like(keys).scatter_reduce_(0, voter, size, "amax", include_self=False)
    wins = size == most[voter]
    classes = torch.full_like(keys, RADIX).scatter_reduce_(0, voter[wins], vote[wins], "amin")
    return Instances(
        index=index,
        picture=keys // RADIX,
        number=keys % RADIX,
        classes=classes,
        area=areas.float() / (height * width),
    )


def mean_features(features: Tensor, instances: Instances) -> Tensor:
    """(M,F): the mean over each instance's pixels of (N,F,H,W) features."""
    return segment_means(features.float(), instances.index, len(instances.number))


def style_map(vectors: Tensor, instances: Instances) -> Tensor:
    """(N,F,H,W): every pixel carries the vector of its instance; `vectors` is (M,F)."""
    return spread(vectors, instances.index).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Styles:
    """The clusters of every class, the most frequent first."""

    centers: Tensor
    """(L,K,F) float32; zero where a class has fewer clusters."""
    counts: Tensor
    """(L,K) int64: instances in a cluster; 0: no such cluster."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name."""
        return {"centers": self.centers.contiguous(), "counts": self.counts.contiguous()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Styles:
        """The inverse of `tensors`. Raises ValueError if these are not styles."""
        if set(tensors) != {"centers", "counts"}:
            raise ValueError(f"styles are the tensors centers and counts, not {sorted(tensors)}")
        centers, counts = tensors["centers"], tensors["counts"]
        if centers.dim() != 3 or counts.shape != centers.shape[:2] or counts.dtype != torch.int64:
            raise ValueError(f"no styles: centers {tuple(centers.shape)}, counts {tuple(counts.shape)}")
        return cls(centers=centers.float(), counts=counts)

    def choose(self, instances: Instances, cluster: int) -> Tensor:
        """(M,F): every instance takes cluster `cluster` of its class (modulo the clusters the class has)."""
        return self._take(instances, torch.full_like(instances.number, cluster))

    def sample(self, instances: Instances, seeds: Tensor) -> Tensor:
        """(M,F): every instance takes a random cluster of its class, each with the same probability.

        `seeds` is (N,) int64, one per image. The draw is a function of (seed, instance id) alone, so an image
        does not depend on its batch.
        """
        draws = _mix(_mix(seeds.to(instances.number.device)[instances.picture]) ^ instances.number)
        return self._take(instances, draws)

    def _take(self, instances: Instances, draws: Tensor) -> Tensor:
        """Draws (any integers) to vectors; zeros for a class without clusters, as in NVIDIA's code."""
        classes = instances.classes.clamp(0, len(self.counts) - 1)
        clusters = (self.counts > 0).sum(1)[classes] * (classes == instances.classes)
        return self.centers[classes, draws % clusters.clamp(min=1)] * (clusters > 0).unsqueeze(1)


def from_reference(
    features: Tensor, reference: Instances, instances: Instances, *, default: Tensor | None = None
) -> Tensor:
    """(M,F): every instance takes the mean style its class has in a reference image.

    `features` (R,F) are the vectors of the `reference`'s instances. A class the reference does not show takes
    its row of `default` (M,F), or the mean of the whole reference.
    """
    size = 1 + int(max(reference.classes.max(), instances.classes.max()))
    weights = torch.zeros(size, device=features.device).index_add_(0, reference.classes, reference.area)
    sums = features.new_zeros(size, features.shape[1])
    sums.index_add_(0, reference.classes, features * reference.area.unsqueeze(1))
    means = sums / weights.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    if default is None:
        default = (sums.sum(0) / weights.sum()).expand(len(instances.classes), -1)
    shown = (weights > 0)[instances.classes].unsqueeze(1)
    return torch.where(shown, means[instances.classes], default)


@torch.no_grad()
def collect_styles(
    encoder: FeatureEncoder,
    batches: Iterable[Batch],
    *,
    num_classes: int,
    limit: int = 200_000,
) -> Styles:
    """The styles of a trained encoder over (a sample of) its training set, for `save_model`.

    Reads batches until `limit` instances are seen: more of them move the clusters little, and memory stays
    bounded. Batches must be on the encoder's device, with a labels source and instances. Raises ValueError if
    there are none.
    """
    features, classes = [], []
    for batch in batches:
        assert batch.instance is not None, "an encoder is trained on pairs with instances"
        for row in range(len(batch.source)):  # one by one: a batch of all workers may not fit
            roles = (batch.target, batch.instance, batch.source)
            target, instance, source = (role[row : row + 1] for role in roles)
            instances = find_instances(instance, source)
            features.append(mean_features(encoder.features(unit_range(target)), instances).cpu())
            classes.append(instances.classes.cpu())
        if sum(map(len, classes)) >= limit:
            break
    if not features:
        raise ValueError("no pairs to take styles from")
    return fit_styles(torch.cat(features), torch.cat(classes), num_classes=num_classes)


def fit_styles(features: Tensor, classes: Tensor, *, num_classes: int, clusters: int = 10) -> Styles:
    """k-means within each class over the instances of (a sample of) the training set.

    `features` (M,F), `classes` (M,). A class with fewer distinct vectors than `clusters` gets as many
    clusters as it has vectors; a class without instances gets none. Same input, same styles.
    """
    features = features.detach().to("cpu", torch.float64)
    classes = classes.to("cpu")
    centers = torch.zeros(num_classes, clusters, features.shape[1])
    counts = torch.zeros(num_classes, clusters, dtype=torch.int64)
    for number in torch.unique(classes).tolist():
        if not 0 <= number < num_classes:
            continue
        generator = torch.Generator().manual_seed(number)
        means, sizes = k_means(features[classes == number], clusters, generator)
        centers[number, : len(means)] = means.float()
        counts[number, : len(means)] = sizes
    return Styles(centers=centers, counts=counts)


def k_means(points: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ starts, best of four: centers (k,F) and sizes (k,), largest first.

    `points` is (n,F), n >= 1, float64; k is `clusters`, or the number of distinct points if that is less.
    """
    clusters = min(clusters, len(torch.unique(points, dim=0)))
    runs = [_lloyd(points, _seeded_centers(points, clusters, generator)) for _ in range(RESTARTS)]
    _, centers, sizes = min(runs, key=lambda run: run[0])
    order = torch.argsort(sizes, descending=True, stable=True)
    return centers[order], sizes[order]


def _seeded_centers(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur & Vassilvitskii 2007): centres drawn by squared distance to those before."""
    chosen = points[torch.randint(len(points), (1,), generator=generator)]
    distance = (points - chosen).square().sum(1)
    while len(chosen) < clusters:
        # a cumulative draw: torch.multinomial takes no more than 2^24 points
        mark = torch.rand(1, dtype=torch.float64, generator=generator) * distance.sum()
        position = torch.searchsorted(distance.cumsum(0), mark, right=True).clamp(max=len(points) - 1)
        if distance[position] == 0:  # rounding chose a point a second time
            position = distance.argmax().view(1)
        chosen = torch.cat([chosen, points[position]])
        distance = torch.minimum(distance, (points - points[position]).square().sum(1))
    return chosen


def _lloyd(points: Tensor, centers: Tensor, iterations: int = 100) -> tuple[float, Tensor, Tensor]:
    """Sum of squared distances, centers, sizes after Lloyd's iterations; no cluster stays empty."""
    norms = points.square().sum(1)
    assigned = torch.full((len(points),), -1)
    sizes = torch.zeros(len(centers), dtype=torch.int64)
    inertia = float("inf")
    for _ in range(iterations):
        distances = (norms.unsqueeze(1) - 2 * points @ centers.T + centers.square().sum(1)).clamp(min=0)
        nearest, now = distances.min(1)
        sizes = torch.bincount(now, minlength=len(centers))
        for empty in (sizes == 0).nonzero().flatten().tolist():
            farthest = torch.where(sizes[now] > 1, nearest, -1.0).argmax()
            now[farthest], nearest[farthest] = empty, 0.0
            sizes = torch.bincount(now, minlength=len(centers))
        inertia = float(nearest.sum())
        if torch.equal(now, assigned):
            break
        assigned = now
        sums = torch.zeros_like(centers).index_add_(0, assigned, points)
        centers = sums / sizes.unsqueeze(1)
    return inertia, centers, sizes


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 (wrapping), without the sign bit: neighbours get unrelated draws."""
    z = values + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return (z ^ _shift(z, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def _shift(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right (torch's is arithmetic)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
