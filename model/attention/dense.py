"""Multi-head attention without experts: the dense baseline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.rope import apply_rope, rope_tables
from model.config import DenseAttentionConfig, ModelConfig


class DenseAttention(nn.Module):
    """Causal multi-head attention, no biases. [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert isinstance(config.attention, DenseAttentionConfig)
        self.config = config.attention
        self.position = config.position
        width = self.config.num_heads * self.config.head_dim
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor, sequence_index: Tensor) -> Tensor:
        """`x` [B, T, d] is the layer-normed block input; `sequence_index` [B] is unused: nothing here is random."""
        B, T, _ = x.shape
        heads = (B, T, self.config.num_heads, self.config.head_dim)
        q, k, v = (layer(x).view(heads) for layer in (self.query, self.key, self.value))
        cos, sin = rope_tables(torch.arange(T, device=x.device), self.config.head_dim, self.position)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(B, T, -1))
