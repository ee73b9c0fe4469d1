"""Multi-head attention without experts: the dense baseline, with RoPE or Transformer-XL positions, and with as many
heads of keys and values as queries, or fewer (grouped-query attention, arXiv 2305.13245)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.attention.rope import RopeTables, rotate
from model.attention.xl import Sinusoids, relative_attention
from model.config import DenseAttentionConfig, ModelConfig, RopeConfig, XLConfig
from model.distributions import Constant, dense_layer_weight
from model.documents import Seen, causal_attention
from model.kernels.choice import Backends
from model.linear import region_linear
from model.parallel.collectives import enter_shards
from model.parallel.context import ParallelContext
from model.parallel.overlap import enter_overlapped
from model.parallel.regions import leave_region
from model.parameter_spec import ParameterSpec, Specs


class DenseAttention(nn.Module):
    """Causal multi-head attention, no biases in the projections. With XL positions: biases u and v on the queries
    (initially 0) and a learned scale of the logits (initially 1 / sqrt(head_dim)), as in the paper's baseline.

    Of H heads i attends with keys and values of head i // (H / K) of K. With XL positions a group shares its keys of
    distances too: W_pos has K heads, as that of MoA, whose keys are shared, has one. The biases, which belong to
    queries, are those of each of the H heads."""

    @staticmethod
    def parameter_specs(config: ModelConfig) -> Specs:
        assert isinstance(config.attention, DenseAttentionConfig)
        d, H, h = config.d_model, config.attention.num_heads, config.attention.head_dim
        weight = dense_layer_weight(config, d)
        heads = ParameterSpec(shape=(H * h, d), divided=0, experts=None, decayed=True, initial=weight)
        key_heads = replace(heads, shape=(config.attention.key_heads * h, d))
        output = dense_layer_weight(config, H * h)
        specs = {
            "query.weight": heads,
            "key.weight": key_heads,
            "value.weight": key_heads,
            "output.weight": ParameterSpec(shape=(d, H * h), divided=1, experts=None, decayed=True, initial=output),
        }
        if isinstance(config.position, XLConfig):
            bias = ParameterSpec(shape=(H, h), divided=0, experts=None, decayed=False, initial=Constant(0.0))
            scale = Constant(h**-0.5)
            specs |= {
                "position.weight": key_heads,
                "content_bias": bias,
                "position_bias": bias,
                "scale": ParameterSpec(shape=(1,), divided=None, experts=None, decayed=False, initial=scale),
            }
        return specs

    def __init__(
        self, config: ModelConfig, *, parallel: ParallelContext, backends: Backends, name: str, seed: int
    ) -> None:
        """`name` and `seed`, which every layer is given, are unused: nothing is random here."""
        super().__init__()
        assert isinstance(config.attention, DenseAttentionConfig)
        self.config = config.attention
        position = config.position
        self.rope = RopeTables(self.config.head_dim, position) if isinstance(position, RopeConfig) else None
        self.sinusoids = Sinusoids()
        self.parallel = parallel
        self.backends = backends
        self.num_heads = self.parallel.share(self.config.num_heads)
        self.key_heads = self.parallel.share(self.config.key_heads)
        H, K, h = self.num_heads, self.key_heads, self.config.head_dim
        self.query = nn.Linear(config.d_model, H * h, bias=False)
        self.key = nn.Linear(config.d_model, K * h, bias=False)
        self.value = nn.Linear(config.d_model, K * h, bias=False)
        self.output = nn.Linear(H * h, config.d_model, bias=False)
        if isinstance(config.position, XLConfig):
            self.position = nn.Linear(config.d_model, K * h, bias=False)
            self.content_bias = nn.Parameter(torch.empty(H, h))
            self.position_bias = nn.Parameter(torch.empty(H, h))
            self.scale = nn.Parameter(torch.empty(1))

    def forward(
        self, context: Tensor, num_queries: int, sequence_index: Tensor, documents: Seen | None = None
    ) -> tuple[Tensor, None]:
        """`context` [B, M + T, d]: layer-normed block input, memory first; the last `num_queries` = T are the chunk
        (with sequence parallelism this rank's tokens of each). `sequence_index` [B] is unused: nothing here is random.
        -> [B, T, d] like the chunk, and no auxiliary loss."""
        maps = ((layer.weight,) for layer in (self.query, self.key, self.value))
        context, _, (query, key, value) = enter_overlapped(context, self.parallel, *maps, chunk=num_queries)
        (B, L, _), T = context.shape, num_queries * self.parallel.token_shards
        H, K, h = self.num_heads, self.key_heads, self.config.head_dim
        q = region_linear(context[:, L - T :], query).view(B, T, H, h)
        k, v = (region_linear(context, late).view(B, L, K, h) for late in (key, value))
        if self.rope is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            scale = enter_shards(self.scale, self.parallel.tensor_group)
            attended = relative_attention(
                *(q, k, v, self.position.weight, self.sinusoids),
                scale=scale,
                backend=self.backends.relative_attention,
                content_bias=self.content_bias,
                position_bias=self.position_bias,
                seen=documents,
            )
        else:
            tables = self.rope(documents, L, context.device)
            q, k = rotate(q, k, tables, backend=self.backends.elementwise)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            backend = self.backends.causal_attention
            attended = causal_attention(q, k, v, documents, backend=backend, shared=K < H)
        return leave_region(self.output(attended.transpose(1, 2).reshape(B, T, H * h)), self.parallel), None
