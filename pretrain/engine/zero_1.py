"""ZeRO 1 with bf16: DeepSpeed's ZeRO optimizer, as at its stages 1 (fp32) and 2, instead of its BF16_Optimizer.

Both keep one fp32 sum of gradients per parameter and rank. BF16_Optimizer moves 26 bytes per parameter and micro-step
to add to it, and all-reduces it after the last backward pass. The ZeRO optimizer moves 10, and all-reduces it in
buckets during the last backward pass. DeepSpeed 0.19.8 has no setting for the choice
(DeepSpeedEngine._do_optimizer_sanity_check), so it is made here, in the one place; docs/parallelism.md has the bytes.
Pipelines keep BF16_Optimizer, which DeepSpeed's pipeline engine knows by its type.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.replaced import replaced
from pretrain.config.schema import Config


def is_used(config: Config) -> bool:
    """Whether this run's optimizer would otherwise be BF16_Optimizer, and need not be."""
    parallel = config.parallel
    is_bf16 = config.train.precision == "bf16"
    return is_bf16 and parallel.zero == 1 and parallel.pipeline == 1 and not parallel.offload_optimizer


def settings(data_size: int) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`: all-reduced by buckets during the backward pass. DeepSpeed can send each
    gradient to its owner alone (use_multi_rank_bucket_allreduce = false), half the bytes, but then the host waits for
    the GPU before every such reduction (DeepSpeedZeroOptimizer.allreduce_and_copy).

    A rank alone sends nothing, so nothing overlaps: there the second buffer would be memory for nothing, and the host
    would wait for the GPU at the end of the backward pass (independent_gradient_partition_epilogue)."""
    return {
        "overlap_comm": data_size > 1,
        "contiguous_gradients": True,
        "reduce_scatter": True,
    }


@contextlib.contextmanager
def chosen(config: Config) -> Iterator[None]:
    """DeepSpeed's engine, if it is built inside, gets the ZeRO optimizer where `is_used` says so."""
    from deepspeed.runtime.engine import DeepSpeedEngine  # here: device.start prepares its import
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    if not is_used(config):
        yield
        return
    # RELIES-ON deepspeed-zero-1
    with replaced(DeepSpeedEngine, "_do_optimizer_sanity_check", lambda engine, optimizer: ZERO_OPTIMIZATION):
        yield


def add_without_a_copy(optimizer: Any) -> None:
    """Makes the ZeRO optimizer add a bf16 gradient to the fp32 sum in one pass (10 bytes per parameter) and not through
    an fp32 copy (18). The values are the same: torch adds in fp32 either way."""

    def add(parameter: Any) -> None:
        gradient: Tensor | None = parameter.grad
        if gradient is None:
            return
        if parameter.grad_accum is None:
            parameter.grad_accum = gradient.to(torch.float32)
        else:
            parameter.grad_accum.add_(gradient)
        parameter.grad = None

    assert optimizer.use_grad_accum_attribute and callable(optimizer._fill_param_grad_accum_attribute)
    optimizer._fill_param_grad_accum_attribute = add  # RELIES-ON deepspeed-sum
