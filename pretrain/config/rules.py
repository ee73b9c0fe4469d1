"""Rules that join several settings: all in one place, each message with its key and the nearest legal value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.json_config import keys
from common.tables import counted
from pretrain.config.compile_rules import check_compile
from pretrain.config.data_rules import check_data
from pretrain.config.deepspeed_keys import check_deepspeed
from pretrain.config.graph_rules import check_graphs
from pretrain.config.schema import BatchConfig, Config

if TYPE_CHECKING:
    from model.kernels.choice import Backends


def check_rules(config: Config) -> None:
    """Rules that need no knowledge of the machine or the number of ranks. Raises ConfigError at the first that is
    broken."""
    for rule in RULES.values():
        rule(config)


def broken_rules(config: Config) -> dict[str, ConfigError]:
    """Every broken rule by its name in RULES, and what it says."""
    found = {name: _error_of(rule, config) for name, rule in RULES.items()}
    return {name: error for name, error in found.items() if error is not None}


def _error_of(check: Callable[..., object], *arguments: Any, **options: Any) -> ConfigError | None:
    try:
        check(*arguments, **options)
    except ConfigError as error:
        return error
    return None


def _check_recompute(config: Config) -> None:
    if config.parallel.zero == 3 and config.train.recompute == "selective":
        raise ConfigError(
            "train.recompute: selective does not go with parallel.zero = 3 (DeepSpeed gathers other parameters "
            "inside the repeated forward pass than in the first, so torch's record of kept products does not match); "
            "set train.recompute to full or none, or parallel.zero to 2"
        )


def _check_precision(config: Config) -> None:
    if config.parallel.zero == 0 and config.train.precision != "fp32":
        raise ConfigError(
            f"parallel.zero: stage 0 trains in fp32 only (DeepSpeed keeps no fp32 master weights there and drifts), "
            f"but train.precision is {config.train.precision}; set parallel.zero to 1 or train.precision to fp32"
        )
    if config.parallel.reduce_dtype == "bf16" and config.train.precision != "bf16":
        raise ConfigError(
            f"parallel.reduce_dtype: gradients of a run in {config.train.precision} are summed in fp32; set "
            f"parallel.reduce_dtype to fp32, or train.precision to bf16"
        )


def _check_keep_best(config: Config) -> None:
    if config.checkpoint.keep_best and config.evaluate.sequences == 0:
        raise ConfigError(
            f"checkpoint.keep_best: {config.checkpoint.keep_best} needs validation losses, but evaluate.sequences is "
            f"0; set evaluate.sequences to 256, or checkpoint.keep_best to 0"
        )


def _check_spikes(config: Config) -> None:
    if config.resilience.spike_action == "rollback" and config.resilience.spike_threshold == 0:
        raise ConfigError(
            "resilience.spike_action: rollback never happens, because resilience.spike_threshold is 0 (off); set the "
            "threshold to 10, or spike_action to warn"
        )


def _check_batch(config: Config) -> None:
    batch = config.batch
    if batch.global_sequences % batch.micro_sequences:
        raise ConfigError(
            f"batch.global_sequences: {batch.global_sequences} is not divisible by batch.micro_sequences = "
            f"{batch.micro_sequences}; set it to {_nearest_multiple(batch.global_sequences, batch.micro_sequences)}"
        )


def _check_hang_timeout(config: Config) -> None:
    if 0 < config.resilience.hang_timeout_seconds < 1:
        raise ConfigError(
            f"resilience.hang_timeout_seconds: {config.resilience.hang_timeout_seconds:g} s is shorter than any step; "
            f"set it to at least 1 (540 is the default), or to 0 to turn it off"
        )
    if 0 < config.resilience.step_timeout_factor < 2:
        raise ConfigError(
            f"resilience.step_timeout_factor: {config.resilience.step_timeout_factor:g} times the longest step may be "
            f"less than the next one takes; set it to at least 2 (10 is the default), or to 0 to turn it off"
        )


def _check_profiled_steps(config: Config) -> None:
    profiled = config.monitor.profile_steps
    if profiled is not None and profiled[0] > profiled[1]:
        raise ConfigError(
            f"monitor.profile_steps: {list(profiled)} ends before it begins; name the first and the last step, e.g. "
            f"[{profiled[0]}, {profiled[0] + 2}]"
        )


def _check_resume(config: Config) -> None:
    if not config.checkpoint.resume.strip():
        raise ConfigError("checkpoint.resume: is empty; set it to auto, never or the path of a step-... folder")


def _check_average(config: Config) -> None:
    if config.evaluate.ema and not config.train.ema_decay:
        raise ConfigError(
            "evaluate.ema: there is no moving average to validate, because train.ema_decay is 0 (off); set "
            "train.ema_decay to 0.999, or evaluate.ema to false"
        )


def _check_init_from(config: Config) -> None:
    if config.train.init_from is not None and not config.train.init_from.strip():
        raise ConfigError("train.init_from: is empty; set it to a checkpoint (step-...), a run folder or null")


def _check_routing_record(config: Config) -> None:
    """Recorded or replayed choices must exist, and a replay would only record again what it replays."""
    record, replay = config.train.record_routing, config.train.replay_routing
    for key in ["train.record_routing"] * record + ["train.replay_routing"] * (replay is not None):
        layers = {"attention": config.model.attention, "feedforward": config.model.feedforward}
        if all(layer.routers is None for layer in layers.values()):
            raise ConfigError(f"{key}: this model has no routers; remove the key")
        for place, layer in layers.items():
            if (reason := layer.lacks.get("choices")) is not None:
                raise ConfigError(f"{key}: model.{place}.type is {layer.type}: {reason}; remove the key")
    if replay is not None and not replay.strip():
        raise ConfigError(
            "train.replay_routing: is empty; set it to the run folder of a run with train.record_routing, or to null"
        )
    if record and replay is not None:
        raise ConfigError(
            "train.record_routing: a run with train.replay_routing has the choices of the record that it replays; set "
            "one of the two"
        )


def _check_tensor(config: Config) -> None:
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
        divided |= {f"model.{place}.{key}": value for key, value in layer.divided.items()}
    divided["model.vocab_size"] = model.vocab_size
    common = math.gcd(*divided.values())
    for key, value in divided.items():
        if value % tensor:
            fits = _largest_divisor(common, tensor)
            raise ConfigError(
                f"parallel.tensor: {tensor} does not divide {key} = {value}; set parallel.tensor to {fits}, or {key} "
                f"to {-(-value // tensor) * tensor}"
            )


def _check_pipeline(config: Config) -> None:
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


def _check_offload(config: Config) -> None:
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


def _check_sequence(config: Config) -> None:
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
            f"parallel.sequence to false or model.sequence_length to {_nearest_multiple(length, tensor)}"
        )


def _check_expert(config: Config) -> None:
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
            f"parallel.expert to {_largest_divisor(experts, expert)}, or model.feedforward.num_experts "
            f"to {_nearest_multiple(experts, expert)}"
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


def smallest_world(config: Config) -> int:
    """The fewest ranks that the parallel sizes allow."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.expert


