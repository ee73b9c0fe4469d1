"""What a model is: every setting of the architecture, in the terms of the SwitchHead and sigma-MoE papers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every configuration section: frozen, unknown keys refused, docstrings under the fields feed `--help`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def _check_active(active_experts: int, num_experts: int) -> None:
    if active_experts > num_experts:
        raise ValueError(
            f"active_experts is {active_experts} but there are only num_experts = {num_experts} to choose from; "
            f"set active_experts to at most {num_experts}"
        )


class RopeConfig(Section):
    """Rotary position embedding on queries and keys."""

    type: Literal["rope"] = "rope"
    """Kind of position information."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of head_dim that is rotated: int(fraction * head_dim), rounded down to even (41 -> 20, 76 -> 38)."""
    base: Annotated[float, Field(gt=1.0)] = 10000.0
    """Base of the geometric progression of wavelengths, in tokens."""


class SwitchHeadConfig(Section):
    """SwitchHead attention (NeurIPS 2024): few attention matrices, experts in the value and output projections."""

    type: Literal["switchhead"] = "switchhead"
    """Kind of attention."""
    num_heads: PositiveInt = 4
    """Attention matrices computed per layer (H)."""
    head_dim: PositiveInt = 64
    """Width of a query, key and value vector (h)."""
    num_experts: PositiveInt = 4
    """Value experts and output experts of each head (E). 1 is a dense head with a sigmoid gate."""
    active_experts: PositiveInt = 2
    """Experts chosen per token and head, separately for values and for outputs (k)."""
    expert_dropout: Probability = 0.0
    """Probability that an expert may not be chosen by a token; the weight of a chosen expert is never altered."""

    @model_validator(mode="after")
    def _active_within_experts(self) -> SwitchHeadConfig:
        _check_active(self.active_experts, self.num_experts)
        return self


class DenseAttentionConfig(Section):
    """Multi-head attention without experts: the baseline."""

    type: Literal["dense"] = "dense"
    """Kind of attention."""
    num_heads: PositiveInt = 8
    """Attention heads per layer (H)."""
    head_dim: PositiveInt = 64
    """Width of a query, key and value vector (h)."""


class SigmaMoEConfig(Section):
    """sigma-MoE feed-forward (arXiv 2310.10837): y = sum over the k chosen experts of s_e ReLU(x W_1[e]) W_2[e]."""

    type: Literal["sigma_moe"] = "sigma_moe"
    """Kind of feed-forward layer."""
    num_experts: PositiveInt = 16
    """Experts per layer (N_E)."""
    expert_size: PositiveInt = 128
    """Hidden width of one expert (G)."""
    active_experts: PositiveInt = 4
    """Experts chosen per token (k)."""
    expert_dropout: Probability = 0.0
    """Probability that an expert's score becomes 0 for a token, for choosing and for weighting."""
    entropy_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """gamma: the loss gains gamma * sum_e p_e log p_e per layer, p being the mean routing distribution over a batch."""
    entropy_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Batch whose mean p the regulariser uses: `global_batch` takes the previous step's p as a constant coefficient
    (the same in every layout); `micro_batch`, as published, takes p over one micro-step on all data-parallel ranks."""

    @model_validator(mode="after")
    def _active_within_experts(self) -> SigmaMoEConfig:
        _check_active(self.active_experts, self.num_experts)
        return self


class DenseFeedForwardConfig(Section):
    """Two linear layers with biases and a ReLU between them: the baseline."""

    type: Literal["dense"] = "dense"
    """Kind of feed-forward layer."""
    hidden_size: PositiveInt = 512
    """Width of the hidden layer (d_ff)."""


AttentionConfig = Annotated[SwitchHeadConfig | DenseAttentionConfig, Field(discriminator="type")]
FeedForwardConfig = Annotated[SigmaMoEConfig | DenseFeedForwardConfig, Field(discriminator="type")]


class ModelConfig(Section):
    """The language model: embedding, pre-LN blocks of attention and feed-forward, final LayerNorm, output layer."""

    d_model: PositiveInt
    """Width of the residual stream (d)."""
    num_layers: PositiveInt
    """Blocks (L)."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Rows of the embedding and of the output layer: the tokenizer's size, or more (rounded up, the rest unused)."""
    sequence_length: PositiveInt
    """Tokens of context in training and evaluation (T)."""
    attention: AttentionConfig = SwitchHeadConfig()
    """Attention layer: `type` is switchhead or dense."""
    position: RopeConfig = RopeConfig()
    """Position information inside attention."""
    feedforward: FeedForwardConfig = SigmaMoEConfig()
    """Feed-forward layer: `type` is sigma_moe or dense."""
    dropout: Probability = 0.0
    """Dropout on the embedding output, after attention, after the feed-forward, inside a dense feed-forward, and
    before the output layer."""
