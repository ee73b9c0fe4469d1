"""How many weights ZeRO 3 gathers in a micro-step, by the rules of DeepSpeed's `PartitionedParameterCoordinator`.

Not all of them twice: small ones stay whole from update to update, and of the others those that the backward pass
needs soon stay from the forward pass on. How soon depends on how far ahead it has fetched by then. The rules, with the
keys of `deepspeed.zero_optimization` that change them, each in elements:

    stage3_param_persistence_threshold, stage3_model_persistence_threshold   what stays whole
    stage3_prefetch_bucket_size, stage3_max_live_parameters   what is fetched ahead: at each visit of a module as many
                                                              more, while fewer are there than may be
    stage3_max_reuse_distance                                 what is needed again within so many is not let go
"""

from __future__ import annotations

import functools
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from model.config import ModelConfig
from model.parallel.context import ParallelContext
from model.parallel.sharding import local_shape
from model.parameters import owner_of, parameter_specs
from pretrain.config.schema import Config


class Limits(NamedTuple):  # RELIES-ON deepspeed-gathers
    """DeepSpeed's, with its defaults; elements."""

    param_persistence_threshold: int = 10**5
    model_persistence_threshold: int = sys.maxsize
    prefetch_bucket_size: int = 5 * 10**7
    max_live_parameters: int = 10**9
    max_reuse_distance: int = 10**9


class Gathered(NamedTuple):
    """Elements that a data-parallel group gathers."""

    micro_step: int
    update: int
    """What stays whole, once the weights are new."""


def gathered(config: Config) -> Gathered:
    """At parallel.zero = 3, which has neither pipeline nor divided experts."""
    zero = config.deepspeed.get("zero_optimization", {})
    given = {name: zero.get(f"stage3_{name}", zero.get(name)) for name in Limits._fields}
    limits = Limits(**{name: int(value) for name, value in given.items() if value is not None})
    return _gathered(config.model, config.parallel.tensor, config.train.recompute == "full", limits)


@functools.lru_cache(maxsize=256)
def _gathered(model: ModelConfig, tensor: int, again: bool, limits: Limits) -> Gathered:
    sizes = _modules(model, tensor)
    visits = [sizes.get(name, {}) for name in _visits(model, again=again)]
    numbers = {name: size for of_module in sizes.values() for name, size in of_module.items()}
    whole, left = set[str](), limits.model_persistence_threshold
    for name, size in numbers.items():
        if size <= min(limits.param_persistence_threshold, left):
            whole.add(name)
            left -= size
    fetcher = _Fetcher(visits, numbers, whole, limits)
    for place in range(len(visits)):
        fetcher.visit(place)
    return Gathered(fetcher.gathered, sum(numbers[name] for name in whole))


class _Fetcher:
    """A micro-step whose modules are known from the one before."""

    def __init__(
        self, visits: Sequence[Mapping[str, int]], sizes: Mapping[str, int], whole: set[str], limits: Limits
    ) -> None:
        self._visits, self._sizes, self._whole, self._limits = visits, sizes, whole, limits
        self._ahead = deque((name, place) for place, module in enumerate(visits) for name in module)
        """What is used, in order, that nobody has looked at yet."""
        self._seen: dict[str, int] = {}
        """The last use of a parameter that was looked at."""
        self._there = set(whole)
        self._live = 0
        """Elements that are there for a while."""
        self.gathered = 0

    def visit(self, place: int) -> None:
        """Fetches what a module needs, and more ahead; lets go what is not needed soon."""
        module = self._visits[place]
        for name in module:
            self._fetch(name)
        for _ in range(sum(self._seen.get(name, -1) < place for name in module)):
            name, use = self._ahead.popleft()
            self._seen[name] = use
        room = min(self._limits.max_live_parameters - self._live, self._limits.prefetch_bucket_size)
        end = self._live + room
        while self._ahead and self._live < end:
            name, use = self._ahead.popleft()
            self._seen[name] = max(self._seen.get(name, -1), use)
            self._fetch(name)
        if self._visits[place + 1 : place + 2] == [module]:  # its backward pass has not begun
            return
        for name in self._not_needed(module, place + 1):
            self._there.discard(name)
            self._live -= self._sizes[name]

    def _fetch(self, name: str) -> None:
        if name not in self._there:
            self._there.add(name)
            self._live += self._sizes[name]
            self.gathered += self._sizes[name]

    def _not_needed(self, module: Mapping[str, int], after: int) -> set[str]:
        """Those whose next use is far, and was not looked at: it would not be fetched again."""
        found = {name for name in module if name not in self._whole and self._seen[name] <= after}
        passed = 0
        for later in self._visits[after:]:
            if not found or passed >= self._limits.max_reuse_distance:
                break
            found -= later.keys()
            passed += sum(later.values())
        return found


def _modules(model: ModelConfig, tensor: int) -> dict[str, dict[str, int]]:
    """Parameters of each module, and how many elements a tensor-parallel rank has of each; a tied embedding is the
    output layer's too."""
    nobody: Any = object()  # nothing communicates here
    context = ParallelContext(tensor_size=tensor, tensor_group=nobody if tensor > 1 else None)
    found: dict[str, dict[str, int]] = {}
    for name, spec in parameter_specs(model).items():
        found.setdefault(_module_of(name), {})[owner_of(name, model)] = math.prod(local_shape(spec, context))
    return found


def _module_of(parameter: str) -> str:
    """A block's attention or feed-forward layer, the block, which has its norms, or embedding, final norm or output
    layer."""
    first, *inner = parameter.split(".")
    if first != "blocks":
        return first
    return ".".join([first, *inner[: 2 if inner[1] in ("attention", "feedforward") else 1]])


def _visits(model: ModelConfig, *, again: bool) -> Iterator[str]:
    """The modules of a micro-step in the order in which DeepSpeed's hooks see them. Empty names are of modules without
    parameters, at whose visit something is fetched ahead all the same. A module with an auxiliary loss is seen twice in
    the backward pass, once for each of its outputs. `again`: whether blocks are recomputed, which begins when the
    backward pass asks for the feed-forward layer: until that is over it stays."""
    blocks = range(model.num_layers)
    yield from ("", "embedding", "")
    for block in blocks:
        yield from (f"blocks.{block}", f"blocks.{block}.attention", f"blocks.{block}.feedforward")
    yield from ("final_norm", "head", "", "")
    losses = [_has_loss(layer) for layer in (model.attention, model.feedforward)]
    of_attention, of_feedforward, of_any = (1 + has for has in (*losses, any(losses)))
    yield from ["head"] * of_any + [""] + ["final_norm"] * of_any
    for block in reversed(blocks):
        attention, feedforward = f"blocks.{block}.attention", f"blocks.{block}.feedforward"
        yield from [f"blocks.{block}"] * of_any + [attention] * again
        yield from [feedforward] * (of_feedforward + again) + [attention] * of_attention
    yield from ("embedding", "")


def _has_loss(layer: Any) -> bool:
    """Whether a layer adds a loss of its own, by its keys: entropy_weight, z_loss_weight, ..."""
    return any(value for key, value in layer.model_dump().items() if key.endswith("_weight"))
