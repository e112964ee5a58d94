"""Networks that score images: Inception features for FID and KID, a segmenter. Weights are the user's.

`fid` and `kid` name distances by the published weights only, which are known by their checksum. The name of
any other weights carries the first digits of theirs, as in `fid_1f3a9c02`, so that two numbers of one name
can always be compared. Weights that are absent are an error, never another number.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from stages import storage
from stages.config.evaluate import InceptionConfig, SegmenterConfig
from stages.errors import UserError, one_line
from stages.images import geometry
from stages.images.kinds import Array
from stages.models.files.weights import read_tensors
from stages.storage.local import local_file

INCEPTION, SEGMENTER = "evaluate.inception.weights", "evaluate.segmenter.weights"


# -- weights ---------------------------------------------------------------------------------------


@contextmanager
def weights_file(uri: str, key: str) -> Iterator[Path]:
    """A weights file, on this machine for as long as it is needed. UserError naming `key` if it is absent."""
    with ExitStack() as stack:
        try:
            path = stack.enter_context(local_file(storage.absolute(uri)))
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{key}: {uri}: the weights cannot be read ({type(error).__name__})") from error
        yield path


def checksum(uri: str, key: str) -> str:
    """The SHA-256 of a weights file, for its scorer's name. Raises UserError as `weights_file` does."""
    with weights_file(uri, key) as path, path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def feature_names(config: InceptionConfig, digest: str | None = None) -> tuple[str, str]:
    """The names of the Frechet and the kernel distance of these features. `digest`: see `checksum`."""
    digest = digest or checksum(config.weights, INCEPTION)
    suffix = "" if digest == config.published else f"_{digest[:8]}"
    if config.size is not None:  # other pixels than the published network makes itself: other numbers
        suffix += f"_{config.size}px"
    return f"fid{suffix}", f"kid{suffix}"


# -- networks --------------------------------------------------------------------------------------


class Network:
    """A TorchScript or ONNX file as a function of (N, C, H, W) to an array."""

    def __init__(self, uri: str, key: str, device: str) -> None:
        self.device = device
        with weights_file(uri, key) as path:
            try:
                self._module, self._session = self._load(path)
            except ImportError as error:
                raise UserError(f"{key}: {uri}: pip install onnxruntime to read it") from error
            except Exception as error:  # either library has its own, of no common base
                reason = f"neither TorchScript nor ONNX ({one_line(error, limit=200)})"
                raise UserError(f"{key}: {uri}: {_bare_weights(path)}{reason}") from error
        # NVIDIA's Inception gives class scores unless features are requested
        features = self._module is not None and "return_features" in str(self._module.forward.schema)
        self._options = {"return_features": True} if features else {}

    def _load(self, path: Path) -> tuple[Any, Any]:
        """A TorchScript module, or an ONNX session."""
        if path.suffix.lower() == ".onnx":
            import onnxruntime  # noqa: PLC0415 - an optional dependency

            return None, onnxruntime.InferenceSession(str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls TorchScript deprecated; the files are there
            return torch.jit.load(str(path), map_location=self.device).eval(), None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Tensor) -> np.ndarray:
        """The network's first output."""
        if self._session is not None:  # many ONNX files take one image
            name = self._session.get_inputs()[0].name
            runs = [
                self._session.run(None, {name: image.numpy()})[0] for image in torch.split(batch.cpu(), 1)
            ]
            return np.concatenate(runs)
        with torch.inference_mode():
            out = self._module(batch.to(self.device), **self._options)
        return cast(np.ndarray, (out[0] if isinstance(out, tuple | list) else out).float().cpu().numpy())


def _bare_weights(path: Path) -> str:
    """If the file is a bare state dict, the words that say so in an error; else ""."""
    try:
        tensors = read_tensors(path)
    except (ValueError, OSError):
        return ""
    return f"{len(tensors)} weights without the network they belong to: "


class Inception:
    """Feature vectors of images."""

    def __init__(self, config: InceptionConfig, device: str) -> None:
        self.network = Network(config.weights, INCEPTION, device)
        self.size = config.size

    def __call__(self, images: Sequence[Array]) -> np.ndarray:
        """Images (H, W, 3) uint8 of one shape -> (N, D) float32."""
        if self.size is not None:
            images = [geometry.resize(image, (self.size, self.size), "rgb") for image in images]
        batch = torch.from_numpy(np.stack([image.transpose(2, 0, 1) for image in images]))
        return self.network(batch).reshape(len(images), -1).astype(np.float32)


class Segmenter:
    """Class ids of an image's pixels."""

    def __init__(self, config: SegmenterConfig, device: str) -> None:
        self.config = config
        self.network = Network(config.weights, SEGMENTER, device)

    def __call__(self, image: Array) -> np.ndarray:
        """(H, W, 3) uint8 -> (H, W) ids. Raises UserError for values that are no ids from 0 to 255."""
        height, width = image.shape[:2]
        sized = image if self.config.size is None else geometry.resize(image, self.config.size, "rgb")
        values = torch.from_numpy(np.array(sized.transpose(2, 0, 1), order="C"))[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std))
        out = self.network((values - mean) / std)
        scores = out.ndim == 4 and out.shape[1] > 1
        ids = out[0].argmax(0) if scores else out[0].reshape(out.shape[-2:])
        if not ((ids >= 0) & (ids < 256) & (ids == np.floor(ids))).all():  # not-a-numbers too
            raise UserError(f"{SEGMENTER}: it gives {ids.min():g} to {ids.max():g}: no class ids, 0 to 255")
        return geometry.resize(ids.astype(np.uint8)[:, :, None], (width, height), "labels")[:, :, 0]

    def actual(self, labels: Array) -> np.ndarray:
        """A label map (H, W, 1) in the segmenter's classes; pixels that are not scored become -1."""
        ids = labels[:, :, 0].astype(np.int64)
        if self.config.train_ids:
            table = np.full(256, -1, np.int64)
            for old, new in self.config.train_ids.items():
                table[old] = new
            return cast(np.ndarray, table[ids])
        return np.where(ids == self.config.ignore, -1, ids) if self.config.ignore is not None else ids
