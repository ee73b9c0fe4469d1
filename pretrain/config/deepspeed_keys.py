"""The `deepspeed` section: which keys of DeepSpeed 0.19.8's own configuration have an effect here, and their types.

A key is passed on only if it changes what a run of ours does. All others are refused with the reason: decided by
another key of ours, without an effect here (DeepSpeed's own checkpoints, data loader, inference ...), removed from
DeepSpeed, one with which no run works, or unknown. tests/pretrain/config/test_deepspeed_keys.py compares the tables
with DeepSpeed's own models, so that an upgrade cannot add or remove a key unseen.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from common.errors import ConfigError
from pretrain.config.schema import Config

OWNED = {
    "train_batch_size": "batch.global_sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch.global_sequences and batch.micro_sequences",
    "managed_gradient_accumulation": "batch.global_sequences and batch.micro_sequences",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "bfloat16": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "parallel.reduce_dtype",
    "torch_autocast": "train.precision",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.compute_grad_norm": "the need of metrics.jsonl for the gradient norm",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.zenflow": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_optimizer, which moves optimizer states alone",
    "zero_optimization.cpu_offload_param": "parallel.offload_optimizer, which moves optimizer states alone",
    "zero_optimization.cpu_offload_use_pin_memory": "parallel.offload_optimizer",
    "zero_force_ds_cpu_optimizer": "parallel.offload_optimizer",
    "activation_checkpointing": "train.recompute",
    "sequence_parallel_size": "parallel.sequence",
    "tensor_parallel": "parallel.tensor",
    "elasticity": "the number of ranks at start: a run resumes in any layout",
    "amp": "train.precision",
    "sparse_gradients": "the embedding, whose gradient is dense",
    "pipeline.pipe_partitioned": "the exactness of sequence parallelism",
    "pipeline.grad_partitioned": "the exactness of sequence parallelism",
    "pipeline.activation_checkpoint_interval": "train.recompute",
    "zero_allow_untested_optimizer": "the optimizer section",
    "prescale_gradients": "the average over ranks that every layout shares",
    "gradient_predivide_factor": "the average over ranks that every layout shares",
    "gradient_allreduce_op": "the average over ranks that every layout shares",
    "steps_per_print": "monitor.print_every_steps",
    "wall_clock_breakdown": "monitor.print_every_steps",
    "tensorboard": "monitor.tensorboard",
    "use_data_before_expert_parallelism": "parallel.expert, which divides neighbouring data-parallel ranks",
    "expert_parallel": "parallel.expert",
}
"""Keys that follow from other keys of ours: DeepSpeed's key -> who decides."""

NO_EFFECT = {
    "aio": "is for tensors on NVMe",
    "autotuning": "is for DeepSpeed's own launcher script",
    "checkpoint": "is for DeepSpeed's own checkpoints; see the checkpoint section",
    "comet.api_key": "is a secret, and the configuration is saved with the run; set COMET_API_KEY",
    "compile": "is for engine.compile(), which is not called",
    "data_efficiency": "is for DeepSpeed's own data loader; see the data section",
    "dataloader_drop_last": "is for DeepSpeed's own data loader; see the data section",
    "datastates_ckpt": "is for DeepSpeed's own checkpoints; see the checkpoint section",
    "disable_allgather": "is read nowhere",
    "hybrid_engine": "is for inference",
    "pipeline": "is decided by parallel.pipeline and the model",
    "seq_parallel_communication_data_type": "is for DeepSpeed's own sequence parallelism",
    "vocabulary_size": "is only for a warning; see model.vocab_size",
    "weight_quantization": "is for inference",
    "zero_optimization.allgather_partitions": "is read nowhere",
    "zero_optimization.elastic_checkpoint": "is for DeepSpeed's own checkpoints",
    "zero_optimization.gather_16bit_weights_on_model_save": "is for DeepSpeed's own checkpoints",
    "zero_optimization.legacy_stage1": "is refused by DeepSpeed",
    "zero_optimization.load_from_fp32_weights": "is for DeepSpeed's own checkpoints",
    "zero_optimization.memory_efficient_linear": "is for models built by deepspeed.zero.Init",
    "zero_optimization.override_module_apply": "is for models built by deepspeed.zero.Init",
    "zero_optimization.pipeline_loading_checkpoint": "is for DeepSpeed's own checkpoints",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for the Muon optimizer",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "is for DeepSpeed's own checkpoints",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is for DeepSpeed's own checkpoints",
    "zero_optimization.zero_quantized_nontrainable_weights": "is for frozen weights, of which there are none",
}
"""Keys that DeepSpeed knows and a run of ours never reads: key -> why."""

