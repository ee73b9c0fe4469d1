"""SwitchHead attention (arXiv 2312.07987, section 2.2): few heads, experts in the value and output projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.rope import apply_rope, rope_tables
from model.config import ModelConfig, SwitchHeadConfig
from model.dropout import keep_mask, site_key
from model.kernels.choice import Backends
from model.kernels.route import route
from model.kernels.switchhead_output import switchhead_output
from model.kernels.switchhead_value import switchhead_value
from model.routing import RoutingStatistics


class SwitchHeadAttention(nn.Module):
    """H attention matrices; per token and head, k of E value experts and k of E output experts, sigmoid gated.

    v[h] = sum_{e in top-k} s_V[h, e] x W_V[h, e];  y = sum_h sum_{e in top-k} s_O[h, e] a[h] W_O[h, e].
    The value selector looks at the key's token, the output selector at the query's token, both through the
    layer-normed block input. Shape legend: B batch, T tokens, H heads, h head_dim, E experts, d d_model.
    """

    def __init__(self, config: ModelConfig, *, backends: Backends, name: str, seed: int) -> None:
        super().__init__()
        assert isinstance(config.attention, SwitchHeadConfig)
        self.config = config.attention
        self.position = config.position
        self.backends = backends
        H, h, E, d = self.config.num_heads, self.config.head_dim, self.config.num_experts, config.d_model
        self.query = nn.Linear(d, H * h, bias=False)
        self.key = nn.Linear(d, H * h, bias=False)
        self.value_selector = nn.Parameter(torch.empty(H, E, d))
        self.output_selector = nn.Parameter(torch.empty(H, E, d))
        self.value_experts = nn.Parameter(torch.empty(H, E, d, h))
        self.output_experts = nn.Parameter(torch.empty(H, E, h, d))
        self.value_statistics = RoutingStatistics((H, E), tracks_probability=False)
        self.output_statistics = RoutingStatistics((H, E), tracks_probability=False)
        self._value_key = site_key(seed, f"{name}.value_experts")
        self._output_key = site_key(seed, f"{name}.output_experts")

    def forward(self, x: Tensor, sequence_index: Tensor) -> Tensor:
        """`x` [B, T, d]: layer-normed block input; `sequence_index` [B] int64 seeds expert dropout. -> [B, T, d]."""
        B, T, d = x.shape
        H, h = self.config.num_heads, self.config.head_dim
        cos, sin = rope_tables(torch.arange(T, device=x.device), h, self.position)
        q, k = (apply_rope(layer(x).view(B, T, H, h), cos, sin).transpose(1, 2) for layer in (self.query, self.key))

        tokens = x.reshape(B * T, d)
        scores, index = self._select(tokens, sequence_index, T)  # [N, 2H, k]: value routers, then output routers
        v = switchhead_value(tokens, scores[:, :H], index[:, :H], self.value_experts, self.backends.switchhead_value)
        # q and k each carry head_dim^-1/4 in the paper: the default scale of the attention below.
        attended = F.scaled_dot_product_attention(q, k, v.view(B, T, H, h).transpose(1, 2), is_causal=True)
        attended = attended.transpose(1, 2).reshape(B * T, H, h)
        y = switchhead_output(
            attended, scores[:, H:], index[:, H:], self.output_experts, self.backends.switchhead_output
        )
        return y.view(B, T, d)

    def _select(self, tokens: Tensor, sequence_index: Tensor, T: int) -> tuple[Tensor, Tensor]:
        """Scores (fp32) and indices [N, 2H, k] of the chosen value experts and output experts, from one product."""
        H, E, probability = self.config.num_heads, self.config.num_experts, self.config.expert_dropout
        keep = None
        if self.training and probability > 0.0:
            shape = (sequence_index.shape[0], T, H, E)
            masks = [
                keep_mask(probability=probability, key=key, sequence_index=sequence_index, shape=shape)
                for key in (self._value_key, self._output_key)
            ]
            keep = torch.cat(masks, dim=2).flatten(0, 1)
        selectors = torch.cat([self.value_selector, self.output_selector])
        routing = route(tokens, selectors, self.config.active_experts, keep=keep, backend=self.backends.route)
        if self.training:
            self.value_statistics.record(routing.load[:H], None)
            self.output_statistics.record(routing.load[H:], None)
        return routing.scores, routing.index
