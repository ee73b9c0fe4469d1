"""A rank's model, the DeepSpeed engine around it (optimizer, ZeRO and precision), and what trains with both."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from common.replaced import replaced
from model.kernels.choice import Backends
from model.language_model import LanguageModel, routing_statistics
from model.parallel.context import ParallelContext
from model.parameters import parameter_specs
from pretrain.config.schema import Config
from pretrain.engine import zero_1
from pretrain.engine.deepspeed_json import deepspeed_json
from pretrain.engine.gradient_norm import GradientNorm, ask_once, see_copies, sum_as_we_do
from pretrain.engine.micro_steps import Executor, PlainExecutor
from pretrain.engine.optimizer import build_optimizer
from pretrain.parallel.experts import declare_experts
from pretrain.parallel.groups import ModelParallelUnit


def build_module(config: Config, parallel: ParallelContext, backends: Backends) -> Any:
    """The model, or this rank's pipeline stage of it, on the CPU. The parameters have no values yet."""
    if parallel.pipeline_size == 1:
        seed, recompute = config.train.seed, config.train.recompute
        return LanguageModel(config.model, parallel, backends, seed=seed, recompute=recompute)
    from pretrain.engine.pipeline import PipelineStage  # imports DeepSpeed, which device.start must prepare before

    return PipelineStage(config, parallel, backends)


def build_executor(engine: Any, config: Config, parallel: ParallelContext) -> Executor:
    if parallel.pipeline_size == 1:
        return PlainExecutor(engine, GradientNorm(engine, config.optimizer.clip_norm, parallel))
    from pretrain.engine.pipeline import PipelineExecutor  # see build_module

    return PipelineExecutor(engine)


def build_engine(model: nn.Module, config: Config, parallel: ParallelContext, device: torch.device) -> Any:
    """Hands the initialised model, or pipeline stage, to DeepSpeed. Returns a DeepSpeedEngine (for a stage a
    PipelineEngine) whose module is `model`."""
    import deepspeed  # here: device.start prepares its import
    from deepspeed.utils import groups, logger

    groups.mpu = None  # an earlier engine of this process may have left its own. RELIES-ON deepspeed-marks
    logger.setLevel(logging.ERROR)  # its INFO lines repeat, unasked, what our derived values say once
    import_muon_without_a_compiler()
    specs = parameter_specs(config.model)
    for name, parameter in model.named_parameters():
        # Read by DeepSpeed's norm: a replicated parameter counts once, not once per tensor-parallel rank. Experts that
        # are divided over data-parallel ranks count on every rank: ZeRO divides them over tensor-parallel ones too.
        parameter.tensor_model_parallel = specs[name].divided is not None  # type: ignore[attr-defined]
    declare_experts(model, config.model, parallel)
    optimizer = build_optimizer(model, config)
    # Its bf16 optimizer prints the memory in use, whatever the log level.
    with contextlib.redirect_stdout(io.StringIO()), zero_1.chosen(config):
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
        # ZeRO 1 and 2. For fp32 DeepSpeed would look at the norm alone, in which what all tensor-parallel ranks hold
        # counts on the first of them.
        engine.optimizer.check_grad_overflow = True  # RELIES-ON deepspeed-overflow
        ask_once(engine.optimizer)
        sum_as_we_do(engine.optimizer, in_stages=config.parallel.pipeline > 1)
        _keep_until_reduced(engine.optimizer)
        if config.parallel.offload_optimizer:
            _drop_skipped_gradients(engine.optimizer)
    if config.parallel.zero == 3 and parallel.tensor_size > 1:
        see_copies(engine.optimizer)
    if zero_1.is_used(config):
        zero_1.add_without_a_copy(engine.optimizer)
    if engine.fp16_enabled():
        # At the smallest loss scale DeepSpeed would end the process with a traceback. Such steps count as skipped, and
        # too many of them end the run (segment.py).
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    _average_only_over_others(engine)
    return engine


def import_muon_without_a_compiler() -> None:
    """DeepSpeed's ZeRO optimizers import its Muon to ask whether ours is one. As they are defined, Muon's functions are
    handed to torch.compile, which imports all of TorchInductor: a sixth of the time to the first step on a CPU. No run
    calls them."""
    from deepspeed.runtime import compiler

    # RELIES-ON deepspeed-muon
    with replaced(compiler, "compile", lambda *_, **__: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def _average_only_over_others(engine: Any) -> None:
    """Where DeepSpeed's engine averages the gradients itself (ZeRO 0), it copies them into one buffer and back, also on
    a rank that has nobody to average with: a tenth of a step of the 47M model on one CPU rank. The values stay."""
    average = engine.allreduce_no_retain

    def average_over_others(bucket: list[torch.Tensor], dp_group: Any, **options: Any) -> None:
        # For experts the divisor, `dp_world_size`, is not the size of the group.
        if dist.get_world_size(dp_group) > 1 or options.get("dp_world_size") not in (None, 1):
            average(bucket, dp_group, **options)

    engine.allreduce_no_retain = average_over_others  # RELIES-ON deepspeed-average


def _keep_until_reduced(optimizer: Any) -> None:
    """With overlap_comm at ZeRO 2 DeepSpeed 0.19.8 reduces a gradient that is larger than a bucket in its own memory,
    on a stream of its own, and drops it at once on ranks that own no part of it: the next tensor of the backward pass
    would get memory that is still being reduced. The allocator is told of that stream, as DeepSpeed does where it
    offloads."""
    from deepspeed.accelerator import get_accelerator  # here: device.start prepares its import

    def record(gradient: torch.Tensor, stream: Any) -> None:
        if not get_accelerator().resolves_data_dependency():
            gradient.record_stream(stream)

    assert callable(optimizer._record_gradient_stream)
    if optimizer.overlap_comm and optimizer.partition_gradients:
        optimizer._record_gradient_stream = record  # RELIES-ON deepspeed-stream


def _drop_skipped_gradients(optimizer: Any) -> None:
    """DeepSpeed 0.19.8 keeps the fp32 sums of a skipped update's gradients if the optimizer is offloaded: with bf16 and
    fp16 the next step would add to what is not finite, and no later step would update. Without offload it drops them,
    as this does."""
    reset = optimizer.reset_cpu_buffers  # called after every step, done or skipped

    def reset_and_drop() -> None:
        reset()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None

    optimizer.reset_cpu_buffers = reset_and_drop  # RELIES-ON deepspeed-dropped
