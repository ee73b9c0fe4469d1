"""What SwitchHead's two dense projections share: chunks of tokens, the parts between the GEMMs, weight gradients.

All experts of all heads are one GEMM of H * E * h columns (value) or rows (output). A token needs k in E of them, so
that is E / k times the useful flops, at cuBLAS's rate. Between it and the narrow tensors [N, H, h] stand a gated sum
and a gated spread, in Triton (strategy `fused`) or in torch's operators (`plain`), and nothing else. What is as wide as
all experts, [tokens, H, E, h], exists for one chunk of tokens at a time. Grids and chunks follow from the shapes
of the inputs: nothing waits for the device, and every sum has a fixed order. Bytes: docs/kernels.md.

Shape legend: N tokens, C tokens of a chunk, d d_model, H heads, h head_dim, E experts of a head, k chosen experts.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from model.kernels.dtypes import wide_dtype
from model.kernels.gemm import multiply
from model.kernels.ops.route import Choice
from model.kernels.ops.switchhead import Inputs

CHUNK_BYTES = 256 * 2**20
"""Largest [C, H, E, h] of a chunk: 32768 tokens of switchall_1b in bf16, 8 KB each. A micro-batch of any shipped
configuration is one chunk."""
CHUNK_MULTIPLE = 256
"""Tokens of a chunk are a multiple of it, so that only the last one leaves tiles of its GEMMs unfilled."""


def rows_module(strategy: str) -> ModuleType:
    """gated_sum and gated_spread: by Triton (`fused`) or by torch (`plain`)."""
    return importlib.import_module(
        "model.kernels.triton.gated_rows" if strategy == "fused" else "model.kernels.dense.plain_rows"
    )


def check_dtypes(inputs: Inputs, backend: str = "dense") -> None:
    """ValueError where the rows and the experts differ in dtype."""
    if inputs.rows.dtype != inputs.experts.dtype:
        raise ValueError(
            f"kernels.backend={backend} multiplies rows by experts of the same dtype, not {inputs.rows.dtype} by "
            f"{inputs.experts.dtype}"
        )


class Chunk:
    """Some of the tokens of a call, and the part of each tensor that is theirs."""

    def __init__(self, start: int, stop: int) -> None:
        self.tokens = slice(start, stop)

    def __len__(self) -> int:
        return self.tokens.stop - self.tokens.start

    def pairs(self, t: Tensor) -> Tensor:
        """Of `t` [N, H, ...] the chunk's, [C * H, ...]."""
        return t[self.tokens].flatten(0, 1)

    def choices(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """The chunk's scores and index, [C, H, k]."""
        return choice.scores[self.tokens], choice.index[self.tokens]


def chunks(num_tokens: int, width: int, itemsize: int) -> list[Chunk]:
    """Consecutive chunks of at most CHUNK_BYTES, for `width` = H * E * h."""
    size = max(1, CHUNK_BYTES // (width * itemsize))
    if size > CHUNK_MULTIPLE:
        size -= size % CHUNK_MULTIPLE
    return [Chunk(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


class WeightGradient:
    """The sum over chunks of a^T b. Of several chunks it is kept in fp32, so that it is rounded once."""

    def __init__(self, rows: int, columns: int, like: Tensor, num_chunks: int) -> None:
        dtype = like.dtype if num_chunks == 1 else wide_dtype(like.dtype)
        new = like.new_empty if num_chunks > 0 else like.new_zeros
        self.total, self.begun = new(rows, columns, dtype=dtype), False

    def add(self, a: Tensor, b: Tensor) -> None:
        """`a` [C, rows], `b` [C, columns]."""
        multiply(a.t(), b, self.total, add=self.begun)
        self.begun = True
