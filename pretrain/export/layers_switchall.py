"""Attention and feed-forward layers of SwitchAll models, without transformers. Exported models carry this file.

Letters of shapes: B batch, T new tokens, L keys (tokens of the cache and new ones), d hidden_size, H heads, K heads
of keys and values (H or a divisor), h head_dim, E experts, k chosen experts, N = B T. Parameters have the names of the
model that was exported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

XL_BASE = 10000.0
"""Base of the geometric progression of the wavelengths of Transformer-XL's sinusoids."""


class Places:
    """Where the T new tokens stand: after `seen` tokens of the cache. The same in every layer of a forward pass."""

    def __init__(
        self,
        config: Any,
        seen: int,
        num_tokens: int,
        device: torch.device,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> None:
        """`attention_mask` [B, seen + T]: 0 where a token is padding. `position_ids` [B, T] replace what rotary
        positions would count. `ends` [B, seen + T] bool: which tokens end a document. Behind one nothing up to it is
        seen, and positions begin again."""
        self.num_tokens, self.seen, self.config = num_tokens, seen, config
        every = torch.arange(seen + num_tokens, device=device)[None]  # [1 or B, seen + T]: position among real tokens
        self._real = None if attention_mask is None else attention_mask.to(device) != 0
        self._positions = every if self._real is None else (self._real.long().cumsum(-1) - 1).clamp_min(0)
        self._index = every
        self._documents: Tensor | None = None
        self.new_ends: Tensor | None = None
        """[B, T] bool, kept with the keys of the first layer: all that a cache must know of documents."""
        if ends is not None:
            ends = ends if self._real is None else ends & self._real
            self.new_ends = ends[:, seen:]
            self._documents = ends.long().cumsum(-1) - ends.long()
            before = torch.where(ends, self._positions + 1, 0).cummax(-1).values  # tokens of this and former documents
            self._positions = self._positions - F.pad(before[:, :-1], (1, 0))
        positions = self._positions[:, seen:] if position_ids is None else position_ids
        self.rope = rope_tables(positions, config) if config.position["type"] == "rope" else None
        self._mask: Tensor | None = None

    def visible_keys(self, L: int) -> int:
        """How many of the last L keys some query may see."""
        chunk, memory = self.config.sequence_length, self.config.memory_length
        return min(L, memory + chunk - 1 + self.num_tokens) if memory else L

    def mask(self, L: int) -> Tensor | None:
        """[B or 1, 1, T, L] bool: which of the keys, the last L tokens, each query may see. None where a query sees all
        keys up to itself, and T = L or T = 1."""
        T = self.num_tokens
        is_plain = self._real is None and self._documents is None and not self.config.memory_length
        if is_plain and T in (1, L):
            return None
        if self._mask is None or self._mask.shape[-1] != L:
            queries, keys = slice(self.seen, None), slice(self.seen + T - L, None)
            index = self._index
            seen = index[:, None, keys] <= index[:, queries, None]
            if self._real is not None:
                seen = seen & self._real[:, None, keys]
            if self._documents is not None:
                seen = seen & (self._documents[:, None, keys] == self._documents[:, queries, None])
            if self.config.memory_length:
                chunk, places = self.config.sequence_length, self._positions
                first = places[:, queries] // chunk * chunk - self.config.memory_length
                seen = seen & (places[:, None, keys] >= first[:, :, None])
            # Padding sees itself, for a softmax of nothing is no number.
            seen = seen | (index[:, None, keys] == index[:, queries, None])
            self._mask = seen[:, None]
        return self._mask


def rope_tables(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B or 1, 1, T, n / 2] fp32 of `positions` [B or 1, T]: n of head_dim dimensions are rotated.

    The angle is rounded to fp32 as in training. With memory, where positions grow without end, it is not.
    """
    width = int(config.position["fraction"] * config.head_dim) // 2 * 2
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, width, 2, dtype=wide, device=positions.device) / max(width, 1)
    angles = (positions.to(wide)[..., None] * config.position["base"] ** -exponent)[:, None]
    if not config.memory_length:
        angles = angles.float()
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first n dimensions of `x` [B, H, T, h] (arXiv 2104.09864): dimension i pairs with i + n / 2."""
    cos, sin = (table.to(x.device) for table in tables)
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[..., 2 * half :]], dim=-1)