def check_ranks(config: Config, world_size: int) -> int:
    """Checks that the configuration fits `world_size` ranks. Returns the data-parallel size. Raises ConfigError."""
    for error in rank_problems(config, world_size):
        raise error
    return config.data_size(world_size)


def rank_problems(config: Config, world_size: int) -> Iterator[ConfigError]:
    """Everything that does not fit `world_size` ranks."""
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    if world_size % model_ranks:
        yield ConfigError(
            f"parallel: {world_size} ranks cannot be divided into groups of tensor x pipeline = {model_ranks}; "
            f"start {_nearest_multiple(world_size, model_ranks)} ranks"
        )
        return  # there is no data-parallel size
    data_size, expert = world_size // model_ranks, config.parallel.expert
    if data_size % expert:
        yield ConfigError(
            f"parallel.expert: {expert} does not divide the {data_size} data-parallel ranks (ranks / (tensor x "
            f"pipeline)); set parallel.expert to {_largest_divisor(data_size, expert)} or start "
            f"{_nearest_multiple(data_size, expert) * model_ranks} ranks"
        )
    batch, sequences = config.batch, config.batch.micro_sequences * data_size
    if batch.global_sequences % sequences and batch.global_sequences % batch.micro_sequences == 0:  # else: _check_batch
        yield ConfigError(
            f"batch.global_sequences: {batch.global_sequences} is not divisible by batch.micro_sequences x DP = "
            f"{batch.micro_sequences} x {data_size} = {sequences}; set it to "
            + ", or ".join(_ways_to_divide(batch, data_size, expert, model_ranks))
        )
    for check in (check_graphs, check_compile):
        error = _error_of(check, config, data_size=data_size)
        if error is not None:
            yield error


