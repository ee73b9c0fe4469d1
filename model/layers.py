"""The model as a list of layers, the form that both the plain module and a pipeline are built from.

A layer maps a state to a state. The state is a plain tuple of tensors, so that it can cross a pipeline boundary:
    hidden          [B, T, d] activations (at the first layer: token ids [B, T] int64); with sequence parallelism
                    [B, T / tensor_size, d], the tokens of this rank
    sequence_index  [B] int64, index of each sequence in the whole run: seeds every dropout mask
    auxiliary_loss  [] fp32, sum of the auxiliary losses of the layers so far
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.dense import DenseAttention
from model.attention.moa import MoAAttention
from model.attention.switchhead import SwitchHeadAttention
from model.cache import LayerCache
from model.config import (
    DenseAttentionConfig,
    DenseFeedForwardConfig,
    MoAConfig,
    ModelConfig,
    SigmaMoEConfig,
    SwiGLUConfig,
    SwitchHeadConfig,
)
from model.distributions import Constant, Distribution, Normal, Uniform
from model.documents import Seen
from model.dropout import Draw, site_key
from model.feedforward.dense import DenseFeedForward
from model.feedforward.sigma_moe import SigmaMoE
from model.feedforward.swiglu import SwiGLU
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import dropout, layer_norm
from model.kernels.ops.linear_cross_entropy import chunk_bytes, linear_cross_entropy
from model.layer_section import LayerSection
from model.memory import LayerMemory
from model.parallel.collectives import gather_last
from model.parallel.context import ParallelContext
from model.parallel.regions import between_regions, enter_region, first_token
from model.parameter_spec import ParameterSpec, Specs, prefixed
from model.recompute import Recompute, recomputed
from model.routing import RoutingStatistics

State = tuple[Tensor, Tensor, Tensor]

ATTENTIONS: dict[type[LayerSection], type[SwitchHeadAttention | DenseAttention | MoAAttention]] = {
    SwitchHeadConfig: SwitchHeadAttention,
    DenseAttentionConfig: DenseAttention,
    MoAConfig: MoAAttention,
}
FEEDFORWARDS: dict[type[LayerSection], type[SigmaMoE | DenseFeedForward | SwiGLU]] = {
    SigmaMoEConfig: SigmaMoE,
    DenseFeedForwardConfig: DenseFeedForward,
    SwiGLUConfig: SwiGLU,
}
"""The layer that each section builds. All have the same constructor and declare their parameters
(docs/new-layer.md)."""


class Dropout(nn.Module):
    """Dropout at one named place of the model; masks are functions of position, see model/dropout.py."""

    def __init__(
        self, probability: float, *, name: str, seed: int, parallel: ParallelContext, backends: Backends
    ) -> None:
        super().__init__()
        self.probability = probability
        self.parallel = parallel
        self.backend = backends.elementwise
        self._key = site_key(seed, name)

    def forward(self, x: Tensor, sequence_index: Tensor) -> Tensor:
        draw = self.draw(x.shape[1], sequence_index)
        return x if draw is None else dropout(x, draw, backend=self.backend)

    def draw(self, num_tokens: int, sequence_index: Tensor) -> Draw | None:
        """The mask of this rank's `num_tokens` tokens of each sequence; None where there is no dropout now."""
        if not self.training or self.probability == 0.0:
            return None
        return Draw(self.probability, self._key, sequence_index, first_token(num_tokens, self.parallel))


class LayerNorm(nn.LayerNorm):
    """Normalises every token by itself, so with sequence parallelism those of this rank."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        shape, one, zero = (config.d_model,), Constant(1.0), Constant(0.0)
        return {
            "weight": ParameterSpec(shape=shape, divided=None, experts=None, decayed=False, initial=one),
            "bias": ParameterSpec(shape=shape, divided=None, experts=None, decayed=False, initial=zero),
        }

    def __init__(self, d_model: int, *, parallel: ParallelContext, backends: Backends) -> None:
        super().__init__(d_model)
        self.parallel = parallel
        self.backend = backends.elementwise

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None, None)[1]

    def add(self, x: Tensor, branch: Tensor | None, draw: Draw | None) -> tuple[Tensor, Tensor]:
        """The sum of `x` [B, T, d] and of `branch` after dropout, where they are given, and the norm of the sum."""
        weight, bias = (between_regions(p, self.parallel) for p in (self.weight, self.bias))
        return layer_norm(x, weight, bias, self.eps, branch=branch, draw=draw, backend=self.backend)


class Embedding(nn.Module):
    """Token embedding, without a sqrt(d) factor, and dropout."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Classes are divided."""
        shape = V, d = config.vocab_size, config.d_model
        initial: Distribution = Normal(1.0 / math.sqrt(d))
        if config.initialization == "published_sigma_moe":
            initial = Uniform(math.sqrt(6.0 / (V + d)))  # xavier_uniform_ in their code: standard deviation by V too
        return {"weight": ParameterSpec(shape=shape, divided=0, experts=None, decayed=True, initial=initial)}

    def __init__(self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, seed: int) -> None:
        super().__init__()
        self.parallel = parallel
        self.held = parallel.slice_of(config.vocab_size)
        self.weight = nn.Parameter(torch.empty(parallel.share(config.vocab_size), config.d_model))
        self.dropout = Dropout(config.dropout, name="embedding", seed=seed, parallel=parallel, backends=backends)

    def forward(self, state: tuple[Tensor, Tensor]) -> State:
        tokens, sequence_index = state
        group = self.parallel.tensor_group
        if group is None:
            hidden = nn.functional.embedding(tokens, self.weight)
        else:
            from model.parallel import megatron_core

            first, is_divided = self.held.start, self.parallel.sequence_parallel
            hidden = megatron_core.embed(tokens, self.weight, first=first, group=group, sequence_parallel=is_divided)
        return self.dropout(hidden, sequence_index), sequence_index, hidden.new_zeros((), dtype=torch.float32)


