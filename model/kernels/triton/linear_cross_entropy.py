"""Output layer and cross-entropy in Triton: chunks of tokens, softmax and gradient in one pass over a chunk's logits.

The three products of a chunk (logits, and the gradients of hidden states and weight) are plain dense GEMMs and stay
with torch.mm: cuBLAS has them near the peak at these sizes, and no kernel of ours would. What is fused is all between
them, which PyTorch does in about eight passes over [chunk, V]: bias, maximum, sum of exponentials, target, loss,
probabilities minus one-hot, and the rounding to the dtype of the next GEMM.

Bytes per logit in bf16: 4 written in fp32 by the first GEMM (8 bits of a logit of 10 would put 3% of error into its
probability), 4 read, 2 written, 2 read by each of the other two GEMMs. A row of up to 32768 classes is held in
registers between statistics and gradient; a longer one is read twice, the second time from the L2 cache mostly (132
rows of 200 kB at a time are half of an H100's). Multiplying again for the gradient instead of writing logits would
save 8 of the 14 bytes and cost a fourth GEMM, one of ours: at the peaks of an H100 and d = 1024 it gains 2.4 ps per
logit and costs 2.1.

With a vocabulary shard per rank: statistics, two small collectives, gradient. No host sync, no atomics.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.backend import triton_limit
from model.kernels.dtypes import gradient_dtype
from model.kernels.gemm import multiply
from model.kernels.ops.linear_cross_entropy import Inputs, chunk_tokens
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.tiles import measured

LONGEST_BLOCK = 32768
"""Classes that one program holds: 32 fp32 registers in each of 1024 threads."""
WALKING_BLOCK = 4096


@triton.jit
def load_logits(
    logits_ptr, bias_ptr, start, NUM_CLASSES: tl.constexpr, ROW_STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Logits [BLOCK] of a row from class `start` on, -inf past the last. Rows are padded to ROW_STRIDE, a multiple of
    16 elements, and read to there: a mask at an odd NUM_CLASSES would make every load a narrow one."""
    classes = start + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + classes, mask=classes < ROW_STRIDE, other=0.0)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + classes, mask=classes < NUM_CLASSES, other=0.0).to(tl.float32)
    return tl.where(classes < NUM_CLASSES, logits, float("-inf"))


