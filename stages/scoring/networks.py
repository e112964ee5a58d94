"""Networks that judge images: LPIPS, Inception features for FID and KID, a segmenter. Weights are the user's.

A judge is named after its weights: `lpips_alex`, `fid` are said only of the published files, known by their
checksum; any other weights' number carries the first digits of its own, as in `lpips_alex_1f3a9c02`, so that
two numbers of one name can always be compared. Weights that are absent are an error, never another number.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from stages import storage
from stages.config.evaluate import InceptionConfig, LpipsConfig, SegmenterConfig
from stages.errors import UserError
from stages.images import geometry
from stages.images.kinds import Array
from stages.models.files.weights import read_tensors
from stages.scoring.metrics import Lpips

PUBLISHED_BACKBONES = {"alex": "7be5be79", "vgg": "397923af"}
"""First digits of the SHA-256 of torchvision's files, as in their names (alexnet-owt-7be5be79.pth)."""


# -- weights ---------------------------------------------------------------------------------------


def fetch_weights(uri: str, folder: Path, key: str) -> tuple[Path, str]:
    """A weights file on this machine and its SHA-256. Raises UserError, naming the key, if it is absent."""
    try:
        data = storage.read_bytes(storage.absolute(uri))
    except OSError as error:
        raise UserError(f"{key}: {uri}: the weights cannot be read ({type(error).__name__})") from error
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"{digest[:16]}-{Path(uri).name}"
    path.write_bytes(data)
    return path, digest


def checksum(uri: str, key: str) -> str:
    """The SHA-256 of a weights file, for its judge's name. Raises UserError as `fetch_weights` does."""
    try:
        return hashlib.sha256(storage.read_bytes(storage.absolute(uri))).hexdigest()
    except OSError as error:
        raise UserError(f"{key}: {uri}: the weights cannot be read ({type(error).__name__})") from error


def lpips_name(config: LpipsConfig) -> str:
    """What the number is called. Raises UserError where weights are absent."""
    digest = checksum(config.backbone, "evaluate.lpips.backbone")
    published = digest.startswith(PUBLISHED_BACKBONES[config.kind])
    if config.linear is not None:
        digest, published = digest[:4] + checksum(config.linear, "evaluate.lpips.linear")[:4], False
    return f"lpips_{config.kind}" + ("" if published else f"_{digest[:8]}")


def feature_names(config: InceptionConfig) -> tuple[str, str]:
    """What the Frechet and the kernel distance of these features are called. Raises UserError as above."""
    digest = checksum(config.weights, "evaluate.inception.weights")
    suffix = "" if digest == config.published else f"_{digest[:8]}"
    if config.size is not None:  # other pixels than the published network makes itself: other numbers
        suffix += f"_{config.size}px"
    return f"fid{suffix}", f"kid{suffix}"


def load_lpips(config: LpipsConfig, folder: Path, device: str) -> Lpips:
    """The network. Raises UserError for weights that are absent or another network's."""
    backbone, _ = fetch_weights(config.backbone, folder, "evaluate.lpips.backbone")
    if config.linear is not None:
        linear, _ = fetch_weights(config.linear, folder, "evaluate.lpips.linear")
    else:
        found = importlib.util.find_spec("torchmetrics.functional.image.lpips_models")
        assert found is not None
        assert found.submodule_search_locations is not None
        linear = Path(next(iter(found.submodule_search_locations))) / f"{config.kind}.pth"
    try:
        return Lpips(config.kind, read_tensors(backbone), read_tensors(linear)).to(device)
    except (ValueError, KeyError, RuntimeError) as error:
        told = str(error).splitlines()[0][:200]
        raise UserError(f"evaluate.lpips: these are no {config.kind} weights: {told}") from error


def _instead(path: Path) -> str:
    """What a file holds that is no network, where that can be told."""
    try:
        tensors = read_tensors(path)
    except (ValueError, OSError):
        return ""
    return f"{len(tensors)} weights without the network they belong to: "


