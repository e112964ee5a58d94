"""Runs whole training steps on a GPU that is not there: finds what would be slow or wrong on a real one.

    python -m tests.support.pretended_gpu            a JSON object on stdout, case by case
    python -m tests.support.pretended_gpu --published    the same at the published sizes, for people

Torch lets Python register a device of its own ("PrivateUse1"). Tensors on it are fake: they have a shape, a
type, a layout and a device, and no data. So an operator that mixes devices fails, and so does whatever reads
data, which on a GPU would wait for it: `.item()`, `bool(tensor)`, `nonzero`. All else is torch's own code:
autograd, autocast with CUDA's lists, fused optimizers, hooks.

The device is registered for the whole process, so tests run this as a process of its own. What torch offers
for it is not public: without it, `unavailable()` says so.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from stages.base import Precision
from stages.models.architecture import InputSpec, Parts, Pix2Pix, Pix2PixHD, paper_weights
from stages.models.build import build_generator
from stages.models.fast.frozen import freeze
from stages.models.gan import build_gan
from stages.models.losses import VGG19Features
from stages.models.step import Batch
from stages.scoring.lpips import LAYERS, Lpips
from stages.training.previews import generate
from tests.support.steps import step

NAME = "pretended"
DEVICE = f"{NAME}:0"

VIEWS = (
    "view",
    "as_strided",
    "permute",
    "expand",
    "detach",
    "empty",
    "split",
    "slice",
    "select",
    "alias",
    "prim.",
    "unsqueeze",
    "squeeze",
    "t.",
    "transpose",
    "_reshape_alias",
    "unbind",
    "lift",
    "new_empty",
    "unfold",
)
"""Operators that start no kernel: views and allocations."""

REFUSED = (
    "reflection_pad",
    "upsample_linear",
    "upsample_bilinear",
    "upsample_bicubic",
    "adaptive_",
    "avg_pool3d",
    "fractional_max_pool",
    "max_unpool",
    "grid_sampler",
    "nll_loss",
    "bincount",
    "histc",
    "median",
    "put_",
)
"""Operators that have no deterministic kernel, forward or backward (`torch.use_deterministic_algorithms`)."""

IN_BF16 = ("conv2d", "conv_transpose2d.input", "mm", "matmul", "addmm", "linear")
IN_FLOAT32 = ("softplus",)
"""CUDA's autocast, as far as we use it."""


@dataclass
class Counts:
    """What one step asks of the device.

    launches   operators that start a kernel
    bytes      that they read and write
    layouts    operators that see both channels-last and channels-first images: copies, slow kernels
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Totals, and the operators that move most."""
        return {
            "launches": self.launches.total(),
            "bytes": self.bytes.total(),
            "most bytes": dict(self.bytes.most_common(4)),
            "refused": sorted(name for name in self.launches if name.startswith(REFUSED)),
            "mixed layouts": sorted(name for name, count in self.layouts.items() if count),
        }


def unavailable() -> str:
    """Why this torch cannot pretend, or ""."""
    try:
        from torch._subclasses import FakeTensorMode  # noqa: F401
        from torch.utils.backend_registration import (  # noqa: F401
            _DummyBackendModule,
            _setup_privateuseone_for_python_backend,
        )
    except ImportError as error:
        return f"torch {torch.__version__} has no devices written in Python: {error}"
    return ""


def register() -> list[torch.library.Library]:
    """Make `DEVICE` a device of this process, with CUDA's layouts and autocast. Keep what it returns."""
    from torch._subclasses import FakeTensorMode
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):  # type: ignore[misc]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def is_initialized(self) -> bool:
            return True

    _setup_privateuseone_for_python_backend(NAME, Module())
    nn.Module.to = _moved  # type: ignore[method-assign, assignment]
    FakeTensorMode.__deepcopy__ = lambda mode, memo: mode  # type: ignore[method-assign, assignment]

    def layout(x: Tensor, weight: Tensor, _: object) -> torch.memory_format:
        last = any(_layout(tensor) == "last" for tensor in (x, weight))
        return torch.channels_last if last else torch.contiguous_format

    torch._C._conv_determine_backend_memory_format = layout  # type: ignore[assignment]
    torch._meta_registrations.device_hint = lambda tensor: "cuda"  # type: ignore[attr-defined]
    return [*autocast(), _updates()]


def _moved(network: nn.Module, device: Any) -> nn.Module:
    """In place of `Module.to`: fake tensors cannot change their device, so there are new ones."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None:
                    last = torch.channels_last if old.ndim == 4 else torch.contiguous_format
                    new = torch.empty(old.shape, dtype=old.dtype, device=device, memory_format=last)
                    kept = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    tensors[name] = kept
    return network


def _updates() -> torch.library.Library:
    """Fused Adam with its rate in a tensor: torch does not know the operator without data."""
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_fused_adam_.tensor_lr", lambda *_, **__: None)
    return library


def autocast() -> list[torch.library.Library]:
    """CUDA's autocast for the device. Keep what it returns."""
    return [_autocast(), _fallthrough()]


