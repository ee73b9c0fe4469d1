"""What all Triton kernels of this package share: the device that they run on, the cases that are compiled without a
GPU, and names of dtypes.

Importing it under TRITON_INTERPRET=1 repairs the interpreter's bf16 (model/kernels/triton/interpreter.py): every kernel
module imports it, so no kernel ever runs on the interpreter's own bf16, which is silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from model.kernels.backend import interpreting, triton_limit

if interpreting():
    from model.kernels.triton.interpreter import repair

    repair()

TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
"""Triton's names of dtypes in a signature; a pointer has a star before it."""


P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(host: Callable[P, R]) -> Callable[P, R]:
    """For host functions: Triton launches on the calling thread's current device, wherever the tensors are. Raises
    RuntimeError for tensors that it has no kernels for."""

    @functools.wraps(host)
    def launching(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        limit = triton_limit(device.type, None)
        if limit is not None:  # else Triton's own words: "0 active drivers"
            raise RuntimeError(f"{host.__name__} got tensors on {device}: {limit}")
        if device.type == "cpu":
            return host(*args, **kwargs)
        with torch.cuda.device(device):  # GPU-ONLY triton-device
            return host(*args, **kwargs)

    return launching


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One kernel with one shipped configuration at realistic widths: what benchmarks/compiled.py compiles and gates.

    `kernel` is the @triton.jit function. `signature` gives every argument a type by name: "*bf16", "i32", "fp32", or
    "constexpr" for those in `constexprs`. Pointers and the integers in `divisible` are multiples of 16, as at run time
    for realistic widths: without it there are no 16-byte loads.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    load_bytes: int = 16
    """The widest global load that the layout of the tensors allows. Below 16 only with the reason beside it."""
    is_gemm: bool = False
    """Must contain the tensor-core instructions of the architecture."""
    divisible: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        names = list(self.kernel.arg_names)
        if list(self.signature) != names:
            raise ValueError(
                f"{self.name}: the signature has {list(self.signature)}, the kernel's arguments are {names}"
            )
        wrong = {n for n, kind in self.signature.items() if (kind == "constexpr") != (n in self.constexprs)}
        if wrong:
            raise ValueError(
                f"{self.name}: {sorted(wrong)} must be constexpr in the signature and have a value, or neither"
            )

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """The `attrs` of triton's ASTSource."""
        return {
            (position,): [["tt.divisibility", 16]]
            for position, (name, kind) in enumerate(self.signature.items())
            if kind.startswith("*") or name in self.divisible
        }
