"""An export, loaded with transformers, against the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from model.config import ModelConfig
from model.decoding import uncached_logits
from model.documents import document_index
from model.language_model import LanguageModel
from pretrain.checkpoint.folder import Checkpoint
from pretrain.export.same_choices import kept_choices, taking
from pretrain.saved_model.loading import load_model
from pretrain.saved_model.tokenizer import Tokenizer

TOLERANCE = 1e-5
"""Largest difference of logits between weights and themselves in fp32, times the largest logit if that is above 1."""
TEXT = (
    "The old library stood at the end of the street, between the bakery and the river.\nEvery morning Anna opened its "
    "heavy door, lit the lamps, and put back the 37 books that had come in the day before.\n"
)
CHUNKS = 3
"""Windows of the model that are compared: with memory the later ones see it."""
MOST_TOKENS = 4096
"""Of a model without memory that has longer windows than a third of this, so many, or one window if that is more: with
32,000 pieces each token has 128 kB of logits, here and there."""
ROWS = 256
"""Tokens whose logits are subtracted at a time."""


def check_transformers() -> None:
    """Raises UserError where transformers is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            "--verify: needs the package transformers; install it with `pip install -e .[export]`, or leave it out"
        ) from None


def verify(
    folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, *, data: Sequence[str | Path] = (), ema: bool = False
) -> str:
    """Compares ids, text and logits, computed in fp32 on the CPU. Where the weights were rounded to `dtype`, so are
    those of the checkpoint. `data`, `ema`: as of `load_model`. Returns what was found, in a line. Raises UserError if
    something differs."""
    from transformers.utils import logging

    from pretrain.export.modeling_switchall import SwitchAllForCausalLM
    from pretrain.export.tokenization_switchall import SwitchAllTokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    saved = load_model(checkpoint.path, data=data, verify=False, ema=ema)
    ids, found_ids = _any_ids(saved.tokenizer), ""
    if saved.tokenizer.has_text:
        ids = _check_tokenizer(SwitchAllTokenizer.from_pretrained(folder), saved.tokenizer)
        found_ids = "the same ids, and "
    length = compared_tokens(saved.config.model)
    tokens = torch.tensor([(ids * (1 + length // len(ids)))[:length]])
    if (end := saved.document_end) is not None:
        tokens[0, length // 3] = end  # what stands before is not seen behind it
    chunk = saved.config.model.sequence_length if saved.config.model.memory_length else length
    passes = [min(chunk, length - first) for first in range(0, length, chunk)]
    with torch.no_grad():
        with kept_choices(saved.model, passes) as kept:
            exact = expected = logits_of(saved.model, tokens, end)
        if not bool(exact.isfinite().all()):
            raise UserError(
                f"checkpoint {checkpoint.path}: its outputs are not finite, so it has diverged or its numbers "
                f"overflow; export an earlier one"
            )
        if dtype != torch.float32:
            for parameter in saved.model.parameters():
                parameter.copy_(parameter.to(dtype))
            with kept_choices(saved.model, passes) as kept:
                expected = logits_of(saved.model, tokens, end)
        del saved  # one model in memory at a time
        model = SwitchAllForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with taking(kept) as taken:
            found = model(tokens).logits
    difference, largest = largest_difference(found, expected), largest_size(expected)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError(
            f"{folder}: logits differ by {difference:.1e} from those of the checkpoint{taken.wrong}; this is an error "
            f"of the exporter, please report it"
        )
    same = f"transformers gives {found_ids}logits that differ by at most {difference:.1e}{taken.told}"
    if dtype == torch.float32:
        return same
    moved = largest_difference(expected, exact)
    return f"{same} from those of the weights rounded alike; rounding itself moves them by up to {moved:.1e}"


def compared_tokens(model: ModelConfig) -> int:
    """How long a text is compared."""
    windows = CHUNKS * model.sequence_length
    return windows if model.memory_length else min(windows, max(model.sequence_length, MOST_TOKENS))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Of any two numbers at the same place of two [1, L, vocab_size], without a third; NaN if there is one."""
    rows = zip(one.split(ROWS, 1), other.split(ROWS, 1), strict=True)
    return float(torch.stack([(a - b).abs().max() for a, b in rows]).max())


def largest_size(logits: Tensor) -> float:
    return float(torch.stack([rows.abs().max() for rows in logits.split(ROWS, 1)]).max())


def logits_of(model: LanguageModel, tokens: Tensor, document_end: int | None) -> Tensor:
    """Logits [1, L, vocab_size] of `tokens` [1, L], chunk by chunk if the model has a memory. Behind the id
    `document_end` nothing before is seen."""
    if model.config.memory_length:
        return uncached_logits(model, tokens[0].tolist())[None]
    documents = None if document_end is None else document_index(tokens, document_end)
    return model.logits(tokens, documents=documents)[0]


def _any_ids(tokenizer: Tokenizer) -> list[int]:
    """The first ones, where no text gives any."""
    return list(range(min(tokenizer.vocab_size, 200)))


def _check_tokenizer(theirs: Any, ours: Tokenizer) -> list[int]:
    try:
        ids = ours.encode(TEXT)
    except UserError:
        return _any_ids(ours)  # symbols of other texts than this one
    known = [number for number in ids if number != theirs.unk_token_id]  # which each shows as a sign of its own
    if theirs.encode(TEXT) != ids or theirs.decode(known) != ours.decode(known):
        raise UserError("the exported tokenizer gives other ids; this is an error of the exporter, please report it")
    return ids
