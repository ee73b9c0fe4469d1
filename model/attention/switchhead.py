"""SwitchHead attention (arXiv 2312.07987, section 2.2): few heads, experts in the value and output projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.rope import apply_rope, rope_angles
from model.config import ModelConfig, SwitchHeadConfig
from model.dropout import keep_mask, site_key
from model.routing import RoutingStatistics, router_logits, select


class SwitchHeadAttention(nn.Module):
    """H attention matrices; per token and head, k of E value experts and k of E output experts, sigmoid gated.

    v[h] = sum_{e in top-k} s_V[h, e] x W_V[h, e];  y = sum_h sum_{e in top-k} s_O[h, e] a[h] W_O[h, e].
    The value selector looks at the key's token, the output selector at the query's token, both through the
    layer-normed block input. Shape legend: B batch, T tokens, H heads, h head_dim, E experts, d d_model.
    """

    def __init__(self, config: ModelConfig, *, name: str, seed: int) -> None:
        super().__init__()
        assert isinstance(config.attention, SwitchHeadConfig)
        self.config = config.attention
        self.position = config.position
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
        q, k = (layer(x).view(B, T, H, h).transpose(1, 2) for layer in (self.query, self.key))
        angles = rope_angles(torch.arange(T, device=x.device), h, self.position)
        q, k = apply_rope(q, angles), apply_rope(k, angles)

        value_gates = self._gates(x, self.value_selector, self._value_key, self.value_statistics, sequence_index)
        expert_values = torch.einsum("btd,kedh->btkeh", x, self.value_experts)  # [B, T, H, E, h]
        v = (expert_values * value_gates[..., None]).sum(3).transpose(1, 2)  # [B, H, T, h]

        # q and k each carry head_dim^-1/4 in the paper: the default scale of the attention below.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)  # [B, T, H, h]

        output_gates = self._gates(x, self.output_selector, self._output_key, self.output_statistics, sequence_index)
        gated = attended[:, :, :, None, :] * output_gates[..., None]  # [B, T, H, E, h]
        return gated.reshape(B, T, -1) @ self.output_experts.view(-1, d)

    def _gates(
        self, x: Tensor, selector: Tensor, key: int, statistics: RoutingStatistics, sequence_index: Tensor
    ) -> Tensor:
        """Gate of every expert [B, T, H, E] in the dtype of `x`: the sigmoid score if chosen, else 0."""
        H, E, d = selector.shape
        logits = router_logits(x, selector.view(H * E, d)).view(*x.shape[:2], H, E)
        keep = None
        if self.training and self.config.expert_dropout > 0.0:
            keep = keep_mask(
                probability=self.config.expert_dropout,
                key=key,
                sequence_index=sequence_index,
                shape=tuple(logits.shape),
            )
        scores, index = select(logits, self.config.active_experts, keep=keep)
        if self.training:
            statistics.record(index, None)
        return torch.zeros_like(logits).scatter(-1, index, scores).to(x.dtype)
