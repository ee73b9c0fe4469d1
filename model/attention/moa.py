"""Mixture of Attention Heads (MoA, arXiv 2210.05144): the sparse-attention baseline of the SwitchHead paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.rope import RopeTables, rotate
from model.attention.xl import Sinusoids, relative_attention
from model.balance import balance_losses
from model.choices import settled
from model.config import MoAConfig, ModelConfig, RopeConfig, XLConfig
from model.distributions import Constant, Normal, block_std
from model.documents import Seen, causal_attention
from model.dropout import Draw, site_key
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import keep_mask
from model.kernels.ops.expert_linear import expert_linear, expert_linear_sum
from model.kernels.ops.route import Choice, Routing, group_choices, route
from model.parallel.collectives import enter_shards
from model.parallel.context import ParallelContext
from model.parallel.overlap import enter_overlapped
from model.parallel.regions import leave_region
from model.parameter_spec import Experts, ParameterSpec, Specs
from model.routing import RoutingStatistics


class MoAAttention(nn.Module):
    """Every token attends with its k chosen experts, each a query and an output projection; keys and values are shared.

    q[t, j] = x[t] W_Q[e], e the j-th choice of token t;  a[t, j] = attention of q[t, j] over all keys and values;
    y[t] = sum_j g[t, e] a[t, j] W_O[e]. The gate g is sigmoid(logits), or softmax(logits) over all E experts, used
    unchanged as in the SwitchHead authors' baseline (the original MoA divides the chosen gates by their detached sum).
    With XL positions one W_pos and one learned scale of the logits serve all experts; there are no u and v. Shape
    legend: B batch, T tokens of the chunk, L = M + T of the context, N = B T, h head_dim, E experts, d d_model.
    """

    position: nn.Linear

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """All replicated: tensor-parallel ranks divide the chosen experts of each token."""
        assert isinstance(config.attention, MoAConfig)
        attention, d, h = config.attention, config.d_model, config.attention.head_dim
        k, E, weight = attention.num_heads, attention.num_experts, Normal(block_std(config, d))
        experts, output = Experts(active=k, total=E, exchanged=False), Normal(block_std(config, k * h))
        shared = ParameterSpec(shape=(h, d), divided=None, experts=None, decayed=True, initial=weight)
        specs = {
            "selector": ParameterSpec(shape=(E, d), divided=None, experts=None, decayed=True, initial=weight),
            "query_experts": ParameterSpec(
                shape=(E, d, h), divided=None, experts=experts, decayed=True, initial=weight
            ),
            "output_experts": ParameterSpec(
                shape=(E, h, d), divided=None, experts=experts, decayed=True, initial=output
            ),
            "key.weight": shared,
            "value.weight": shared,
        }
        if isinstance(config.position, XLConfig):
            scale = Constant(h**-0.5)
            specs |= {
                "position.weight": shared,
                "scale": ParameterSpec(shape=(1,), divided=None, experts=None, decayed=False, initial=scale),
            }
        return specs

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.attention, MoAConfig)
        self.config = config.attention
        position = config.position
        self.rope = RopeTables(self.config.head_dim, position) if isinstance(position, RopeConfig) else None
        self.sinusoids = Sinusoids()
        self.parallel = parallel
        self.backends = backends
        h, E, d = self.config.head_dim, self.config.num_experts, config.d_model
        self.selector = nn.Parameter(torch.empty(E, d))
        self.query_experts = nn.Parameter(torch.empty(E, d, h))
        self.output_experts = nn.Parameter(torch.empty(E, h, d))
        self.key = nn.Linear(d, h, bias=False)
        self.value = nn.Linear(d, h, bias=False)
        if isinstance(config.position, XLConfig):
            self.position = nn.Linear(d, h, bias=False)
            self.scale = nn.Parameter(torch.empty(1))
        self.statistics = RoutingStatistics((E,), tracks_probability=False, tracks_balance=True)
        self._dropout_key = site_key(seed, f"{name}.experts")

    def forward(
        self, context: Tensor, num_queries: int, sequence_index: Tensor, documents: Seen | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`context` [B, L, d]: layer-normed block input, memory first; the last `num_queries` = T are the chunk (with
        sequence parallelism this rank's tokens of each). `sequence_index` [B] int64 seeds expert dropout.
        -> [B, T, d] like the chunk and the weighted losses (fp32 scalar), None where there are none."""
        group = self.parallel.tensor_group
        queries = (enter_shards(self.query_experts, group),)
        divided, context, (late,) = enter_overlapped(context, self.parallel, queries, chunk=num_queries)
        (B, L, d), T = context.shape, num_queries * self.parallel.token_shards
        k, h = self.config.num_heads, self.config.head_dim
        tokens = context[:, L - T :].reshape(B * T, d)
        routing = self._route(tokens, sequence_index, T)
        logits, index, load, order = routing.logits[:, 0], routing.index[:, 0], routing.load[0], routing.order[0]
        probability = logits.softmax(-1) if self.config.router == "softmax" else None
        gates = routing.scores[:, 0] if probability is None else probability.gather(1, index)  # [N, k] fp32
        auxiliary_loss = None
        if self.training:
            if probability is not None:
                auxiliary_loss = balance_losses(
                    logits, probability, gates, index, load, self.config, self.statistics, self.parallel
                )
            self.statistics.record(load, logits, gates, index)

        if group is not None:  # each rank takes some of a token's slots, with all experts
            slots = self.parallel.slice_of(k)
            index, gates, k = index[:, slots].contiguous(), enter_shards(gates, group)[:, slots], self.parallel.share(k)
            order, load = group_choices(index[:, None], self.config.num_experts, backend=self.backends.expert_linear)
            order, load = order[0], load[0]
            tokens = divided[:, L - T :].reshape(B * T, d)
        backend = self.backends.expert_linear
        output_experts = enter_shards(self.output_experts, group)
        choice, (query_experts,) = Choice(gates, index, order, load), late.weights
        q = expert_linear(tokens, choice, query_experts, backend=backend, slot=late.slot)
        key, value = (enter_shards(layer(context), group)[:, :, None] for layer in (self.key, self.value))
        attended = self._attend(q.view(B, T, k, h), key, value, documents).reshape(B * T, k, h)
        y = expert_linear_sum(attended, choice, output_experts, backend=backend)
        return leave_region(y.view(B, T, d), self.parallel), auxiliary_loss

    def _attend(self, q: Tensor, key: Tensor, value: Tensor, documents: Seen | None) -> Tensor:
        """q [B, T, k, h], key and value [B, L, 1, h] -> [B, T, k, h]: a slot is to attention what a head is."""
        if self.rope is None:
            q, key, value = (t.transpose(1, 2) for t in (q, key, value))
            weight, scale = (enter_shards(p, self.parallel.tensor_group) for p in (self.position.weight, self.scale))
            backend = self.backends.relative_attention
            attended = relative_attention(
                q, key, value, weight, self.sinusoids, scale=scale, backend=backend, seen=documents
            )
            return attended.transpose(1, 2)
        tables = self.rope(documents, key.shape[1], q.device)
        q, key = rotate(q, key, tables, backend=self.backends.elementwise)
        q, key, value = (t.transpose(1, 2) for t in (q, key, value))
        # One key and value head serves k query heads.
        backend = self.backends.causal_attention
        attended = causal_attention(q, key, value, documents, backend=backend, shared=True)
        return attended.transpose(1, 2)

    def _route(self, tokens: Tensor, sequence_index: Tensor, T: int) -> Routing:
        """The choice of `tokens` [N, d]; the one router is an axis of size 1. The losses see clean logits."""
        keep, E = None, self.config.num_experts
        if self.training and self.config.expert_dropout > 0.0:
            draw = Draw(self.config.expert_dropout, self._dropout_key, sequence_index)
            shape = (sequence_index.shape[0], T, E)
            keep = keep_mask(shape, draw, backend=self.backends.elementwise).view(-1, 1, E)
        routing = route(tokens, self.selector[None], self.config.num_heads, keep=keep, backend=self.backends.route)
        return settled(routing, [self.statistics], sequence_index, training=self.training)
