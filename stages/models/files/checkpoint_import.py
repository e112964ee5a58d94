"""Published checkpoints to our networks: the tensors' names and shapes give the architecture.

NVIDIA/pix2pixHD (`latest_net_G.pth`, `_D`, `_E`) and junyanz/pytorch-CycleGAN-and-pix2pix. For settings that
leave no tensors the defaults of those repositories are assumed; `Imported.notes` says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stages.errors import first_invalid
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files import nvidia_names

State = Mapping[str, Tensor]

MODEL_WEIGHT = r"model\.(\d+)\.weight"
NO_DISCRIMINATOR = "no discriminator given: its settings are the paper's"
COUNTERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A published model in our networks, for `save_model`."""

    architecture: Pix2Pix | Pix2PixHD
    inputs: InputSpec
    generator: nn.Module
    discriminator: nn.Module | None
    encoder: nn.Module | None
    notes: tuple[str, ...]
    """Assumptions about settings that leave no tensors, one sentence each."""


def import_checkpoint(
    generator: State,
    *,
    discriminator: State | None = None,
    encoder: State | None = None,
    source: Literal["image", "labels"] | None = None,
    classes: int | None = None,
    instances: bool | None = None,
) -> Imported:
    """Build our networks from published state dicts (see `weights.read_tensors`). No tensor may be left over.

    `source`, `classes` and `instances` say what the input channels mean where the assumption would be wrong:
    up to 4 channels are an image (the 4th of an HD model: instance edges), more are one-hot labels and, for
    an HD model, one channel of edges.

    Raises ValueError, one line, if the tensors are of another network or do not fit together.
    """
    notes: list[str] = []
    architecture: Pix2Pix | Pix2PixHD
    try:
        if any(name.startswith("model.model.") for name in generator):
            if encoder is not None:
                raise ValueError("a pix2pix generator has no feature encoder")
            architecture, channels, target = _pix2pix(generator, discriminator, notes)
        elif "model.1.weight" in generator:
            architecture, channels, target = _pix2pixhd(generator, discriminator, encoder, notes)
        else:
            raise ValueError(
                "neither a pix2pix U-Net (model.model.*) nor a pix2pixHD generator (model.1.weight ...): "
                f"the first tensor is {min(generator)[:80]}"
            )
    except ValidationError as error:
        raise ValueError(f"the tensors give {first_invalid(error)}") from error
    if isinstance(architecture, Pix2PixHD) and architecture.feature_encoder:
        channels -= architecture.feature_channels
        if instances is False:
            raise ValueError("a feature encoder needs instance maps")
        instances = True
    edges = isinstance(architecture, Pix2PixHD)
    inputs = _inputs(channels, target, source, classes, instances if edges else False, notes, hd=edges)
    if isinstance(architecture, Pix2PixHD) and not inputs.instances:
        architecture = architecture.model_copy(update={"instance_edges": False})

    filled = partial(_filled, architecture, inputs)
    return Imported(
        architecture=architecture,
        inputs=inputs,
        generator=filled("generator", generator),
        discriminator=None if discriminator is None else filled("discriminator", discriminator),
        encoder=None if encoder is None else filled("encoder", encoder),
        notes=tuple(notes),
    )


# -- architectures ------------------------------------------------------------


def _pix2pix(generator: State, discriminator: State | None, notes: list[str]) -> tuple[Pix2Pix, int, int]:
    """Architecture, input channels and output channels of a published U-Net and its PatchGAN."""
    levels = 2
    while f"model.model.1.{'model.3.' * (levels - 2)}model.3.model.1.weight" in generator:
        levels += 1
    width, channels = _shape(generator, "model.model.0.weight")[:2]
    target = _shape(generator, "model.model.3.weight")[1]
    norm = "batch" if "model.model.1.model.2.weight" in generator else "instance"
    values: dict[str, Any] = {"levels": levels, "width": width, "norm": norm, "dropout": "common"}
    notes.append("dropout leaves no tensors: placed as in the published code (`dropout: common`)")
    if discriminator is None:
        notes.append(NO_DISCRIMINATOR)
    else:
        pixel = "net.0.weight" in discriminator
        values |= _first_layer(discriminator, "net.0.weight" if pixel else "model.0.weight", channels, target)
        values["discriminator_layers"] = 0 if pixel else _count(discriminator, MODEL_WEIGHT, dims=4) - 2
    return Pix2Pix.model_validate(values), channels, target


