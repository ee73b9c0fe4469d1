"""The Triton interpreter made right for bf16: kernels are verified on CPU tensors.

TRITON_INTERPRET=1 must be set before any kernel module is imported. Stock triton, 3.6 to 3.9, keeps bf16 as 16-bit
integers and computes with the bits (tl.dot, +, *), truncates where a GPU rounds to nearest even, and casts integers to
bits: results are silently wrong. `repair` computes in fp32 and rounds once per operation, as a GPU does. It also lets a
condition on scalars be part of a mask, and lets triton 3.6 loop beside numpy 2.4 or newer.

What kernels read, write and race for is recorded in recording.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from model.kernels.triton.interpreter_speed import speed_up

# RELIES-ON triton-bf16
Builder, Handle = stock.InterpreterBuilder, stock.TensorHandle
_BITS = np.dtype(np.uint16)
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
    return isinstance(handle, Handle) and handle.data.dtype == _BITS and handle.dtype.scalar == tl.bfloat16


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
    _repair_index()
    speed_up()


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
        return dot(self, a, b, d, *options)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        if not _is_bf16(a):
            return fma(self, a, b, c)
        product = widen(a.data).astype(np.float64) * widen(b.data)  # exact; the sum is rounded to bf16 once
        return Handle(narrow((product + widen(c.data)).astype(np.float32)), tl.bfloat16)

    def create_atomic_rmw(self: Any, op: Any, pointer: Any, value: Any, mask: Any, *options: Any) -> Any:
        if _is_bf16(value):
            raise NotImplementedError("bf16 atomics add bits in the interpreter")
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


def _repair_index() -> None:
    """range() over a scalar of a kernel. Scalars are arrays of one element, which numpy 2.4 and newer no longer turns
    into an int: triton 3.6 asks for that, 3.7 and newer squeeze the array first."""
    patch = stock._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    stock._patch_lang_tensor = patched
