"""Configuration of SwitchAll language models for transformers. Stands alone: exported models carry this file."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SwitchAllConfig(PretrainedConfig):
    """The architecture. `attention`, `position` and `feedforward` are the sections of switchall's `model`
    configuration, each with a `type`; the rest has the names that transformers uses.

    Attention is `switchhead` (arXiv 2312.07987), `moa` (arXiv 2210.05144) or `dense`; position is `rope` or `xl`
    (arXiv 1901.02860), each with `memory_chunks`; feedforward is `sigma_moe` (arXiv 2310.10837), `swiglu` or `dense`.
    """

    model_type = "switchall"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 8000,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        sequence_length: int = 128,
        attention: dict[str, Any] | None = None,
        position: dict[str, Any] | None = None,
        feedforward: dict[str, Any] | None = None,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        document_end: int | None = None,
        **kwargs: Any,
    ) -> None:
        """`sequence_length`: tokens of a chunk in training (T). `dropout` acts while training alone, as the
        `expert_dropout` of `attention` and `feedforward` does. `document_end`: the id behind which nothing before it
        is seen; None: documents see each other."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.sequence_length = sequence_length
        self.attention = attention or {"type": "dense", "num_heads": 4, "head_dim": 32}
        self.position = position or {"type": "rope", "fraction": 0.5, "base": 10000.0, "memory_chunks": 0}
        self.feedforward = feedforward or {"type": "dense", "hidden_size": 512}
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.use_cache = use_cache
        self.document_end = document_end
        # What other programs look for follows from the sections, whatever a file says.
        for derived in ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
            kwargs.pop(derived, None)
        if self.memory_length:
            kwargs["sliding_window"] = self.memory_length + sequence_length
            kwargs["layer_types"] = ["sliding_attention"] * num_hidden_layers
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.num_attention_heads = self.attention["num_heads"]
        shared = 1 if self.attention["type"] == "moa" else self.attention.get("num_kv_heads")
        self.num_key_value_heads = shared or self.attention["num_heads"]
        self.head_dim = self.attention["head_dim"]
        self.max_position_embeddings = self.memory_length + sequence_length

    @property
    def memory_length(self) -> int:
        """Tokens of the chunks before a query's own that it sees: memory_chunks * T."""
        return int(self.position["memory_chunks"]) * self.sequence_length
