"""A saved model as one file for other runtimes: ONNX, or a `torch.export` program.

The exported graph includes conditioning and padding:

    source     (N,C,H,W) float32 in [-1, 1], or (N,1,H,W) uint8 class ids (int32 beyond 256 classes), or
               (N,3,H,W) uint8 colours, where the model's label maps have a palette
    instance   (N,1,H,W) int32 ids, where the model looks at instance edges
    style      (N,F,H,W) float32, where the model has a feature encoder: see `stages.models.styles`
    image      (N,C,H,W) float32 in [-1, 1], of the source's size

The source is padded by reflection to a size the network takes and the image cropped back. Generation is
deterministic (no dropout; batch norms take each image's own statistics). Nothing is written here: callers
check the bytes (`largest_difference`) and write them.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import conv2d

from stages.errors import one_line
from stages.models.architecture import Pix2PixHD, size_multiple, uses_edges
from stages.models.files.saved import LoadedModel
from stages.models.inputs import make_condition, padded_size, reflect_to, translate

TOLERANCE = 0.002
"""Images in [-1, 1] may differ by a quarter of one of 256 levels: other runtimes sum in another order."""

MAX_BATCH, MAX_SIDE = 1024, 16384
"""Bounds of a graph of any size, which torch.export needs."""

MAX_ONNX_BYTES = (1 << 31) - 1
"""The largest protobuf message."""


class ExportedTranslator(nn.Module):
    """Source to image, padding and conditioning included: what is exported.

    any_size   written so that one graph serves every size above the network's multiple. Below that, padding
               may reflect more than once, and the innermost map can be a single pixel: torch.export needs
               the size
    """

    def __init__(self, model: LoadedModel, *, any_size: bool = False) -> None:
        super().__init__()
        manifest = model.manifest
        self.generator, self.labels = model.generator, manifest.preprocessing.pictures.get("source")
        self.architecture, self.inputs, self.any_size = manifest.architecture, manifest.inputs, any_size
        self.multiple, self.minimum = size_multiple(manifest.architecture, enhancers=manifest.enhancers)
        self.eval()

    def forward(self, source: Tensor, instance: Tensor | None = None, style: Tensor | None = None) -> Tensor:
        """(N,C,H,W) and, where the model takes them, instance ids and style features -> (N,C_out,H,W)."""
        height, width = source.shape[2:]
        how = self.labels
        if how is not None and how.palette is not None:
            colours = source.new_tensor([(c, c, c) if isinstance(c, int) else c for c in how.palette]).float()
            # the nearest colour: |x - c|^2 less |x|^2, exact in float32
            source = conv2d(source.float(), -2 * colours[:, :, None, None], (colours**2).sum(1))
            source = source.argmin(1, keepdim=True)
        if how is not None and how.ignore_label is not None and how.classes is not None:
            void = how.classes - 1 if how.void_class is None else how.void_class
            source = source.masked_fill(source == how.ignore_label, void)
        padded = None if instance is None else self._pad(instance)
        condition = make_condition(self._pad(source), padded, arch=self.architecture, inputs=self.inputs)
        image = translate(self.generator, condition, None if style is None else self._pad(style))
        # not a slice: it branches on whether the size differs, which a graph of any size cannot
        for dim, side in ((2, height), (3, width)):
            image = image.index_select(dim, torch.arange(side, device=image.device))
        return image

    def _pad(self, x: Tensor) -> Tensor:
        """Reflect the lower and right border up to the next multiple."""
        if not self.any_size:
            height, width = (
                padded_size(side, multiple=self.multiple, minimum=self.minimum) for side in x.shape[2:]
            )
            return reflect_to(x, height, width)
        for dim in (2, 3):
            side = x.shape[dim]
            index = torch.arange((side + self.multiple - 1) // self.multiple * self.multiple, device=x.device)
            x = x.index_select(dim, torch.minimum(index, 2 * (side - 1) - index))
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A traced model and its contract."""

    program: ExportedProgram
    any_size: bool
    """Any batch and any sides above the network's multiple; else the sides it was exported with."""
    notice: str
    """The contract as JSON; it travels inside the file."""


