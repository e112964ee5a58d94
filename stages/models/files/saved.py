"""A trained model as a folder: safetensors weights and a JSON that says how to build and feed the network.

    model.json                  format, architecture, inputs, preprocessing, size and SHA-256 of every file
    weights.safetensors         the generator, as trained
    ema.safetensors             the moving average of its weights (if one was kept)
    discriminator.safetensors   what the next phase or a fine-tuning starts from (optional)
    encoder.safetensors         the feature encoder (optional)
    styles.safetensors          the encoder's clusters per class (optional)

`model.json` is written last: a folder without it is not a model. Nothing here unpickles. A folder is not
trusted: names are fixed, sizes are bounded before files are read, checksums are verified, and a network is
built only after its tensors' sizes are compared with the file's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn

from stages.base import Config
from stages.errors import first_invalid, one_line
from stages.models.architecture import Architecture, InputSpec, Pix2Pix, Pix2PixHD, Preprocessing
from stages.models.build import build_discriminator, build_encoder, build_generator
from stages.models.files.manifest import FileEntry, verified, write_folder
from stages.models.pix2pix import PatchDiscriminator, PixelDiscriminator, UNet
from stages.models.pix2pixhd import CoarseToFineGenerator, FeatureEncoder, MultiScaleDiscriminator
from stages.models.styles import Styles

MANIFEST: Final = "model.json"
WEIGHTS: Final = "weights.safetensors"
EMA: Final = "ema.safetensors"
DISCRIMINATOR: Final = "discriminator.safetensors"
ENCODER: Final = "encoder.safetensors"
STYLES: Final = "styles.safetensors"

MAX_MANIFEST_BYTES = 1 << 20

Generator = UNet | CoarseToFineGenerator
Discriminator = PatchDiscriminator | PixelDiscriminator | MultiScaleDiscriminator
FileName = Literal[
    "weights.safetensors",
    "ema.safetensors",
    "discriminator.safetensors",
    "encoder.safetensors",
    "styles.safetensors",
]


# -- the manifest -------------------------------------------------------------


class Manifest(Config):
    """`model.json`."""

    format: Literal["pixloom-model"] = "pixloom-model"
    version: Literal[1] = 1
    architecture: Architecture
    inputs: InputSpec
    enhancers: Annotated[int, Field(ge=0, le=8, description="how many this phase's generator has")] = 0
    discriminators: Annotated[
        int, Field(ge=0, le=8, description="scales of the saved discriminator; 0: none is saved")
    ] = 0
    preprocessing: Preprocessing = Preprocessing()
    extra: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    files: dict[FileName, FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """The checked `model.json` of a local model folder. Raises ValueError, one line that names the file."""
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{folder}: not a model folder, there is no {MANIFEST}") from error
    if size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: {size} bytes, more than a {MANIFEST} can have")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {first_invalid(error)[:300]}") from error
    if WEIGHTS not in manifest.files:
        raise ValueError(f"{path}: files: {WEIGHTS} is missing")
    return manifest


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """Sixteen hex digits of a model's `model.json`: they differ whenever its weights or settings do."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


# -- saving -------------------------------------------------------------------


def save_model(
    folder: Path,
    generator: nn.Module,
    *,
    architecture: Pix2Pix | Pix2PixHD,
    inputs: InputSpec,
    preprocessing: Preprocessing | None = None,
    ema: Mapping[str, Tensor] | None = None,
    discriminator: nn.Module | None = None,
    encoder: nn.Module | None = None,
    styles: Styles | None = None,
    extra: Mapping[str, str | int | float | bool | None] | None = None,
) -> Manifest:
    """Write a model folder on this machine; a folder that is there already is replaced, `model.json` last.

    How many enhancers and scales are active is read off the modules. `ema` names the generator's tensors;
    those it leaves out (frozen parts, counters) are saved as they are in the generator. `extra` holds plain
    values for a reader: the phase, the epoch, the run.

    Raises ValueError if the architecture builds other modules than these, before anything is saved.
    """
    tensors: dict[FileName, dict[str, Tensor]] = {WEIGHTS: _plain(generator.state_dict())}
    if ema is not None:
        unknown = set(ema) - set(tensors[WEIGHTS])
        if unknown:
            raise ValueError(f"the average holds {min(unknown)}, which the generator lacks")
        tensors[EMA] = tensors[WEIGHTS] | _plain(ema)
    parts: dict[FileName, nn.Module | None] = {DISCRIMINATOR: discriminator, ENCODER: encoder}
    tensors |= {name: _plain(part.state_dict()) for name, part in parts.items() if part is not None}
    if styles is not None:
        tensors[STYLES] = _plain(styles.tensors())
    draft = Manifest(
        architecture=architecture,
        inputs=inputs,
        enhancers=len(getattr(generator, "enhancers", ())),
        discriminators=len(getattr(discriminator, "scales", ())) or int(discriminator is not None),
        preprocessing=preprocessing or Preprocessing(),
        extra=dict(extra or {}),
        files={},
    )
    for name, values in tensors.items():
        if name != STYLES:
            shapes = {key: list(value.shape) for key, value in values.items()}
            _check_shapes(name, empty_network(draft, name), shapes)
    writers = {name: partial(save_file, values) for name, values in tensors.items()}
    return write_folder(folder, MANIFEST, writers, draft)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to store: on the CPU, contiguous, float32 (integers as they are)."""
    return {
        name: (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in tensors.items()
    }


# -- loading ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model folder's content: modules in evaluation mode on the requested device."""

    generator: Generator
    encoder: FeatureEncoder | None
    styles: Styles | None
    manifest: Manifest
    weights: Literal["ema", "raw"]
    """Which weights these are; "raw" as well where no average was saved."""
    fingerprint: str
    """See `fingerprint`."""


