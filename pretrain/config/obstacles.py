"""What stands in the way of taking a step's host work away: of CUDA graphs (graph_rules.py) and of compiled blocks
(compile_rules.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from common.errors import ConfigError
from model.config import ModelConfig
from pretrain.config.schema import Config


class Obstacle(NamedTuple):
    """Why a run cannot have them."""

    what: str
    """The setting, as `key = value`."""
    reason: str
    fix: str
    """What makes it possible, beside the key on auto."""

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


def check(key: str, value: str, found: Obstacle | None) -> None:
    """Raises ConfigError if `key` is on where that is impossible."""
    if value == "on" and found is not None:
        raise ConfigError(f"{key}: on does not go with {found.what} ({found.reason}); set it to auto{found.fix}")


def of_the_host(config: Config, data_size: int | None, *, instead: str) -> Iterator[Obstacle]:
    """Settings by which the host takes part in a micro-step, which both would leave out. `instead`: what happens where
    the model's operators were called. The number of data-parallel ranks counts only where it is given."""
    for key in ("record_routing", "replay_routing"):
        if getattr(config.train, key):
            yield Obstacle(f"train.{key}", "the host takes part in each choice", f", or remove train.{key}")
    if config.deepspeed.get("flops_profiler", {}).get("enabled"):
        reason = f"it counts what the model calls, and {instead}"
        yield Obstacle("deepspeed.flops_profiler.enabled", reason, ", or remove deepspeed.flops_profiler")
    if data_size is not None and data_size > 1:
        yield from _collective_regularisers(config, data_size)


def _collective_regularisers(config: Config, data_size: int) -> Iterator[Obstacle]:
    """Regularisers that sum over ranks in every micro-step."""
    for name in of_a_micro_batch(config.model):
        reason = f"it is a collective of {data_size} ranks in each layer"
        yield Obstacle(f"{name} = micro_batch", reason, f", or {name} to global_batch")


def of_a_micro_batch(model: ModelConfig) -> Iterator[str]:
    """The keys by which a regulariser is one of a micro-step's sequences on all data-parallel ranks: with them the loss
    depends on batch.micro_sequences x DP, which may change at every start."""
    for section, key, weights in (
        ("feedforward", "entropy_scope", ("entropy_weight",)),
        ("attention", "loss_scope", ("switch_loss_weight", "cv_loss_weight")),
    ):
        layer = getattr(model, section)
        if getattr(layer, key, None) == "micro_batch" and any(getattr(layer, weight) for weight in weights):
            yield f"model.{section}.{key}"


class AnotherLoss(NamedTuple):
    """What a layout changes of the loss, by regularisers of a micro-step's batch."""

    keys: tuple[str, ...]
    """By which they are such: see `of_a_micro_batch`."""
    sequences: int
    """Of a micro-step on all data-parallel ranks, which the regularisers are of."""
    run_sequences: int
    """The same of the run."""


def another_loss(config: Config, changed: Config, num_ranks: int) -> AnotherLoss | None:
    """Whether a run has another loss with the layout, or the batch, of `changed`; None where it has not."""
    keys = tuple(of_a_micro_batch(config.model))
    now, then = (c.batch.micro_sequences * c.data_size(num_ranks) for c in (changed, config))
    return AnotherLoss(keys, now, then) if keys and now != then else None
