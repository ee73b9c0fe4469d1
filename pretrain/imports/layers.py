"""Weights of the SwitchHead authors' layers as ours, so that the outputs are the same.

Two kinds of files have them (github.com/RobertCsordas): the public modules `switchhead` and `moe_layer`, with q.weight,
k.weight, v, o, sel_v, sel_o, pos_to_pk and keys, values, expert_sel; and training checkpoints of `moe_attention`, with
projections.* and selections.* and the layers of the baselines. Experts are [heads x experts, in, out] there, [heads,
experts, in, out] here. RoPE rotates the same half of a head in the same pairs. Sinusoids of Transformer-XL are those of
key minus query there, of query minus key here: the sine, on even channels, changes its sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.errors import UserError
from model.config import (
    DenseAttentionConfig,
    DenseFeedForwardConfig,
    MoAConfig,
    ModelConfig,
    Projection,
    SigmaMoEConfig,
    SwitchHeadConfig,
    XLConfig,
)
from pretrain.imports.names import State

Lazy = Callable[[], Tensor]
Layer = dict[str, Lazy]
"""Our name inside the layer -> function that gives its tensor."""
LETTERS: dict[Projection, str] = {"query": "q", "key": "k", "value": "v", "output": "o"}


def convert(state: State, config: ModelConfig) -> tuple[dict[str, Lazy], list[str]]:
    """The model's parameters by canonical name, and the keys of `state` that no output depends on. Raises UserError,
    which names the key, if one is missing, unknown or of another shape."""
    d, vocab = config.d_model, config.vocab_size
    if (blocks := state.blocks()) != config.num_layers:
        raise UserError(
            f"model.num_layers: is {config.num_layers}, but {state.source} holds {blocks} blocks; set it to {blocks}, "
            f"or say with --rename what the blocks are called there (blocks.{{}}.attention, ...)"
        )
    tied = config.tied_embedding
    found = _norm(state, "final_norm", d) | {
        "embedding.weight": partial(_plain, state.take("embedding.weight", vocab, d))
    }
    ignored = [state.drop("head.weight")] if tied else []
    if not tied:
        found["head.weight"] = partial(_plain, state.take("head.weight", vocab, d))
    found["head.bias"] = partial(_plain, state.take("head.bias", vocab))
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        ignored += [state.drop(f"{block}.attention.s_bias"), state.drop(f"{block}.feedforward.kv_sel_counts_100")]
        for norm in ("attention_norm", "feedforward_norm"):
            found |= _norm(state, f"{block}.{norm}", d)
        for name, layer in (("attention", attention), ("feedforward", feedforward)):
            found |= {f"{block}.{name}.{n}": tensor for n, tensor in layer(state, f"{block}.{name}", config).items()}
    if left := state.left():
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise UserError(
            f"{left[0]}: {state.source} holds this{more}, which the configured model has no place for; correct the "
            f"configuration's model section, or say with --rename what the module is"
        )
    return found, [key for key in ignored if key is not None]


def attention(state: State, at: str, config: ModelConfig) -> Layer:
    """The attention layer `at` (our name) of any kind."""
    settings = config.attention
    if isinstance(settings, SwitchHeadConfig):
        layer = (_switchhead_module if f"{at}.sel_o" in state else _switchhead_trained)(state, at, config, settings)
    elif isinstance(settings, MoAConfig):
        layer = _moa(state, at, config, settings)
    elif isinstance(settings, DenseAttentionConfig):
        layer = _dense(state, at, config, settings)
    else:
        raise UserError("model.attention: the authors' layers are switchhead, moa and dense; set type to one of them")
    return layer


def feedforward(state: State, at: str, config: ModelConfig) -> Layer:
    """The feed-forward layer `at` (our name)."""
    d, settings = config.d_model, config.feedforward
    if isinstance(settings, SigmaMoEConfig) and settings.activation == "relu":
        E, G = settings.num_experts, settings.expert_size
        return {
            "router": partial(_plain, state.take(f"{at}.expert_sel", E, d)),
            "up_experts": partial(_plain, state.take(f"{at}.keys", E, d, G)),
            "down_experts": partial(_plain, state.take(f"{at}.values", E, G, d)),
        }
    if isinstance(settings, DenseFeedForwardConfig):
        width = settings.hidden_size
        return {
            "up.weight": partial(_plain, state.take(f"{at}.linear1.weight", width, d)),
            "up.bias": partial(_plain, state.take(f"{at}.linear1.bias", width)),
            "down.weight": partial(_plain, state.take(f"{at}.linear2.weight", d, width)),
            "down.bias": partial(_plain, state.take(f"{at}.linear2.bias", d)),
        }
    raise UserError(
        "model.feedforward: the authors' layers are sigma_moe with activation relu and dense; set type to one of them"
    )


def _switchhead_module(state: State, at: str, config: ModelConfig, settings: SwitchHeadConfig) -> Layer:
    """SwitchHeadRope or SwitchHeadXL of the package `switchhead`."""
    H, h, E, d = settings.num_heads, settings.head_dim, settings.num_experts, config.d_model
    experts = {"value", "output"} if E > 1 else {"output"}  # one expert: a dense value, and a gate on the output
    if set(settings.expert_projections) != experts or settings.selection == "shared":
        names = '["value", "output"]' if E > 1 else '["output"]'
        raise UserError(
            f"model.attention.expert_projections: {state.source} holds the public module with {E} experts a head; set "
            f"it to {names}, and model.attention.selection to side"
        )
    layer = {
        "query.weight": partial(_plain, state.take(f"{at}.q.weight", H * h, d)),
        "key.weight": partial(_plain, state.take(f"{at}.k.weight", H * h, d)),
        "output_selector": partial(_viewed, state.take(f"{at}.sel_o", H * E, d), (H, E, d)),
    }
    if E > 1:
        layer["value_selector"] = partial(_viewed, state.take(f"{at}.sel_v", H * E, d), (H, E, d))
        layer["value_experts"] = partial(_viewed, state.take(f"{at}.v", H * E, d, h), (H, E, d, h))
        layer["output_experts"] = partial(_viewed, state.take(f"{at}.o", H * E, h, d), (H, E, h, d))
    else:
        layer["value.weight"] = partial(_plain, state.take(f"{at}.v", H * h, d))
        layer["output_experts"] = partial(_transposed, state.take(f"{at}.o", d, H * h), (H, 1, h, d))
    return layer | _position(state, f"{at}.pos_to_pk", config, H * h)


def _switchhead_trained(state: State, at: str, config: ModelConfig, settings: SwitchHeadConfig) -> Layer:
    """FullMoeRelativeAttention or FullMoeRopeAttention of a training checkpoint."""
    H, h, E, d = settings.num_heads, settings.head_dim, settings.num_experts, config.d_model
    layer: Layer = {}
    for projection, letter in LETTERS.items():
        name, is_output = f"{at}.projections.{letter}", projection == "output"
        if projection not in settings.expert_projections:
            shape = (d, H * h) if is_output else (H * h, d)
            layer[f"{projection}.weight"] = partial(_plain, state.take(name, *shape))
            continue
        matrix = (h, d) if is_output else (d, h)
        layer[f"{projection}_experts"] = partial(_viewed, state.take(name, H * E, *matrix), (H, E, *matrix))
        owner = settings.selector_of(projection)
        if f"{owner}_selector" not in layer:
            selector = state.take(f"{at}.selections.{LETTERS[owner]}", H * E, d)
            layer[f"{owner}_selector"] = partial(_viewed, selector, (H, E, d))
    return layer | _position(state, f"{at}.pos_to_pk", config, H * h)


def _moa(state: State, at: str, config: ModelConfig, settings: MoAConfig) -> Layer:
    """MoA of a training checkpoint, which has Transformer-XL positions."""
    h, E, d = settings.head_dim, settings.num_experts, config.d_model
    both = state.take(f"{at}.data_to_kv", d, 2 * h)
    layer = {
        "selector": partial(_plain, state.take(f"{at}.sel_dst", E, d)),
        "query_experts": partial(_plain, state.take(f"{at}.data_to_q", E, d, h)),
        "output_experts": partial(_plain, state.take(f"{at}.out_proj", E, h, d)),
        "key.weight": partial(_transposed, both[:, :h], (h, d)),
        "value.weight": partial(_transposed, both[:, h:], (h, d)),
    }
    if isinstance(config.position, XLConfig):
        layer["scale"] = partial(_plain, state.take(f"{at}.scale", 1))
    return layer | _position(state, f"{at}.pos_to_pk", config, h)


def _dense(state: State, at: str, config: ModelConfig, settings: DenseAttentionConfig) -> Layer:
    """The baselines of a training checkpoint: keys and values of one product, head by head with Transformer-XL, one
    after the other with RoPE."""
    H, h, d = settings.num_heads, settings.head_dim, config.d_model
    if settings.key_heads != H:
        raise UserError(
            f"model.attention.num_kv_heads: is {settings.key_heads}, but the authors' layers have keys and values of "
            f"each head; set it to null"
        )
    is_xl = isinstance(config.position, XLConfig)
    both = state.take(f"{at}.data_to_kv.weight", 2 * H * h, d)
    key, value = both.view(H, 2, h, d).unbind(1) if is_xl else both.view(2, H, h, d).unbind(0)
    output = "multi_head_merge" if is_xl else "out_proj"
    layer = {
        "query.weight": partial(_plain, state.take(f"{at}.data_to_q.weight", H * h, d)),
        "key.weight": partial(_viewed, key, (H * h, d)),
        "value.weight": partial(_viewed, value, (H * h, d)),
        "output.weight": partial(_plain, state.take(f"{at}.{output}.weight", d, H * h)),
    }
    if is_xl:
        layer["content_bias"] = partial(_plain, state.take(f"{at}.global_content_bias", H, h))
        layer["position_bias"] = partial(_plain, state.take(f"{at}.global_pos_bias", H, h))
        layer["scale"] = partial(_plain, state.take(f"{at}.scale", 1))
    return layer | _position(state, f"{at}.pos_to_pq.weight", config, H * h)


def _position(state: State, name: str, config: ModelConfig, width: int) -> Layer:
    if not isinstance(config.position, XLConfig):
        return {}
    return {"position.weight": partial(_other_sign, state.take(name, width, config.d_model))}


def _norm(state: State, at: str, d: int) -> Layer:
    return {f"{at}.{name}": partial(_plain, state.take(f"{at}.{name}", d)) for name in ("weight", "bias")}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _viewed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.to(torch.float32).reshape(shape)


def _transposed(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.to(torch.float32).T.reshape(shape)


def _other_sign(tensor: Tensor) -> Tensor:
    """[n, d] for sinusoids of the negated distance: the sines, on even channels, have the other sign."""
    result = tensor.to(torch.float32, copy=True)
    result[:, ::2].neg_()
    return result