class Network:
    """A TorchScript or ONNX file as a function of (N, C, H, W) to an array."""

    def __init__(self, uri: str, folder: Path, key: str, device: str) -> None:
        path, _ = fetch_weights(uri, folder, key)
        self.device = device
        self._module: Any = None
        self._session: Any = None
        try:
            if uri.lower().endswith(".onnx"):
                import onnxruntime  # noqa: PLC0415 - an optional dependency

                self._session = onnxruntime.InferenceSession(str(path))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch calls TorchScript deprecated; the files are there
                    self._module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
        except ImportError as error:
            raise UserError(f"{key}: {uri}: pip install onnxruntime to read it") from error
        except Exception as error:  # either library has its own, of no common base
            told = str(error).splitlines()[0][:200]
            raise UserError(f"{key}: {uri}: {_instead(path)}neither TorchScript nor ONNX ({told})") from error
        # NVIDIA's Inception gives class scores unless it is asked for features
        asked = self._module is not None and "return_features" in str(self._module.forward.schema)
        self._options = {"return_features": True} if asked else {}

    def __call__(self, batch: Tensor) -> np.ndarray:
        """The network's first output."""
        if self._session is not None:
            name = self._session.get_inputs()[0].name
            return cast(np.ndarray, self._session.run(None, {name: batch.cpu().numpy()})[0])
        with torch.inference_mode():
            out = self._module(batch.to(self.device), **self._options)
        return cast(np.ndarray, (out[0] if isinstance(out, tuple | list) else out).float().cpu().numpy())


class Inception:
    """Feature vectors of images."""

    def __init__(self, config: InceptionConfig, folder: Path, device: str) -> None:
        self.network = Network(config.weights, folder, "evaluate.inception.weights", device)
        self.size = config.size

    def __call__(self, image: Array) -> np.ndarray:
        """(H, W, 3) uint8 -> (D,) float32."""
        if self.size is not None:
            image = geometry.resize(image, (self.size, self.size), "rgb")
        batch = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        return self.network(batch).reshape(-1).astype(np.float32)


class Segmenter:
    """Class ids of an image's pixels."""

    def __init__(self, config: SegmenterConfig, folder: Path, device: str) -> None:
        self.config = config
        self.network = Network(config.weights, folder, "evaluate.segmenter.weights", device)

    def __call__(self, image: Array) -> np.ndarray:
        """(H, W, 3) uint8 -> (H, W) ids."""
        height, width = image.shape[:2]
        sized = image if self.config.size is None else geometry.resize(image, self.config.size, "rgb")
        values = torch.from_numpy(np.ascontiguousarray(sized.transpose(2, 0, 1)))[None].float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std))
        out = self.network((values - mean) / std)
        ids = out[0].argmax(0) if out.ndim == 4 else out[0]
        return geometry.resize(ids.astype(np.uint8)[:, :, None], (width, height), "labels")[:, :, 0]

    def actual(self, labels: Array) -> np.ndarray:
        """A label map (H, W, 1) in the segmenter's classes; what it is not to be judged on becomes -1."""
        ids = labels[:, :, 0].astype(np.int64)
        if self.config.train_ids:
            table = np.full(256, -1, np.int64)
            for old, new in self.config.train_ids.items():
                table[old] = new
            return cast(np.ndarray, table[ids])
        return np.where(ids == self.config.ignore, -1, ids) if self.config.ignore is not None else ids


def pairwise_mean(model: Lpips, samples: Sequence[Array], device: str) -> float:
    """Mean LPIPS over all pairs of samples: diversity as BicycleGAN measures it."""
    batch = [
        torch.from_numpy(s.transpose(2, 0, 1).copy())[None].float().to(device) / 127.5 - 1 for s in samples
    ]
    with torch.inference_mode():
        values = [float(model(batch[i], batch[j])) for i in range(len(batch)) for j in range(i)]
    return sum(values) / len(values) if values else 0.0