class Block(nn.Module):
    """Pre-LN block: x + attention(norm(x)), then x + feedforward(norm(x))."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        norm = LayerNorm.parameter_specs(config)
        return prefixed(
            {
                "attention_norm": norm,
                "attention": ATTENTIONS[type(config.attention)].parameter_specs(config),
                "feedforward_norm": norm,
                "feedforward": FEEDFORWARDS[type(config.feedforward)].parameter_specs(config),
            }
        )

    def __init__(
        self,
        config: ModelConfig,
        *,
        parallel: ParallelContext,
        backends: Backends,
        index: int,
        seed: int,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        name = f"blocks.{index}"
        self.recompute: Recompute = recompute
        self.backend = backends.elementwise
        self.attention_norm = LayerNorm(config.d_model, parallel=parallel, backends=backends)
        attention = ATTENTIONS[type(config.attention)]
        self.attention = attention(config, parallel=parallel, backends=backends, name=f"{name}.attention", seed=seed)
        self.attention_dropout = Dropout(
            config.dropout, name=f"{name}.attention", seed=seed, parallel=parallel, backends=backends
        )
        self.memory = LayerMemory(config.memory_length // parallel.token_shards) if config.memory_length else None
        self.feedforward_norm = LayerNorm(config.d_model, parallel=parallel, backends=backends)
        feedforward = FEEDFORWARDS[type(config.feedforward)]
        self.feedforward = feedforward(
            config, parallel=parallel, backends=backends, name=f"{name}.feedforward", seed=seed
        )
        self.feedforward_dropout = Dropout(
            config.dropout, name=f"{name}.feedforward", seed=seed, parallel=parallel, backends=backends
        )
        # What a forward pass leaves a trace in. Found once, here, because torch 2.11 cannot compile vars() of a module.
        inner = [module for layer in (self.attention, self.feedforward) for module in layer.modules()]
        found = [self.memory, *(value for module in inner for value in vars(module).values())]
        self.recorders = [v for v in found if isinstance(v, RoutingStatistics | LayerMemory)]
        self.compiled: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]] | None = None
        """Computes `transform` in training, if given (train.compile). A function, so it adds no parameter names."""

    def forward(self, state: State, documents: Seen | None = None) -> State:
        compute = self._compute if documents is None else partial(self._compute, documents=documents)
        return recomputed(compute, state, mode=self.recompute, recorders=self.recorders)

    def _compute(self, state: State, documents: Seen | None = None) -> State:
        hidden, sequence_index, auxiliary_loss = state
        # Memory is normalised with the present weights, like the chunk itself. A cache has its keys and values already.
        if self.memory is None or isinstance(documents, LayerCache):
            context = hidden
        else:
            context = self.memory.extend(hidden, sequence_index)
        is_step = self.training and torch.is_grad_enabled()
        transform = self.compiled if self.compiled is not None and is_step else self.transform
        hidden, *losses = transform(hidden, context, sequence_index, documents)
        for loss in losses:
            auxiliary_loss = auxiliary_loss if loss is None else auxiliary_loss + loss
        return hidden, sequence_index, auxiliary_loss

    def fill_tables(self, context: Tensor) -> None:
        """Computes the tables of positions that `transform` reads for a `context` of this shape, dtype and device,
        where they are not kept yet. Of a context that is not divided over ranks."""
        (_, L, d), attention = context.shape, self.attention
        if attention.rope is not None:
            attention.rope(None, L, context.device)
        else:
            attention.sinusoids(L, d, context)

    def transform(
        self, hidden: Tensor, context: Tensor, sequence_index: Tensor, documents: Seen | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the block does to `hidden` [B, T, d], given the `context` [B, M + T, d] that attention sees. -> the
        hidden state and the auxiliary losses of attention and feed-forward, fp32 scalars, where they have one."""
        context, normalised = self.attention_norm.add(context, None, None)
        if self.memory is None:
            hidden = context  # the same values, but the gradient by the residual is added inside the norm
        attended, attention_loss = self.attention(normalised, hidden.shape[1], sequence_index, documents)
        draw = self.attention_dropout.draw(hidden.shape[1], sequence_index)
        hidden, normalised = self.feedforward_norm.add(hidden, attended, draw)
        draw = self.feedforward_dropout.draw(hidden.shape[1], sequence_index)
        if draw is None and isinstance(self.feedforward, SigmaMoE):  # whose sum over the experts adds it in its pass
            hidden, feedforward_loss = self.feedforward(normalised, sequence_index, hidden)
            return hidden, attention_loss, feedforward_loss
        transformed, feedforward_loss = self.feedforward(normalised, sequence_index)
        hidden = hidden + transformed if draw is None else dropout(transformed, draw, hidden, backend=self.backend)
        return hidden, attention_loss, feedforward_loss


