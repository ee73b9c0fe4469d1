"""The DeepSpeed engine around the plain model: optimizer, ZeRO, precision, and the gradient norm it does not give."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.language_model import LanguageModel, routing_statistics
from model.parallel.context import ParallelContext
from pretrain.config import Config
from pretrain.derived import deepspeed_json


def parallel_context() -> ParallelContext:
    """Every rank is one data-parallel rank of the default group."""
    size = dist.get_world_size()
    group = dist.group.WORLD if size > 1 else None
    return ParallelContext(data_rank=dist.get_rank(), data_size=size, data_group=group)


def build_engine(model: LanguageModel, config: Config, parallel: ParallelContext, device: torch.device) -> Any:
    """Hands the initialised model to DeepSpeed. Returns a DeepSpeedEngine whose module is `model`."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # its INFO lines repeat, unasked, what our derived values say once
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config),
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
        )
    for _, statistics in routing_statistics(model):
        statistics.to(device)
    return engine


def parameter_groups(model: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """Matrices and expert tensors are decayed; LayerNorms, biases (XL's u and v are matrices) and scales are not."""
    decay = config.optimizer.weight_decay
    if decay == 0.0:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    decayed = {name: p.ndim > 1 and not name.endswith("bias") for name, p in model.named_parameters()}
    return [
        {"params": [p for name, p in model.named_parameters() if decayed[name] is wanted], "weight_decay": rate}
        for wanted, rate in ((True, decay), (False, 0.0))
    ]


def step_was_skipped(engine: Any) -> bool:
    """Whether fp16 loss scaling discarded the last optimizer step because a gradient overflowed."""
    return bool(engine.fp16_enabled() and engine.optimizer.overflow)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


class GradientNorm:
    """The global gradient norm before clipping.

    DeepSpeed gives it for ZeRO 1 to 3, summed in fp64. For ZeRO 0 norm and clipping are ours, between the last backward
    (which averages over ranks) and the optimizer step (which clears the gradients), in fp64 as well: torch's fp32 norm
    of an 8000 x 128 embedding is off by 1.1e-5 on a CPU, of 4 million elements by 7e-5, and clipping scales by it.
    """

    def __init__(self, engine: Any, clip_norm: float) -> None:
        self._engine = engine
        self._clip_norm = clip_norm
        self._own: Tensor | None = None

    def before_step(self) -> None:
        """Call before engine.step() of the last micro-step: takes the norm and clips where DeepSpeed does not."""
        if self._engine.zero_optimization_stage() != 0:
            return
        gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in gradients])
        self._own = squares.sum().sqrt()
        if self._clip_norm > 0.0:
            factor = (self._clip_norm / (self._own + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.float())

    def value(self) -> float:
        """Call after engine.step() of the last micro-step."""
        if self._own is not None:
            return float(self._own)
        return float(self._engine.get_global_grad_norm())