def example(model: LoadedModel, *, batch: int, width: int, height: int) -> dict[str, Tensor]:
    """Inputs of a model by name: a seeded scene of blocks, as labels and instances are, over smooth noise."""
    random = torch.Generator().manual_seed(batch * 1_000_003 + width * 1009 + height)

    def blocks(high: int) -> Tensor:
        coarse = torch.randint(0, high, (batch, 1, -(-height // 8), -(-width // 8)), generator=random)
        return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :height, :width].contiguous()

    arch, inputs, values = model.manifest.architecture, model.manifest.inputs, {}
    if inputs.source == "labels":
        assert inputs.classes is not None
        dtype = torch.uint8 if inputs.classes <= 256 else torch.int32
        values["source"] = blocks(inputs.classes).to(dtype)
        how = model.manifest.preprocessing.pictures.get("source")
        if how is not None and how.palette is not None:
            colours = [(c, c, c) if isinstance(c, int) else c for c in how.palette]
            picked = torch.tensor(colours, dtype=torch.uint8)[blocks(len(colours))[:, 0]]
            values["source"] = picked.permute(0, 3, 1, 2).contiguous()
    else:
        values["source"] = torch.rand(batch, inputs.channels, height, width, generator=random) * 2 - 1
    if uses_edges(arch, inputs):
        values["instance"] = blocks(20).to(torch.int32)
    if isinstance(arch, Pix2PixHD) and arch.feature_encoder:
        channels = arch.feature_channels
        values["style"] = torch.rand(batch, channels, height, width, generator=random) * 2 - 1
    return values


def export_model(model: LoadedModel, *, width: int, height: int) -> Exported:
    """Trace a loaded model: for any size if both sides exceed the network's multiple, else for that size.

    Raises ValueError if torch cannot trace it.
    """
    multiple, _ = size_multiple(model.manifest.architecture, enhancers=model.manifest.enhancers)
    any_size = min(width, height) > multiple and max(width, height) <= MAX_SIDE
    network = ExportedTranslator(model, any_size=any_size)
    dims: dict[int, object] = {0: Dim("batch", max=MAX_BATCH)}
    if any_size:
        dims |= {
            2: Dim("height", min=multiple + 1, max=MAX_SIDE),
            3: Dim("width", min=multiple + 1, max=MAX_SIDE),
        }
    try:
        values = example(model, batch=2, width=width, height=height)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.export.export(
                network, (), kwargs=values, dynamic_shapes=dict.fromkeys(values, dims), strict=False
            )
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ValueError(f"torch.export cannot trace this model: {one_line(error, limit=200)}") from error
    sides = f"above {multiple}" if any_size else f"{height} (H), {width} (W)"
    notice = {
        "format": "pixloom-export",
        "fingerprint": model.fingerprint,
        "weights": model.weights,
        "architecture": model.manifest.architecture.model_dump(mode="json"),
        "inputs": model.manifest.inputs.model_dump(mode="json"),
        "preprocessing": model.manifest.preprocessing.model_dump(mode="json", exclude_defaults=True),
        "sides": sides,
        "range": "float images in [-1, 1]",
    }
    return Exported(program=program, any_size=any_size, notice=json.dumps(notice, sort_keys=True))


def program_bytes(exported: Exported) -> bytes:
    """The file that `torch.export.load` reads; the notice is its extra file `pixloom.json`."""
    buffer = io.BytesIO()
    torch.export.save(exported.program, buffer, extra_files={"pixloom.json": exported.notice})
    return buffer.getvalue()


def onnx_bytes(exported: Exported) -> bytes:
    """The ONNX model, weights inside; the notice is its metadata entry `pixloom`.

    Needs the packages onnx and onnxscript: ImportError without. Raises ValueError if torch has no ONNX
    operator for a part of it, or it is larger than one ONNX file can be.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.onnx.export(exported.program, dynamo=True, verbose=False, output_names=["image"])
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"torch.onnx cannot convert this model: {one_line(error, limit=200)}") from error
    assert program is not None
    proto = program.model_proto
    if proto.ByteSize() > MAX_ONNX_BYTES:
        raise ValueError(f"the model has {proto.ByteSize()} bytes, one ONNX file holds {MAX_ONNX_BYTES}")
    entry = proto.metadata_props.add()
    entry.key, entry.value = "pixloom", exported.notice
    return bytes(proto.SerializeToString())


def largest_difference(
    run: Callable[[Mapping[str, Tensor]], Tensor],
    model: LoadedModel,
    *,
    width: int,
    height: int,
    any_size: bool,
) -> float:
    """The largest difference, over a few inputs, between an exported model's image and the model's own.

    `run` feeds the inputs by name and returns the image. Raises ValueError above `TOLERANCE`.
    """
    network = ExportedTranslator(model)
    sizes = [(1, width, height), (2, width, height)]
    if any_size:  # another size, no multiple of anything
        sizes.append((1, 2 * network.multiple - 1, network.multiple + 1))
    worst = 0.0
    for batch, w, h in sizes:
        values = example(model, batch=batch, width=w, height=h)
        with torch.inference_mode():
            expected, image = network(**values), run(values)
        if image.shape != expected.shape:
            raise ValueError(f"the export gives {list(image.shape)} for {list(expected.shape)}")
        difference = float((image - expected).abs().max())
        if not difference <= TOLERANCE:  # also if it is NaN
            raise ValueError(f"the export's image differs by up to {difference:.4f}, more than {TOLERANCE}")
        worst = max(worst, difference)
    return worst
