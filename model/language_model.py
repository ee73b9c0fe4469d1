"""The plain module: all layers on one device, with the loss. Parallel forms use the same layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.documents import Documents
from model.initialization import initialize
from model.kernels.choice import Backends
from model.layers import State, layer_factories
from model.parallel.context import ParallelContext
from model.parameters import check_declarations
from model.recompute import Recompute
from model.routing import RoutingStatistics, add_up


class LanguageModel(nn.Module):
    """Decoder-only language model. Parameter names: embedding.*, blocks.N.*, final_norm.*, head.* (head.weight is
    embedding.weight with config.tied_embedding)."""

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelContext | None = None,
        backends: Backends | None = None,
        *,
        seed: int = 0,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.config = config
        parallel = parallel or ParallelContext()
        factories = layer_factories(config, parallel, backends or Backends(), seed=seed, recompute=recompute)
        layers = {name: build() for name, build in factories}
        self.embedding = layers["embedding"]
        self.blocks = nn.ModuleList(layers[f"blocks.{index}"] for index in range(config.num_layers))
        self.final_norm = layers["final_norm"]
        self.head = layers["head"]
        if config.tied_embedding:
            self.head.weight = self.embedding.weight
        check_declarations(self, config, parallel, layers=layers)
        self._routers = [statistics for _, statistics in routing_statistics(self)]

    def logits(
        self, tokens: Tensor, sequence_index: Tensor | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`tokens` [B, T] int64 -> logits [B, T, vocab_size] and the auxiliary loss (fp32 scalar).

        `sequence_index` [B] int64 (index of each sequence in the run) is needed only where dropout is active.
        `documents` as in `forward`.
        """
        if sequence_index is None:
            sequence_index = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        state, apart = self.begin(tokens, sequence_index, documents)
        for block in self.blocks:
            state = block(state, apart)
        logits, _, auxiliary_loss = self.head(self._final_state(state))
        return logits, auxiliary_loss

    def log_likelihood(
        self, tokens: Tensor, targets: Tensor, places: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`tokens` [B, T] int64; `places` [n] int64 in the flattened [B T], and `targets` [n] int64, the tokens that
        follow there -> log p of each target [n] fp32 in nats, and whether it is the likeliest token [n] bool.
        `documents` as in `forward`."""
        sequence_index = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        state, apart = self.begin(tokens, sequence_index, documents)
        for block in self.blocks:
            state = block(state, apart)
        likelihood, is_likeliest, _ = self.head(self._final_state(state), targets, places)
        return likelihood, is_likeliest

    def forward(
        self, tokens: Tensor, targets: Tensor, sequence_index: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`tokens`, `targets` [B, T] int64, `sequence_index` [B] int64. `documents` [B, T] int64 numbers each token's
        document, rising; with it attention does not cross documents and positions begin again in each.

        Returns the training objective (fp32 scalar: mean cross-entropy over all tokens plus auxiliary losses, in nats)
        and, detached, the mean cross-entropy of each sequence [B] fp32 and the sum of the auxiliary losses (fp32
        scalar): they are returned because they are thousands of times smaller, and a difference from the objective
        would lose their digits.
        """
        state, apart = self.begin(tokens, sequence_index, documents)
        for block in self.blocks:
            state = block(state, apart)
        return self.end(state, targets)

    def begin(
        self, tokens: Tensor, sequence_index: Tensor, documents: Tensor | None = None
    ) -> tuple[State, Documents | None]:
        """What comes before the blocks: their first state, and what they all need to know of the documents."""
        state = self.embedding((tokens, sequence_index))
        return state, None if documents is None else Documents.of(documents)

    def end(self, state: State, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes after the blocks: the results of `forward`."""
        loss, sequence_loss, auxiliary_loss = self.head(self._final_state(state), targets)
        return loss + auxiliary_loss, sequence_loss, auxiliary_loss.detach()

    def _final_state(self, state: State) -> State:
        add_up(self._routers)
        return self.final_norm(state)


def build_model(
    config: ModelConfig,
    parallel: ParallelContext | None = None,
    backends: Backends | None = None,
    *,
    seed: int,
    recompute: Recompute = "none",
) -> LanguageModel:
    """The initialised model, fp32, on the CPU. `seed` decides the weights and the dropout masks. Without `backends`
    every op uses the readable reference."""
    parallel = parallel or ParallelContext()
    model = LanguageModel(config, parallel, backends, seed=seed, recompute=recompute)
    initialize(model, config, parallel, seed=seed)
    return model


def build_on_meta(config: ModelConfig) -> LanguageModel:
    """The model without storage, to count the parameters of a model of any size quickly."""
    with torch.device("meta"):
        return LanguageModel(config)


def prepare_to_answer(model: nn.Module, device: torch.device) -> None:
    """A model that was loaded, or its pipeline stage, goes to `device` and evaluation mode; no parameter asks for a
    gradient."""
    model.requires_grad_(False).eval().to(device)
    for _, statistics in routing_statistics(model):
        statistics.to(device)


def routing_statistics(model: nn.Module) -> Iterator[tuple[str, RoutingStatistics]]:
    """Every router's statistics with a canonical name, e.g. `blocks.3.feedforward.statistics`, in module order."""
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, RoutingStatistics):
                yield f"{module_name}.{attribute}", value
