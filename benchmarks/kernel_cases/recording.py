"""What interpreted kernels do: bytes, products and atomics of every launch, and checks of every access.

The interpreter runs the programs of a launch one after another, so it cannot show a race. `recording` sees one in the
addresses instead: two programs of a launch that store to the same place, or one that loads what another stores.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter as stock

from model.kernels.triton.interpreter import repair

Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle


@dataclass
class Traffic:
    """Bytes of one tensor argument in one launch, as lanes ask for them: one lane, one element."""

    load_bytes: int = 0
    store_bytes: int = 0
    atomic_bytes: int = 0
    sector_bytes: int = 0
    """32-byte sectors that each tile access touches, added up: what a scattered access costs more than its lanes."""
    distinct_bytes: int = 0
    """Bytes that were touched at least once: the compulsory part."""

    @property
    def requested_bytes(self) -> int:
        return self.load_bytes + self.store_bytes + self.atomic_bytes


@dataclass
class Launch:
    """One kernel launch."""

    kernel: str
    grid: tuple[int, ...] = ()
    dot_flops: int = 0
    """2 M N K of every tl.dot, padding included."""
    atomics: int = 0
    """Lanes of atomic operations."""
    float_atomics: int = 0
    tensors: dict[str, Traffic] = field(default_factory=dict)

    @property
    def requested_bytes(self) -> int:
        return sum(traffic.requested_bytes for traffic in self.tensors.values())


class KernelError(AssertionError):
    """A kernel touched memory outside its tensor, or two programs of a launch raced."""


@dataclass
class _Storage:
    """Which program touched each byte offset: -1 none, -2 several."""

    writer: np.ndarray
    reader: np.ndarray


@dataclass
class _Argument:
    name: str
    low: int
    """First byte of the tensor."""
    high: int
    """The byte after its last element, strides included."""
    base: int
    """First byte of its storage."""
    storage: _Storage
    touched: np.ndarray


class _Watch:
    """One launch under observation."""

    def __init__(self, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any], check: bool) -> None:
        self.launch, self.check = Launch(kernel=executor.fn.__name__), check
        self.arguments: dict[tuple[Any, ...], _Argument] = {}
        storages: dict[int, _Storage] = {}
        names = inspect.getfullargspec(executor.fn)
        known = {n: v for n, v in kwargs.items() if n in names.args or n in names.kwonlyargs}
        for name, value in inspect.getcallargs(executor.fn, *args, **known).items():
            if isinstance(value, torch.Tensor):
                whole = value.untyped_storage()
                size = whole.nbytes() if check else 0
                empty = np.full(size, -1, np.int32)
                storage = storages.setdefault(whole.data_ptr(), _Storage(empty, empty.copy()))
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                low = value.data_ptr()
                high = low + ((last + 1) * value.element_size() if value.numel() > 0 else 0)
                touched = np.zeros(high - low, bool)
                argument = _Argument(name, low, high, whole.data_ptr(), storage, touched)
                self.arguments.setdefault(_identity(value), argument)
                self.launch.tensors.setdefault(name, Traffic())

    def finish(self) -> Launch:
        for argument in self.arguments.values():
            self.launch.tensors[argument.name].distinct_bytes = int(argument.touched.sum())
        self.launch.tensors = {
            name: traffic for name, traffic in self.launch.tensors.items() if traffic.requested_bytes
        }
        return self.launch

    def dot(self, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        self.launch.dot_flops += 2 * int(np.prod(a)) * b[-1]

    def access(self, kind: str, builder: Any, pointer: Any, mask: Any) -> None:
        argument = pointer.attr.get("argument")
        if argument is None:
            raise KernelError(f"{self.launch.kernel}: a pointer of unknown origin")
        self.launch.grid = tuple(builder.grid_dim)
        size = stock._get_np_dtype(pointer.get_element_ty()).itemsize
        lanes = np.broadcast_to(True if mask is None else mask.data, pointer.data.shape)
        address = pointer.data[lanes].astype(np.int64)
        if address.size == 0:
            return
        if address.min() < argument.low or address.max() + size > argument.high:
            beyond = int(((address < argument.low) | (address + size > argument.high)).sum())
            first, last = address.min() - argument.low, address.max() - argument.low
            raise KernelError(
                f"{self.launch.kernel}: {kind} of {beyond} elements outside {argument.name}, "
                f"bytes {first} to {last} of {argument.high - argument.low}"
            )
        traffic = self.launch.tensors[argument.name]
        setattr(traffic, f"{kind}_bytes", getattr(traffic, f"{kind}_bytes") + address.size * size)
        traffic.sector_bytes += 32 * np.unique(address >> 5).size
        for byte in range(size):
            argument.touched[address - argument.low + byte] = True
        if kind == "atomic":
            self.launch.atomics += address.size
            self.launch.float_atomics += address.size * pointer.get_element_ty().is_floating()
        elif self.check:
            nx, ny, _ = builder.grid_dim
            x, y, z = builder.grid_idx
            self._races(kind, argument, address - argument.base, (z * ny + y) * nx + x)

    def _races(self, kind: str, argument: _Argument, offset: np.ndarray, program: int) -> None:
        writer, reader = argument.storage.writer, argument.storage.reader
        where = f"{self.launch.kernel}: {argument.name}"
        written = writer[offset]
        if kind == "load":
            if ((written != -1) & (written != program)).any():
                raise KernelError(f"{where}: a program loads what another one of the launch stores")
            before = reader[offset]
            reader[offset] = np.where((before == -1) | (before == program), program, -2)
            return
        if ((written != -1) & (written != program)).any():
            raise KernelError(f"{where}: overlapping stores of two programs")
        if np.unique(offset).size != offset.size:
            raise KernelError(f"{where}: one store writes an element twice")
        read = reader[offset]
        if ((read != -1) & (read != program)).any():
            raise KernelError(f"{where}: a program stores what another one of the launch loads")
        writer[offset] = program


_watch: _Watch | None = None


def is_running() -> bool:
    """Whether a recorded launch is being interpreted."""
    return _watch is not None


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


@contextlib.contextmanager
def recording(*, check: bool = True) -> Iterator[list[Launch]]:
    """Yields a list that gets a `Launch` for every kernel launch in the block.

    Accesses outside the tensor that a pointer came from raise KernelError (triton wraps it in its InterpreterError). So
    do, with `check`, races between programs of one launch; and memory from torch.empty is NaN or the largest integer,
    so that a kernel that reads what nothing wrote does not pass by luck.
    """
    repair()
    launches: list[Launch] = []
    call, convert = stock.GridExecutor.__call__, stock._implicit_cvt

    def watched_call(self: Any, *args: Any, **kwargs: Any) -> None:
        global _watch
        outer, _watch = _watch, _Watch(self, args, kwargs, check)
        try:
            call(self, *args, **kwargs)
            launches.append(_watch.finish())
        finally:
            _watch = outer

    def watched_convert(arg: Any) -> Any:
        result = convert(arg)
        if _watch is not None and isinstance(arg, torch.Tensor):
            result.handle.attr["argument"] = _watch.arguments[_identity(arg)]
        return result

    def noticing(method: Callable[..., Any], notice: Callable[..., None]) -> Callable[..., Any]:
        def noticed(self: Any, *args: Any, **options: Any) -> Any:
            if _watch is not None:
                notice(_watch, self, *args)
            return method(self, *args, **options)

        return noticed

    changed = {name: noticing(getattr(Builder, name), notice) for name, notice in _WATCHED.items()}
    changed |= {name: _carrying(getattr(Builder, name)) for name in _CARRY}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(stock.GridExecutor, "__call__", watched_call))
        stack.enter_context(mock.patch.object(stock, "_implicit_cvt", watched_convert))
        for name, method in changed.items():
            stack.enter_context(mock.patch.object(Builder, name, method))
        stack.enter_context(_poisoned() if check else contextlib.nullcontext())
        yield launches


_WATCHED: dict[str, Callable[..., None]] = {
    "create_masked_load": lambda watch, builder, pointer, mask, *_: watch.access("load", builder, pointer, mask),
    "create_masked_store": lambda watch, builder, pointer, _, mask, *__: watch.access("store", builder, pointer, mask),
    "create_atomic_rmw": lambda watch, builder, _, at, __, mask, *___: watch.access("atomic", builder, at, mask),
    "create_dot": lambda watch, builder, a, b, *_: watch.dot(a.data.shape, b.data.shape),
}
"""What is noticed of an operation, by its arguments."""
_CARRY = tuple(
    f"create_{name}"
    for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "select")
)
"""Operations on pointers; their result points into the same tensor."""


def _carrying(method: Callable[..., Any]) -> Callable[..., Any]:
    def carrying(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for arg in args:
            if isinstance(arg, Handle) and "argument" in arg.attr:
                result.attr["argument"] = arg.attr["argument"]
                break
        return result

    return carrying


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
