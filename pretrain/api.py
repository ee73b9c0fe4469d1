"""Trained models in notebooks and programs: `open_model(place)`, then ask it. docs/use.md shows each call.

A text is a str, or ids that it was made of. Everything is computed as in validation: fp32, without dropout, in chunks
of sequence_length tokens with the memory of a model that has one, and of a model that was trained with
data.document_mask, nothing before an EOS is seen behind it; tensors lie on the CPU.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.progress_bar import count_bytes
from common.tables import beginning
from model.decoding import head_logits, hidden_states, uncached_logits
from model.layer_section import Ability
from model.parameters import owner_of
from pretrain.analysis.trace import Request, RouterTrace, Trace, lacking, trace_text
from pretrain.checkpoint.average import origin_of
from pretrain.checkpoint.weights import write_weights
from pretrain.export.loading import load_any
from pretrain.export.reading import is_export, open_export
from pretrain.generation import Generated, Sampling, Settings, generate
from pretrain.saved_model import SavedModel

Text = str | Sequence[int]

_OPTION = re.compile(r"--([a-z][a-z-]*)")


class TextLoss(NamedTuple):
    """How well a model predicts a text of N tokens, from the second on."""

    tokens: Tensor
    """fp32 [N - 1]: -log p of each, in nats."""
    mean: float
    """nats per token."""
    perplexity: float
    bits_per_byte: float
    """All of them over the bytes of the text (UTF-8) behind the first token's; NaN where these are not known, as of a
    character that the tokenizer has not."""


class AttentionMaps(NamedTuple):
    """Attention of one window of the text."""

    weights: dict[int, Tensor]
    """Layer -> fp32 [heads, queries, keys], rows sum to 1; with MoA a token's chosen experts, best first."""
    first_query: int
    """Position in the text of the first query,"""
    first_key: int
    """and of the first key, which is in the memory if there is one."""


def open_model(
    place: str | Path, *, device: str = "cpu", data: Sequence[str | Path] = (), ema: bool = False
) -> OpenModel:
    """The newest checkpoint of a run folder, the named checkpoint, or an export; arguments and errors of
    `pretrain.saved_model.load_model`."""
    if not isinstance(place, str | os.PathLike):
        raise UserError(f"place: is {_shown(place)}; give a run folder, a checkpoint or an export, as a str or a Path")
    return OpenModel(load_any(place, device=device, data=data, ema=ema))


def _whole(numbers: Any) -> list[int] | None:
    """Of a list, an array or a tensor of whole numbers; None of anything else."""
    try:
        return None if isinstance(numbers, bytes | bytearray) else [operator.index(number) for number in numbers]
    except TypeError:
        return None


def _ids(numbers: Any) -> list[int]:
    """Raises UserError for what is neither a list, an array or a tensor of whole numbers."""
    if (found := _whole(numbers)) is None:
        raise UserError(
            f"text: is {_shown(numbers)}; give a str, or the ids of one text in a list or a tensor of one dimension"
        )
    return found


def _shown(value: Any) -> str:
    return beginning(repr(value), 60)


