"""The DeepSpeed engine around the plain model: optimizer, ZeRO, precision, and the gradient norm it does not give."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.language_model import routing_statistics
from model.parallel.context import ParallelContext
from model.parallel.sharding import sharded_dim
from pretrain.config.schema import Config
from pretrain.parallel.experts import declare_experts, separate_experts
from pretrain.parallel.groups import ModelParallelUnit, process_groups
from pretrain.report.derived import deepspeed_json


def parallel_context(config: Config) -> ParallelContext:
    """The place of this rank; collective. Tensor-parallel ranks follow each other: their traffic is the heaviest, so
    they belong on one node."""
    rank, parallel = dist.get_rank(), config.parallel
    tensor, expert = parallel.tensor, parallel.expert
    data = dist.get_world_size() // (parallel.pipeline * tensor)
    data_rank = rank // tensor % data
    if data == dist.get_world_size() and expert == 1:  # no other groups than the one that is there
        return ParallelContext(data_rank=rank, data_size=data, data_group=dist.group.WORLD if data > 1 else None)
    groups = process_groups(pipeline=parallel.pipeline, data=data, tensor=tensor, expert=expert)
    return ParallelContext(
        data_rank=data_rank,
        data_size=data,
        data_group=groups.data if data > 1 else None,
        tensor_rank=rank % tensor,
        tensor_size=tensor,
        tensor_group=groups.tensor if tensor > 1 else None,
        sequence_parallel=parallel.sequence,
        pipeline_rank=rank // (data * tensor),
        pipeline_size=parallel.pipeline,
        pipeline_group=groups.pipeline if parallel.pipeline > 1 else None,
        expert_rank=data_rank % expert,
        expert_size=expert,
        expert_group=groups.expert if expert > 1 else None,
    )


def build_engine(model: nn.Module, config: Config, parallel: ParallelContext, device: torch.device) -> Any:
    """Hands the initialised model, or pipeline stage, to DeepSpeed. Returns a DeepSpeedEngine (for a stage a
    PipelineEngine) whose module is `model`."""
    import deepspeed
    from deepspeed.utils import groups, logger

    groups.mpu = None  # an engine that this process built before may have left its own
    logger.setLevel(logging.ERROR)  # its INFO lines repeat, unasked, what our derived values say once
    for name, parameter in model.named_parameters():
        # Read by DeepSpeed's norm: a replicated parameter counts once, not once per tensor-parallel rank.
        parameter.tensor_model_parallel = sharded_dim(name, config.model) is not None  # type: ignore[attr-defined]
    declare_experts(model, config.model, parallel)
    optimizer = torch.optim.AdamW(
        separate_experts(parameter_groups(model, config)),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # its bf16 optimizer prints the memory in use, whatever the log level
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_json(config, parallel.data_size),
            dist_init_required=False,
            # A pipeline module brings its own groups.
            mpu=ModelParallelUnit(parallel) if parallel.tensor_size > 1 and parallel.pipeline_size == 1 else None,
        )
    for _, statistics in routing_statistics(model):
        statistics.to(device)
    if hasattr(engine.optimizer, "check_grad_overflow"):
        # ZeRO 1 and 2. Of fp32 and bf16 DeepSpeed looks at the norm alone, which averages over the experts' ranks.
        engine.optimizer.check_grad_overflow = True
    return engine


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Matrices and expert tensors are decayed; LayerNorms, biases (XL's u and v are matrices) and scales are not."""
    decay = config.optimizer.weight_decay
    if decay == 0.0:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    decayed = {name: p.ndim > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    groups = [
        {"params": [p for name, p in model.named_parameters() if decayed[name] is wanted], "weight_decay": rate}
        for wanted, rate in ((True, decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def poisoned_unless_finite(objective: Tensor, *losses: Tensor) -> Tensor:
    """`objective` as it is, bit by bit; but if any of `losses` is not finite, its gradient is NaN everywhere. A loss
    that is not finite then stops the update on every rank, by way of the gradient norm that all of them share, without
    a word between host and device."""
    poison = sum((0.0 * loss.detach().float().sum() for loss in losses), torch.zeros((), device=objective.device))
    return objective * (1.0 + poison)


class GradientNorm:
    """The global gradient norm before clipping, and whether it let the update happen.

    A norm that is not finite is so on every rank, and no rank updates: weights, Adam's moments and its step counters
    stay as they were. DeepSpeed's ZeRO optimizers do that; for ZeRO 0 gradients are dropped, which AdamW passes over.

    DeepSpeed gives it for ZeRO 1 to 3, summed in fp64. For ZeRO 0 norm and clipping are ours, between the last backward
    (which averages over ranks) and the optimizer step (which clears the gradients), in fp64 as well: torch's fp32 norm
    of an 8000 x 128 embedding is off by 1.1e-5 on a CPU, of 4 million elements by 7e-5, and clipping scales by it.
    """

    def __init__(self, engine: Any, clip_norm: float, parallel: ParallelContext) -> None:
        self._engine = engine
        self._parallel = parallel
        self._clip_norm = clip_norm
        self._own: Tensor | None = None

    def before_step(self) -> None:
        """Call before engine.step() of the last micro-step: takes the norm and clips where DeepSpeed does not."""
        if self._engine.zero_optimization_stage() != 0:
            return
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        counted = [
            p.grad
            for p in self._engine.module.parameters()
            if p.grad is not None and (p.tensor_model_parallel or self._parallel.tensor_rank == 0)
        ]
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in counted]).sum()
        if self._parallel.tensor_group is not None:
            dist.all_reduce(squares, group=self._parallel.tensor_group)
        self._own = squares.sqrt()
        if not math.isfinite(self._own):
            for parameter in self._engine.module.parameters():
                parameter.grad = None
        elif self._clip_norm > 0.0:
            factor = (self._clip_norm / (self._own + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.float())

    def value(self) -> float | None:
        """The norm; None if the update was skipped. Call after engine.step() of the last micro-step."""
        if self._own is not None:
            return float(self._own) if math.isfinite(self._own) else None
        return None if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())