class FinalNorm(LayerNorm):
    """LayerNorm after the last block."""

    def forward(self, state: State) -> State:  # type: ignore[override]
        hidden, sequence_index, auxiliary_loss = state
        return super().forward(hidden), sequence_index, auxiliary_loss


class Head(nn.Linear):
    """Dropout and the output layer, with a bias, untied or with the embedding's weight. Gives the loss without ever
    holding all logits."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Classes are divided. A tied weight has the embedding's initial values, see model.parameters.owner_of."""
        V, d = config.vocab_size, config.d_model
        weight: Distribution = Normal(1.0 / math.sqrt(d))
        bias: Distribution = Constant(0.0)
        if config.initialization != "normal":
            weight = bias = Uniform(1.0 / math.sqrt(d))  # as in torch.nn.Linear: standard deviation 1 / sqrt(3 d)
        return {
            "weight": ParameterSpec(shape=(V, d), divided=0, experts=None, decayed=True, initial=weight),
            "bias": ParameterSpec(shape=(V,), divided=0, experts=None, decayed=False, initial=bias),
        }

    def __init__(self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, seed: int) -> None:
        super().__init__(config.d_model, parallel.share(config.vocab_size))
        self.parallel = parallel
        self.backend = backends.linear_cross_entropy
        self.dropout = Dropout(config.dropout, name="head", seed=seed, parallel=parallel, backends=backends)

    def forward(  # type: ignore[override]
        self, state: State, targets: Tensor | None = None, places: Tensor | None = None
    ) -> State:
        """Without `targets` the first element of the result is the logits [B, T, vocab_size]. With `targets` [B, T]
        int64: the mean cross-entropy (fp32 scalar, nats), then the detached one of each sequence [B]. With `places` [n]
        int64, tokens of the flattened [B T], and one target for each of them, [n]: the targets' log-likelihoods [n]
        fp32, then whether each target is the likeliest token [n] bool."""
        hidden, sequence_index, auxiliary_loss = state
        hidden = enter_region(self.dropout(hidden, sequence_index), self.parallel)
        if targets is not None and places is not None:
            return *self._log_likelihood(hidden.flatten(0, 1)[places], targets), auxiliary_loss
        if targets is None:
            logits = gather_last(super().forward(hidden), self.parallel.tensor_group)
            return logits, sequence_index, auxiliary_loss
        loss, token_loss = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            self.bias,
            targets.flatten(),
            backend=self.backend,
            parallel=self.parallel,
        )
        return loss, token_loss.view(targets.shape).mean(1), auxiliary_loss

    def _log_likelihood(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of `hidden` [n, d] and `targets` [n], a part at a time: logits take 4 bytes per token and class."""
        at_once = max(1, chunk_bytes(hidden.device.type) // (4 * self.weight.shape[0] * self.parallel.tensor_size))
        likelihoods, likeliest = [], []
        for part, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = gather_last(super().forward(part), self.parallel.tensor_group).float()
            likelihoods.append(logits.log_softmax(-1).gather(1, wanted[:, None]).squeeze(1))
            likeliest.append(logits.argmax(-1) == wanted)
        return torch.cat(likelihoods), torch.cat(likeliest)


LayerFactory = Callable[[], nn.Module]


def layer_specs(config: ModelConfig) -> dict[str, Specs]:
    """What each layer of the model declares, by the layer's canonical name, in order."""
    block = Block.parameter_specs(config)
    return {
        "embedding": Embedding.parameter_specs(config),
        **{f"blocks.{index}": block for index in range(config.num_layers)},
        "final_norm": FinalNorm.parameter_specs(config),
        "head": Head.parameter_specs(config),
    }


def layer_factories(
    config: ModelConfig, parallel: ParallelContext, backends: Backends, *, seed: int, recompute: Recompute = "none"
) -> list[tuple[str, LayerFactory]]:
    """The layers in order, each with its canonical name prefix and a function that builds it: a pipeline stage builds
    only its own. `seed` keys the dropout masks. With config.tied_embedding the code that assembles the layers gives the
    head the embedding's weight.

    Parameters are not initialised: call model.initialization.initialize on the assembled module.
    """
    common: dict[str, Any] = {"parallel": parallel, "backends": backends, "seed": seed}
    layers: list[tuple[str, LayerFactory]] = [("embedding", partial(Embedding, config, **common))]
    for index in range(config.num_layers):
        block = partial(Block, config, **common, index=index, recompute=recompute)
        layers.append((f"blocks.{index}", block))
    layers.append(("final_norm", partial(FinalNorm, config.d_model, parallel=parallel, backends=backends)))
    layers.append(("head", partial(Head, config, **common)))
    return layers