def _pix2pixhd(
    generator: State, discriminator: State | None, encoder: State | None, notes: list[str]
) -> tuple[Pix2PixHD, int, int]:
    """Architecture, input channels (with the style features) and output channels of a pix2pixHD model."""
    if _shape(generator, "model.1.weight")[2:] != (7, 7):
        raise ValueError("model.1.weight is no 7x7 convolution: not a pix2pixHD generator")
    width, channels = _shape(generator, "model.1.weight")[:2]
    enhancers = _count(generator, r"model(\d+)_1\.1\.weight")
    enhancer_blocks = _count(generator, r"model1_2\.(\d+)\.conv_block\.1\.weight")
    plain = _count(generator, MODEL_WEIGHT, dims=4)  # stem, ways down, ways up, maybe the head
    head = f"model{enhancers}_2.{enhancer_blocks + 4}.weight" if enhancers else _last(generator)
    target = _shape(generator, head)[0]
    if width % 2**enhancers:
        raise ValueError(f"G1's width {width} cannot be halved {enhancers} times")
    values: dict[str, Any] = {
        "enhancers": enhancers,
        "width": width // 2**enhancers,
        "downsamplings": (plain - (1 if enhancers else 2)) // 2,
        "blocks": _count(generator, r"model\.(\d+)\.conv_block\.1\.weight"),
        "enhancer_blocks": enhancer_blocks,
    }
    condition = channels
    if encoder is not None:
        stem = _shape(encoder, "model.1.weight")
        features = _shape(encoder, _last(encoder))[0]
        if stem[1] != target or features >= channels:
            raise ValueError(
                f"the encoder ({stem[1]} channels to {features}) does not go with a generator "
                f"of {channels} channels to {target}"
            )
        condition -= features
        values |= {
            "feature_encoder": True,
            "feature_channels": features,
            "feature_width": stem[0],
            "feature_downsamplings": (_count(encoder, MODEL_WEIGHT, dims=4) - 2) // 2,
        }
    if discriminator is None:
        notes.append(NO_DISCRIMINATOR)
    else:
        single = "layer0.0.weight" in discriminator
        scale, layer = (
            (r"layer(\d+)\.0\.weight", r"layer0\.(\d+)\.weight")
            if single
            else (r"scale(\d+)_layer0\.0\.weight", r"scale0_layer(\d+)\.0\.weight")
        )
        first = "layer0.0.weight" if single else "scale0_layer0.0.weight"
        values |= _first_layer(discriminator, first, condition, target)
        values["discriminators"] = _count(discriminator, scale)
        values["discriminator_layers"] = _count(discriminator, layer, dims=4) - 2
    return Pix2PixHD.model_validate(values), channels, target


def _first_layer(discriminator: State, name: str, condition: int, target: int) -> dict[str, Any]:
    """What a discriminator's first convolution says of the architecture."""
    width, channels = _shape(discriminator, name)[:2]
    if channels not in (target, condition + target):
        raise ValueError(
            f"the discriminator takes {channels} channels, not {condition + target} (source and target) or "
            f"{target} (target); is a feature encoder missing?"
        )
    return {"discriminator_width": width, "conditional": channels != target}