def gates_of(x: Tensor, selector: Tensor, k: int, dropout: float, *, zeroed: bool = False) -> tuple[Tensor, Tensor]:
    """`x` [..., d], `selector` [R, E, d] of R routers -> gates [..., R, E] fp32, the sigmoid of the k best experts'
    logits and 0 for the others, and the index [..., R, k] of these, best first, of equal ones the lowest.

    `dropout`: probability that an expert may not be chosen; with `zeroed` its gate is 0 instead (sigma-MoE)."""
    scores = torch.sigmoid(torch.einsum("...d,red->...re", x.float(), selector.float()))
    preferred = scores
    if dropout:
        keep = torch.rand_like(scores) >= dropout
        scores = scores * keep if zeroed else scores
        preferred = scores if zeroed else scores.masked_fill(~keep, -1.0)
    index = preferred.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index)), index


def attend(
    q: Tensor, k: Tensor, v: Tensor, places: Places, *, scale: float, bias: Tensor | None, eager: bool
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of `q` [B, H, T, h] over `k` and `v` [B, K, L, h]; `bias` [B, H, T, L] is added to the scaled
    logits. -> [B, H, T, h], and with `eager` the weights [B, H, T, L]."""
    mask = places.mask(k.shape[2])
    mask = None if mask is None else mask.to(q.device)
    k, v = (of_each_head(t, q.shape[1], 1) for t in (k, v))
    if not eager:
        if k.shape[1] != q.shape[1]:
            # Copied: expanded, a new token's heads get the masks of other rows on GPUs (torch's issue 191937, of 2.12).
            k, v = (t.repeat_interleave(q.shape[1], 1) for t in (k, v))
        is_causal = mask is None and q.shape[2] > 1
        if bias is not None:
            mask, is_causal = _causal(bias, mask), False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale), None
    logits = (q * scale) @ k.transpose(2, 3)
    logits = _causal(logits if bias is None else logits + bias, mask)
    weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v, weights


def of_each_head(keys: Tensor, num_heads: int, dim: int) -> Tensor:
    """Keys or values of K heads along `dim`, each repeated for its H / K of H = `num_heads`; of one head as it is."""
    heads = keys.shape[dim]
    return keys if heads in (1, num_heads) else keys.repeat_interleave(num_heads // heads, dim)


def _causal(logits: Tensor, mask: Tensor | None) -> Tensor:
    """`logits` [B, H, T, L], minus infinity where `mask`, or causality without one, hides the key."""
    T, L = logits.shape[-2:]
    if mask is None:
        mask = torch.ones(T, L, dtype=torch.bool, device=logits.device).tril(L - T)
    return logits.masked_fill(~mask, -math.inf)


def with_ends(k: Tensor, ends: Tensor) -> Tensor:
    """Keys [B, H, T, h] -> [B, H, T, h + 1]: the last column is 1 where a token ends a document (`ends` [B, T]). So
    whatever a cache does to rows and tokens, as for beams, it does to these."""
    column = ends.to(k)[:, None, :, None].expand(-1, k.shape[1], -1, -1)
    return torch.cat([k, column], dim=-1)


def relative_shift(x: Tensor) -> Tensor:
    """out[..., i, j] = x[..., i, j + T - 1 - i] for `x` [..., T, L]; meaningless for keys after the query."""
    T, L = x.shape[-2:]
    padded = F.pad(x, (1, 0)).reshape(*x.shape[:-2], (L + 1) * T)
    return padded[..., T:].view(x.shape)


class PositionKeys(nn.Module):
    """Transformer-XL's keys of distances: W_pos r(distance), r sinusoids of width d. No nn.Linear, for it takes no
    tensor: what adapts or quantizes every nn.Linear must leave it alone."""

    def __init__(self, d: int, width: int, h: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, d))
        self._d, self._h = d, h

    def forward(self, L: int) -> Tensor:
        """[K, L, h] of the distances L - 1 down to 0."""
        device, d = self.weight.device, self._d
        wide = torch.float32 if device.type == "mps" else torch.float64
        exponent = torch.arange(0, d, 2, dtype=wide, device=device) / d
        angles = torch.arange(L - 1, -1, -1, device=device).to(wide)[:, None] * XL_BASE**-exponent
        r = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :d].float()
        return F.linear(r.to(self.weight.dtype), self.weight).view(L, -1, self._h).transpose(0, 1)


class Attention(nn.Module):
    """What the three kinds of attention share: rotary or relative positions, the cache, the softmax."""

    position: PositionKeys

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.H, self.h, self.d = config.num_attention_heads, config.head_dim, config.hidden_size
        self.has_rope = config.position["type"] == "rope"
        self.scale: nn.Parameter | float = self.h**-0.5

    def add_positions(self, heads: int, *, learned_scale: bool = False, biases: bool = False) -> None:
        """Makes what relative positions need, with keys of distances for `heads` heads."""
        if self.has_rope:
            return
        self.position = PositionKeys(self.d, heads * self.h, self.h)
        if learned_scale:
            self.scale = nn.Parameter(torch.empty(1))
        if biases:
            self.content_bias = nn.Parameter(torch.empty(self.H, self.h))
            self.position_bias = nn.Parameter(torch.empty(self.H, self.h))

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, places: Places, cache: Any, eager: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`q` [B, T, H, h], `k` and `v` [B, T, K, h] of the new tokens -> [B, T, H, h], and with `eager` the
        weights [B, H, T, L]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if places.rope is not None:
            q, k = rotate(q, places.rope), rotate(k, places.rope)
        if cache is not None:
            ends = places.new_ends if self.layer == 0 else None
            k, v = cache.update(k if ends is None else with_ends(k, ends), v, self.layer)
            k = k if ends is None else k[..., : self.h].contiguous()
        L = places.visible_keys(k.shape[2])
        k, v = k[:, :, k.shape[2] - L :], v[:, :, v.shape[2] - L :]
        if places.rope is not None:
            mixed, weights = attend(q, k, v, places, scale=self.h**-0.5, bias=None, eager=eager)
        else:
            content, position = getattr(self, "content_bias", None), getattr(self, "position_bias", None)
            for_content = (q if content is None else q + content[:, None]) * self.scale
            for_position = (q if position is None else q + position[:, None]) * self.scale
            distances = of_each_head(self._position_keys(L, cache), self.H, 0)
            bias = relative_shift(for_position @ distances.transpose(1, 2))
            mixed, weights = attend(for_content, k, v, places, scale=1.0, bias=bias, eager=eager)
        return mixed.transpose(1, 2), weights

    def _position_keys(self, L: int, cache: Any) -> Tensor:
        """Of `position`. In generation they are computed once for all steps, and kept with the cache: as its keys they
        are those of the weights of now."""
        if cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.position(L)
        kept: dict[int, Tensor] = vars(cache).setdefault("_position_keys", {})
        if self.layer not in kept or kept[self.layer].shape[1] < L:
            kept[self.layer] = self.position(1 << (L - 1).bit_length())
        keys = kept[self.layer]
        return keys[:, keys.shape[1] - L :]


class DenseAttention(Attention):
    """Multi-head attention, whose heads may share keys, values and keys of distances in K groups; with relative
    positions it has the biases u and v and a learned scale of the logits."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        width, K = self.H * self.h, config.num_key_value_heads
        self.query = nn.Linear(self.d, width, bias=False)
        self.key, self.value = (nn.Linear(self.d, K * self.h, bias=False) for _ in range(2))
        self.output = nn.Linear(width, self.d, bias=False)
        self.add_positions(K, learned_scale=True, biases=True)

    def forward(self, x: Tensor, places: Places, cache: Any, eager: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = (layer(x).unflatten(2, (-1, self.h)) for layer in (self.query, self.key, self.value))
        mixed, weights = self.mix(q, k, v, places, cache, eager)
        return self.output(mixed.flatten(2)), weights


class SwitchHeadAttention(Attention):
    """For each token and head k of E experts in each projection that has them. Every expert computes every token, and
    gates of the others are 0: E / k times the arithmetic of these projections, in large products of fixed shapes."""

    output: nn.Linear
    output_experts: nn.Parameter

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        section, width = config.attention, self.H * self.h
        self.E, self.k, self.dropout = section["num_experts"], section["active_experts"], section["expert_dropout"]
        experts = section["expert_projections"]
        self.selector_of = {name: _selector_of(name, experts, section["selection"]) for name in experts}
        for name in ("query", "key", "value", "output"):
            if name in experts:
                shape = (self.h, self.d) if name == "output" else (self.d, self.h)
                self.register_parameter(f"{name}_experts", nn.Parameter(torch.empty(self.H, self.E, *shape)))
            elif name == "output":
                self.output = nn.Linear(width, self.d, bias=False)
            else:
                setattr(self, name, nn.Linear(self.d, width, bias=False))
        for owner in sorted(set(self.selector_of.values())):
            self.register_parameter(f"{owner}_selector", nn.Parameter(torch.empty(self.H, self.E, self.d)))
        self.add_positions(self.H)

    def forward(self, x: Tensor, places: Places, cache: Any, eager: bool) -> tuple[Tensor, Tensor | None]:
        dropout, gates = self.dropout if self.training else 0.0, {}
        for owner in sorted(set(self.selector_of.values())):
            chosen, _ = gates_of(x, getattr(self, f"{owner}_selector"), self.k, dropout)
            gates[owner] = chosen.to(x.dtype)  # [B, T, H, E]
        q, k, v = (self._project(name, x, gates) for name in ("query", "key", "value"))
        mixed, weights = self.mix(q, k, v, places, cache, eager)
        if "output" not in self.selector_of:
            return self.output(mixed.flatten(2)), weights
        gated = gates[self.selector_of["output"]][..., None] * mixed[..., None, :]  # [B, T, H, E, h]
        return gated.flatten(2) @ self.output_experts.flatten(0, 2), weights

    def _project(self, name: str, x: Tensor, gates: dict[str, Tensor]) -> Tensor:
        """[B, T, d] -> [B, T, H, h]."""
        if name not in self.selector_of:
            return getattr(self, name)(x).view(*x.shape[:2], self.H, self.h)
        products = torch.einsum("btd,xedh->btxeh", x, getattr(self, f"{name}_experts"))
        return torch.einsum("btxeh,btxe->btxh", products, gates[self.selector_of[name]])


def _selector_of(name: str, experts: list[str], selection: str) -> str:
    """The projection whose selector chooses for the expert projection `name`."""
    if selection == "projection":
        return name
    order: tuple[str, ...] = ("output", "value", "query", "key")
    if selection == "side":
        order = ("value", "key") if name in ("key", "value") else ("output", "query")
    return next(owner for owner in order if owner in experts)


class MoAAttention(Attention):
    """Mixture of Attention Heads: each token attends with its k chosen experts; keys and values are shared."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        section, E = config.attention, config.attention["num_experts"]
        self.is_softmax, self.dropout = section["router"] == "softmax", section["expert_dropout"]
        self.selector = nn.Parameter(torch.empty(E, self.d))
        self.query_experts = nn.Parameter(torch.empty(E, self.d, self.h))
        self.output_experts = nn.Parameter(torch.empty(E, self.h, self.d))
        self.key, self.value = (nn.Linear(self.d, self.h, bias=False) for _ in range(2))
        self.add_positions(1, learned_scale=True)

    def forward(self, x: Tensor, places: Places, cache: Any, eager: bool) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        gates, index = gates_of(x, self.selector[None], self.H, dropout)
        gates, index = gates[:, :, 0], index[:, :, 0]  # [B, T, E], [B, T, k]
        if self.is_softmax:
            gates = torch.einsum("btd,ed->bte", x.float(), self.selector.float()).softmax(-1)
        chosen = gates.gather(-1, index).to(x.dtype)
        wide = index[..., None].expand(-1, -1, -1, self.h)  # [B, T, k, h]
        q = torch.einsum("btd,edh->bteh", x, self.query_experts).gather(2, wide)
        k, v = (layer(x)[:, :, None] for layer in (self.key, self.value))
        mixed, weights = self.mix(q, k, v, places, cache, eager)
        gated = chosen[..., None] * mixed
        by_expert = gated.new_zeros(*x.shape[:2], len(self.selector), self.h).scatter(2, wide, gated)
        return by_expert.flatten(2) @ self.output_experts.flatten(0, 1), weights


class SigmaMoE(nn.Module):
    """y = sum over the k chosen experts e of s_e a(x W_1[e]) W_2[e], s = sigmoid(x W_S), a ReLU or SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        section, d = config.feedforward, config.hidden_size
        E, G = section["num_experts"], section["expert_size"]
        self.k, self.dropout = section["active_experts"], section["expert_dropout"]
        self.is_swiglu = section["activation"] == "swiglu"
        self.router = nn.Parameter(torch.empty(E, d))
        self.up_experts = nn.Parameter(torch.empty(E, d, 2 * G if self.is_swiglu else G))
        self.down_experts = nn.Parameter(torch.empty(E, G, d))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        dropout = self.dropout if self.training else 0.0
        gates, index = gates_of(tokens, self.router[None], self.k, dropout, zeroed=True)
        gates, index = gates[:, 0].to(x.dtype), index[:, 0]  # [N, E], [N, k]
        if torch.compiler.is_compiling():  # E / k times the arithmetic, but shapes that a compiler knows
            hidden = self._activate(torch.einsum("nd,edw->new", tokens, self.up_experts))
            return torch.einsum("neg,egd->nd", hidden * gates[..., None], self.down_experts).view_as(x)
        y = torch.zeros_like(tokens, dtype=torch.float32)
        chosen = index.flatten()
        order, load = chosen.sort(stable=True).indices, torch.bincount(chosen, minlength=len(self.router))
        for expert, slots in enumerate(order.split(load.tolist())):
            if len(slots):
                rows = slots // self.k
                hidden = self._activate(tokens[rows] @ self.up_experts[expert])
                y.index_add_(0, rows, ((hidden * gates[rows, expert, None]) @ self.down_experts[expert]).float())
        return y.to(x.dtype).view_as(x)

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.is_swiglu:
            return F.relu(hidden)
        gate, linear = hidden.chunk(2, dim=-1)
        return F.silu(gate) * linear


class DenseFeedForward(nn.Module):
    """y = ReLU(x W_1 + b_1) W_2 + b_2, or without biases y = (SiLU(x W_gate) * x W_up) W_down."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.is_swiglu = config.feedforward["hidden_size"], config.feedforward["type"] == "swiglu"
        if self.is_swiglu:
            self.gate = nn.Linear(config.hidden_size, width, bias=False)
        self.up = nn.Linear(config.hidden_size, width, bias=not self.is_swiglu)
        self.down = nn.Linear(width, config.hidden_size, bias=not self.is_swiglu)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.gate(x)) * self.up(x) if self.is_swiglu else F.relu(self.up(x))
        return self.down(F.dropout(hidden, self.dropout, self.training))


ATTENTIONS: dict[str, type[Attention]] = {
    "switchhead": SwitchHeadAttention,
    "moa": MoAAttention,
    "dense": DenseAttention,
}
FEEDFORWARDS: dict[str, type[nn.Module]] = {
    "sigma_moe": SigmaMoE,
    "swiglu": DenseFeedForward,
    "dense": DenseFeedForward,
}