class OpenModel:
    """A trained model. `model`, `tokenizer`, `config` and `checkpoint` are those of SavedModel."""

    def __init__(self, saved: SavedModel) -> None:
        self.saved = saved
        self.model, self.tokenizer, self.config, self.checkpoint = saved

    def __repr__(self) -> str:
        step, config = self.checkpoint.progress.step, self.config.model
        return f"OpenModel({self.checkpoint.path}, step {step:,}, {config.num_layers} layers of {config.d_model})"

    def encode(self, text: Text) -> list[int]:
        """Ids of a text. Raises UserError if there are none, or one that the model does not have."""
        ids = self.tokenizer.encode(text) if isinstance(text, str) else _ids(text)
        if not ids:
            raise UserError("text: is empty; give some words")
        rows = self.model.config.vocab_size
        if wrong := [number for number in ids if not 0 <= number < rows]:
            raise UserError(f"text: holds the id {wrong[0]}, but the model's ids are 0 to {rows - 1}")
        return ids

    def pieces(self, text: Text) -> list[str]:
        """What each token stands for."""
        return self.tokenizer.pieces(self.encode(text))

    def logits(self, text: Text) -> Tensor:
        """fp32 [N, vocab_size]: of what follows each token."""
        return uncached_logits(self.model, self.encode(text), document_end=self.saved.document_end).cpu()

    def hidden_states(self, text: Text) -> Tensor:
        """fp32 [num_layers + 1, N, d_model]: of the embedding and behind every block, before the final norm."""
        found = hidden_states(self.model, self.encode(text), document_end=self.saved.document_end)
        return torch.cat(list(found), dim=1).cpu()

    def loss(self, text: Text) -> TextLoss:
        """Raises UserError for a text of one token, which nothing predicts."""
        ids = self.encode(text)
        if len(ids) < 2:
            raise UserError("text: is a single token; a loss needs one that follows")
        parts, first = [], 1
        # Of one chunk at a time: the logits of a book are gigabytes.
        for states in hidden_states(self.model, ids, document_end=self.saved.document_end):
            targets = torch.tensor(ids[first : first + states.shape[1]], dtype=torch.int64)
            logits = head_logits(self.model, states[-1:])[0, : len(targets)].cpu()
            parts.append(-logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
            first += len(targets)
        tokens = torch.cat(parts)
        total = float(tokens.sum(dtype=torch.float64))
        size = self.tokenizer.bytes_of(np.bincount(ids[1:]))
        mean = total / len(tokens)
        return TextLoss(tokens, mean, math.exp(min(mean, 700.0)), total / math.log(2) / size if size else math.nan)

    def _refuse(self, *lacks: tuple[str, Ability]) -> None:
        """Raises UserError for what a layer lacks."""
        found = lacking(self.model.config)
        for lack in lacks:
            if lack in found:
                raise UserError(found[lack])

    def attention(self, text: Text, *, layers: Sequence[int] | None = None, window: int = 0) -> AttentionMaps:
        """Of `layers` (None: all) and the window of sequence_length tokens with this number, from 0."""
        self._refuse(("attention", "maps"))
        config = self.model.config
        ids, wanted = self.encode(text), _whole(range(config.num_layers) if layers is None else layers)
        if wanted is None:
            raise UserError(f"layers: is {_shown(layers)}; give the numbers of layers in a list, such as [0]")
        if wrong := [layer for layer in wanted if not 0 <= layer < config.num_layers]:
            raise UserError(f"layers: there is no layer {wrong[0]}; the model's are 0 to {config.num_layers - 1}")
        windows = -(-len(ids) // config.sequence_length)
        if not isinstance(window, Integral) or not 0 <= window < windows:
            raise UserError(
                f"window: is {window}, but the text has {windows} of {config.sequence_length} tokens, from 0"
            )
        trace = self._trace(ids, Request(wanted, window, config.sequence_length))
        weights = {layer: torch.from_numpy(found) for layer, found in trace.maps.items()}
        return AttentionMaps(weights, trace.first_query, trace.first_key)

    def routing(self, text: Text) -> list[RouterTrace]:
        """The experts that every router chooses for each token, and their gates; empty for a model without experts.
        Raises UserError where nothing shows a layer's choices; `pretrain.analysis.trace.trace_text` has the others'."""
        self._refuse(("attention", "routing"), ("feedforward", "routing"))
        return self._trace(self.encode(text), Request([])).routers

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        tokens: int | None = None,
        samples: int = 1,
        until: str | None = None,
        slide: bool = False,
        **sampling: Any,
    ) -> list[Generated]:
        """Continues a prompt, or several, `samples` times each, by `tokens` tokens at most (None: 100, or as
        many as the context has room for), to the first `until`. `slide`: beyond the context only a text's end is read.
        `sampling`: temperature, top_k, top_p, seed (`pretrain.generation.Sampling`). Raises UserError."""
        prompts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else [prompt]
        if wrong := [one for one in prompts if not isinstance(one, str)]:
            raise UserError(f"prompt: is {_shown(wrong[0])}; give a str, or a list of them")
        if unknown := sorted(sampling.keys() - {field.name for field in fields(Sampling)}):
            raise UserError(f"{unknown[0]}: generate has no such argument; it knows temperature, top_k, top_p and seed")
        try:
            settings = Settings(
                tokens=tokens, samples=samples, sampling=Sampling(**sampling), until=until, slides=slide
            )
            return generate(self.saved, prompts, settings)
        except UserError as error:  # names the command's options
            raise UserError(_OPTION.sub(lambda found: found[1].replace("-", "_"), str(error))) from None

    def save(self, folder: str | Path, source: str = "a program") -> Path:
        """Writes the weights as `model` has them now (trained on, interpolated, ...) as a new checkpoint of weights
        alone, with the tokenizer: `open_model`, every command that reads a checkpoint, and train.init_from take it.
        `source`: what the weights are, in a few words that are recorded with them. Shows a progress bar on a terminal.
        Raises UserError."""
        place, opened = Path(folder), self.checkpoint.path
        if is_export(opened):
            origin = replace(open_export(opened).weights_origin(), source=source, loss=None, validation_loss=None)
        else:
            origin = origin_of(self.checkpoint, source, self.tokenizer.stored)
        parameters = dict(self.model.named_parameters())
        tensors = {
            name: lambda name=name: parameters[name].detach().float().cpu()
            for name in parameters
            if owner_of(name, self.config.model) == name
        }
        bar = count_bytes(place.name, sum(4 * parameters[name].numel() for name in tensors))
        return write_weights(place, origin, tensors, option="folder", wrote=bar).path

    def _trace(self, ids: Sequence[int], request: Request) -> Trace:
        return trace_text(self.model, ids, request, document_end=self.saved.document_end)
