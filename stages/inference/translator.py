"""A loaded model as a function from images to images of any size.

    Translator(load_model(folder)).translate(sources, instances)  ->  generated images

in:  sources (H, W, C) of the model's kind, instance maps (H, W, 1) if it needs them
out: one image (H, W, C) of the target kind per source, of the source's size

The network sees a source as in training (one-hot labels, instance edges, [-1, 1]), padded by reflection to a
size that it takes. torch and numpy only: batch inference, the MLflow model and the evaluation's untrained
baseline share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stages import seeding
from stages.base import Kind
from stages.images import colour, kinds, pictures
from stages.images.kinds import Array
from stages.inference.tiled import FeatureMap, LayerByLayer
from stages.models.architecture import Picture, size_multiple, uses_edges
from stages.models.copies import to_device, to_host
from stages.models.fast.frozen import freeze
from stages.models.files.saved import LoadedModel
from stages.models.inputs import make_condition, padded_size, reflect_to, reflected, translate, unit_range
from stages.models.layers import noise_sources
from stages.models.styles import find_instances, from_reference, mean_features, style_map

RowReader = Callable[[int, int], tuple[Sequence[Array], Sequence[Array] | None]]
"""Reads rows, from a first one up to another, of the images of a batch."""

StyleKind = Literal["random", "cluster", "reference"]

CHANNELS = 64
"""A band has as many values as a tile with this number of channels."""


def noise_seed(seed: int, key: str, sample: int = 0) -> int:
    """The seed of the noise and random style of one image."""
    return seeding.number(seed, sample, key)


class Translator:
    """A model to call with arrays, from any threads at once, on the device that it was loaded to.

    The loaded model itself stays as it is.

    stochastic    with dropout as noise, as Isola et al. generate
    tile          pictures with more pixels than a square of this side are computed layer by layer, in bands
                  with as many pixels as it has: the same picture in bounded memory. None: always whole
    compiled      torch.compile the generator, for a GPU and batches of one shape
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        precision: Literal["float32", "bf16"] = "float32",
        stochastic: bool = False,
        tile: int | None = None,
        compiled: bool = False,
    ) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = next(model.generator.parameters()).device
        generator = freeze(model.generator, device=self.device, dtype=dtype)
        if compiled:
            generator.compile()
        self.model = replace(model, generator=generator)
        self.precision = precision
        self.stochastic, self.tile = stochastic, tile
        self.arch, self.inputs = model.manifest.architecture, model.manifest.inputs
        self.multiple, self.minimum = size_multiple(self.arch, enhancers=model.manifest.enhancers)
        trained = model.manifest.preprocessing.pictures
        default: Kind = "labels" if self.inputs.source == "labels" else "rgb"
        self.source = trained.get("source", Picture(kind=default, classes=self.inputs.classes))
        self.source_kind: Kind = self.source.kind
        self.target = trained.get("target", Picture(kind="rgb"))
        self.target_kind: Kind = self.target.kind
        self._make_condition = partial(
            make_condition, arch=self.arch, inputs=self.inputs, kind=self.source_kind
        )
        edges = uses_edges(self.arch, self.inputs)
        self.needs_instances = self.inputs.instances and (edges or model.encoder is not None)

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image of this size is padded to."""
        return (
            padded_size(height, multiple=self.multiple, minimum=self.minimum),
            padded_size(width, multiple=self.multiple, minimum=self.minimum),
        )

    def prepared(self, source: Array) -> Array:
        """A source as the model was trained on it. Raises ImageRejected if its ids are no classes."""
        if self.source_kind in ("lab_l", "lab_ab") and source.shape[2] == 3:  # a file's colours
            return colour.lab_channels(source, self.source_kind)
        return colour.class_ids(source, self.source) if self.source_kind == "labels" else source

    def translate(
        self,
        sources: Sequence[Array],
        instances: Sequence[Array] | None = None,
        *,
        seeds: Sequence[int] | None = None,
        style: StyleKind = "random",
        cluster: int = 0,
        reference: tuple[Array, Array, Array] | None = None,
    ) -> list[Array]:
        """Images (H, W, C) of the target kind, one per source; all sources have one shape (H, W, C).

        instances   id maps (H, W, 1), for a model that needs them
        seeds       one per source, for the noise and for random styles
        reference   a target image with its instance and label maps, for that style

        Raises ValueError for input that the model cannot take, ImageRejected for ids that are no classes.
        """
        sources = [self.prepared(source) for source in sources]
        if self.needs_instances and instances is None:
            raise ValueError("this model needs an instance map with every source")
        height, width = sources[0].shape[:2]
        instances = instances if self.needs_instances else None
        if any(one.shape != (height, width, 1) for one in instances or ()):
            raise ValueError(f"an instance map is not of its source's size, {width}x{height}")
        seeds = list(seeds) if seeds is not None else [0] * len(sources)
        with torch.inference_mode():
            features = None
            if self.model.encoder is not None:
                assert instances is not None
                pair = self._stack(sources), self._stack(instances)
                features = self._features(*pair, seeds, style, cluster, reference)
            if self.tile is not None and height * width > self.tile**2:

                def read(start: int, stop: int) -> tuple[list[Array], list[Array] | None]:
                    rows = slice(start, stop)
                    maps = None if instances is None else [one[rows] for one in instances]
                    return [one[rows] for one in sources], maps

                bands = self.bands(read, height, width, features=features, seeds=seeds)
                return [np.concatenate(one) for one in zip(*bands, strict=True)]
            instance = None if instances is None else self._stack(instances)
            out = self._whole(self._stack(sources), instance, features, seeds)
            return self._arrays(out.float().permute(0, 2, 3, 1))

    def output(self, generated: Array, source: Array) -> Array:
        """A generated image as it is written: grey and colour as they are, Lab and channels as RGB.

        source   prepared
        """
        if self.target_kind in ("rgb", "grey", "grey16"):
            return generated
        lightness = source if self.source_kind == "lab_l" else None
        return pictures.picture(generated, self.target_kind, lightness=lightness)

    def _arrays(self, out: Tensor) -> list[Array]:
        """(N, H, W, C) in [-1, 1] -> arrays of the target kind; rounded on the device where it is uint8.

        Waits for this thread's stream, and not for what other threads have a GPU do.
        """
        photo = self.target_kind in kinds.PHOTOS
        copy, arrived = to_host(((out + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8) if photo else out)
        if arrived is not None:
            arrived.synchronize()
        arrays = list(copy.numpy())
        return arrays if photo else [kinds.restore(array, self.target_kind) for array in arrays]

    def _stack(self, arrays: Sequence[Array]) -> Tensor:
        """Arrays (H, W, C) of one shape -> (N, C, H, W) on the device; ids stay integers, amounts float32."""
        batch = np.stack(arrays).transpose(0, 3, 1, 2)
        if batch.dtype == np.uint16:  # torch has few operators for it
            batch = batch.astype(np.int32)
        return to_device(torch.from_numpy(np.ascontiguousarray(batch)), self.device)

    def _whole(
        self, source: Tensor, instance: Tensor | None, features: Tensor | None, seeds: Sequence[int]
    ) -> Tensor:
        height, width = source.shape[2:]
        size = self.padded(height, width)
        maps = None if instance is None else reflect_to(instance, *size)
        condition = self._make_condition(reflect_to(source, *size), maps)
        condition = condition.contiguous(memory_format=torch.channels_last)
        style = None if features is None else reflect_to(features, *size)
        noise = noise_sources(seeds) if self.stochastic else None
        with self._computing():
            out = translate(self.model.generator, condition, style, noise)
        return out[:, :, :height, :width]

    def bands(
        self,
        read: RowReader,
        height: int,
        width: int,
        *,
        features: Tensor | None = None,
        seeds: Sequence[int] = (0,),
    ) -> Iterator[list[Array]]:
        """The pictures from top to bottom, in bands: each layer in bands of as many pixels as a tile has.

        read       rows of the sources, prepared, and of the instance maps
        features   (N, F, height, width): the styles of a model with an encoder
        """
        assert self.tile is not None
        size = self.padded(height, width)

        def condition(start: int, stop: int) -> Tensor:
            """Rows of the padded condition; the rows beside them decide on edges of instances."""
            first, last = max(0, start - 1), min(size[0], stop + 1)
            rows = reflected(torch.arange(first, last), height)
            low, high = int(rows.min()), int(rows.max()) + 1
            rows = to_device(rows - low, self.device)

            def padded(values: Tensor) -> Tensor:
                return reflect_to(values.index_select(2, rows), last - first, size[1])

            sources, instances = read(low, high)
            maps = None if instances is None else padded(self._stack(instances))
            band = self._make_condition(padded(self._stack(sources)), maps)
            if features is not None:
                band = torch.cat([band, padded(features[:, :, low:high])], 1)
            band = band[:, :, start - first : stop - first]
            return band.contiguous(memory_format=torch.channels_last)

        noise = noise_sources(seeds) if self.stochastic else None
        with self._computing():
            channels = condition(0, 1).shape[1]
            source = FeatureMap(
                channels=channels, height=size[0], width=size[1], read=condition, work=channels * size[1]
            )
            walk = LayerByLayer(self.tile**2 * CHANNELS // len(seeds), size[0])
            out = walk.generate(self.model.generator, source, noise)
        for start, stop in walk.bands(out, height):
            with self._computing():
                band = out.read(start, stop)[..., :width].float()
                arrays = self._arrays(band.permute(0, 2, 3, 1))
            yield arrays

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield

    def _features(
        self,
        source: Tensor,
        instance: Tensor,
        seeds: Sequence[int],
        style: StyleKind,
        cluster: int,
        reference: tuple[Array, Array, Array] | None,
    ) -> Tensor:
        """Style features (N, F, H, W): every instance is filled with a style of its class."""
        styles, encoder = self.model.styles, self.model.encoder
        assert encoder is not None
        instances = find_instances(instance, source)
        if style == "reference":
            if reference is None:
                raise ValueError("a reference style needs a picture with its instance and label maps")
            arrays = (*reference[:2], self.prepared(reference[2]))
            picture, instance_map, label_map = (self._stack([array]) for array in arrays)
            shown = find_instances(instance_map, label_map)
            features = encoder.features(unit_range(picture, kind=self.target_kind))
            vectors = from_reference(
                mean_features(features, shown),
                shown,
                instances,
                default=None if styles is None else styles.choose(instances, 0),
            )
        elif styles is None:
            raise ValueError("the model was saved without styles: give it a reference picture")
        elif style == "cluster":
            vectors = styles.choose(instances, cluster)
        else:
            vectors = styles.sample(
                instances, to_device(torch.tensor(list(seeds), dtype=torch.int64), self.device)
            )
        return style_map(vectors, instances)