BREAKS = {
    f"zero_optimization.{prefix}module_granularity_threshold": "it gathers whole blocks at once, whose parameters "
    "DeepSpeed frees before their backward pass is over; deepspeed.zero_optimization.leaf_module names single layers"
    for prefix in ("", "stage3_")
} | {
    "zero_optimization.round_robin_gradients": "DeepSpeed 0.19.8 then says of most elements that another parameter's "
    "lie where they lie, so a checkpoint would hold other weights than the model's"
}
"""Keys with which a run of ours ends at its first step or saves what cannot be used, unless they are off (0, false):
key -> why."""

REMOVED = (
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
)
"""Keys of earlier versions of DeepSpeed."""


def _whole(value: Any) -> Any:
    """Takes 5e8, as DeepSpeed's documentation writes sizes, for a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=0, lt=2**63)]
Size = Annotated[Whole, Field(gt=0, lt=2**63)]
Even = Annotated[Whole, Field(ge=0, lt=2**63, multiple_of=2)]
Names = list[str]
LEAVES = ("SwitchHeadAttention", "DenseAttention", "MoAAttention", "SigmaMoE", "DenseFeedForward", "SwiGLU")
"""Layers that ZeRO 3 can gather whole: of others, which take or give a tuple, DeepSpeed frees the parameters before
their backward pass is over."""


def _names(pattern: str) -> Any:
    return list[Annotated[str, Field(pattern=f"^{pattern}$")]]


LeafClasses = _names(rf"([A-Za-z_]+\.)*({'|'.join(LEAVES)})")
LeafNames = _names(r"blocks\.\d+\.(attention|feedforward)")
LeafSuffixes = _names(r"(.*\.)?(attention|feedforward)")
Level = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True)
class Extra:
    """A key that is passed on."""

    type: Any
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages (parallel.zero) at which DeepSpeed reads it."""


def _zero(stages: tuple[int, ...], **types: Any) -> dict[str, Extra]:
    return {f"zero_optimization.{name}": Extra(kind, stages) for name, kind in types.items()}


def _section(section: str, **types: Any) -> dict[str, Extra]:
    return {f"{section}.{name}": Extra(kind) for name, kind in types.items()}


STAGE_3_SIZES = {
    "prefetch_bucket_size": Count,
    "param_persistence_threshold": Count,
    "model_persistence_threshold": Count,
    "max_live_parameters": Count,
    "max_reuse_distance": Count,
    "use_all_reduce_for_fetch_params": bool,
    "allgather_sequential": bool,
}
"""DeepSpeed takes these with and without `stage3_` before them."""

EXTRA: dict[str, Extra] = {
    **_zero((1, 2, 3), contiguous_gradients=bool, reduce_scatter=bool, reduce_bucket_size=Size, overlap_comm=bool),
    **_zero((1, 2), use_multi_rank_bucket_allreduce=bool, allgather_bucket_size=Even, parameter_alignment=bool),
    **_zero((2,), ignore_unused_parameters=bool),
    **_zero((3,), **STAGE_3_SIZES),
    **_zero((3,), **{f"stage3_{name}": kind for name, kind in STAGE_3_SIZES.items()}),
    **_zero((3,), sub_group_size=Count, zero_hpz_partition_size=Size, log_trace_cache_warnings=bool),
    **_zero((3,), zero_quantized_weights=bool, zero_quantized_gradients=bool, enable_sanity_checks=bool),
    **_zero((3,), **{"leaf_module.classes": LeafClasses, "leaf_module.names": LeafNames}),
    **_zero((3,), **{"leaf_module.name_suffixes": LeafSuffixes}),
    **_section("comms_logger", enabled=bool, prof_all=bool, prof_ops=Names, verbose=bool, debug=bool),
    **_section("flops_profiler", enabled=bool, profile_step=Size, module_depth=Annotated[Whole, Field(ge=-1)]),
    **_section("flops_profiler", recompute_fwd_factor=Annotated[float, Field(ge=0)], top_modules=Size),
    **_section("flops_profiler", detailed=bool, output_file=str),
    **_section("timers.throughput", enabled=bool, synchronized=bool),
    **_section("csv_monitor", enabled=bool, output_path=str, job_name=str),
    **_section("wandb", enabled=bool, group=str, team=str, project=str),
    **_section("comet", enabled=bool, samples_log_interval=Size, project=str, workspace=str, experiment_name=str),
    **_section("comet", experiment_key=str, online=bool, mode=Literal["get", "create", "get_or_create"]),
    "disable_python_gc": Extra(bool),
    "dump_state": Extra(bool),
    "log_level": Extra(Level),
    "memory_breakdown": Extra(bool),
}
"""Keys that are passed on."""

