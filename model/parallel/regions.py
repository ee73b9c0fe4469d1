"""Tensor-parallel regions: inside, ranks hold all tokens and shares of heads, experts, columns or classes; between two
regions all ranks hold the same hidden states, or, with sequence parallelism, each holds T / tensor_size tokens of every
sequence (Megatron-LM, arXiv 2205.05198, section 4.2.2).

A region is entered with `enter_region` or `enter_overlapped` (model/parallel/overlap.py), and left with `leave_region`;
without a tensor-parallel group all of them do nothing.
"""

from __future__ import annotations

from torch import Tensor

from model.parallel.collectives import enter_shards, gather_tokens, leave_shards, scatter_tokens
from model.parallel.context import ParallelContext


def enter_region(x: Tensor, parallel: ParallelContext) -> Tensor:
    """`x` [B, T, d], or this rank's tokens of it -> [B, T, d] for work that ranks divide: gradients are summed.

    If the region's weights get their gradients in the backward pass, `enter_overlapped` hides that sum behind them.
    """
    if parallel.sequence_parallel:
        return gather_tokens(x, parallel.tensor_group)
    return enter_shards(x, parallel.tensor_group)


def leave_region(y: Tensor, parallel: ParallelContext) -> Tensor:
    """The sum over ranks of partial results `y` [B, T, d], or this rank's tokens of the sum."""
    if parallel.sequence_parallel:
        return scatter_tokens(y, parallel.tensor_group)
    return leave_shards(y, parallel.tensor_group)


def between_regions(parameter: Tensor, parallel: ParallelContext) -> Tensor:
    """A replicated parameter for use between regions. With sequence parallelism each rank applies it to other tokens:
    the gradient is the sum over ranks."""
    return enter_shards(parameter, parallel.tensor_group) if parallel.sequence_parallel else parameter


def first_token(num_tokens: int, parallel: ParallelContext) -> int:
    """Between regions: where in its sequence the first of this rank's `num_tokens` tokens is."""
    return parallel.tensor_rank * num_tokens if parallel.sequence_parallel else 0
