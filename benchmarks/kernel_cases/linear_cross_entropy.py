"""The cases of model/kernels/triton/linear_cross_entropy.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernel_cases.case import TYPE_NAMES, CompileCase
from benchmarks.kernel_cases.shipped import VOCABULARIES
from model.kernels.triton.linear_cross_entropy import blocks, softmax_kernel


def compile_cases() -> Iterator[CompileCase]:
    """The three launches at every vocabulary, in bf16, and one in fp16 and fp32."""
    for num_classes in VOCABULARIES:
        for what in ("loss and gradient", "loss", "statistics", "gradient"):
            yield _case(what, num_classes, torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        yield _case("loss and gradient", 32000, dtype)


def _case(what: str, num_classes: int, dtype: torch.dtype) -> CompileCase:
    absent = {
        "loss and gradient": ("combined_ptr", "statistics_ptr"),
        "loss": ("combined_ptr", "statistics_ptr", "gradient_ptr"),
        "statistics": ("combined_ptr", "token_loss_ptr", "gradient_ptr"),
        "gradient": ("statistics_ptr", "token_loss_ptr"),
    }[what]
    stride, block, warps = blocks(num_classes, holds_row=what == "loss and gradient")
    constants = dict.fromkeys(absent) | {"NUM_CLASSES": num_classes, "ROW_STRIDE": stride, "BLOCK": block}
    half = f"*{TYPE_NAMES[dtype]}"
    kinds = {"bias_ptr": half, "gradient_ptr": half, "targets_ptr": "*i64"}
    kinds |= dict.fromkeys(("num_rows", "ignore_index", "first_class"), "i32")
    name = f"linear_cross_entropy {what} {num_classes} {TYPE_NAMES[dtype]}"
    return CompileCase.of(name, softmax_kernel, kinds, constants, "*fp32", num_warps=warps)
