"""The attention matrices of a layer, computed from its input: fused attention never makes them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.dense import DenseAttention
from model.attention.moa import MoAAttention
from model.attention.rope import apply_rope, last_rows
from model.attention.switchhead import SwitchHeadAttention
from model.attention.xl import sinusoids
from model.config import Projection
from model.kernels.ops.causal_attention import of_each_head
from model.kernels.ops.expert_linear import expert_linear
from model.kernels.ops.relative_attention import relative_shift
from model.kernels.ops.route import Choice, group_choices
from model.kernels.ops.switchhead import switchhead_value
from pretrain.analysis.routers import routers_of, routing_of


@torch.no_grad()
def attention_weights(layer: nn.Module, context: Tensor, num_queries: int, first: Tensor | None = None) -> Tensor:
    """`context` [B, L, d]: layer-normed block input, memory first, whose last `num_queries` = T tokens are the chunk.
    -> [B, H, T, L] fp32: row t is the softmax over all keys up to the query's own token. With MoA an axis of size k
    stands for H: a token's chosen experts, best first. `first` [B, T]: of each query the first key that it sees (the
    first token of its document; RoPE, whose differences alone count); None: all do see the first."""
    if isinstance(layer, SwitchHeadAttention):
        q, k = _projected(layer, "query", context[:, -num_queries:]), _projected(layer, "key", context)
    elif isinstance(layer, DenseAttention):
        q, k = _dense(layer, context, num_queries)
    else:
        assert isinstance(layer, MoAAttention), type(layer)
        q, k = _moa(layer, context, num_queries)
    (T, h), L = q.shape[1:4:2], k.shape[1]
    if layer.rope is not None:
        tables = layer.rope(None, L, context.device)
        q, k = apply_rope(q, *last_rows(tables, T)), apply_rope(k, *tables)
    q, k = q.transpose(1, 2).float(), of_each_head(k, q.shape[2], dim=2).transpose(1, 2).float()
    if layer.rope is not None:
        logits = q @ k.transpose(2, 3) * h**-0.5
    else:
        logits = _relative_logits(layer, q, k)
    future = torch.ones(T, L, dtype=torch.bool, device=q.device).triu(L - T + 1)
    unseen = future if first is None else future | (torch.arange(L, device=q.device) < first[:, None, :, None])
    return logits.masked_fill(unseen, -math.inf).softmax(-1)


def _relative_logits(layer: SwitchHeadAttention | DenseAttention | MoAAttention, q: Tensor, k: Tensor) -> Tensor:
    """Transformer-XL's, of q [B, H, T, h] and k [B, H or 1, L, h]: scale ((q_i + u) . k_j + (q_i + v) . W_pos r(i -
    j))."""
    L, h = k.shape[2:]
    r = sinusoids(torch.arange(L - 1, -1, -1, device=q.device), layer.position.weight.shape[1])
    position_keys = F.linear(r, layer.position.weight.float()).view(L, -1, h).transpose(0, 1)
    position_keys = of_each_head(position_keys, q.shape[1], dim=0)
    for_content = for_position = q
    if isinstance(layer, DenseAttention):
        for_content, for_position = q + layer.content_bias[:, None], q + layer.position_bias[:, None]
    scale = h**-0.5 if isinstance(layer, SwitchHeadAttention) else layer.scale.float()
    return scale * (for_content @ k.transpose(2, 3) + relative_shift(for_position @ position_keys.transpose(1, 2)))


def _dense(layer: DenseAttention, context: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """-> queries [B, T, H, h] and keys [B, L, K, h], not yet rotated."""
    h = layer.config.head_dim
    return layer.query(context[:, -T:]).unflatten(2, (-1, h)), layer.key(context).unflatten(2, (-1, h))


def _projected(layer: SwitchHeadAttention, projection: Projection, x: Tensor) -> Tensor:
    """x [B, n, d] -> [B, n, H, h], by a dense map or by chosen experts."""
    shape = (*x.shape[:2], layer.num_heads, layer.config.head_dim)
    if projection not in layer.config.expert_projections:
        dense: nn.Linear = getattr(layer, projection)
        return dense(x).view(shape)
    owner = layer.config.selector_of(projection)
    router = next(router for router in routers_of(layer) if router.name == owner)
    choice = routing_of(layer, router, x.flatten(0, 1)).choice
    experts = layer.get_parameter(f"{projection}_experts")
    return switchhead_value(x.flatten(0, 1), choice, experts, backend=layer.backends.switchhead_value).view(shape)


def _moa(layer: MoAAttention, context: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """-> queries [B, T, k, h] of the chosen experts, and the shared keys [B, L, 1, h]."""
    (router,), tokens = routers_of(layer), context[:, -T:].flatten(0, 1)
    routing, backend = routing_of(layer, router, tokens), layer.backends.expert_linear
    order, load = group_choices(routing.index, layer.config.num_experts, backend=backend)
    choice = Choice(routing.scores[:, 0], routing.index[:, 0], order[0], load[0])
    q = expert_linear(tokens, choice, layer.query_experts, backend=backend)
    return q.view(len(context), T, router.active, layer.config.head_dim), layer.key(context)[:, :, None]