def _inputs(
    channels: int,
    target: int,
    source: Literal["image", "labels"] | None,
    classes: int | None,
    instances: bool | None,
    notes: list[str],
    *,
    hd: bool,
) -> InputSpec:
    """The meaning of the condition's channels: as requested, else by the published defaults."""
    if source is None:
        source = "labels" if classes is not None or channels > 4 else "image"
        meaning = "one-hot labels" if source == "labels" else "an image"
        notes.append(f"{channels} input channels: assumed to be {meaning} (--source)")
    if instances is None:
        instances = hd and (channels != classes if classes is not None else channels not in (1, 2, 3))
        if hd:
            what = "the last input channel is instance edges" if instances else "no channel of instance edges"
            notes.append(f"assumed that {what} (--instances, --no-instances)")
    rest = channels - 1 if instances else channels
    if rest < 1 or (classes is not None and classes != rest):
        meaning = (source if classes is None else f"{classes} classes") + (" and edges" if instances else "")
        raise ValueError(f"{channels} input channels cannot be {meaning}")
    if source == "labels":
        return InputSpec(source="labels", classes=rest, instances=instances, target_channels=target)
    return InputSpec(source="image", channels=rest, instances=instances, target_channels=target)


# -- tensors ------------------------------------------------------------------


def _tidy(state: State) -> dict[str, Tensor]:
    """Floats as float32; without the statistics that old versions saved for instance norms."""
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name.rpartition(".")[2] not in COUNTERS or f"{name.rpartition('.')[0]}.weight" in state
    }


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise ValueError(f"no tensor {name}: not the network it looks like")
    shape = tuple(state[name].shape)
    if len(shape) != 4:
        raise ValueError(f"{name} is {list(shape)}, not a convolution's")
    return shape


def _numbers(state: State, pattern: str, dims: int | None = None) -> set[int]:
    """The numbers a pattern's group matches among the names (of tensors with `dims` dimensions)."""
    return {
        int(match[1])
        for name, tensor in state.items()
        if (match := re.fullmatch(pattern, name)) and dims in (None, tensor.dim())
    }


def _count(state: State, pattern: str, dims: int | None = None) -> int:
    return len(_numbers(state, pattern, dims))


def _last(state: State) -> str:
    """The last convolution of a `model` sequence."""
    return f"model.{max(_numbers(state, MODEL_WEIGHT), default=0)}.weight"


BUILDERS: Mapping[str, Callable[[Pix2Pix | Pix2PixHD, InputSpec], nn.Module | None]] = {
    "generator": build_generator,
    "discriminator": build_discriminator,
    "encoder": build_encoder,
}


def _filled(architecture: Pix2Pix | Pix2PixHD, inputs: InputSpec, role: str, state: State) -> nn.Module:
    """A network with its published weights. Raises ValueError if one is missing or left over."""
    state = _tidy(state)
    with torch.device("meta"):  # without initial weights: all of them come from the files
        network = BUILDERS[role](architecture, inputs)
    assert network is not None
    names = nvidia_names.layer_names(network, intermediate_features="layer0.0.weight" not in state)
    layers = set(names.values())
    for name in sorted(state):
        if name.rpartition(".")[0] not in layers:
            hint = " (batch norm in a pix2pixHD network is not supported)" if state[name].dim() == 1 else ""
            raise ValueError(f"{role}: {name[:80]} has no place in the network{hint}")
    ours = nvidia_names.renamed(state, {theirs: ours for ours, theirs in names.items()})
    expected = network.state_dict()
    for name, empty in expected.items():
        if name not in ours and name.endswith("num_batches_tracked"):
            ours[name] = torch.zeros(empty.shape, dtype=empty.dtype)  # torch before 0.4.1 did not count
        if name not in ours:
            layer, _, part = name.rpartition(".")
            raise ValueError(f"{role}: no tensor {names.get(layer, layer)}.{part}")
        if ours[name].shape != empty.shape:
            layer, _, part = name.rpartition(".")
            raise ValueError(
                f"{role}: {names.get(layer, layer)}.{part} is {list(ours[name].shape)}, "
                f"the other tensors make it {list(empty.shape)}"
            )
    network.to_empty(device="cpu")
    network.load_state_dict(ours)
    return network.eval()
