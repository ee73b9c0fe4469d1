"""A model in one line and its parameters, from its configuration: what is printed at start is what is trained."""

from __future__ import annotations

from model.config import ModelConfig, RopeConfig
from model.language_model import build_on_meta
from model.parameters import ParameterCount, count_parameters

BASELINES = ("dense attention", "dense feed-forward", "SwiGLU feed-forward")
"""Labels of layers that a family's name leaves out."""


def model_family(model: ModelConfig) -> str:
    """The name that the papers give to this combination of layers."""
    labels = [label for label in (model.attention.label, model.feedforward.label) if label not in BASELINES]
    return "SwitchAll" if labels == ["SwitchHead", "sigma-MoE"] else " with ".join(labels) or "dense"


def model_text(model: ModelConfig) -> str:
    """Layers with their sizes, e.g. `4 x (SwitchHead: 4 heads of 32, 2 of 4 experts; sigma-MoE: 4 of 16 experts of
    64), d_model 128, RoPE, 128 tokens of context`."""
    first, second = (f"{layer.label}: {layer.sizes}" for layer in (model.attention, model.feedforward))
    position = "RoPE" if isinstance(model.position, RopeConfig) else "Transformer-XL positions"
    memory = f" and {model.memory_length} of memory" if model.memory_length else ""
    return (
        f"{model.num_layers} x ({first}; {second}), d_model {model.d_model}, {position}, "
        f"{model.sequence_length} tokens of context{memory}"
    )


def parameter_count(model: ModelConfig) -> ParameterCount:
    """Total and active parameters, counted on the built model without storage."""
    return count_parameters(build_on_meta(model), model)
