"""DeepSpeed's own configuration, derived from ours. Every key that is set here is in deepspeed_keys.OWNED."""

from __future__ import annotations

from typing import Any

from pretrain.config.schema import Config
from pretrain.engine import zero_1

BUCKET_ELEMENTS = 50_000_000
"""Elements of gradients that ZeRO reduces together. DeepSpeed sets buffers of as many aside, whatever the size of the
model: of its own 500 million they take 1 to 2 GB, and most of a model of a billion parameters waits for the end of the
backward pass."""

SMALLEST_LOSS_SCALE = 1.0
"""Of fp16: DeepSpeed's own, below which its search does not go."""


def deepspeed_json(config: Config, data_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ours, plus the keys of the `deepspeed` section (checked not to contradict)."""
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": config.micro_steps(data_size),
        # At stage 0 we clip the gradients ourselves, by a norm summed in fp64 as at the other stages
        # (gradient_norm.py).
        "gradient_clipping": config.optimizer.clip_norm if config.parallel.zero else 0.0,
        "zero_optimization": {"stage": config.parallel.zero},
        # Our AdamW is torch's: DeepSpeed's fused one compiles a C++ extension at start (105 s on a CPU). Its class is
        # our own (optimizer.py), which DeepSpeed's list of tested optimizers does not know.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        # It prints nothing, as steps_per_print says, but waits for the GPU before each forward pass and after each
        # backward pass: the GPU would then wait for the host, which has queued nothing in advance.
        "timers": {"throughput": {"enabled": False}},
    }
    if config.parallel.zero:
        derived["zero_optimization"]["reduce_bucket_size"] = BUCKET_ELEMENTS
    if config.parallel.pipeline > 1:
        # Dividing what travels over tensor-parallel ranks would silently give wrong numbers under sequence parallelism.
        derived["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if config.parallel.offload_optimizer:
        derived["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        derived["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW; DeepSpeed's own compiles for 180 s
    if config.train.precision == "bf16":
        # Where BF16_Optimizer stays (zero_1.py), a gradient joins the fp32 sum as soon as it is known: 18 bytes per
        # parameter and micro-step instead of 26, and no second copy of all gradients.
        derived["bf16"] = {"enabled": True, "immediate_grad_update": True}
        # Micro-steps are summed in fp32: bf16 sums lose the contribution of late ones.
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = config.parallel.reduce_dtype
    if zero_1.is_used(config):
        derived["zero_optimization"] |= zero_1.settings(data_size)
    if config.train.precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0}
        derived["communication_data_type"] = "fp32"
    return _merge(derived, config.deepspeed)


def _merge(ours: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """`extra` below `ours`, objects merged key by key; deepspeed_keys.py has refused contradictions."""
    merged = dict(ours)
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
