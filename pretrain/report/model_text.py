"""A model in one line and its parameters, from its configuration: what is printed at start is what is trained."""

from __future__ import annotations

from model.config import (
    DenseAttentionConfig,
    DenseFeedForwardConfig,
    MoAConfig,
    ModelConfig,
    RopeConfig,
    SigmaMoEConfig,
)
from model.language_model import build_on_meta
from model.parameters import ParameterCount, count_parameters


def model_family(model: ModelConfig) -> str:
    """The name that the papers give to this combination of layers."""
    has_experts = isinstance(model.feedforward, SigmaMoEConfig)
    if isinstance(model.attention, DenseAttentionConfig):
        return "sigma-MoE" if has_experts else "dense"
    attention = "MoA" if isinstance(model.attention, MoAConfig) else "SwitchHead"
    if not has_experts:
        return attention
    return "SwitchAll" if attention == "SwitchHead" else f"{attention} with sigma-MoE"


def model_text(model: ModelConfig) -> str:
    """Layers with their sizes, e.g. `4 x (SwitchHead: 4 heads of 32, 2 of 4 experts; sigma-MoE: 4 of 16 experts of
    64), d_model 128, RoPE, 128 tokens of context`."""
    attention, feedforward = model.attention, model.feedforward
    if isinstance(attention, DenseAttentionConfig):
        first = f"dense attention: {attention.num_heads} heads of {attention.head_dim}"
    elif isinstance(attention, MoAConfig):
        first = f"MoA: {attention.num_heads} of {attention.num_experts} heads of {attention.head_dim}"
    else:
        chosen = f"{attention.active_experts} of {attention.num_experts} experts"
        first = f"SwitchHead: {attention.num_heads} heads of {attention.head_dim}, {chosen}"
    if isinstance(feedforward, SigmaMoEConfig):
        chosen = f"{feedforward.active_experts} of {feedforward.num_experts} experts"
        kind = "" if feedforward.activation == "relu" else " SwiGLU"
        second = f"sigma-MoE: {chosen} of {feedforward.expert_size}{kind}"
    else:
        kind = "dense" if isinstance(feedforward, DenseFeedForwardConfig) else "SwiGLU"
        second = f"{kind} feed-forward: {feedforward.hidden_size}"
    position = "RoPE" if isinstance(model.position, RopeConfig) else "Transformer-XL positions"
    memory = f" and {model.memory_length} of memory" if model.memory_length else ""
    return (
        f"{model.num_layers} x ({first}; {second}), d_model {model.d_model}, {position}, "
        f"{model.sequence_length} tokens of context{memory}"
    )


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Total and active parameters, counted on the built model without storage."""
    return count_parameters(build_on_meta(model), model)
