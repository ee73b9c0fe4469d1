"""The configuration of a model in the form of transformers (config.json of an export), and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from common.errors import ConfigError, UserError
from common.json_config import validate
from model.config import DenseAttentionConfig, MoAConfig, ModelConfig

MODEL_TYPE = "switchall"
AUTO_MAP = {
    "AutoConfig": "configuration_switchall.SwitchAllConfig",
    "AutoModel": "modeling_switchall.SwitchAllModel",
    "AutoModelForCausalLM": "modeling_switchall.SwitchAllForCausalLM",
}
NAMES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "sequence_length": "sequence_length",
    "attention": "attention",
    "position": "position",
    "feedforward": "feedforward",
    "dropout": "dropout",
    "tied_embedding": "tie_word_embeddings",
}
"""Key of our `model` section -> key of config.json. The other keys decide initial weights alone."""
DOCUMENT_END = "document_end"
"""Key of config.json: the id behind which nothing before is seen, of a model trained with data.document_mask."""
LAYER_NORM_EPS = 1e-5
"""torch's default, which the layers of the model have."""


def check_layers(model: ModelConfig) -> None:
    """Raises UserError if layers_switchall.py computes one of the layers not."""
    for place, layer in (("attention", model.attention), ("feedforward", model.feedforward)):
        if (reason := layer.lacks.get("export")) is not None:
            raise UserError(
                f"model.{place}.type is {layer.type}, which no export has: {reason}; `launch/checkpoint.py convert` "
                f"writes the weights for programs that use this project's code"
            )


def hf_config(
    model: ModelConfig, *, dtype: str, special: Mapping[str, int | None], document_end: int | None = None
) -> dict[str, Any]:
    """The content of config.json. `dtype`: float32, bfloat16 or float16. `special`: token ids by name, such as
    eos_token_id. `document_end`: the id behind which nothing before is seen (`document_end_of`)."""
    tree = model.model_dump(mode="json")
    key_heads = model.attention.num_heads
    if isinstance(model.attention, DenseAttentionConfig):
        key_heads = model.attention.key_heads
    elif isinstance(model.attention, MoAConfig):
        key_heads = 1
    window: dict[str, Any] = {}
    if model.memory_length:
        window = {
            "sliding_window": model.memory_length + model.sequence_length,
            "layer_types": ["sliding_attention"] * model.num_layers,
        }
    return {
        "architectures": ["SwitchAllForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        **{theirs: tree[ours] for ours, theirs in NAMES.items()},
        "num_attention_heads": model.attention.num_heads,
        "num_key_value_heads": key_heads,
        "head_dim": model.attention.head_dim,
        "max_position_embeddings": model.memory_length + model.sequence_length,
        **window,
        DOCUMENT_END: document_end,
        "layer_norm_eps": LAYER_NORM_EPS,
        "use_cache": True,
        "dtype": dtype,
        **special,
    }


def model_config(text: str, name: str, initial: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model of the config.json with content `text`, which messages call `name`. `initial`: a `model` section that
    decides what config.json does not hold, the distributions of initial weights. Raises UserError."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}); export the model again") from None
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if kind != MODEL_TYPE:
        raise UserError(
            f"{name}: model_type is {kind!r}, not {MODEL_TYPE!r}; name a folder that launch/export.py wrote"
        )
    if missing := next((theirs for theirs in NAMES.values() if theirs not in tree), None):
        raise UserError(f"{name} has no {missing}; export the model again")
    if tree.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
        raise UserError(f"{name}: layer_norm_eps is {tree['layer_norm_eps']}; these models have {LAYER_NORM_EPS}")
    section = {**(initial or {}), **{ours: tree[theirs] for ours, theirs in NAMES.items()}}
    try:
        return validate(ModelConfig, section)
    except ConfigError as error:
        raise UserError(f"{name}: {error}") from None
