"""The cases of model/kernels/triton/dropout.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernel_cases.case import CompileCase
from model.kernels.triton.dropout import BLOCK, WARPS, dropout_kernel, keep_mask_kernel


def compile_cases() -> Iterator[CompileCase]:
    """Shapes decide nothing but whether a rank holds all columns: one machine code for all models."""
    for kind in ("bf16", "fp16", "fp32"):
        for divided in (False, True):
            for residual in (False, True):
                yield _dropout(kind, divided=divided, residual=residual)
    for divided in (False, True):
        constants = {"DIVIDED": divided, "BLOCK": BLOCK}
        kinds = {"mask_ptr": "*i1", "sequence_index_ptr": "*i64"}
        name = f"keep_mask{' divided' * divided}"
        # It loads nothing but the index of a sequence.
        yield _case(name, keep_mask_kernel, kinds, constants, load_bytes=8)


def _dropout(kind: str, *, divided: bool, residual: bool) -> CompileCase:
    constants = {"DIVIDED": divided, "BLOCK": BLOCK} | ({} if residual else {"residual_ptr": None})
    kinds = dict.fromkeys(("x_ptr", "residual_ptr", "y_ptr"), f"*{kind}")
    kinds |= {"sequence_index_ptr": "*i64", "scale": "fp32"}
    name = f"dropout{' residual' * residual}{' divided' * divided} {kind}"
    return _case(name, dropout_kernel, kinds, constants)


def _case(
    name: str, kernel: Any, kinds: dict[str, str], constants: dict[str, Any], *, load_bytes: int = 16
) -> CompileCase:
    kinds = kinds | dict.fromkeys(constants, "constexpr")
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        constexprs=constants,
        num_warps=WARPS,
        load_bytes=load_bytes,
        divisible=frozenset({"num_values"}),
    )
