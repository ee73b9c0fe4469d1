"""sigma-MoE feed-forward (arXiv 2310.10837, section 5): sigmoid-routed two-layer experts without biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.choices import settled
from model.config import ModelConfig, SigmaMoEConfig
from model.distributions import Normal, block_std
from model.dropout import Draw, site_key
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import keep_mask
from model.kernels.ops.route import Choice, Routing, route_handing_on
from model.kernels.ops.sigma_moe import HeldExperts, sigma_moe
from model.parallel.collectives import enter_shards
from model.parallel.context import ParallelContext
from model.parallel.exchange import Exchange, collect, spread
from model.parallel.overlap import Late, enter_overlapped
from model.parallel.regions import between_regions, first_token, leave_region
from model.parameter_spec import Experts, ParameterSpec, Specs
from model.routing import RoutingStatistics, entropy_regularizer


class SigmaMoE(nn.Module):
    """y = sum over the k chosen experts e of s_e a(x W_1[e]) W_2[e], s = sigmoid(x W_S), a ReLU or SwiGLU. Dropless."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Experts are divided, over expert-parallel ranks if there are any. Every rank routes."""
        assert isinstance(config.feedforward, SigmaMoEConfig)
        d, E, G = config.d_model, config.feedforward.num_experts, config.feedforward.expert_size
        W = config.feedforward.up_width
        experts = Experts(active=config.feedforward.active_experts, total=E, exchanged=True)
        from_tokens = block_std(config, d)
        router = Normal(from_tokens, equal_norms=(-1,))
        # As for the dense layer of the same width, N_E G.
        up, down = Normal(from_tokens), Normal(block_std(config, E * G))
        return {
            "router": ParameterSpec(shape=(E, d), divided=None, experts=None, decayed=True, initial=router),
            "up_experts": ParameterSpec(shape=(E, d, W), divided=0, experts=experts, decayed=True, initial=up),
            "down_experts": ParameterSpec(shape=(E, G, d), divided=0, experts=experts, decayed=True, initial=down),
        }

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.feedforward, SigmaMoEConfig)
        self.config = config.feedforward
        self.parallel = parallel
        self.backends = backends
        d, E, G = config.d_model, self.config.num_experts, self.config.expert_size
        self.exchanges = parallel.expert_group is not None
        """Expert-parallel ranks hold the experts: each rank routes its own tokens and sends them there. With tensor
        parallelism these are the rank's own tokens between regions, and this layer has no region."""
        assert not self.exchanges or parallel.tensor_size == parallel.token_shards, "EP with TP needs sequence parallel"
        held = E // parallel.expert_size if self.exchanges else parallel.share(E)
        self.router = nn.Parameter(torch.empty(E, d))
        self.up_experts = nn.Parameter(torch.empty(held, d, self.config.up_width))
        self.down_experts = nn.Parameter(torch.empty(held, G, d))
        self.token_group = parallel.tensor_group if self.exchanges else None
        """The ranks that divide the tokens of a sequence when these are routed."""
        self.statistics = RoutingStatistics(
            (E,), tracks_probability=self.config.entropy_weight > 0.0, is_sharded=self.token_group is not None
        )
        self._dropout_key = site_key(seed, f"{name}.experts")

    def forward(
        self, x: Tensor, sequence_index: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`x` [B, T, d], with sequence parallelism this rank's tokens -> output of the same shape, added to `residual`
        if given, and the weighted entropy regulariser (fp32 scalar, part of the loss) where there is one."""
        if self.exchanges:
            tokens, routing, auxiliary_loss = self._route(x, sequence_index)
            return added(self._exchange(tokens, routing).view_as(x), residual), auxiliary_loss
        divided, x, (late,) = enter_overlapped(x, self.parallel, (self.up_experts, self.down_experts))
        tokens, routing, auxiliary_loss = self._route(x, sequence_index)
        if self.parallel.tensor_group is not None:
            tokens = divided.reshape(-1, x.shape[2])
            y = leave_region(self._divide(tokens, routing, late).view_as(x), self.parallel)
            return added(y, residual), auxiliary_loss
        stream = None if residual is None else residual.reshape(tokens.shape)
        return self._divide(tokens, routing, late, stream).view_as(x), auxiliary_loss

    def _route(self, x: Tensor, sequence_index: Tensor) -> tuple[Tensor, Routing, Tensor | None]:
        """The tokens [N, d] of `x` [B, T, d], handed on, their choices, without the axis of the single router, and the
        regulariser."""
        (B, T, d), keep = x.shape, None
        first = first_token(T, self.parallel) if self.exchanges else 0
        if self.training and self.config.expert_dropout > 0.0:
            draw = Draw(self.config.expert_dropout, self._dropout_key, sequence_index, first)
            keep = keep_mask((B, T, self.config.num_experts), draw, backend=self.backends.elementwise)
            keep = keep.view(B * T, 1, -1)
        router = between_regions(self.router, self.parallel) if self.exchanges else self.router
        tokens, found = route_handing_on(
            x.reshape(B * T, d),
            router[None],
            self.config.active_experts,
            keep=keep,
            drop_scores=True,
            backend=self.backends.route,
        )
        found = settled(
            found,
            [self.statistics],
            sequence_index,
            keep=keep,
            drop_scores=True,
            first_token=first,
            training=self.training,
        )
        routing = Routing(*(t.squeeze(dim) for t, dim in zip(found, (1, 1, 1, 0, 0), strict=True)))
        # The regulariser sees the clean logits: expert dropout must not teach the router to look balanced.
        auxiliary_loss = probability = None
        if self.training:
            if self.config.entropy_weight > 0.0:
                auxiliary_loss, probability = entropy_regularizer(
                    routing.logits,
                    self.config,
                    self.statistics,
                    self.parallel,
                    token_group=self.token_group,
                    backend=self.backends.elementwise,
                )
            self.statistics.record(routing.load, routing.logits, probability=probability)
        return tokens, routing, auxiliary_loss

    def _divide(self, tokens: Tensor, routing: Routing, late: Late, residual: Tensor | None = None) -> Tensor:
        """`tokens` [N, d], the same on every tensor-parallel rank -> [N, d], the part of this rank's experts, added to
        `residual` if given, by one rank alone."""
        group, scores, index = self.parallel.tensor_group, routing.scores, routing.index
        order, load = routing.order, routing.load
        if group is not None:
            # Every rank routes all tokens in the same way, and computes the slots of its own experts. The gates'
            # gradients are summed where they enter; the regulariser's gradient is the same on every rank and reaches
            # the logits directly, once.
            held = self.parallel.slice_of(self.config.num_experts)
            index = index - held.start
            if self.backends.sigma_moe == "triton":  # finds its slots itself: no waiting for the device
                return self._experts(tokens, Choice(enter_shards(scores, group), index, order, load), late, held.start)
            order, load = own_slots(order, load, held)
        choice = Choice(enter_shards(scores, group), index, order, load)
        return self._experts(tokens, choice, late, residual=residual)

    def _exchange(self, tokens: Tensor, routing: Routing) -> Tensor:
        """`tokens` [N, d] of this rank alone -> [N, d], computed where the experts are."""
        assert self.parallel.expert_group is not None
        k, order = self.config.active_experts, routing.order
        exchange = Exchange.plan(routing.load, self.parallel.expert_group)
        # Here every row is a token with one choice: its gate travels with it and multiplies the narrow hidden layer.
        rows = exchange.there(spread(tokens, order, k))
        gates = exchange.there(routing.scores.flatten().gather(0, order))
        index, load = exchange.row_experts()[:, None], exchange.received_load.sum(0)
        choice = Choice(gates[:, None], index, exchange.row_order(), load)
        y = self._experts(rows, choice, Late((self.up_experts, self.down_experts)))
        return collect(exchange.back(y), order, k)

    def _experts(
        self, x: Tensor, choice: Choice, late: Late, first_expert: int = 0, residual: Tensor | None = None
    ) -> Tensor:
        up, down = late.weights
        experts = HeldExperts(up, down, first_expert)
        return sigma_moe(x, choice, experts, backend=self.backends.sigma_moe, slot=late.slot, residual=residual)


def added(y: Tensor, residual: Tensor | None) -> Tensor:
    """`y`, added to `residual` of the same shape if given."""
    return y if residual is None else residual + y


def own_slots(order: Tensor, load: Tensor, held: slice) -> tuple[Tensor, Tensor]:
    """Of all slots `order` [N k], sorted by expert, and choices per expert `load` [E], those of the experts `held`.
    Waits for the device."""
    first, last = int(load[: held.start].sum()), int(load[: held.stop].sum())
    return order[first:last], load[held]
