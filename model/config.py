"""What a model is: every setting of the architecture, in the terms of the SwitchHead and sigma-MoE papers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from common.json_config import Section
from model.layer_section import Lacks, LayerSection, Routers

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
# Far above every published model, but low enough that no tensor of a model has 2**63 bytes.
Width = Annotated[int, Field(ge=1, le=2**20)]
Experts = Annotated[int, Field(ge=1, le=2**16)]
Heads = Annotated[int, Field(ge=1, le=2**12)]
HeadDim = Annotated[int, Field(ge=1, le=2**12)]
HeadExperts = Annotated[int, Field(ge=1, le=2**12)]


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
    memory_chunks: Annotated[int, Field(ge=0, le=2**10)] = 0
    """Number of earlier chunks of sequence_length tokens that keys and values also come from, as with `type` xl;
    positions count from the first token of the memory."""


class XLConfig(Section):
    """Transformer-XL (arXiv 1901.02860): relative positions, and the previous chunks' layer inputs as extra context.

    The logit of query i and key j gains q_i . W_pos r(i - j), where r are sinusoids of width d_model. The dense
    baseline also has the biases u and v and a learned scale on the logits; SwitchHead has neither; MoA has the learned
    scale.
    """

    type: Literal["xl"] = "xl"
    """Kind of position information."""
    memory_chunks: Annotated[int, Field(ge=0, le=2**10)] = 1
    """Number of earlier chunks of sequence_length tokens that keys and values also come from (C - 1), without a
    gradient. 1 or more trains on contiguous streams of text; 0 is relative positions alone."""


Projection = Literal["query", "key", "value", "output"]


class SwitchHeadConfig(LayerSection):
    """SwitchHead attention (NeurIPS 2024): few attention matrices, experts in the value and output projections."""

    label = "SwitchHead"
    lacks: ClassVar[Lacks] = {}
    divided: ClassVar[tuple[str, ...]] = ("num_heads",)
    type: Literal["switchhead"] = "switchhead"
    """Kind of attention."""
    num_heads: Heads = 4
    """Attention matrices computed per layer (H)."""
    head_dim: HeadDim = 64
    """Width of a query, key and value vector (h)."""
    num_experts: HeadExperts = 4
    """Value experts and output experts of each head (E). 1 is a dense head with a sigmoid gate."""
    active_experts: HeadExperts = 2
    """Experts chosen per token and head, separately for values and for outputs (k)."""
    expert_projections: tuple[Projection, ...] = Field(default=("value", "output"), min_length=1, strict=False)
    """Projections that consist of experts; the others are dense. Value and output is the paper's choice."""
    selection: Literal["side", "projection", "shared"] = "side"
    """Which selectors there are: `side`, as published, has one selector for key and value experts (the key's token
    decides) and one for query and output experts (the query's token decides); `projection` has one for each; `shared`
    one for all."""
    normalized_init: bool = False
    """Divides the initial expert weights by their norm over all heads and experts, entry by entry, keeping the standard
    deviation. The published 262M peS2o run does this."""
    expert_dropout: Probability = 0.0
    """Probability that an expert may not be chosen by a token; the weight of a chosen expert is never altered."""
    entropy_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """delta: the loss gains delta * sum_e p_e log p_e per layer and selector, where p is the mean routing distribution
    of a head over the tokens of one sequence; a mean over heads and sequences, the same in every layout. MoEUT (arXiv
    2405.16039) has 0.001, the published SwitchHead 0."""

    @model_validator(mode="after")
    def _consistent(self) -> SwitchHeadConfig:
        _check_active(self.active_experts, self.num_experts)
        if len(set(self.expert_projections)) != len(self.expert_projections):
            raise ValueError("expert_projections names a projection twice; name each at most once")
        return self

    def selector_of(self, projection: Projection) -> Projection:
        """The projection whose selector chooses for `projection` (an expert one): often its own."""
        experts = self.expert_projections
        if self.selection == "projection":
            return projection
        # As in the authors' code the output's selector leads, then the value's.
        order: tuple[Projection, ...] = ("output", "value", "query", "key")
        if self.selection == "side":
            order = ("value", "key") if projection in ("key", "value") else ("output", "query")
        return next(name for name in order if name in experts)

    @property
    def sizes(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim}, {self.active_experts} of {self.num_experts} experts"

    @property
    def routers(self) -> Routers:
        return Routers(self.num_experts, self.active_experts, "sigmoid")


