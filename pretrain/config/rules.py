"""Rules that join several settings: all in one place, each message with its key and the nearest legal value."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.json_config import keys
from common.tables import counted
from pretrain.config.compile_rules import check_compile
from pretrain.config.data_rules import check_data
from pretrain.config.deepspeed_keys import check_deepspeed
from pretrain.config.graph_rules import check_graphs
from pretrain.config.parallel_rules import (
    check_expert,
    check_offload,
    check_pipeline,
    check_sequence,
    check_tensor,
    largest_divisor,
    nearest_multiple,
)
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
            f"{batch.micro_sequences}; set it to {nearest_multiple(batch.global_sequences, batch.micro_sequences)}"
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
            f"parallel: {counted(world_size, 'rank')} cannot be divided into groups of tensor x pipeline = "
            f"{model_ranks}; start {nearest_multiple(world_size, model_ranks)} ranks"
        )
        return  # there is no data-parallel size
    data_size, expert = world_size // model_ranks, config.parallel.expert
    if data_size % expert:
        yield ConfigError(
            f"parallel.expert: {expert} does not divide the {data_size} data-parallel ranks (ranks / (tensor x "
            f"pipeline)); set parallel.expert to {largest_divisor(data_size, expert)} or start "
            f"{nearest_multiple(data_size, expert) * model_ranks} ranks"
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


def _ways_to_divide(batch: BatchConfig, data_size: int, expert: int, model_ranks: int) -> Iterator[str]:
    """What makes batch.micro_sequences x DP divide batch.global_sequences: each way that there is."""
    total, micro = batch.global_sequences, batch.micro_sequences
    yield str(nearest_multiple(total, micro * data_size))
    if total % data_size == 0:
        yield f"batch.micro_sequences to {largest_divisor(total // data_size, micro)}"
    most = min(data_size, total // micro + 1)  # of ranks that can divide the batch, however many are asked for
    sizes = [size for size in range(expert, most, expert) if total % (micro * size) == 0]
    if sizes:
        yield f"start {counted(sizes[-1] * model_ranks, 'rank')}"


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
    "tensor": check_tensor,
    "pipeline": check_pipeline,
    "offload": check_offload,
    "sequence": check_sequence,
    "expert": check_expert,
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