@triton.jit
def store_gradient(
    gradient_ptr, logits, maximum, exp_sum, target, start, ROW_STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """softmax - onehot(target); 0 in the padding."""
    classes = start + tl.arange(0, BLOCK)
    gradient = tl.exp(logits - maximum) * (1.0 / exp_sum) - tl.where(classes == target, 1.0, 0.0)
    tl.store(gradient_ptr + classes, gradient.to(gradient_ptr.dtype.element_ty), mask=classes < ROW_STRIDE)


@triton.jit
def softmax_kernel(
    logits_ptr, bias_ptr, targets_ptr, combined_ptr, statistics_ptr, token_loss_ptr, gradient_ptr,
    ignore_index, first_class, num_rows,
    NUM_CLASSES: tl.constexpr, ROW_STRIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of logits [num_rows, ROW_STRIDE] fp32 per program, targets int64 in classes of all shards.

    The row's maximum and sum of exp(logit - maximum) are those of all shards in `combined_ptr` [2, num_rows] if given,
    else computed: stored with the target logit (0 where another shard has it) in `statistics_ptr` [3, num_rows] if
    given, else made the token's loss. The gradient for d loss = 1 is stored if `gradient_ptr` is given: from maximum
    and sum, because their logarithm is rounded (6e-5 at logits of 1000). Ignored rows read nothing and store zeros.
    """
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    target = tl.load(targets_ptr + row)
    kept = target != ignore_index
    target -= first_class
    logits_ptr += wide_row * ROW_STRIDE
    if gradient_ptr is not None:
        gradient_ptr += wide_row * ROW_STRIDE
    if kept:
        logits = load_logits(logits_ptr, bias_ptr, 0, NUM_CLASSES, ROW_STRIDE, BLOCK)
        if combined_ptr is None:
            maximum = tl.max(logits, 0)
            exp_sum = tl.sum(tl.exp(logits - maximum), 0)
            for start in range(BLOCK, NUM_CLASSES, BLOCK):
                more = load_logits(logits_ptr, bias_ptr, start, NUM_CLASSES, ROW_STRIDE, BLOCK)
                larger = tl.maximum(maximum, tl.max(more, 0))
                exp_sum = exp_sum * tl.exp(maximum - larger) + tl.sum(tl.exp(more - larger), 0)
                maximum = larger
            here = (target >= 0) & (target < NUM_CLASSES)
            target_logit = tl.load(logits_ptr + target, mask=here, other=0.0)
            if bias_ptr is not None:
                target_logit += tl.load(bias_ptr + target, mask=here, other=0.0).to(tl.float32)
            if statistics_ptr is not None:
                tl.store(statistics_ptr + row, maximum)
                tl.store(statistics_ptr + num_rows + row, exp_sum)
                tl.store(statistics_ptr + 2 * num_rows + row, target_logit)
            else:
                tl.store(token_loss_ptr + row, tl.log(exp_sum) + (maximum - target_logit))
        else:
            maximum = tl.load(combined_ptr + row)
            exp_sum = tl.load(combined_ptr + num_rows + row)
        if gradient_ptr is not None:
            store_gradient(gradient_ptr, logits, maximum, exp_sum, target, 0, ROW_STRIDE, BLOCK)
            for start in range(BLOCK, NUM_CLASSES, BLOCK):
                more = load_logits(logits_ptr, bias_ptr, start, NUM_CLASSES, ROW_STRIDE, BLOCK)
                store_gradient(gradient_ptr, more, maximum, exp_sum, target, start, ROW_STRIDE, BLOCK)
    else:
        if statistics_ptr is not None:
            tl.store(statistics_ptr + row, 0.0)
            tl.store(statistics_ptr + num_rows + row, 1.0)
            tl.store(statistics_ptr + 2 * num_rows + row, 0.0)
        if token_loss_ptr is not None:
            tl.store(token_loss_ptr + row, 0.0)
        if gradient_ptr is not None:
            for start in range(0, ROW_STRIDE, BLOCK):
                classes = start + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + classes, zero, mask=classes < ROW_STRIDE)


# -------------------------------------------------------------------------------------------------------------- host


@on_its_device
def forward(inputs: Inputs, chunk_bytes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `model.kernels.ops.linear_cross_entropy._linear_cross_entropy`; `chunk_bytes` of fp32 logits at a time."""
    hidden, weight, bias, targets, ignore_index, need_hidden, need_weight, _, _ = inputs
    reason = triton_limit(hidden.device.type, hidden.dtype)
    if reason is not None:
        raise ValueError(
            f"kernels.backend=triton cannot compute linear_cross_entropy: {reason}. Possible: auto, reference"
        )
    (N, d), V, dtype = hidden.shape, weight.shape[0], gradient_dtype(weight.dtype)
    hidden, weight, targets = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    inputs = inputs._replace(bias=bias, targets=targets)
    need_gradient, need_bias = need_hidden or need_weight, need_weight and bias is not None
    stride, _, _ = blocks(V, holds_row=False)
    chunk_size = chunk_tokens(N, stride * 4, chunk_bytes, hidden.device.type)
    logits = hidden.new_empty(chunk_size, stride, dtype=torch.float32)
    gradient = hidden.new_empty(chunk_size, stride) if need_gradient else None
    token_loss = hidden.new_empty(N, dtype=torch.float32)
    inverse_count = 1.0 / (targets != ignore_index).sum().clamp_min(1).float()
    grad_hidden = hidden.new_empty((N, d) if need_hidden else (0,), dtype=gradient_dtype(hidden.dtype))
    new = hidden.new_empty if N > 0 else hidden.new_zeros  # the first chunk overwrites it
    grad_weight = new((V, d) if need_weight else (0,), dtype=torch.float32)
    grad_bias = torch.zeros(V if need_bias else 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, N, chunk_size):
        chunk = slice(start, min(start + chunk_size, N))
        rows, size = hidden[chunk], chunk.stop - start
        multiply(rows, weight.t(), logits[:size, :V])
        _softmax(inputs, chunk, logits[:size], token_loss[chunk], None if gradient is None else gradient[:size])
        if gradient is None:
            continue
        delta = gradient[:size, :V]
        # 1 / count is not in `delta`: in fp16 a small probability divided by a million tokens would be zero.
        if need_hidden:
            grad_rows = multiply(delta, weight, rows.new_empty(size, d, dtype=torch.float32))
            torch.mul(grad_rows, inverse_count, out=grad_hidden[chunk])
        if need_weight:
            multiply(delta.t(), rows, grad_weight, add=start > 0)
        if need_bias:
            grad_bias += delta.sum(0, dtype=torch.float32)
    grad_weight, grad_bias = (
        torch.mul(grad, inverse_count, out=grad if grad.dtype == dtype else grad.new_empty(grad.shape, dtype=dtype))
        for grad in (grad_weight, grad_bias)  # scaled and rounded in one pass
    )
    return token_loss.sum() * inverse_count, token_loss, grad_hidden, grad_weight, grad_bias


def _softmax(inputs: Inputs, chunk: slice, logits: Tensor, token_loss: Tensor, gradient: Tensor | None) -> None:
    """Fills `token_loss` [C] and `gradient` [C, padded V] of the tokens in `chunk` from `logits` [C, padded V] of this
    rank's classes."""
    size, num_classes, targets, group = logits.shape[0], inputs.weight.shape[0], inputs.targets[chunk], inputs.group

    def launch(
        combined: Tensor | None, statistics: Tensor | None, loss: Tensor | None, gradient: Tensor | None
    ) -> None:
        holds_row = loss is not None and gradient is not None
        stride, block, warps = blocks(num_classes, holds_row=holds_row)
        if found := measured("softmax", inputs.hidden.dtype, V=num_classes, holds_row=int(holds_row)):
            block, warps = found["block"], found["warps"]
        softmax_kernel[(size,)](
            logits_ptr=logits,
            bias_ptr=inputs.bias,
            targets_ptr=targets,
            combined_ptr=combined,
            statistics_ptr=statistics,
            token_loss_ptr=loss,
            gradient_ptr=gradient,
            ignore_index=inputs.ignore_index,
            first_class=inputs.first_class,
            num_rows=size,
            NUM_CLASSES=num_classes,
            ROW_STRIDE=stride,
            BLOCK=block,
            num_warps=warps,
        )

    if group is None:
        launch(None, None, token_loss, gradient)
        return
    statistics = logits.new_empty(3, size)
    launch(None, statistics, None, None)
    own, exp_sum, target_logit = statistics
    maximum = own.clone()
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([exp_sum * (own - maximum).exp_(), target_logit])
    dist.all_reduce(sums, group=group)
    exp_sum, target_logit = sums
    # Of an ignored token every rank gave maximum 0, and the sum of its ones is not a loss.
    loss = exp_sum.log() + (maximum - target_logit)
    token_loss.copy_(torch.where(targets != inputs.ignore_index, loss, 0.0))
    if gradient is not None:
        launch(torch.stack([maximum, exp_sum]), None, None, gradient)


def blocks(num_classes: int, *, holds_row: bool) -> tuple[int, int, int]:
    """-> elements from row to row, classes per block, warps. A launch that computes statistics and gradient holds the
    row in registers where it can; one that does either walks over it."""
    stride = triton.cdiv(num_classes, 16) * 16
    block = triton.next_power_of_2(num_classes)
    if block > (LONGEST_BLOCK if holds_row else WALKING_BLOCK):
        return stride, WALKING_BLOCK, 8
    block = max(128, block)
    return stride, block, min(32, max(min(4, block // 128), block // 1024))  # 4 numbers a thread, 16 bytes, or more
