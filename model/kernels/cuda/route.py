"""Routing by route.cu: torch computes the logits (fp32 GEMM), two launches do the rest; backward one launch, two GEMMs.

Not fused with the GEMM: a fused kernel would save writing and reading N R E fp32 logits, which the entropy regulariser
and the backward pass need in memory anyway. Per router the two launches move about E (4 bytes) + 14 k bytes per token.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.cuda import build

MAX_EXPERTS = 256
MIN_CHUNK_TOKENS, MAX_CHUNKS = 32, 128
"""A block sorts one chunk of tokens, and reads the counts of all chunks to know where to write."""


class Library(NamedTuple):
    """A compiled route.cu and the tensors that it takes: `cuda`, or `cpu` for the emulated build of the tests."""

    functions: ctypes.CDLL
    device_type: str

    @classmethod
    def open(cls, path: Path, device_type: str) -> Library:
        functions = ctypes.CDLL(str(path))
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        functions.switchall_route.argtypes = [pointer, pointer, *[integer] * 6, *[pointer] * 6, integer, pointer]
        functions.switchall_route_gradient.argtypes = [*[pointer] * 4, *[integer] * 4, pointer, integer, pointer]
        functions.switchall_error.argtypes = [integer]
        functions.switchall_error.restype = ctypes.c_char_p
        return cls(functions, device_type)

    def check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"kernels.backend=cuda, route: {self.functions.switchall_error(code).decode()} ({code})")


@functools.cache
def library() -> Library:
    """Compiles route.cu at the first call, unless a cache has it."""
    return Library.open(build.build("route"), "cuda")


def forward(
    x: Tensor, weight: Tensor, keep: Tensor | None, k: int, drop_scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As route_reference: x [N, d], weight [R, E, d], keep [N, R, E] bool -> logits, scores, index, load, order.

    RuntimeError for shapes or types that the kernels do not know, and for errors of the launch.
    """
    N, (R, E, d) = x.shape[0], weight.shape
    functions = _library_for(x, E, R, N * k)
    logits = torch.mm(x.float(), weight.float().reshape(R * E, d).t()).view(N, R, E)
    scores, index = logits.new_empty(N, R, k), logits.new_empty(N, R, k, dtype=torch.int64)
    order = logits.new_empty(R, N * k, dtype=torch.int64)
    if N == 0:
        return logits, scores, index, logits.new_zeros(R, E, dtype=torch.int64), order
    load = logits.new_empty(R, E, dtype=torch.int64)
    chunks = num_chunks(N)
    chosen = logits.new_empty(R, N * k, dtype=torch.uint8)
    counts = logits.new_empty(R, chunks, E, dtype=torch.int32)
    keep = keep.contiguous() if keep is not None else None
    functions.check(
        functions.functions.switchall_route(
            _address(logits),
            _address(keep),
            drop_scores,
            *(N, R, E, k, chunks),
            *map(_address, (scores, index, chosen, counts, load, order)),
            x.device.index or 0,
            _stream(x.device),
        )
    )
    return logits, scores, index, load, order


def backward(
    grad_logits: Tensor | None, grad_scores: Tensor | None, x: Tensor, weight: Tensor, scores: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, accumulated in fp32, in the dtypes of x and weight."""
    (N, R, k), (_, E, d) = scores.shape, weight.shape
    functions = _library_for(x, E, R, N * k)
    grad = scores.new_empty(N, R, E)
    if N > 0:
        # Both may be expanded scalars; the variables keep their contiguous copies alive until the launch.
        grad_logits = grad_logits.contiguous() if grad_logits is not None else None
        grad_scores = grad_scores.contiguous() if grad_scores is not None else None
        functions.check(
            functions.functions.switchall_route_gradient(
                *map(_address, (grad_logits, grad_scores, scores, index)),
                *(N, R, E, k),
                _address(grad),
                x.device.index or 0,
                _stream(x.device),
            )
        )
    flat = grad.view(N, R * E)
    grad_x = torch.mm(flat, weight.float().reshape(R * E, d)).to(x.dtype)
    grad_weight = torch.mm(flat.t(), x.float()).to(weight.dtype)
    return grad_x, grad_weight.view(R, E, d)


def num_chunks(num_tokens: int) -> int:
    """Number of chunks of N >= 1 tokens. A chunk has ceil(N / chunks) tokens, the last ones have fewer."""
    return min(MAX_CHUNKS, -(-num_tokens // MIN_CHUNK_TOKENS))


def _library_for(x: Tensor, num_experts: int, num_routers: int, num_slots: int) -> Library:
    if x.dtype == torch.float64:
        raise RuntimeError("kernels.backend=cuda computes routing in fp32: use reference for float64")
    # Slots are counted in ints, and the chunks together may be longer than the tokens.
    if num_experts > MAX_EXPERTS or num_routers >= 1 << 16 or num_slots > 1 << 30:
        raise RuntimeError(
            f"kernels.backend=cuda routes at most {MAX_EXPERTS} experts, 65535 routers and 2^30 slots, not "
            f"{num_experts}, {num_routers} and {num_slots}: use another backend"
        )
    found = library()
    if x.device.type != found.device_type:
        raise RuntimeError(f"kernels.backend=cuda computes routing on {found.device_type} tensors, not {x.device.type}")
    return found


def _address(tensor: Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None


def _stream(device: torch.device) -> int | None:
    """The CUDA stream on which torch queues its own kernels at this point."""
    if device.type == "cuda":  # GPU-ONLY route-stream
        return torch.cuda.current_stream(device).cuda_stream
    return None
