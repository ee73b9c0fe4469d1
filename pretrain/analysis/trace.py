"""Runs a model over a text and keeps what its layers did: choices of every router, attention maps of some layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import Documents, document_index
from model.language_model import LanguageModel
from model.layer_section import Ability
from model.memory import layer_memories, separate_streams
from pretrain.analysis.attention import attention_weights
from pretrain.analysis.routers import Router, routers_of, routing_of

ABILITIES: tuple[Ability, ...] = ("maps", "routing")
"""Of a layer, that this needs."""


@dataclass(frozen=True)
class Request:
    """What is to be kept."""

    layers: Sequence[int]
    """Whose attention maps."""
    window: int = 0
    """Of which window of sequence_length tokens, counted from 0."""
    map_tokens: int = 64
    """Queries of that window, from its first token on."""


@dataclass
class RouterTrace:
    """The choices of one router for N tokens of text."""

    layer: int
    name: str
    """Canonical, as in the statistics of a run: `blocks.3.attention.value`, `blocks.3.feedforward`."""
    title: str
    """For people, without the layer."""
    num_experts: int
    index: np.ndarray
    """int64 [N, R, k]: the chosen experts, best first; R heads, 1 for a router without."""
    gates: np.ndarray
    """fp32 [N, R, k]."""


@dataclass
class Trace:
    """What a model did with N tokens."""

    losses: np.ndarray
    """fp32 [N - 1]: -log p of the tokens from the second on, in nats."""
    routers: list[RouterTrace]
    """Of all layers, in the order of the model."""
    maps: dict[int, np.ndarray]
    """Layer -> fp32 [H, queries, keys]."""
    first_query: int
    """Position in the text of the maps' first query; their first key is `first_key`."""
    first_key: int
    left_out: list[str] = field(default_factory=list)
    """What the model's layers lack of this, a sentence each."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token; NaN of a single token."""
        return float(self.losses.mean(dtype=np.float64)) if len(self.losses) else float("nan")


@torch.no_grad()
def trace_text(
    model: LanguageModel,
    tokens: Sequence[int],
    request: Request,
    *,
    document_end: int | None = None,
    after_window: Callable[[int], object] = lambda n: None,
) -> Trace:
    """`tokens`: ids [N], N >= 1. They are read in windows of sequence_length tokens; a model with memory carries it
    from window to window, as in training. `document_end`: the id behind which nothing before is seen. Calls
    `after_window` with the number of tokens read. What the model's layers lack is left out, and the trace says so."""
    length, device = model.config.sequence_length, next(model.parameters()).device
    ids = torch.tensor(list(tokens), device=device)
    left_out = lacking(model.config)
    kept, losses = _Kept(model, request, frozenset(left_out)), []
    with separate_streams(model, torch.zeros(1, dtype=torch.int64, device=device), 1), _watched(model, kept):
        for number, first in enumerate(range(0, len(ids), length)):
            window = ids[first : first + length]
            kept.begin(number)
            documents = None if document_end is None else document_index(window[None], document_end)
            logits, _ = model.logits(window[None], documents=documents)
            targets = ids[first + 1 : first + 1 + len(window)]
            losses.append(nn.functional.cross_entropy(logits[0, : len(targets)], targets, reduction="none").cpu())
            for _, memory in layer_memories(model):
                memory.advance()
            after_window(len(window))
    first_query = request.window * length
    first_key = first_query - kept.memory_tokens
    told = list(left_out.values())
    return Trace(torch.cat(losses).numpy(), kept.routers(), kept.maps, first_query, first_key, told)


def lacking(config: ModelConfig) -> dict[tuple[str, str], str]:
    """What nothing here computes of the model's layers: (place, ability) -> a sentence."""
    words = {"maps": "whose attention maps are not shown", "routing": "whose choices of experts are not shown"}
    return {
        (place, ability): f"model.{place}.type is {layer.type}, {words[ability]}: {layer.lacks[ability]}"
        for place, layer in (("attention", config.attention), ("feedforward", config.feedforward))
        for ability in ABILITIES
        if ability in layer.lacks
    }


@dataclass
class _Kept:
    """Fills up while the model reads."""

    model: LanguageModel
    request: Request
    left_out: frozenset[tuple[str, str]]
    """(place, ability), see `lacking`."""
    maps: dict[int, np.ndarray] = field(default_factory=dict)
    memory_tokens: int = 0
    _parts: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _known: dict[tuple[int, str], tuple[str, Router]] = field(default_factory=dict)
    _wants_maps: bool = False

    def begin(self, window: int) -> None:
        self._wants_maps = window == self.request.window

    def attention(
        self,
        layer: int,
        module: nn.Module,
        context: Tensor,
        num_queries: int,
        sequence_index: Tensor,
        documents: Documents | None,
    ) -> None:
        """What a layer of attention is called with; `context` [1, L, d], see `attention_weights`."""
        self._choices(layer, "attention", module, context[0, -num_queries:])
        if self._wants_maps and layer in self.request.layers and ("attention", "maps") not in self.left_out:
            self.memory_tokens = context.shape[1] - num_queries
            queries = min(self.request.map_tokens, num_queries)
            # The tokens after the last drawn query are keys of none that is drawn.
            seen = context[:, : self.memory_tokens + queries]
            first = None if documents is None else documents.first[:, :queries]
            self.maps[layer] = attention_weights(module, seen, queries, first)[0].float().cpu().numpy()

    def feedforward(self, layer: int, module: nn.Module, x: Tensor) -> None:
        """`x` [1, T, d]."""
        self._choices(layer, "feedforward", module, x[0])

    def _choices(self, layer: int, place: str, module: nn.Module, tokens: Tensor) -> None:
        if (place, "routing") in self.left_out:
            return
        for router in routers_of(module):
            routing = routing_of(module, router, tokens)
            name = ".".join(part for part in ("blocks", str(layer), place, router.name) if part)
            self._known[layer, name] = router.title, router
            self._parts.setdefault((layer, name), []).append((routing.index.cpu(), routing.scores.float().cpu()))

    def routers(self) -> list[RouterTrace]:
        found = []
        for (layer, name), parts in self._parts.items():
            title, router = self._known[layer, name]
            index, gates = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
            found.append(RouterTrace(layer, name, title, router.weight.shape[1], index, gates))
        return found


@contextlib.contextmanager
def _watched(model: LanguageModel, kept: _Kept) -> Iterator[None]:
    """While it is open `kept` sees the input of every layer; the model computes as always."""

    def watch(module: nn.Module, tell: Callable[..., None], layer: int, arguments: int) -> Any:
        return module.register_forward_pre_hook(lambda module, args: tell(layer, module, *args[:arguments]))

    hooks = []
    try:
        for layer, block in enumerate(model.blocks):
            hooks.append(watch(block.get_submodule("attention"), kept.attention, layer, 4))
            hooks.append(watch(block.get_submodule("feedforward"), kept.feedforward, layer, 1))
        yield
    finally:
        for hook in hooks:
            hook.remove()
