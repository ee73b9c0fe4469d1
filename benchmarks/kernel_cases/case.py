"""One kernel in one shipped configuration, as benchmarks/compiled.py compiles it without a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from model.kernels.backend import ATTENTION_WIDTHS
from model.kernels.triton.gated_gemm import GemmTiles

TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
"""Triton's names of dtypes in a signature; a pointer has a star before it."""


ARCHITECTURES = (80, 90, 100, 120)


def without_wide_heads(architectures: Iterable[int], width: int) -> tuple[int, ...]:
    """Those on which attention's kernels take heads of `width` columns."""
    return tuple(a for a in architectures if width <= ATTENTION_WIDTHS.get((a // 10, a % 10), 128))


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
    registers: int = 0
    """Of a thread, at most; 0: as the compiler likes."""
    load_bytes: int = 16
    """The widest global load that the layout of the tensors allows. Below 16 only with the reason beside it."""
    is_gemm: bool = False
    """Must contain the tensor-core instructions of the architecture."""
    divisible: frozenset[str] = field(default_factory=frozenset)
    architectures: tuple[int, ...] = ARCHITECTURES
    """Those that it is for, where a kernel has other tiles on another, or takes less there."""

    @classmethod
    def of(
        cls,
        name: str,
        kernel: Any,
        kinds: dict[str, str],
        constants: dict[str, Any],
        others: str = "i32",
        **options: Any,
    ) -> CompileCase:
        """`kinds`: types of arguments that are no `constants`; `others`: of all further ones."""
        kinds = kinds | dict.fromkeys(constants, "constexpr")
        signature = {n: kinds.get(n, others) for n in kernel.arg_names}
        return cls(name=name, kernel=kernel, signature=signature, constexprs=constants, **options)

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
    def options(self) -> dict[str, int]:
        """Options of the compiler, as the launch gives them."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    @property
    def attributes(self) -> dict[tuple[int, ...], list[list[Any]]]:
        """The `attrs` of triton's ASTSource."""
        return {
            (position,): [["tt.divisibility", 16]]
            for position, (name, kind) in enumerate(self.signature.items())
            if kind.startswith("*") or name in self.divisible
        }


def row_load(*widths: int) -> int:
    """Widest load that rows of these widths allow in half precision: rows of 412 and of 76 elements start at multiples
    of 8 bytes, of 146 at multiples of 4."""
    return min(math.gcd(16, 2 * width) for width in widths)


def make_case(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    tiles: GemmTiles | None = None,
    *,
    tensor_cores: bool = True,
    launch: Mapping[str, int] | None = None,
    **options: Any,
) -> CompileCase:
    """A case whose `pointers` are given by type, and whose other arguments that are no `constants` are int32. `tiles`
    are those of a GEMM, with `tensor_cores` in half precision; `launch` and `options` are fields of the case."""
    options |= launch or {}
    if tiles is not None:
        constants = constants | {"BLOCK_M": tiles.rows, "BLOCK_N": tiles.columns, "BLOCK_K": tiles.depth}
        options |= {"num_warps": tiles.warps, "num_stages": tiles.stages, "is_gemm": tensor_cores}
    kinds = {n: f"*{kind}" for n, kind in pointers.items()}
    return CompileCase.of(name, kernel, kinds, constants, divisible=frozenset({"N", "num_slots", "size"}), **options)