PRINTED = {"memory_breakdown": "", "dump_state": "", "comms_logger.enabled": "verbose"}
"""Keys that only add lines to DeepSpeed's log, which is off by default: key -> the key beside it that it needs."""

PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
"""Sections whose `enabled` needs a package."""


def check_deepspeed(config: Config) -> None:
    """Checks that every key of the `deepspeed` section is known, has an effect and has its type. Raises ConfigError."""
    _check_section(config, "", config.deepspeed)
    zero = config.deepspeed.get("zero_optimization", {})
    for name in STAGE_3_SIZES:
        if name in zero and f"stage3_{name}" in zero:
            raise ConfigError(f"deepspeed.zero_optimization.{name}: is the same key as stage3_{name}; keep one of them")
    if zero.get("overlap_comm") and config.parallel.pipeline > 1:
        raise ConfigError(
            f"deepspeed.zero_optimization.overlap_comm: has no effect with parallel.pipeline = "
            f"{config.parallel.pipeline}; remove it, or set parallel.pipeline to 1"
        )
    for key, wants in PRINTED.items():
        section, _, name = key.rpartition(".")
        place = config.deepspeed.get(section, {}) if section else config.deepspeed
        if not place.get(name):
            continue
        if config.deepspeed.get("log_level") not in ("debug", "info") or (wants and not place.get(wants)):
            more = f" and deepspeed.{section}.{wants} to true" if wants else ""
            raise ConfigError(
                f"deepspeed.{key}: is printed only at DeepSpeed's level info; set deepspeed.log_level to info{more}, "
                f"or remove this key"
            )
    for section, package in PACKAGES.items():
        if config.deepspeed.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"deepspeed.{section}.enabled: needs the package {package}, which is not installed; pip install "
                f"{package}, or remove this section"
            )


def _check_section(config: Config, prefix: str, section: dict[str, Any]) -> None:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if key in BREAKS and isinstance(value, int) and not value:
            continue  # off, as by default; runs that said so have checkpoints
        _refuse_by_name(key)
        if any(known.startswith(f"{key}.") for known in (*EXTRA, *OWNED, *NO_EFFECT)):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"deepspeed.{key}: must be an object of extra keys (given {json.dumps(value)}); remove it or write "
                    f"{{...}}"
                )
            _check_section(config, f"{key}.", value)
        elif key in EXTRA:
            _check_value(config, key, value)
        else:
            raise ConfigError(f"deepspeed.{key}: DeepSpeed 0.19.8 has no such key{_nearest(key)}")


def _refuse_by_name(key: str) -> None:
    if key in OWNED:
        raise ConfigError(f"deepspeed.{key}: is decided by {OWNED[key]}; remove this key")
    if key in REMOVED:
        raise ConfigError(f"deepspeed.{key}: was removed from DeepSpeed; remove this key")
    if key in BREAKS:
        raise ConfigError(f"deepspeed.{key}: does not work here ({BREAKS[key]}); remove this key")
    section = key.partition(".")[0]
    if key in NO_EFFECT and not any(known.startswith(f"{key}.") for known in OWNED):
        raise ConfigError(f"deepspeed.{key}: has no effect here ({NO_EFFECT[key]}); remove this key")
    if key != section and section in NO_EFFECT:
        raise ConfigError(f"deepspeed.{key}: has no effect here (it {NO_EFFECT[section]}); remove this key")


def _check_value(config: Config, key: str, value: Any) -> None:
    extra, zero = EXTRA[key], config.parallel.zero
    try:
        TypeAdapter(extra.type).validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise ConfigError(
            f"deepspeed.{key}: {message[0].lower()}{message[1:]} (given {json.dumps(value)}); correct it or remove "
            f"this key"
        ) from None
    if zero not in extra.stages:
        stages = " or ".join(map(str, extra.stages))
        raise ConfigError(
            f"deepspeed.{key}: has an effect only with parallel.zero = {stages}, but it is {zero}; remove this key, or "
            f"set parallel.zero to {extra.stages[0]}"
        )


def _nearest(key: str) -> str:
    """The end of a refusal, which names the key that was probably meant, even if another key of ours decides it."""
    sections = {known.rpartition(".")[0] for known in EXTRA} - {""}
    names = [*sorted(sections), *EXTRA, *OWNED]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if not close:
        leaf = key.rpartition(".")[2]
        close = [known for known in names if known.rpartition(".")[2] == leaf][:1]
    if not close:
        return "; remove this key"
    nearest = f"; the nearest known key is deepspeed.{close[0]}"
    return f"{nearest}, which is decided by {OWNED[close[0]]}; remove this key" if close[0] in OWNED else nearest