def check_device(config: Config, device_type: str) -> None:
    """Checks that precision and kernels exist on the device (`cuda` or `cpu`). Raises ConfigError."""
    if config.train.precision == "fp16" and device_type != "cuda":
        raise ConfigError(
            "train.precision: fp16 needs CUDA, and none was found: on the CPU fp16 matrix products are emulated and "
            "overflow at 65504 inside reductions; set train.precision to bf16 or fp32"
        )
    if config.deepspeed.get("zero_optimization", {}).get("zero_quantized_weights") and device_type != "cuda":
        raise ConfigError(
            "deepspeed.zero_optimization.zero_quantized_weights: needs CUDA, and none was found: DeepSpeed "
            "quantizes on GPUs alone; remove this key"
        )
    check_graphs(config, device_type=device_type)
    choose_backends(config, device_type)


def choose_backends(config: Config, device_type: str) -> Backends:
    """The backend of every op. Raises ConfigError with the reason if kernels.backend is impossible here."""
    import torch  # here: no other rule needs it, so other refusals do not wait for its import

    from model.kernels.choice import Backends

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    try:
        return Backends.choose(
            config.kernels.backend,
            config.model,
            device_type=device_type,
            dtype=dtype,
            document_mask=config.data.document_mask,
        )
    except ValueError as error:
        raise ConfigError(f"kernels.backend: {error}") from None


def _largest_divisor(value: int, limit: int) -> int:
    """The largest divisor of `value` that is at most `limit`."""
    small = [size for size in range(1, math.isqrt(value) + 1) if value % size == 0]
    return max(size for size in (*small, *(value // size for size in small)) if size <= limit)


def _ways_to_divide(batch: BatchConfig, data_size: int, expert: int, model_ranks: int) -> Iterator[str]:
    """What makes batch.micro_sequences x DP divide batch.global_sequences: each way that there is."""
    total, micro = batch.global_sequences, batch.micro_sequences
    yield str(_nearest_multiple(total, micro * data_size))
    if total % data_size == 0:
        yield f"batch.micro_sequences to {_largest_divisor(total // data_size, micro)}"
    most = min(data_size, total // micro + 1)  # of ranks that can divide the batch, however many are asked for
    sizes = [size for size in range(expert, most, expert) if total % (micro * size) == 0]
    if sizes:
        yield f"start {counted(sizes[-1] * model_ranks, 'rank')}"


def _nearest_multiple(value: int, divisor: int) -> int:
    """The positive multiple of `divisor` nearest to `value`."""
    return max(divisor, round(value / divisor) * divisor)


def _check_allow_changes(config: Config) -> None:
    """Every entry of checkpoint.allow_changes must name a key or a section: a misspelt one would allow nothing."""
    dotted = {key.dotted for key in keys(Config)}
    known = dotted | {key[:i] for key in dotted for i, letter in enumerate(key) if letter == "."}
    for entry in config.checkpoint.allow_changes:
        if entry not in known and not entry.startswith("deepspeed."):
            close = difflib.get_close_matches(entry, sorted(known), n=1, cutoff=0.0)[0]
            raise ConfigError(f"checkpoint.allow_changes: {entry!r} is no key; the nearest known key is {close}")


RULES: dict[str, Callable[[Config], None]] = {
    "recomputation": _check_recompute,
    "deepspeed": check_deepspeed,
    "graphs": check_graphs,
    "compile": check_compile,
    "routing record": _check_routing_record,
    "tensor": _check_tensor,
    "pipeline": _check_pipeline,
    "offload": _check_offload,
    "sequence": _check_sequence,
    "expert": _check_expert,
    "data": check_data,
    "precision": _check_precision,
    "keep_best": _check_keep_best,
    "spikes": _check_spikes,
    "batch": _check_batch,
    "hang timeout": _check_hang_timeout,
    "profiled steps": _check_profiled_steps,
    "resume": _check_resume,
    "moving average": _check_average,
    "initial weights": _check_init_from,
    "allowed changes": _check_allow_changes,
}
"""In the order in which they are checked."""
