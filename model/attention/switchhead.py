"""SwitchHead attention (arXiv 2312.07987, section 2.2): few heads, experts in some of their projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.rope import RopeTables, rotate, rotate_joint
from model.attention.xl import Sinusoids, relative_attention
from model.choices import settled
from model.config import ModelConfig, Projection, RopeConfig, SwitchHeadConfig, XLConfig
from model.distributions import Normal, block_std
from model.documents import Seen, causal_attention
from model.dropout import Draw, site_key
from model.kernels.choice import Backends
from model.kernels.ops.elementwise import keep_mask
from model.kernels.ops.route import Choice, group_choices, route_handing_on
from model.kernels.ops.switchhead import switchhead_output, switchhead_value_handing_on
from model.linear import region_linear
from model.parallel.collectives import leave_shards
from model.parallel.context import ParallelContext
from model.parallel.overlap import Late, enter_overlapped
from model.parallel.regions import leave_region
from model.parameter_spec import Experts, ParameterSpec, Specs
from model.routing import RoutingStatistics, entropy_of_sequences

PROJECTIONS: tuple[Projection, ...] = ("query", "key", "value", "output")
SOURCE: tuple[Projection, ...] = ("key", "value")
"""Projections of the context's tokens; query and output are projections of the chunk's tokens."""


class SwitchHeadAttention(nn.Module):
    """H attention matrices; for each token and head, k of E experts in each of `expert_projections`.

    With experts in the value and output projections, the default, for head i and the layer-normed block input x [L, d]:

        s_V[l, i] = sigmoid(W_sV[i] x[l])                                         [E], the k largest are chosen
        v[l, i]   = sum over chosen e: s_V[l, i, e] x[l] W_V[i, e]                W_V [H, E, d, h], v [L, H, h]
        a[t, i]   = sum over l <= t: softmax_l(q[t, i] . k[l, i] / sqrt(h)) v[l, i]               a [T, H, h]
        s_O[t, i] = sigmoid(W_sO[i] x[t])                                         [E], the k largest are chosen
        y[t]      = sum over i and chosen e: s_O[t, i, e] a[t, i] W_O[i, e]       W_O [H, E, h, d], y [T, d]

    The value selector W_sV looks at the key's token (memory included), the output selector W_sO at the query's token.
    Key experts go with values, query experts with outputs (`selection`). XL adds position terms to the softmax.
    Shape legend: B batch, T tokens of the chunk, L = M + T of the context (M of memory), H heads, h head_dim,
    E experts, d d_model.
    """

    query: nn.Linear
    key: nn.Linear
    output: nn.Linear
    output_experts: Tensor
    position: nn.Linear

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        """Heads are divided."""
        assert isinstance(config.attention, SwitchHeadConfig)
        attention, d = config.attention, config.d_model
        H, h, E = attention.num_heads, attention.head_dim, attention.num_experts
        experts = Experts(active=attention.active_experts, total=E, exchanged=False)
        equal_norms = (0, 1) if attention.normalized_init else ()
        from_tokens, from_heads = block_std(config, d), block_std(config, H * h)
        specs = {}
        for projection in PROJECTIONS:
            is_output = projection == "output"
            std = from_heads if is_output else from_tokens
            if projection in attention.expert_projections:
                specs[f"{projection}_experts"] = ParameterSpec(
                    shape=(H, E, h, d) if is_output else (H, E, d, h),
                    divided=0,
                    experts=experts,
                    decayed=True,
                    initial=Normal(std, equal_norms),
                )
                # Several projections may share a selector.
                specs[f"{attention.selector_of(projection)}_selector"] = ParameterSpec(
                    shape=(H, E, d), divided=0, experts=None, decayed=True, initial=Normal(from_tokens)
                )
            else:
                specs[f"{projection}.weight"] = ParameterSpec(
                    shape=(d, H * h) if is_output else (H * h, d),
                    divided=1 if is_output else 0,
                    experts=None,
                    decayed=True,
                    initial=Normal(std),
                )
        if isinstance(config.position, XLConfig):
            specs["position.weight"] = ParameterSpec(
                shape=(H * h, d), divided=0, experts=None, decayed=True, initial=Normal(from_tokens)
            )
        return specs

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        super().__init__()
        assert isinstance(config.attention, SwitchHeadConfig)
        self.config = config.attention
        position = config.position
        self.rope = RopeTables(self.config.head_dim, position) if isinstance(position, RopeConfig) else None
        self.sinusoids = Sinusoids()
        self.backends = backends
        self.parallel = parallel
        self.num_heads = self.parallel.share(self.config.num_heads)
        H, h, E, d = self.num_heads, self.config.head_dim, self.config.num_experts, config.d_model
        for projection in PROJECTIONS:
            wide_to_narrow = projection != "output"
            if projection in self.config.expert_projections:
                experts = torch.empty(H, E, d, h) if wide_to_narrow else torch.empty(H, E, h, d)
                self.register_parameter(f"{projection}_experts", nn.Parameter(experts))
            else:
                width = (d, H * h) if wide_to_narrow else (H * h, d)
                setattr(self, projection, nn.Linear(*width, bias=False))
        self._selector_of = {p: self.config.selector_of(p) for p in PROJECTIONS if p in self.config.expert_projections}
        self._dropout_keys = {}
        # A fixed order: parameters and statistics are registered in it, and sums over them depend on it in the last
        # bit.
        order: tuple[Projection, ...] = ("key", "value", "query", "output")
        self.selectors = [p for p in order if p in self._selector_of.values()]
        for owner in self.selectors:
            self.register_parameter(f"{owner}_selector", nn.Parameter(torch.empty(H, E, d)))
            setattr(
                self,
                f"{owner}_statistics",
                RoutingStatistics((self.config.num_heads, E), tracks_probability=False, is_sharded=True),
            )
            self._dropout_keys[owner] = site_key(seed, f"{name}.{owner}_experts")
        if isinstance(config.position, XLConfig):
            self.position = nn.Linear(d, H * h, bias=False)

    def forward(
        self, context: Tensor, num_queries: int, sequence_index: Tensor, documents: Seen | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`context` [B, L, d]: layer-normed block input, memory first; the last `num_queries` = T are the chunk (with
        sequence parallelism this rank's tokens of each). `sequence_index` [B] int64 seeds expert dropout.
        -> [B, T, d] like the chunk, and the weighted entropy regulariser (fp32 scalar) where there is one."""
        context, late = self._enter(context, num_queries)
        (B, L, d), T = context.shape, num_queries * self.parallel.token_shards
        H, h = self.num_heads, self.config.head_dim
        context, chunk, selections, auxiliary_loss = self._select(context, T, sequence_index)
        source, v = self._project("value", context.reshape(B * L, d), selections, late)
        v = v.view(B, L, H, h)
        is_joint = "query and key" in late
        if is_joint:
            joint = region_linear(source, late["query and key"]).view(B, T, 2 * H, h)
            q, k = joint.split(H, dim=2)
        else:
            q = self._project("query", chunk.reshape(B * T, d), selections, late)[1].view(B, T, H, h)
            k = self._project("key", source, selections, late)[1].view(B, L, H, h)
        # q and k each carry head_dim^-1/4 in the paper (and the position keys too): together the usual scale.
        if self.rope is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            backend = self.backends.relative_attention
            position = self.position.weight, self.sinusoids
            attended = relative_attention(q, k, v, *position, scale=h**-0.5, backend=backend, seen=documents)
        else:
            tables = self.rope(documents, L, context.device)
            backend = self.backends.elementwise
            if is_joint:
                q, k = rotate_joint(joint, H, tables, backend=backend)
            else:
                q, k = rotate(q, k, tables, backend=backend)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            attended = causal_attention(q, k, v, documents, backend=self.backends.causal_attention)
        attended = attended.transpose(1, 2).reshape(B * T, H, h)
        if "output" in selections:
            backend = self.backends.switchhead_output
            y = switchhead_output(attended, selections["output"], self.output_experts, backend=backend)
        else:
            y = self.output(attended.flatten(1))
        return leave_region(y.view(B, T, d), self.parallel), auxiliary_loss

    def _enter(self, context: Tensor, num_queries: int) -> tuple[Tensor, dict[str, Late]]:
        """The context of all ranks, and the weights of each map of it. Queries and keys are one map if both are dense
        and there is no memory."""
        expert = self.config.expert_projections
        maps: dict[str, tuple[Tensor, ...]] = {}
        for projection in ("query", "key", "value"):
            name = f"{projection}_experts" if projection in expert else f"{projection}.weight"
            maps[projection] = (self.get_parameter(name),)
        if context.shape[1] == num_queries and not ("query" in expert or "key" in expert):
            maps["query and key"] = maps.pop("query") + maps.pop("key")
        context, _, late = enter_overlapped(context, self.parallel, *maps.values(), chunk=num_queries)
        return context, dict(zip(maps, late, strict=True))

    def _project(
        self, projection: Projection, tokens: Tensor, selections: dict[Projection, Choice], late: dict[str, Late]
    ) -> tuple[Tensor, Tensor]:
        """[N, d] -> the tokens, handed on for the next projection, and [N, H, h] or [N, H h]."""
        if projection not in selections:
            return tokens, region_linear(tokens, late[projection])
        ((experts,), slot), backend = late[projection], self.backends.switchhead_value
        return switchhead_value_handing_on(tokens, selections[projection], experts, backend=backend, slot=slot)

    def _select(
        self, context: Tensor, T: int, sequence_index: Tensor
    ) -> tuple[Tensor, Tensor, dict[Projection, Choice], Tensor | None]:
        """The context and its chunk, handed on, and what is chosen for each expert projection: for keys and values at
        every token of the context, for queries and outputs at the chunk's. Selectors that look at the same tokens share
        one product. Behind a memory the chunk is copied out of the context, once. And the sum of the selectors'
        regularisers."""
        sides: dict[bool, list[Projection]] = {True: [], False: []}
        for owner in self.selectors:
            of_source = any(self._selector_of.get(p) == owner for p in SOURCE)
            # Without memory both sides are the same tokens.
            sides[of_source or context.shape[1] == T].append(owner)
        chosen: dict[Projection, Choice] = {}
        losses: list[Tensor] = []
        if sides[True]:
            context, found = self._route(context, sides[True], sequence_index, T, losses)
            chosen |= found
        chunk = context[:, context.shape[1] - T :]
        if sides[False]:
            chunk, found = self._route(chunk, sides[False], sequence_index, T, losses)
            chosen |= found
        selections = {}
        for projection, owner in self._selector_of.items():
            choice, B = chosen[owner], context.shape[0]
            if projection not in SOURCE and choice.index.shape[0] != B * T:  # a shared selector routed the memory too
                scores, index = (t.unflatten(0, (B, -1))[:, -T:].flatten(0, 1) for t in (choice.scores, choice.index))
                backend = self.backends.switchhead_value
                choice = Choice(scores, index, *group_choices(index, self.config.num_experts, backend=backend))
            selections[projection] = choice
        # Each rank has the term of its own heads, whose gradient counts once; the value is the whole on every rank.
        auxiliary_loss = leave_shards(sum(losses[1:], losses[0]), self.parallel.tensor_group) if losses else None
        return context, chunk, selections, auxiliary_loss

    def _route(
        self, tokens: Tensor, owners: list[Projection], sequence_index: Tensor, T: int, losses: list[Tensor]
    ) -> tuple[Tensor, dict[Projection, Choice]]:
        """`tokens` [B, L, d], handed on, and what each selector in `owners` chooses for them, as N = B L tokens; counts
        the choices of the last T tokens of each sequence, those of memory were counted when they were new, and appends
        the regulariser of these tokens, this rank's heads and all `owners` to `losses`."""
        B, L, d = tokens.shape
        H, E, probability = self.num_heads, self.config.num_experts, self.config.expert_dropout
        heads, keep = self.parallel.slice_of(self.config.num_heads), None
        if self.training and probability > 0.0:
            columns, backend = (self.config.num_heads, heads), self.backends.elementwise
            draws = (Draw(probability, self._dropout_keys[o], sequence_index, columns=columns) for o in owners)
            masks = [keep_mask((B, L, H, E), draw, backend=backend) for draw in draws]
            keep = torch.cat(masks, dim=2).flatten(0, 1)
        weight = torch.cat([getattr(self, f"{owner}_selector") for owner in owners])
        flat, routing = route_handing_on(
            tokens.reshape(B * L, d), weight, self.config.active_experts, keep=keep, backend=self.backends.route
        )
        routers = [getattr(self, f"{owner}_statistics") for owner in owners]
        routing = settled(routing, routers, sequence_index, heads=heads, training=self.training)
        found = {}
        parts = zip(*(t.split(H, dim) for t, dim in zip(routing.choice, (1, 1, 0, 0), strict=True)), strict=True)
        for owner, part in zip(owners, parts, strict=True):
            choice = found[owner] = Choice(*part)
            if self.training:
                load = choice.load
                if L > T:
                    of_chunk = choice.index.unflatten(0, (B, L))[:, L - T :].permute(2, 0, 1, 3).reshape(H, -1)
                    load = torch.zeros_like(load).scatter_add_(1, of_chunk, torch.ones_like(of_chunk))
                getattr(self, f"{owner}_statistics").record(load, None, heads=heads)
        if self.training and self.config.entropy_weight > 0.0:
            entropies = entropy_of_sequences(routing.logits.unflatten(0, (B, L))[:, L - T :])
            losses.append(self.config.entropy_weight / (B * self.config.num_heads) * entropies)
        return flat.view(B, L, d), found
