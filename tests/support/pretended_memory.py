"""A GPU that is not there but holds data, in this machine's memory: runs `tests/gpu` without a GPU.

    PIXLOOM_PRETENDED_GPU=1 python -m pytest -m gpu tests/gpu

It is strict where a GPU is. An operator that mixes devices fails. A copy that was not waited for has not
happened: on the host its target is full of a wrong value until an event or a stream is synchronised, and on
the device, if it was sent on a stream of its own, until the stream that computes waits for it. Under
`torch.cuda.set_sync_debug_mode("error")` whatever has the host wait raises: reading a value, a blocking copy,
also one from memory that is not pinned, an operator whose result's shape depends on data.

The device is torch's "PrivateUse1", registered for the whole process; parts of `torch.cuda` are replaced by
ones of this device. Arithmetic is the CPU's: kernels, their speed and rounding are not tested.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

NAME = "pretended"
DEVICE = f"{NAME}:0"
VARIABLE = "PIXLOOM_PRETENDED_GPU"

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
SHAPED_BY_DATA = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
)


class HostWaitError(RuntimeError):
    """The host waits for the device, and it was said that it must not."""


@dataclass
class Machine:
    """What the device was asked to do and has not done."""

    to_host: list[Callable[[], Any]]
    to_device: list[Callable[[], Any]]
    pinned: dict[int, torch.UntypedStorage]
    """By address, and kept, so that no other memory gets one."""
    mode: str = "default"

    def arrive(self, copies: list[Callable[[], Any]], count: int) -> None:
        """Do the first so many copies that were issued."""
        for index in range(count):
            copy, copies[index] = copies[index], _nothing
            copy()

    def waits(self, why: str) -> None:
        """The host waits for the device."""
        if self.mode == "error":
            raise HostWaitError(f"called a synchronizing operation: {why}")
        self.arrive(self.to_host, len(self.to_host))


def _nothing() -> None:
    """A copy that has arrived."""


MACHINE = Machine([], [], {})
LOCK = threading.RLock()
LOCAL = threading.local()


class OnDevice(Tensor):
    """A tensor of the device. Its values are a tensor of the CPU, with the same strides."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> OnDevice:
        own: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=torch.device(DEVICE),
            requires_grad=requires_grad,
        )
        own.values = values
        return own

    def tolist(self) -> Any:
        """As numbers of Python."""
        return self.cpu().tolist()

    def record_stream(self, _: Any) -> None:
        """Nothing: memory is freed when nobody has it."""

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with LOCK:
            return _run(func, args, kwargs or {})


def _values(value: Any) -> Any:
    if not isinstance(value, OnDevice):
        return value
    if value.values.stride() != value.stride():  # `parameter.data = ` gave it another layout
        value.values = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value.values)
    return value.values


def _wrapped(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    from torch.utils._python_dispatch import return_and_correct_aliasing

    name = func.__name__.partition(".")[0]
    if func is aten._to_copy.default:
        return _copied(args[0], **kwargs)
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if strange := [x for x in tensors if not isinstance(x, OnDevice) and x.ndim > 0]:
        raise RuntimeError(f"{func}: a tensor {tuple(strange[0].shape)} is on the CPU, others on {DEVICE}")
    if func in READS or name in SHAPED_BY_DATA or _indexes_by_mask(name, args):
        MACHINE.waits(str(func))
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner = pytree.tree_map(_values, (args, kwargs))
    result = func(*inner[0], **inner[1])
    return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map(_wrapped, result))


def _indexes_by_mask(name: str, args: Any) -> bool:
    return name.startswith("index") and any(
        isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)
        for leaf in pytree.tree_leaves(args[1:2])
    )


