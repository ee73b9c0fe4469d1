"""The Triton interpreter made right for bf16, with counters and checks: kernels are verified on CPU tensors.

TRITON_INTERPRET=1 must be set before any kernel module is imported. Stock triton 3.9 keeps bf16 as 16-bit integers and
computes with the bits (tl.dot, +, *), truncates where a GPU rounds to nearest even, and casts integers to bits: results
are silently wrong. `repair` computes in fp32 and rounds once per operation, as a GPU does. It also lets a condition on
scalars be part of a mask.

The interpreter runs the programs of a launch one after another, so it cannot show a race. `recording` sees one in the
addresses instead: two programs of a launch that store to the same place, or one that loads what another stores.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock

Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


# ------------------------------------------------------------------------------------------------------------- bf16


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) -> fp32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Numbers -> bf16 bits (uint16), rounded to nearest, ties to even; every NaN becomes the quiet one."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _result(data: np.ndarray) -> Any:
    """A handle of what an fp32 operation on bf16 operands gave: comparisons stay, numbers are rounded."""
    return Handle(data, tl.int1) if data.dtype == np.bool_ else Handle(narrow(data), tl.bfloat16)


def repair() -> None:
    """Makes bf16 right in this process's interpreter; any number of calls. Raises RuntimeError when the interpreter is
    off, because kernels that were decorated without it would run compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton kernels are imported")
    if getattr(Builder, "bf16_is_right", False):
        return
    Builder.bf16_is_right = True
    _repair_operators()
    _repair_casts()
    _repair_reductions()


def _repair_operators() -> None:
    binary, unary, ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
    dot, fma, atomic = Builder.create_dot, Builder.create_fma, Builder.create_atomic_rmw

    def binary_op(self: Any, a: Any, b: Any, op: Callable) -> Any:
        if _is_bf16(a) and op not in _BITWISE:
            return _result(op(widen(a.data), widen(b.data)))
        result = binary(self, a, b, op)
        # Stock keeps the operands' type for a comparison: a scalar condition then cannot be part of a mask.
        return Handle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    def unary_op(self: Any, a: Any, op: Callable) -> Any:
        return _result(op(widen(a.data))) if _is_bf16(a) else unary(self, a, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Callable) -> Any:
        if _is_bf16(a):  # clip; np.where has a condition first and moves bits, which is right
            return _result(op(widen(a.data), widen(b.data), widen(c.data)))
        return ternary(self, a, b, c, op)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        # Products of half precision are exact in fp32; the widened arrays also take BLAS instead of numpy's loop.
        a, b = (
            Handle(h.data.astype(np.float32), tl.float32) if h.dtype.scalar == tl.float16 else _wide(h) for h in (a, b)
        )
        if _watch is not None:
            _watch.dot(a.data.shape, b.data.shape)
        return dot(self, a, b, d, *options)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not _is_bf16(a):
            return fma(self, a, b, c)
        product = widen(a.data).astype(np.float64) * widen(b.data)  # exact; the sum is rounded to bf16 once
        return Handle(narrow((product + widen(c.data)).astype(np.float32)), tl.bfloat16)

    def create_atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *options: Any) -> Any:
        if _is_bf16(value):
            raise NotImplementedError("bf16 atomics add bits in the interpreter")
        if _watch is not None:
            _watch.access("atomic", self, pointer, mask)
        return atomic(self, op, pointer, value, mask, *options)

    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary_op, unary_op, ternary_op
    Builder.create_dot, Builder.create_fma, Builder.create_atomic_rmw = create_dot, create_fma, create_atomic_rmw


def _repair_casts() -> None:
    cast, fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.bfloat16 and target.scalar == tl.bfloat16:
            return Handle(narrow(source.data), tl.bfloat16)
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            source = _wide(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        to_nearest = rounding is None or "RTNE" in str(rounding)
        kinds = {source.dtype.scalar, target.scalar}
        if to_nearest and kinds <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
            return cast_impl(self, source, target)
        if tl.bfloat16 in kinds:
            raise NotImplementedError(f"bf16 with {rounding}, or from or to fp8")
        return fp_to_fp(self, source, target, rounding)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(Builder, f"create_{name}", lambda self, source, target: self.cast_impl(source, target))


def _repair_reductions() -> None:
    """The fast paths of tl.sum, tl.max, tl.argmax and tl.cumsum, which numpy computes on the bits. Sums are rounded
    once here, once per addition on a GPU: kernels sum in fp32."""

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def repaired(self: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            first = value[0] if isinstance(value, tuple) else value
            if not _is_bf16(first.handle):
                return original(self, value, *args, **kwargs)
            block = tl.block_type(tl.float32, list(first.handle.data.shape))
            result = original(self, tl.core.tensor(_wide(first.handle), block), *args, **kwargs)
            parts = result if isinstance(result, (tuple, list)) else (result,)
            back = [
                self.to_tensor(narrow(t.handle.data) if t.shape else narrow(t.handle.data)[0], tl.bfloat16)
                if t.dtype == tl.float32
                else t
                for t in parts
            ]
            return type(result)(back) if isinstance(result, (tuple, list)) else back[0]

        setattr(owner, name, repaired)

    for owner, names in ((stock.ReduceOps, ("sum", "min_max")), (stock.ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            wrap(owner, name)


# ----------------------------------------------------------------------------------------------- counters and checks


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
    methods = {name: getattr(Builder, name) for name in (*_CARRY, "create_masked_load", "create_masked_store")}

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

    def masked_load(self: Any, pointer: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        if _watch is not None:
            _watch.access("load", self, pointer, mask)
        return methods["create_masked_load"](self, pointer, mask, *rest, **options)

    def masked_store(self: Any, pointer: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        if _watch is not None:
            _watch.access("store", self, pointer, mask)
        return methods["create_masked_store"](self, pointer, value, mask, *rest, **options)

    stock.GridExecutor.__call__, stock._implicit_cvt = watched_call, watched_convert
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    for name in _CARRY:
        setattr(Builder, name, _carrying(methods[name]))
    try:
        with _poisoned() if check else contextlib.nullcontext():
            yield launches
    finally:
        stock.GridExecutor.__call__, stock._implicit_cvt = call, convert
        for name, method in methods.items():
            setattr(Builder, name, method)


_CARRY = tuple(
    f"create_{name}"
    for name in ("addptr", "splat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "select")
)
"""Operations on pointers; their result points into the same tensor."""


def _carrying(method: Callable) -> Callable:
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
