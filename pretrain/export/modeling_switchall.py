"""SwitchAll language models for transformers. Exported models carry this file; it needs torch and transformers alone.

Letters of shapes: B batch, T new tokens, L keys (tokens of the cache and new ones), d hidden_size, H heads, h head_dim.
Parameters have the names of the model that was exported.

A model without memory attends to all tokens before a token, as many as it is given. One with memory (position.
memory_chunks = C - 1 > 0) cuts the text into chunks of sequence_length tokens, counted from its first token; a token
sees its own chunk up to itself and the C - 1 chunks before. A forward pass of any length equals the trained model's on
one chunk after the other, and the cache, which keeps the last C chunks, is the memory.

A model that was trained on one document at a time (`document_end` of its configuration is an id) sees nothing of what
stands before that id behind it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_switchall import SwitchAllConfig
from .layers_switchall import ATTENTIONS, FEEDFORWARDS, Places

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What this release of transformers calls the cache in outputs."""


class SwitchAllBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feedforward(norm(x))."""

    def __init__(self, config: SwitchAllConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ATTENTIONS[config.attention["type"]](config, layer)
        self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feedforward = FEEDFORWARDS[config.feedforward["type"]](config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, places: Places, cache: Any, eager: bool) -> tuple[Tensor, Tensor | None]:
        """`x` [B, T, d] -> the same shape, and with `eager` the attention weights [B, H, T, L]."""
        y, weights = self.attention(self.attention_norm(x), places, cache, eager)
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.feedforward(self.feedforward_norm(x))
        return x + F.dropout(y, self.dropout, self.training), weights


class SwitchAllPreTrainedModel(PreTrainedModel):
    """What both models share: embedding, blocks and final norm."""

    config_class = SwitchAllConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwitchAllBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True

    def build(self, config: SwitchAllConfig) -> None:
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(SwitchAllBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        """Plain initial weights, for a model that begins without an export."""
        depth = (2.0 / self.config.num_hidden_layers) ** 0.5
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                nn.init.constant_(parameter, float(name == "weight"))
            elif name == "scale":
                nn.init.constant_(parameter, self.config.head_dim**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                fan_in = parameter.shape[-2 if name.endswith("_experts") else -1]
                outside = parameter.shape[0] == self.config.vocab_size
                nn.init.normal_(parameter, std=(1.0 if outside else depth) * fan_in**-0.5)

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: Any,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """The fields of BaseModelOutputWithPast. `options`: use_cache, output_hidden_states, output_attentions; None
        is what the configuration says."""
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        wanted = {name: getattr(config, name, False) if value is None else value for name, value in options.items()}
        is_repeated = self.training and self.gradient_checkpointing and torch.is_grad_enabled()
        if is_repeated and cache is not None:
            raise ValueError("with gradient checkpointing blocks are computed twice, and a cache cannot be given")
        if is_repeated or (self.training and cache is None and options["use_cache"] is None):
            wanted["use_cache"] = False
        if wanted["use_cache"] and cache is None:
            cache = DynamicCache(config=config)
        seen, T = 0 if cache is None else cache.get_seq_length(), x.shape[1]
        is_fixed = not isinstance(seen, int) or getattr(cache, "is_compileable", False)  # empty, it has seen 0
        if is_fixed or (attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2):
            raise ValueError(
                "this model makes its masks itself, of an attention_mask of a number for each token, and needs a cache "
                "that grows: leave out cache_implementation"
            )
        if attention_mask is not None and attention_mask.shape != (x.shape[0], seen + T):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; {[x.shape[0], seen + T]} is needed: a number "
                f"for each of the {seen} tokens of the cache and the {T} new ones"
            )
        ends = self.document_ends(input_ids, cache, seen)
        places = Places(config, seen, T, x.device, attention_mask, position_ids, ends)
        x = F.dropout(x, config.dropout, self.training)
        states, attentions = [x], []
        eager = bool(wanted["output_attentions"]) or config._attn_implementation == "eager"
        for block in self.blocks:
            x, weights = block(x, places, cache, eager)
            states.append(x)
            attentions.append(weights)
        x = self.final_norm(x)
        return {
            "last_hidden_state": x,
            CACHE: cache if wanted["use_cache"] else None,
            "hidden_states": (*states[:-1], x) if wanted["output_hidden_states"] else None,
            "attentions": tuple(attentions) if wanted["output_attentions"] else None,
        }

    def document_ends(self, input_ids: Tensor | None, cache: Any, seen: int) -> Tensor | None:
        """[B, seen + T] bool: which of the tokens, those of the cache and the new ones, end a document. None for models
        that see all documents."""
        if self.config.document_end is None:
            return None
        if input_ids is None:
            raise ValueError(
                "this model sees by input_ids where documents end: give them instead of inputs_embeds, or set "
                "config.document_end to None, with which it sees all documents, as it was not trained"
            )
        ends = input_ids == self.config.document_end
        if not seen:
            return ends
        kept = cache.layers[0].keys
        if kept.shape[2:] != (seen, self.config.head_dim + 1):
            raise ValueError(
                "this model keeps in the cache where documents end, and finds it not in this one: leave out "
                "cache_implementation"
            )
        return torch.cat([kept[:, 0, :, -1].to(ends.device) != 0, ends], dim=1)


class SwitchAllModel(SwitchAllPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: SwitchAllConfig) -> None:
        super().__init__(config)
        self.build(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As SwitchAllForCausalLM's, without logits: `last_hidden_state` [B, T, d] after the final norm."""
        options = {
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        past = past_key_values if cache is None else cache
        found = self.run(input_ids, attention_mask, position_ids, inputs_embeds, past, options)
        output = BaseModelOutputWithPast(**found)
        return output if return_dict is not False else output.to_tuple()


class SwitchAllForCausalLM(SwitchAllPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SwitchAllConfig) -> None:
        super().__init__(config)
        self.build(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """`input_ids` [B, T] -> `logits` [B, T, vocab_size]; with `labels` [B, T] (-100: not counted) also `loss`, the
        mean cross-entropy of each token from those before it, in nats. Regularisers of the training are not in it.

        `attention_mask` [B, tokens of the cache + T] is 0 for padding, which may stand left or right of a row's tokens,
        not between them: a row that goes on from a cache has it on the left. The cache goes in as `past_key_values`, in
        newer releases of transformers `cache`, and comes out under the same name.
        `output_attentions` gives each layer's weights [B, H, T, L]; `output_hidden_states` gives embedding and block
        outputs [B, T, d], the last after the final norm. `logits_to_keep`: only the last so many logits, or those at
        these places.
        """
        options = {
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        past = past_key_values if cache is None else cache
        found = self.run(input_ids, attention_mask, position_ids, inputs_embeds, past, options)
        x = found.pop("last_hidden_state")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = x if isinstance(kept, slice) and logits_to_keep == 0 else x[:, kept]
        logits = self.head(F.dropout(x, self.config.dropout, self.training))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **found)
        return output if return_dict is not False else output.to_tuple()
