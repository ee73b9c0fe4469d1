"""What this stack takes from megatron-core (0.16.1). No other file imports that, and none imports this one at its top.

Importing it takes longer than importing torch, and a run that is divided over data-parallel ranks alone needs nothing
of it: who calls has a group, and imports this file then.

megatron-core's layers are used as functions, not as modules. Its modules own their weight, initialise it and name it;
here a parameter has one canonical name and one initial value in every layout, so that checkpoints move between layouts.

This file makes three things right, so that no layer has to:

    memory layout   `mappings._reduce` sums a contiguous COPY of a non-contiguous tensor and returns the unsummed one,
                    silently; and it sums a contiguous one in place, though autograd may have given the same gradient to
                    another consumer, and selective recomputation may keep the product that it overwrites. Its input is
                    therefore always a contiguous tensor of its own.
    sequence first  its sequence-parallel functions divide the first dimension, which is the batch here.
    device          it allocates on `torch.cuda.current_device()`. Its modules see a torch whose answer is the CPU where
                    the ranks do not speak by NCCL, also on a machine with GPUs; torch itself is not touched.
"""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.replaced import replaced


def _left_alone(function: Any = None, **options: Any) -> Any:
    """torch.compile as a decorator that changes nothing, with options or without."""
    return _left_alone if function is None else function


def _is_news(record: logging.LogRecord) -> bool:
    """Not what torch says of a CUDA toolkit on a machine without a GPU, such as a login node: megatron-core imports its
    builder of extensions, which nothing here needs."""
    return not str(record.msg).startswith("No CUDA runtime is found")


logging.getLogger("torch.utils.cpp_extension").addFilter(_is_news)

# Its fused functions, none of which is used here, are handed to torch.compile where they are defined, which imports all
# of TorchInductor. RELIES-ON megatron-import
with warnings.catch_warnings(), replaced(torch, "compile", _left_alone):
    # The warnings that Transformer Engine and Apex are missing: nothing that is used here needs them.
    warnings.simplefilter("ignore")
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

__all__ = ["HyperCommGrid"]


class _Torch:
    """torch as megatron-core's modules see it."""

    def __init__(self) -> None:
        self.cuda = SimpleNamespace(current_device=_current_device)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _current_device() -> torch.device | int:
    """Where the tensors of a run are, by the backend of its ranks: a run on CPUs, or a rehearsal, may have a machine
    with GPUs."""
    if dist.get_backend() == "nccl":  # GPU-ONLY megatron-device
        return torch.cuda.current_device()
    return torch.device("cpu")


mappings.torch = _Torch()  # RELIES-ON megatron-device

# Its advice on CUDA_DEVICE_MAX_CONNECTIONS is in docs/parallelism.md. RELIES-ON megatron-advice
layers.linear_with_grad_accumulation_and_async_allreduce.warned = True

# ------------------------------------------------------------------------------- entering and leaving divided regions


def copy_to_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x`, the same on every rank; the gradient is the sum over ranks."""
    return _OwnGradient.apply(mappings.copy_to_tensor_model_parallel_region(x, group=group))


def reduce_from_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of `x`; the gradient of every rank is the sum's."""
    own = x.clone(memory_format=torch.contiguous_format)  # RELIES-ON megatron-sums
    return mappings.reduce_from_tensor_model_parallel_region(own, group=group)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T / ranks, d] -> [B, T, d]; the gradient is this rank's tokens of the sum over ranks."""
    first = x.transpose(0, 1).contiguous()
    return mappings.gather_from_sequence_parallel_region(first, group=group).transpose(0, 1).contiguous()


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, d] -> [B, T / ranks, d], this rank's tokens of the sum over ranks; the gradient is gathered."""
    assert x.shape[1] % group.size() == 0, f"{x.shape[1]} tokens cannot be divided by {group.size()} ranks"
    # A clone: the collective may use its input as scratch, and with one sequence transposing copies nothing.
    first = x.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return mappings.reduce_scatter_to_sequence_parallel_region(first, group=group).transpose(0, 1).contiguous()


def gather_last(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The shards [..., n] side by side, [..., n * ranks]."""
    return mappings.gather_from_tensor_model_parallel_region(x, group=group)


class _OwnGradient(torch.autograd.Function):
    """The backward function after it may change the gradient in place, so it gets a contiguous copy of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------------------------- layers


def column_linear(x: Tensor, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """ColumnParallelLinear: `x` [..., d], the same on every rank, and this rank's rows of a weight [w, d] -> [..., w].

    It begins the sum of the gradient of `x` over ranks before it computes the gradient of the weight, and awaits it
    afterwards.
    """
    return layers.linear_with_grad_accumulation_and_async_allreduce(
        x, weight, None, False, allreduce_dgrad=True, sequence_parallel=False, tp_group=group
    )


def embed(tokens: Tensor, weight: Tensor, *, first: int, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """VocabParallelEmbedding: `tokens` [B, T] and this rank's rows [V, d] of the table, classes from `first` on
    -> [B, T, d], or with sequence parallelism this rank's tokens of it."""
    hidden = _Embedding(weight, first, group, sequence_parallel)(tokens)
    return hidden.transpose(0, 1).contiguous() if sequence_parallel else hidden


class _Embedding(layers.VocabParallelEmbedding):  # RELIES-ON megatron-embedding
    """Its forward pass with an existing weight: the constructor, which would make a weight, is not called."""

    def __init__(self, weight: Tensor, first: int, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self.vocab_start_index, self.vocab_end_index = first, first + weight.shape[0]
        self.tp_group = group
        self.reduce_scatter_embeddings = sequence_parallel
        self.deterministic_mode = False


# ----------------------------------------------------------------------------------------------- vocab-parallel loss


def cross_entropy(logits: Tensor, targets: Tensor, *, first: int, group: dist.ProcessGroup) -> Tensor:
    """The loss [N] of every token: `logits` [N, V] of this rank's classes, from `first` on, and
    `targets` [N] among all classes (another value, such as -100, is the class of no rank)."""
    return _CrossEntropy.apply(logits, targets, first, group)


class _CrossEntropy(torch.autograd.Function):  # RELIES-ON megatron-loss
    """megatron-core's arithmetic between our collectives: its own function takes the group out of a global of
    parallel_state, and turns fp64 into fp32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        maximum = logits.amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        mask, column, target_logit, exp_sum, exponentials = VocabParallelCrossEntropy.calculate_predicted_logits(
            logits.clone(), targets, maximum, first, first + logits.shape[1]
        )
        sums = torch.stack([target_logit, exp_sum])
        dist.all_reduce(sums, group=group)
        target_logit, exp_sum = sums.unbind()
        softmax, loss = VocabParallelCrossEntropy.calculate_cross_entropy_loss(exponentials, target_logit, exp_sum)
        ctx.save_for_backward(softmax, mask, column)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, mask, column = ctx.saved_tensors
        prepared = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax.clone(), mask)
        rows, place, update, result = prepared
        return (
            VocabParallelCrossEntropy.calculate_gradients(rows, place, column, update, result, grad),
            None,
            None,
            None,
        )
