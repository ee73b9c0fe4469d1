"""Warnings at start that the data are too small for the run, with the number of tokens that would be enough."""

from __future__ import annotations

import math
from typing import Any

from pretrain.config.schema import Config
from pretrain.data.sources import Source, Sources
from pretrain.data.windows import num_windows

MAX_EPOCHS = 4
"""Text read up to four times teaches about as much as new text (Muennighoff et al., arXiv 2305.16264, section 6)."""
SEEN_OFTEN = 10
"""Times that a piece must be met in the data to be learnt at all."""
PADDING = 128
"""Vocabularies are rounded up to a multiple of this for the sake of matrix products."""


def data_warnings(
    config: Config, sources: Sources, reads: list[int] | None = None, so_far: list[int] | None = None
) -> list[str]:
    """One sentence per thing that is too small or too large, with key and remedy. `reads`, `so_far`: see
    `epoch_warnings`."""
    return [*epoch_warnings(config, sources, reads, so_far), *text_warnings(config, sources)]


def text_warnings(config: Config, sources: Sources) -> list[str]:
    """Those of `data_warnings` that do not depend on where the run continues."""
    return [*_vocabulary(config, sources), *_held_out(config, sources)]


def _held_out(config: Config, sources: Sources) -> list[str]:
    wanted, split, T = config.evaluate.sequences, config.evaluate.split, config.model.sequence_length
    there = sum(num_windows(source.manifest, split, T) for source in sources.sources) if wanted else 0
    if wanted <= there:
        return []
    return [
        f"evaluate.sequences: is {wanted:,}, but the {split} split has {there:,} sequences of {T:,} tokens: all "
        f"are read; set it to {there}, or prepare more"
    ]


def epoch_warnings(
    config: Config, sources: Sources, reads: list[int] | None = None, so_far: list[int] | None = None
) -> list[str]:
    """Those about sources that the run reads too often. `reads`: windows of each that it has read by its end; `so_far`:
    where it continues; None: of a run that begins with these sources."""
    T, found = config.model.sequence_length, []
    reads = reads or sources.stage().counts(config.batch.global_sequences * config.train.steps)
    so_far = so_far or [0] * len(reads)
    left = (sum(reads) - sum(so_far)) // config.batch.global_sequences
    for source, count, before in zip(sources.sources, reads, so_far, strict=True):
        size = num_windows(source.manifest, "train", T, max_tokens=config.data.max_tokens)
        if size and count > MAX_EPOCHS * size:  # a source without a window is refused, not warned of
            more = (MAX_EPOCHS * size - before) * left // (count - before) if count > before else 0
            less = f", or set train.steps to at most {config.train.steps - left + more}" if more > 0 else ""
            first, raised = ("first ", " and raise data.max_tokens") if config.data.max_tokens else ("", "")
            found.append(
                f"{source.key}: the run reads the {first}{size * T:,} tokens of {source.manifest.folder} "
                f"{count / size:.1f} times, and text that is read more than {MAX_EPOCHS} times teaches less than new "
                f"text: prepare {math.ceil(count / MAX_EPOCHS) * T:,} tokens{raised}{less}"
            )
    return found


def _vocabulary(config: Config, sources: Sources) -> list[str]:
    if config.train.init_from is not None:
        return []  # weights that are there already decide both sizes, and have learnt what this text lacks
    pieces, rows = sources.tokenizer.vocab_size, config.model.vocab_size
    found = []
    if rows - pieces >= PADDING:
        cost = (1 if config.model.tied_embedding else 2) * (rows - pieces) * config.model.d_model
        found.append(
            f"model.vocab_size: {rows - pieces:,} of {rows:,} rows are no piece of the tokenizer: they are never "
            f"trained and cost {cost:,} parameters; set it to {pieces}, or to {-(-pieces // PADDING) * PADDING}, the "
            f"next multiple of {PADDING}"
        )
    tokens = sum(source.manifest.num_tokens("train") for source in sources.sources)
    tokens = min(tokens, config.data.max_tokens or tokens)
    # Zipf's law: of V pieces the rarest is one of V (1 + 1/2 + ... + 1/V) tokens.
    needed = math.ceil(SEEN_OFTEN * pieces * sum(1 / rank for rank in range(1, pieces + 1)))
    if not sources.tokenizer.tokens_are_bytes and tokens < needed:
        made_here = all("vocab_size" in _settings(source) for source in sources.sources)
        smaller = "set a smaller tokenizer.vocab_size in the preparation" if made_here else "take a smaller tokenizer"
        found.append(
            f"{sources.key}: in its {tokens:,} tokens the rarest of the tokenizer's {pieces:,} pieces are met fewer "
            f"than {SEEN_OFTEN} times, or never (by Zipf's law): prepare {needed:,} tokens, or {smaller}"
        )
    return found


def _settings(source: Source) -> dict[str, Any]:
    """What a preparation was told of its tokenizer: sizes, or which one it was given."""
    found = source.manifest.provenance.config.get("tokenizer")
    return found if isinstance(found, dict) and not {"model_sha256", "name"} & found.keys() else {}