def load_model(
    folder: Path, *, weights: Literal["ema", "raw"] = "ema", device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a local model folder. "ema" takes the averaged weights if the folder has them, else the raw ones.

    Raises ValueError, one line that names the file, for anything that is not exactly what `save_model` wrote:
    absent, truncated or altered files, unknown keys, another network's tensors.
    """
    manifest = read_manifest(folder)
    name: FileName = EMA if weights == "ema" and EMA in manifest.files else WEIGHTS
    generator = _load(folder, manifest, name, device)
    assert isinstance(generator, Generator)
    encoder = _load(folder, manifest, ENCODER, device) if ENCODER in manifest.files else None
    assert encoder is None or isinstance(encoder, FeatureEncoder)
    return LoadedModel(
        generator=generator,
        encoder=encoder,
        styles=_load_styles(folder, manifest, device) if STYLES in manifest.files else None,
        manifest=manifest,
        weights="ema" if name == EMA else "raw",
        fingerprint=fingerprint(json.loads((folder / MANIFEST).read_bytes())),
    )


def load_discriminator(folder: Path, *, device: torch.device | str = "cpu") -> Discriminator:
    """The discriminator of a model folder, for a next phase. Raises ValueError as `load_model` does."""
    manifest = read_manifest(folder)
    if DISCRIMINATOR not in manifest.files:
        raise ValueError(f"{folder}: the model was saved without its discriminator")
    discriminator = _load(folder, manifest, DISCRIMINATOR, device)
    assert isinstance(discriminator, Discriminator)
    return discriminator


def empty_network(manifest: Manifest, name: FileName) -> nn.Module:
    """The network a file's tensors belong to, without memory for its weights."""
    arch, inputs = manifest.architecture, manifest.inputs
    network: nn.Module | None
    with torch.device("meta"):
        if name == DISCRIMINATOR:
            network = build_discriminator(arch, inputs, discriminators=manifest.discriminators)
        elif name == ENCODER:
            network = build_encoder(arch, inputs)
        else:
            network = build_generator(arch, inputs, enhancers=manifest.enhancers)
    if network is None:
        raise ValueError("the architecture has no feature encoder")
    return network


def _load(folder: Path, manifest: Manifest, name: FileName, device: torch.device | str) -> nn.Module:
    path = verified(folder, name, manifest.files[name], manifest_name=MANIFEST)
    shapes = _header(path)
    arch = manifest.architecture
    try:
        if name in (WEIGHTS, EMA) and isinstance(arch, Pix2PixHD):
            blocks = arch.blocks + manifest.enhancers * arch.enhancer_blocks
            if 4 * blocks > len(shapes):  # two convolutions a block; before building millions of them
                raise ValueError(f"{len(shapes)} tensors are too few for {blocks} residual blocks")
        network = empty_network(manifest, name)
        _check_shapes(name, network, shapes)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:  # sizes that overflow in torch
        raise ValueError(f"{path}: {one_line(error, limit=160)}") from error
    network = network.to_empty(device=device)  # only now is memory taken, as much as the file is long
    network.load_state_dict(load_file(path, device="cpu"))  # copied: the mapped file may change later
    return network.eval()


def _load_styles(folder: Path, manifest: Manifest, device: torch.device | str) -> Styles:
    path = verified(folder, STYLES, manifest.files[STYLES], manifest_name=MANIFEST)
    _header(path)
    try:
        return Styles.from_tensors({k: t.to(device) for k, t in load(path.read_bytes()).items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _header(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file, read off its header."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, piece in slices.items():
                if piece.get_dtype() not in ("F32", "I64"):
                    raise ValueError(f"{path}: {name[:80]} is {piece.get_dtype()}, not F32 or I64")
            return {name: list(piece.get_shape()) for name, piece in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({one_line(error, limit=120)})") from error


def _check_shapes(name: str, network: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Raises ValueError naming the first tensor that is missing, unexpected, or of another shape."""
    expected = {key: list(value.shape) for key, value in network.state_dict().items()}
    for key in sorted(expected.keys() | shapes.keys()):
        if key not in shapes:
            raise ValueError(f"{name}: {key} is missing, which the architecture has")
        if key not in expected:
            raise ValueError(f"{name}: {key[:80]} belongs to no part of the architecture")
        if expected[key] != shapes[key]:
            raise ValueError(f"{name}: {key} is {shapes[key]}, the architecture says {expected[key]}")