def _copied(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
    **_: Any,
) -> Tensor:
    """`_to_copy`."""
    on_device = isinstance(source, OnDevice) if device is None else device.type == NAME
    options = {"memory_format": memory_format or torch.preserve_format}
    empty = torch.empty_like(_values(source), dtype=dtype, **options)  # type: ignore[call-overload]
    target = OnDevice(empty) if on_device else empty
    return _copy(target, source, non_blocking)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_`, when a GPU would do it."""
    into, values = _values(target), _values(source)
    sends, fetches = not isinstance(source, OnDevice), not isinstance(target, OnDevice)
    if not sends and not fetches:
        into.copy_(values)
        return target
    pinned = sends and source.untyped_storage().data_ptr() in MACHINE.pinned
    if not non_blocking or (sends and not pinned and source.ndim > 0):
        MACHINE.waits(f"copy of {tuple(source.shape)} {'to' if sends else 'from'} the device")
        into.copy_(values)
    elif fetches:
        values = values.clone()  # the stream's order: what is written later is not seen
        into.fill_(_wrong(into))
        MACHINE.to_host.append(lambda: into.copy_(values))
    elif getattr(LOCAL, "stream", None) is not None:
        into.fill_(_wrong(into))
        MACHINE.to_device.append(lambda: into.copy_(values))
    else:
        into.copy_(values)
    return target


def _wrong(values: Tensor) -> float:
    return float("nan") if values.is_floating_point() else 1


# -- torch.cuda ---------------------------------------------------------------------------------------------


class Stream:
    """A stream of the device."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Wait for all."""
        with LOCK:
            MACHINE.arrive(MACHINE.to_host, len(MACHINE.to_host))
            MACHINE.arrive(MACHINE.to_device, len(MACHINE.to_device))

    def wait_event(self, event: Event) -> None:
        """The device waits, the host does not."""
        with LOCK:
            MACHINE.arrive(MACHINE.to_device, event.sent)


class Event:
    """A moment in what was issued."""

    def __init__(self, **_: Any) -> None:
        self.fetched = self.sent = 0

    def record(self, stream: Any = None) -> None:
        """Now."""
        with LOCK:
            self.fetched, self.sent = len(MACHINE.to_host), len(MACHINE.to_device)

    def synchronize(self) -> None:
        """Wait until that moment has come."""
        with LOCK:
            MACHINE.arrive(MACHINE.to_host, self.fetched)
            MACHINE.arrive(MACHINE.to_device, self.sent)


@contextmanager
def _streaming(stream: Stream) -> Iterator[None]:
    LOCAL.stream = stream
    try:
        yield
    finally:
        LOCAL.stream = None


def _pinned(values: Tensor) -> Tensor:
    copy = torch.empty_like(values).copy_(values)
    MACHINE.pinned[copy.untyped_storage().data_ptr()] = copy.untyped_storage()
    return copy


def register() -> list[torch.library.Library]:
    """Make `DEVICE` a device of this process. Keep what it returns."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):  # type: ignore[misc]
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend(NAME, Module())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    plain_empty = torch.empty

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        values = plain_empty(*size, **options)
        if pin_memory:
            MACHINE.pinned[values.untyped_storage().data_ptr()] = values.untyped_storage()
        return values

    def set_mode(mode: str) -> None:
        MACHINE.mode = mode

    torch.empty = empty  # type: ignore[assignment]
    torch.inference_mode = torch.no_grad  # type: ignore[assignment, misc]  # a subclass has no inference tensors
    Tensor.pin_memory = _pinned  # type: ignore[method-assign, assignment]
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": _streaming,
        "current_stream": Stream,
        "set_stream": lambda _: None,
        "synchronize": lambda *_: Stream().synchronize(),
        "set_sync_debug_mode": set_mode,
        "_sleep": lambda _: None,
    }.items():
        setattr(torch.cuda, name, value)

    def made(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        options = {"memory_format": memory_format or torch.contiguous_format}
        return OnDevice(plain_empty(size, dtype=dtype, **options))

    def made_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype))

    def copied_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        return _copy(target, source, non_blocking)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_copy_from", copied_from, "PrivateUse1")
    library.impl("empty.memory_format", made, "PrivateUse1")
    library.impl("empty_strided", made_strided, "PrivateUse1")
    return [library]
