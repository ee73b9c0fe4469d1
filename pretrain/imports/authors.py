"""The SwitchHead authors' weights as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from common.hashing import sha256_file
from data_prep.shards.manifest_records import TokenizerEntry
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.checkpoint.weights import WeightsOrigin
from pretrain.config.schema import Config
from pretrain.data.sources import Sources
from pretrain.imports.layers import convert
from pretrain.imports.names import AUTHORS, State
from pretrain.imports.reading import read_state


def read_authors(
    source: Path, config: Config, *, renames: Sequence[tuple[str, str]], tokenizer: Path | None
) -> tuple[WeightsOrigin, dict[str, Callable[[], Tensor]], list[str]]:
    """Weights under our names, as functions that give the whole parameter in fp32, and the keys of the source that no
    output depends on. `source`: a file of torch.save (a state dict, or a training checkpoint) or safetensors. `config`:
    of the model that it holds, and of data with its tokenizer, unless `tokenizer` names a SentencePiece model. Raises
    UserError."""
    state = State(source.name, read_state(source), [*renames, *AUTHORS])
    tensors, ignored = convert(state, config.model)
    stored, digest = (_of_file(tokenizer), "") if tokenizer is not None else _of_data(config)
    if stored.entry.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} rows cannot hold the tokenizer's {stored.entry.vocab_size} "
            f"pieces; name the tokenizer that the weights were trained with"
        )
    origin = WeightsOrigin(
        config=config, source=f"imported from {source.name}", tokenizer=stored, manifest_digest=digest
    )
    return origin, tensors, ignored


def _of_data(config: Config) -> tuple[StoredTokenizer, str]:
    try:
        sources = Sources.load(config)
    except UserError as error:
        raise UserError(
            f"{error}; or name the SentencePiece model that the weights were trained with: --tokenizer FILE"
        ) from None
    return StoredTokenizer.of(sources.sources[0].manifest), sources.digest


def _of_file(path: Path) -> StoredTokenizer:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except OSError as error:
        raise UserError(f"--tokenizer: {path} cannot be read: {error.strerror}") from None
    except RuntimeError:
        raise UserError(f"--tokenizer: {path} is not a SentencePiece model") from None
    eos = model.eos_id()
    entry = TokenizerEntry(
        file=path.name,
        sha256=sha256_file(path),
        vocab_size=model.vocab_size(),
        eos_id=eos if eos >= 0 else None,
    )
    return StoredTokenizer(entry=entry, folder=path.parent)
