"""Rules of the sizes by which ranks divide a model: tensor, sequence, pipeline and expert parallelism, and offload."""

from __future__ import annotations

import math

from common.errors import ConfigError
from pretrain.config.schema import Config


def check_tensor(config: Config) -> None:
    """Every size that is divided over tensor-parallel ranks must be a multiple of their number."""
    tensor, model = config.parallel.tensor, config.model
    divided: dict[str, int] = {}
    for place, layer in (("attention", model.attention), ("feedforward", model.feedforward)):
        if tensor > 1 and (reason := layer.lacks.get("tensor")) is not None:
            raise ConfigError(
                f"parallel.tensor: {tensor} ranks would divide every layer, but model.{place}.type is {layer.type}: "
                f"{reason}; set parallel.tensor to 1"
            )
        if place == "feedforward" and config.parallel.expert > 1:
            continue  # experts are divided over expert-parallel ranks instead
        sizes = {key: getattr(layer, key) for key in layer.divided}
        divided |= {f"model.{place}.{key}": size for key, size in sizes.items() if size is not None}
    divided["model.vocab_size"] = model.vocab_size
    common, key_heads = math.gcd(*divided.values()), divided.get("model.attention.num_kv_heads", 1)
    for key, value in divided.items():
        if value % tensor:
            fits = largest_divisor(common, tensor)
            # Heads of keys and values divide those of queries: not every multiple of `tensor` will do.
            step = math.lcm(tensor, key_heads) if key == "model.attention.num_heads" else tensor
            instead = "null" if key == "model.attention.num_kv_heads" else -(-value // step) * step
            raise ConfigError(
                f"parallel.tensor: {tensor} does not divide {key} = {value}; set parallel.tensor to {fits}, or {key} "
                f"to {instead}"
            )


def check_pipeline(config: Config) -> None:
    """Each stage needs a block, and DeepSpeed's pipeline engine needs ZeRO 1."""
    stages, zero = config.parallel.pipeline, config.parallel.zero
    if stages == 1:
        return
    if zero != 1:
        reason = (
            "at stage 0 DeepSpeed clips by the norm of one pipeline stage"
            if zero == 0
            else "DeepSpeed's pipeline engine refuses stages 2 and 3: they would move gradients or parameters at "
            "every micro-step"
        )
        raise ConfigError(
            f"parallel.zero: {zero} does not go with parallel.pipeline = {stages} ({reason}); set parallel.zero to 1, "
            f"or parallel.pipeline to 1"
        )
    if stages > config.model.num_layers:
        raise ConfigError(
            f"parallel.pipeline: {stages} stages need a block each, but model.num_layers is {config.model.num_layers}; "
            f"set parallel.pipeline to at most {config.model.num_layers}"
        )


def check_offload(config: Config) -> None:
    """DeepSpeed offloads sharded optimizer states only."""
    if not config.parallel.offload_optimizer:
        return
    if config.parallel.zero == 0:
        raise ConfigError(
            "parallel.offload_optimizer: ZeRO 0 keeps the optimizer with the parameters; set parallel.zero to 1, 2 or "
            "3, or parallel.offload_optimizer to false"
        )
    if config.parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.offload_optimizer: does not go with parallel.pipeline = {config.parallel.pipeline}; set "
            f"parallel.pipeline to 1, or parallel.offload_optimizer to false"
        )


def check_sequence(config: Config) -> None:
    """Sequence parallelism divides tokens over the ranks of a tensor-parallel group."""
    if not config.parallel.sequence:
        return
    tensor, length = config.parallel.tensor, config.model.sequence_length
    if tensor == 1:
        raise ConfigError(
            "parallel.sequence: divides the tokens over tensor-parallel ranks, but parallel.tensor is 1; set "
            "parallel.sequence to false or parallel.tensor to 2"
        )
    if length % tensor:
        raise ConfigError(
            f"parallel.sequence: parallel.tensor = {tensor} does not divide model.sequence_length = {length}; set "
            f"parallel.sequence to false or model.sequence_length to {nearest_multiple(length, tensor)}"
        )


def check_expert(config: Config) -> None:
    """Expert parallelism divides the feed-forward experts over data-parallel ranks."""
    expert, feedforward, zero = config.parallel.expert, config.model.feedforward, config.parallel.zero
    if expert == 1:
        return
    if (why := feedforward.lacks.get("expert")) is not None:
        raise ConfigError(
            f"parallel.expert: {expert} ranks would divide the feed-forward experts, but model.feedforward.type is "
            f"{feedforward.type}: {why}; set parallel.expert to 1"
        )
    assert feedforward.routers is not None
    experts = feedforward.routers.num_experts
    if experts % expert:
        raise ConfigError(
            f"parallel.expert: {expert} does not divide model.feedforward.num_experts = {experts}; set "
            f"parallel.expert to {largest_divisor(experts, expert)}, or model.feedforward.num_experts "
            f"to {nearest_multiple(experts, expert)}"
        )
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        raise ConfigError(
            f"parallel.expert: with parallel.tensor = {config.parallel.tensor} each tensor-parallel rank must have "
            f"tokens of its own to route, or experts would be taught every token more than once; set parallel.sequence "
            f"to true or parallel.expert to 1"
        )
    if zero not in (1, 2):
        reason = {
            0: "without ZeRO DeepSpeed clips the gradients of experts by a norm that is not the global one",
            3: "DeepSpeed's stage 3 cannot divide parameters that only some data-parallel ranks share",
        }[zero]
        raise ConfigError(
            f"parallel.zero: stage {zero} is impossible with parallel.expert = {expert} ({reason}); set parallel.zero "
            f"to {1 if zero == 0 else 2} or parallel.expert to 1"
        )
    for key in ("reduce_scatter", "contiguous_gradients"):
        if not config.deepspeed.get("zero_optimization", {}).get(key, True):
            raise ConfigError(
                f"deepspeed.zero_optimization.{key}: without it DeepSpeed sums the gradients of experts over the wrong "
                f"ranks; remove this key or set parallel.expert to 1"
            )


def largest_divisor(value: int, limit: int) -> int:
    small = [size for size in range(1, math.isqrt(value) + 1) if value % size == 0]
    return max(size for size in (*small, *(value // size for size in small)) if size <= limit)


def nearest_multiple(value: int, divisor: int) -> int:
    """The positive multiple of `divisor` nearest to `value`."""
    return max(divisor, round(value / divisor) * divisor)