class DenseAttentionConfig(LayerSection):
    """Multi-head attention without experts: the baseline, also with grouped queries."""

    label = "dense attention"
    lacks: ClassVar[Lacks] = {}
    divided: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads")
    type: Literal["dense"] = "dense"
    """Kind of attention."""
    num_heads: Heads = 8
    """Attention heads per layer (H)."""
    num_kv_heads: Heads | None = None
    """Heads of keys and values (K, a divisor of H), all that the cache keeps: grouped-query attention (arXiv
    2305.13245). Head i attends with those of head i // (H / K). null: as many as num_heads."""
    head_dim: HeadDim = 64
    """Width of a query, key and value vector (h)."""

    @model_validator(mode="after")
    def _whole_groups(self) -> DenseAttentionConfig:
        if self.num_heads % self.key_heads:
            raise ValueError(
                f"num_kv_heads is {self.key_heads}, which does not divide num_heads = {self.num_heads}; set "
                f"num_kv_heads to a divisor of {self.num_heads}, or null for one of each head"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the key where it is null: checkpoints and exports of such models are those of before it."""
        return {key: value for key, value in dump(self).items() if (key, value) != ("num_kv_heads", None)}

    @property
    def key_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads

    @property
    def sizes(self) -> str:
        groups = "" if self.num_kv_heads is None else f", {self.num_kv_heads} of keys and values"
        return f"{self.num_heads} heads of {self.head_dim}{groups}"

    @property
    def routers(self) -> Routers | None:
        return None


class MoAConfig(LayerSection):
    """Mixture of Attention Heads (arXiv 2210.05144): one shared key and value projection, query and output experts.

    Each token attends with its `num_heads` chosen experts. Routers differ between publications; both are here.
    """

    label = "MoA"
    lacks: ClassVar[Lacks] = {}
    divided: ClassVar[tuple[str, ...]] = ("num_heads",)
    type: Literal["moa"] = "moa"
    """Kind of attention."""
    num_heads: Heads = 4
    """Experts chosen per token (k): the attention matrices computed."""
    head_dim: HeadDim = 64
    """Width of a query, key and value vector (h)."""
    num_experts: HeadExperts = 8
    """Query and output experts (E)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` over all experts, the chosen probabilities used as they are (competitive, needs the losses below), or
    `sigmoid` of each logit (as in SwitchHead)."""
    expert_dropout: Probability = 0.0
    """Probability that an expert may not be chosen by a token; the weight of a chosen expert is never altered."""
    z_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the mean over tokens of logsumexp(logits)^2."""
    switch_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of E sum_e f_e P_e: f the share of choices, P the mean probability of an expert over a batch."""
    cv_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the squared coefficient of variation over experts of the summed gates of a batch."""
    loss_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Batch of the switch and cv losses, as `entropy_scope` of the sigma_moe feed-forward."""

    @model_validator(mode="after")
    def _active_within_experts(self) -> MoAConfig:
        if self.num_heads > self.num_experts:
            raise ValueError(
                f"num_heads is {self.num_heads} but there are only num_experts = {self.num_experts} to choose from; "
                f"set num_heads to at most {self.num_experts}"
            )
        if self.num_experts == 1 and self.cv_loss_weight:
            raise ValueError("cv_loss_weight compares experts and num_experts is 1; set cv_loss_weight to 0")
        if self.router == "sigmoid" and (self.switch_loss_weight or self.cv_loss_weight or self.z_loss_weight):
            raise ValueError(
                "z_loss_weight, switch_loss_weight and cv_loss_weight regularise the softmax router; set them to 0 "
                "with router = sigmoid"
            )
        return self

    @property
    def sizes(self) -> str:
        return f"{self.num_heads} of {self.num_experts} heads of {self.head_dim}"

    @property
    def routers(self) -> Routers:
        return Routers(self.num_experts, self.num_heads, self.router)


class SigmaMoEConfig(LayerSection):
    """sigma-MoE feed-forward (arXiv 2310.10837): y = sum over the k chosen experts of s_e a(x W_1[e]) W_2[e]."""

    label = "sigma-MoE"
    lacks: ClassVar[Lacks] = {}
    divided: ClassVar[tuple[str, ...]] = ("num_experts",)
    type: Literal["sigma_moe"] = "sigma_moe"
    """Kind of feed-forward layer."""
    num_experts: Experts = 16
    """Experts per layer (N_E)."""
    expert_size: Width = 128
    """Hidden width of one expert (G)."""
    active_experts: Experts = 4
    """Experts chosen per token (k)."""
    activation: Literal["relu", "swiglu"] = "relu"
    """Between an expert's two matrices (a). relu, as published; swiglu: W_1[e] has 2 G columns, g and u, and a(g, u) is
    SiLU(g) * u (arXiv 2002.05202). 2/3 of a ReLU expert's expert_size has as many parameters."""
    expert_dropout: Probability = 0.0
    """Probability that an expert's score becomes 0 for a token, both for the choice and for the weight."""
    entropy_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """gamma: the loss gains gamma * sum_e p_e log p_e per layer, where p is the mean routing distribution over a
    batch."""
    entropy_scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Batch whose mean p the regulariser uses: `global_batch` takes the previous step's p as a constant coefficient
    (the same in every layout); `micro_batch`, as published, takes p over one micro-step on all data-parallel ranks."""

    @property
    def up_width(self) -> int:
        """Columns of an expert's first matrix (W)."""
        return 2 * self.expert_size if self.activation == "swiglu" else self.expert_size

    @model_validator(mode="after")
    def _active_within_experts(self) -> SigmaMoEConfig:
        _check_active(self.active_experts, self.num_experts)
        return self

    @property
    def sizes(self) -> str:
        kind = " SwiGLU" if self.activation == "swiglu" else ""
        return f"{self.active_experts} of {self.num_experts} experts of {self.expert_size}{kind}"

    @property
    def routers(self) -> Routers:
        return Routers(self.num_experts, self.active_experts, "sigmoid")


class DenseFeedForwardConfig(LayerSection):
    """Two linear layers with biases and a ReLU between them: the baseline."""

    label = "dense feed-forward"
    lacks: ClassVar[Lacks] = {"expert": "it has no experts"}
    divided: ClassVar[tuple[str, ...]] = ("hidden_size",)
    type: Literal["dense"] = "dense"
    """Kind of feed-forward layer."""
    hidden_size: Width = 512
    """Width of the hidden layer (d_ff)."""

    @property
    def sizes(self) -> str:
        return f"{self.hidden_size}"

    @property
    def routers(self) -> Routers | None:
        return None


class SwiGLUConfig(LayerSection):
    """Gated feed-forward without biases: y = (SiLU(x W_gate) * x W_up) W_down (arXiv 2002.05202)."""

    label = "SwiGLU feed-forward"
    lacks: ClassVar[Lacks] = {"expert": "it has no experts"}
    divided: ClassVar[tuple[str, ...]] = ("hidden_size",)
    type: Literal["swiglu"] = "swiglu"
    """Kind of feed-forward layer."""
    hidden_size: Width = 512
    """Width of the hidden layer (d_ff). 2/3 of a ReLU layer's width has as many parameters."""

    @property
    def sizes(self) -> str:
        return f"{self.hidden_size}"

    @property
    def routers(self) -> Routers | None:
        return None


AttentionConfig = Annotated[SwitchHeadConfig | DenseAttentionConfig | MoAConfig, Field(discriminator="type")]
PositionConfig = Annotated[RopeConfig | XLConfig, Field(discriminator="type")]
FeedForwardConfig = Annotated[SigmaMoEConfig | DenseFeedForwardConfig | SwiGLUConfig, Field(discriminator="type")]


class ModelConfig(Section):
    """The language model: embedding, pre-LN blocks of attention and feed-forward, final LayerNorm, output layer."""

    d_model: Annotated[int, Field(ge=2, le=2**20)]
    """Width of the residual stream (d); at least 2, for the LayerNorm of a single number is a constant."""
    num_layers: Annotated[int, Field(ge=1, le=1024)]
    """Blocks (L)."""
    vocab_size: Annotated[int, Field(ge=2, le=2**24)]
    """Rows of the embedding and of the output layer: the tokenizer's size, or more (rounded up, the rest unused)."""
    sequence_length: Annotated[int, Field(ge=1, le=2**24)]
    """Tokens of context in training and evaluation (T)."""
    attention: AttentionConfig = SwitchHeadConfig()
    """Attention layer: `type` is switchhead, dense or moa."""
    position: PositionConfig = RopeConfig()
    """Position information inside attention: `type` is rope or xl."""
    feedforward: FeedForwardConfig = SigmaMoEConfig()
    """Feed-forward layer: `type` is sigma_moe, dense or swiglu."""
    initialization: Literal["normal", "published", "published_sigma_moe"] = "normal"
    """Distributions of the initial weights. normal: all matrices normal, the output layer with standard deviation 1 /
    sqrt(d_model) and no bias. published: as in the paper's experiments, the output layer and its bias uniform within 1
    / sqrt(d_model) (PyTorch's default: a third of the variance), the weights of dense layers truncated normal.
    published_sigma_moe: as in the experiments of the σ-MoE paper, the embedding too is uniform, within sqrt(6 /
    (vocab_size + d_model))."""
    init_scale: Literal["paper", "library"] = "paper"
    """s in the initial standard deviations of the blocks: sqrt(2 / L), the experiments' value, or sqrt(1 / L), which
    the authors' stand-alone library recommends."""
    tied_embedding: bool = False
    """The output layer uses the embedding's weight (with a bias of its own). The paper's models are untied."""
    dropout: Probability = 0.0
    """Dropout on the embedding output, after attention, after the feed-forward, inside a dense feed-forward, and
    before the output layer."""

    @model_validator(mode="after")
    def _layers_can(self) -> ModelConfig:
        """Positions that every layer has."""
        for key, wanted, ability in (
            ("position.type", self.position.type, self.position.type),
            ("position.memory_chunks", self.position.memory_chunks, "memory" if self.position.memory_chunks else ""),
        ):
            reason = self.attention.lacks.get(ability)  # type: ignore[call-overload]
            if reason is not None:
                instead = "rope" if key == "position.type" else "0"
                raise ValueError(
                    f"{key} is {wanted}, but attention.type is {self.attention.type}: {reason}; set {key} to {instead}"
                )
        return self

    @property
    def memory_length(self) -> int:
        """Tokens of memory before a chunk: (C - 1) T."""
        return self.position.memory_chunks * self.sequence_length
