"""What a model costs, in closed form from its configuration: parameters, multiply-accumulates (MACs), memory, FLOPs.

MACs and memory are those of one layer and one sequence of T tokens, forward, causal masking not deducted. Two
conventions (SwitchHead, arXiv 2312.07987, section 3 and appendix):

    published     reproduces every figure in the paper's tables
    equation_13   the paper's own equation: SwitchHead's position term on C T distances instead of T, no selectors

They differ only for SwitchHead: with Transformer-XL memory, 262M on C4, 2.36G and 2.82G, 43.9% and 52.5% of dense
(2.83G and 52.7% with the selectors). Neither is what a forward pass computes: keys and values are counted on T tokens
although C T are projected, a selector once instead of per head, position logits not at all. `model.counted_costs`
counts the built model.

Symbols: d d_model, T sequence_length, C 1 + memory chunks, H heads (attention matrices), K heads of keys and values
(and of keys of distances; H but with num_kv_heads, which the paper has not), h head_dim, E experts,
k active experts, G expert_size, N feed-forward experts, L layers, V vocab_size.

SwitchHead's formula is the paper's for value and output experts. For other `expert_projections` each expert projection
costs k d H h T + k H h T (product and gates) instead of d H h T, and each distinct selector E d T C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Never, NoReturn

from common.errors import UserError
from model.config import (
    DenseAttentionConfig,
    DenseFeedForwardConfig,
    MoAConfig,
    ModelConfig,
    SigmaMoEConfig,
    SwiGLUConfig,
    SwitchHeadConfig,
    XLConfig,
)
from model.parameters import ParameterCount

Convention = Literal["published", "equation_13"]


def check_costs(config: ModelConfig) -> None:
    """Raises UserError where what training asks for is not known of a layer."""
    attention_macs(config)
    feedforward_macs(config)
    training_flops_per_token(config)


def _no_costs(layer: Never) -> NoReturn:
    """mypy finds each call of this that a new kind of layer comes to, for `Never` is none of them; who trains without
    asking it reads this."""
    section: Any = layer
    raise UserError(
        f"model: the costs of layers of type {section.type} are not known; give each function of model/costs.py their "
        f"formula (docs/new-layer.md; `make lint` names those that miss it)"
    )


def attention_macs(config: ModelConfig, convention: Convention = "published") -> int:
    """MACs of one attention layer on one sequence, by the formulas of the paper (appendix on resource usage).

    MoA's is that of the authors' code, which counts two gates per head (query and output). It reproduces the published
    223.5M (47M, H = 4) and 2.9G (262M, H = 8).
    """
    d, T, C, xl = config.d_model, config.sequence_length, _context_factor(config), _has_xl(config)
    attention = config.attention
    H, h = attention.num_heads, attention.head_dim
    matrices = 2 * H * h * T * T * C  # logits and weighted sum
    if isinstance(attention, DenseAttentionConfig):
        K = attention.key_heads
        return matrices + 2 * d * (H + K) * h * T + xl * 2 * K * d * T * h * C
    if isinstance(attention, MoAConfig):
        E = attention.num_experts
        # Query and output per head, one key and one value; the gates of a head's query and output.
        return matrices + (2 * H + 2) * d * h * T + 2 * H * T * h + E * d * T + xl * 2 * d * T * h * C
    if not isinstance(attention, SwitchHeadConfig):
        _no_costs(attention)
    E, k, num_expert = attention.num_experts, attention.active_experts, len(attention.expert_projections)
    projections = (num_expert * k + (4 - num_expert)) * d * H * h * T
    gates = num_expert * H * k * T * h
    if convention == "equation_13":
        return matrices + projections + gates + xl * 2 * H * d * T * h * C
    selectors = len(selectors_of(attention)) * E * d * T * C
    return matrices + projections + gates + selectors + xl * 2 * H * d * T * h


def attention_memory(config: ModelConfig) -> int:
    """Floats of activations of one attention layer on one sequence (the published convention; Eq. 13 is about MACs).

    MoA's is that of the authors' code and reproduces the published 1.3M (47M, H = 4) and 9.9M (262M, H = 8). It counts
    the router's scores on C T tokens, the MACs' formula on T.
    """
    T, C, xl = config.sequence_length, _context_factor(config), _has_xl(config)
    attention = config.attention
    H, h = attention.num_heads, attention.head_dim
    matrices = 2 * H * T * T * C  # logits and probabilities
    if isinstance(attention, DenseAttentionConfig):
        K = attention.key_heads
        return matrices + 2 * (H + K) * h * T + xl * 2 * K * T * h * C
    if isinstance(attention, MoAConfig):
        return matrices + (2 * H + 2) * h * T + attention.num_experts * T * C + xl * 2 * T * h
    if not isinstance(attention, SwitchHeadConfig):
        _no_costs(attention)
    selectors = len(selectors_of(attention)) * attention.num_experts * T * C
    return matrices + 4 * H * h * T + selectors + xl * 2 * H * T * h


def cache_floats(config: ModelConfig) -> int:
    """Numbers that a cache of keys and values keeps of one token in all layers (model/cache.py): 2 L K h; K is 1
    with MoA, whose keys and values are shared, and H with SwitchHead."""
    attention = config.attention
    if isinstance(attention, DenseAttentionConfig):
        heads = attention.key_heads
    elif isinstance(attention, MoAConfig | SwitchHeadConfig):
        heads = 1 if isinstance(attention, MoAConfig) else attention.num_heads
    else:
        _no_costs(attention)
    return 2 * config.num_layers * heads * attention.head_dim


def dense_cache_floats(config: ModelConfig) -> int:
    """As `cache_floats`, of dense attention as wide as the model, H h = d: what the paper's dense models have, up to
    rounding."""
    return 2 * config.num_layers * config.d_model


def feedforward_macs(config: ModelConfig) -> int:
    """MACs of one feed-forward layer on one sequence."""
    d, T, feedforward = config.d_model, config.sequence_length, config.feedforward
    if isinstance(feedforward, SigmaMoEConfig):
        active_width = feedforward.active_experts * (feedforward.up_width + feedforward.expert_size)
        return T * d * active_width + T * d * feedforward.num_experts
    if isinstance(feedforward, SwiGLUConfig):
        return 3 * T * d * feedforward.hidden_size
    if isinstance(feedforward, DenseFeedForwardConfig):
        return 2 * T * d * feedforward.hidden_size
    _no_costs(feedforward)


def feedforward_memory(config: ModelConfig) -> int:
    """Floats that the projections inside one feed-forward layer produce for one sequence: ours, by analogy with
    attention's, since none is published. Hidden layer, both branches of SwiGLU, the router's scores."""
    T, feedforward = config.sequence_length, config.feedforward
    if isinstance(feedforward, SigmaMoEConfig):
        return T * (feedforward.active_experts * feedforward.up_width + feedforward.num_experts)
    if isinstance(feedforward, SwiGLUConfig):
        return 2 * T * feedforward.hidden_size
    if isinstance(feedforward, DenseFeedForwardConfig):
        return T * feedforward.hidden_size
    _no_costs(feedforward)


def formula_parameters(config: ModelConfig) -> ParameterCount:
    """Numbers of parameters, total and active per token (expert tensors in the share k / E), without building it."""
    d, L, V = config.d_model, config.num_layers, config.vocab_size
    parts = [_attention_parameters(config), _feedforward_parameters(config)]
    # Embedding, output layer with bias, final LayerNorm; two LayerNorms per block.
    outside = (1 if config.tied_embedding else 2) * V * d + V + 2 * d
    shared = sum(part.matrices + part.vectors for part in parts) + 4 * d
    return ParameterCount(
        total=outside + L * (shared + sum(part.experts for part in parts)),
        active=outside + L * (shared + sum(part.active_experts for part in parts)),
    )


def training_flops_per_token(config: ModelConfig) -> int:
    """6 x active matmul parameters + 6 x (2, or 3 with Transformer-XL) x L H h T C.

    A parameter is one MAC = 2 FLOPs in the forward pass and twice that in the backward pass; the embedding is a lookup,
    biases and LayerNorms are left out. The second term is the attention matrices: logits, weighted sum and, with
    Transformer-XL, position logits, on all T C keys. With a memory W_pos counts as if each token used it once, and the
    memory's keys and values are left out; the two are of about the same size.
    """
    attention = config.attention
    parts = [_attention_parameters(config), _feedforward_parameters(config)]
    parameters = config.vocab_size * config.d_model
    parameters += config.num_layers * sum(part.matrices + part.active_experts for part in parts)
    keys = config.sequence_length * _context_factor(config)
    matrices = (2 + _has_xl(config)) * config.num_layers * attention.num_heads * attention.head_dim * keys
    return 6 * parameters + 6 * matrices


def selectors_of(attention: SwitchHeadConfig) -> list[str]:
    """Names of the distinct selectors: one or more expert projections share each."""
    return sorted({attention.selector_of(projection) for projection in attention.expert_projections})


@dataclass(frozen=True)
class _Parts:
    """Parameters of one layer by how a token uses them."""

    matrices: int
    """Matrices that every token is multiplied with."""
    experts: int = 0
    """All experts."""
    active_experts: int = 0
    """The experts that one token chooses."""
    vectors: int = 0
    """Biases and scales."""


def _attention_parameters(config: ModelConfig) -> _Parts:
    d, xl, attention = config.d_model, _has_xl(config), config.attention
    H, h = attention.num_heads, attention.head_dim
    if isinstance(attention, DenseAttentionConfig):
        # With Transformer-XL also W_pos, content and position bias (u, v), and the scale of the logits.
        K = attention.key_heads
        return _Parts(matrices=(2 * H + (2 + xl) * K) * d * h, vectors=xl * (2 * H * h + 1))
    if isinstance(attention, MoAConfig):
        E = attention.num_experts
        # Query and output experts, one shared key and value (and W_pos), the selector, the scale of the logits.
        return _Parts(
            matrices=(2 + xl) * d * h + E * d, experts=2 * E * d * h, active_experts=2 * H * d * h, vectors=xl * 1
        )
    if not isinstance(attention, SwitchHeadConfig):
        _no_costs(attention)
    E, num_expert = attention.num_experts, len(attention.expert_projections)
    selectors = len(selectors_of(attention)) * H * E * d
    return _Parts(
        matrices=(4 - num_expert + xl) * d * H * h + selectors,
        experts=num_expert * E * d * H * h,
        active_experts=num_expert * attention.active_experts * d * H * h,
    )


def _feedforward_parameters(config: ModelConfig) -> _Parts:
    d, feedforward = config.d_model, config.feedforward
    if isinstance(feedforward, SigmaMoEConfig):
        expert = d * (feedforward.up_width + feedforward.expert_size)
        return _Parts(
            matrices=feedforward.num_experts * d,
            experts=feedforward.num_experts * expert,
            active_experts=feedforward.active_experts * expert,
        )
    if isinstance(feedforward, SwiGLUConfig):
        return _Parts(matrices=3 * d * feedforward.hidden_size)
    if isinstance(feedforward, DenseFeedForwardConfig):
        return _Parts(matrices=2 * d * feedforward.hidden_size, vectors=feedforward.hidden_size + d)
    _no_costs(feedforward)


def _has_xl(config: ModelConfig) -> int:
    """1 with Transformer-XL positions, else 0: the factor of every term that only they have."""
    return int(isinstance(config.position, XLConfig))


def _context_factor(config: ModelConfig) -> int:
    """C = 1 + memory chunks: keys per query, in units of T."""
    return 1 + config.memory_length // config.sequence_length
