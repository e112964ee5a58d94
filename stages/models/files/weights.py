"""Tensors from an untrusted weights file: safetensors, or a torch checkpoint of plain tensors.

No pickled object other than a tensor is ever built, no tensor may claim more memory than the file is long,
and every failure of a parser is one ValueError that names the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from stages.errors import one_line


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a `.safetensors` file or a `torch.save`d state dict (today's or legacy format).

    A state dict wrapped as `{"state_dict": ...}` is unwrapped, and DataParallel's prefix `module.` is cut
    off. Tensors are on the CPU, in the file's dtypes.

    Raises ValueError, naming the file, if it is absent, damaged, holds anything but named tensors, or NaNs.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix.startswith(".safetensors"):  # an address may go on: ?download=true
        try:
            tensors = load(path.read_bytes())  # not mapped: a file that changes later would kill the process
        except Exception as error:  # parsers raise anything for a damaged file
            reason = one_line(error, limit=160)
            raise ValueError(f"{path}: not a readable safetensors file ({reason})") from error
    else:
        tensors = _read_torch(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    for name, tensor in tensors.items():
        if tensor.is_complex() or tensor.is_quantized:
            raise ValueError(f"{path}: {name} holds {tensor.dtype}, not real numbers")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _read_torch(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size:
                    # torch.save does not compress; entries that unfold or overlap could fill the memory
                    raise ValueError("its entries unfold to more than the file: not written by torch.save")
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets arbitrary bytes and raises arbitrary errors
        text = str(error)
        if "Weights only load failed" in text or "weights_only" in text:
            raise ValueError(
                f"{path}: holds more than tensors (a pickled object), which could run code: refused"
            ) from error
        raise ValueError(f"{path}: not a readable torch checkpoint ({one_line(error, limit=160)})") from error
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not a dict of named tensors")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a named tensor")
        if tensor.layout != torch.strided or tensor.nbytes > size:
            # with strides of zero a few bytes are a tensor of any size
            raise ValueError(f"{path}: {name[:80]!r} claims more data than the file holds")
    return {name: tensor.detach().contiguous() for name, tensor in value.items()}