def _fallthrough() -> torch.library.Library:
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    library.fallback(torch.library.fallthrough_kernel)
    return library


def _autocast() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")

    def cast(value: Any, dtype: torch.dtype) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if floating else value

    def cast_to(name: str, dtype: torch.dtype) -> None:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(NAME, enabled=False):
                return operator(*(cast(value, dtype) for value in args), **kwargs)

        library.impl(name, run)

    def promoted(operator: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensors: Sequence[Tensor], dim: int = 0) -> Any:
            wide = any(tensor.dtype == torch.float32 for tensor in tensors)
            dtype = torch.float32 if wide else tensors[0].dtype
            with torch.autocast(NAME, enabled=False):
                return operator([tensor.to(dtype) for tensor in tensors], dim)

        return run

    for name in IN_BF16:
        cast_to(name, torch.bfloat16)
    for name in IN_FLOAT32:
        cast_to(name, torch.float32)
    library.impl("cat", promoted(torch.ops.aten.cat.default))
    library.impl("stack", promoted(torch.ops.aten.stack.default))
    return library


def _layout(tensor: Tensor) -> str:
    """last, first, or "" where an image has no layout to speak of."""
    if tensor.ndim != 4 or tensor.shape[1] == 1 or tensor.shape[2] * tensor.shape[3] == 1:
        return ""
    strides = tensor.stride()
    if 0 in strides:
        return ""
    return "last" if strides[1] == 1 else "first" if strides[3] == 1 else ""


def counting(counts: Counts) -> Any:
    """A context that counts operators."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func).removeprefix("aten.")
            result = func(*args, **(kwargs or {}))
            if name.startswith(VIEWS):
                return result
            if name.startswith("reflection_pad2d"):  # CUDA's kernels return it channels first
                result = result.contiguous()
            leaves = pytree.tree_leaves((args, kwargs, result))
            tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values()
            if not any(tensor.device.type == NAME for tensor in tensors):
                return result
            counts.launches[name] += 1
            counts.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            counts.layouts[name] += {"last", "first"} <= {_layout(tensor) for tensor in tensors}
            return result

    return Mode()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A phase to take steps of."""

    arch: Pix2Pix | Pix2PixHD
    labels: bool = False
    size: tuple[int, int]
    rows: int = 1
    micro_batch: int | None = None
    enhancers: int | None = None
    discriminators: int | None = None
    parts: Parts = "all"
    averaged: bool = False
    ema: float | None = None
    perceptual: bool = False
    checkpointing: bool = False
    losses: dict[str, Any] = field(default_factory=dict)


def _mean(parameters: Sequence[nn.Parameter], *, during_backward: bool) -> Iterable[Sequence[nn.Parameter]]:
    return [parameters]


def alexnet() -> Lpips:
    """LPIPS over AlexNet, with weights of its shapes."""
    backbone, channels = {}, 3
    layers = [
        layer for block in LAYERS["alex"][0] for layer in ([block] if block == "M3" else [block, "ReLU"])
    ]
    for number, layer in enumerate(layers):
        if isinstance(layer, tuple):
            out, kernel = layer[:2]
            backbone[f"features.{number}.weight"] = torch.empty(out, channels, kernel, kernel)
            backbone[f"features.{number}.bias"] = torch.empty(out)
            channels = out
    widths = [layer[0] for layer in layers if isinstance(layer, tuple)]
    linear = {f"lin{n}.model.1.weight": torch.empty(1, width, 1, 1) for n, width in enumerate(widths)}
    return Lpips("alex", backbone, linear)


def run(case: Case, precision: Precision) -> Counts:
    """The counts of a phase's second step. Raises what the device would not do, or would wait for."""
    weights = paper_weights(case.arch)
    if case.perceptual:
        weights = weights.model_copy(update={"perceptual": 10.0})
    weights = weights.model_copy(update=case.losses)
    inputs = InputSpec(source="labels", classes=5, instances=True) if case.labels else InputSpec()
    gan = build_gan(
        case.arch,
        inputs,
        weights=weights,
        enhancers=case.enhancers,
        discriminators=case.discriminators,
        parts=case.parts,
        precision=precision,
        ema_decay=case.ema,
        perceptual=VGG19Features().to(DEVICE) if case.perceptual else None,
        lpips=alexnet().to(DEVICE) if weights.lpips else None,
        checkpointing=case.checkpointing,
        device=DEVICE,
    )
    channels = 1 if case.labels else 3
    batch = Batch(
        source=torch.empty(case.rows, channels, *case.size, dtype=torch.uint8),
        target=torch.empty(case.rows, 3, *case.size, dtype=torch.uint8),
        instance=torch.empty(case.rows, 1, *case.size, dtype=torch.int32) if case.labels else None,
    ).to(DEVICE)
    for _ in range(2):
        counts = Counts()
        with counting(counts):
            losses = step(
                gan,
                batch,
                weights=weights,
                average=_mean if case.averaged else None,
                micro_batch=case.micro_batch,
            )
    for name, value in losses.items():
        assert value.device.type == NAME, f"loss {name} is on {value.device}"
    generate(gan, batch.source, batch.target.float(), batch.instance)
    return counts


def generating(case: Case) -> Counts:
    """The counts of generating in bf16, a batch at a time."""
    generator = build_generator(case.arch, InputSpec(), enhancers=case.enhancers).eval().to(DEVICE)
    frozen = freeze(generator, device=DEVICE, dtype=torch.bfloat16)
    images = torch.empty(case.rows, 3, *case.size, device=DEVICE, memory_format=torch.channels_last)
    counts = Counts()
    with torch.no_grad(), torch.autocast(NAME, torch.bfloat16), counting(counts):
        frozen(images)
    return counts


SMALL = {"width": 16, "downsamplings": 2, "blocks": 2, "enhancer_blocks": 1, "discriminators": 2}
HD = Pix2PixHD(enhancers=1, **SMALL)
ENCODED = Pix2PixHD(enhancers=1, feature_encoder=True, feature_width=8, feature_downsamplings=2, **SMALL)
UNET = Pix2Pix(width=16, discriminator_width=16)
NORMED = Pix2Pix(width=16, discriminator_width=16, norm="instance", upsampling="resize")
ON_HD = {"arch": HD, "labels": True, "size": (64, 64), "discriminators": 2}
ON_UNET = {"arch": UNET, "size": (256, 256)}
OTHERS = {"r1": 10.0, "diff_augment": ("colour", "translation", "cutout")}

CASES = {
    "pix2pix": Case(**ON_UNET),
    "pix2pix, batch 4": Case(**ON_UNET, rows=4),
    "pix2pix, instance norm, resize, average": Case(arch=NORMED, size=(256, 256), ema=0.99),
    "pix2pix, instance norm, resize, batch 4": Case(arch=NORMED, size=(256, 256), rows=4),
    "pix2pix, micro-batches": Case(**ON_UNET, rows=3, micro_batch=2),
    "pix2pixHD global": Case(**ON_HD, enhancers=0),
    "pix2pixHD local": Case(**ON_HD, enhancers=1, parts="outermost"),
    "pix2pixHD joint": Case(**ON_HD, enhancers=1),
    "pix2pixHD joint, batch 4": Case(**ON_HD, enhancers=1, rows=4),
    "pix2pixHD, micro-batches, several workers": Case(
        **ON_HD, enhancers=1, rows=3, micro_batch=2, ema=0.99, averaged=True
    ),
    "pix2pixHD, checkpointing": Case(**ON_HD, enhancers=1, checkpointing=True),
    "pix2pixHD, encoder, perceptual": Case(
        **ON_HD | {"arch": ENCODED}, enhancers=1, rows=2, perceptual=True, averaged=True, ema=0.99
    ),
    "pix2pix, LPIPS, batch 2": Case(**ON_UNET, rows=2, losses={"lpips": 10.0}),
    "pix2pix, R1, augmented": Case(**ON_UNET, rows=2, losses=OTHERS),
    "pix2pixHD, spectral norm, R1, augmented": Case(
        **ON_HD | {"arch": HD.model_copy(update={"discriminator_spectral_norm": True})},
        enhancers=1,
        rows=2,
        losses=OTHERS,
    ),
}
FLOAT32_TOO = {"pix2pix", "pix2pix, batch 4", "pix2pixHD global", "pix2pixHD joint"}
U_NETS = {f"U-Net-256, batch {n}": Case(arch=Pix2Pix(), size=(256, 256), rows=n) for n in (1, 16, 64)}
GENERATING = U_NETS
PUBLISHED = {
    "pix2pixHD global 1024x512": Case(
        arch=Pix2PixHD(enhancers=1), labels=True, size=(512, 1024), enhancers=0, discriminators=2
    ),
    "pix2pixHD joint 2048x1024": Case(
        arch=Pix2PixHD(enhancers=1), labels=True, size=(1024, 2048), enhancers=1, discriminators=3
    ),
    **U_NETS,
}


def results(cases: dict[str, Case]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Per case and precision: an `error`, or the counts of a step."""
    from torch._subclasses import FakeTensorMode

    mode = FakeTensorMode()
    for name, case in GENERATING.items():
        with mode:
            yield f"generating, {name}", generating(case).summary()
    for name, case in cases.items():
        for precision in ("bf16", "float32") if name in FLOAT32_TOO else ("bf16",):
            try:
                with mode:
                    counts = run(case, precision)  # type: ignore[arg-type]
            except Exception as error:  # any: it is what the device says of the step
                at = [f for f in traceback.extract_tb(error.__traceback__) if "/stages/" in f.filename]
                place = f"{at[-1].filename}:{at[-1].lineno}" if at else "?"
                line = str(error).partition("\n")[0]
                yield f"{name}, {precision}", {"error": f"{type(error).__name__} at {place}: {line}"}
            else:
                yield f"{name}, {precision}", counts.summary()


def main() -> None:
    kept = register()
    found = dict(results(PUBLISHED if "--published" in sys.argv else CASES))
    json.dump(found, sys.stdout, indent=1)
    del kept


if __name__ == "__main__":
    main()
