"""From a document to its ids: by a SentencePiece model, by the values of its bytes, or by the numbers of these; or they
are there already."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.hashing import sha256_file, sha256_json
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.shards.format import BYTE_VALUES, TOKENIZER_FILE, TokenizerEntry, dtype_name
from data_prep.stages.tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class IdRecipe:
    """How documents become ids; small, so that tasks carry it."""

    model: Path | None
    """SentencePiece model, or the symbols in the order of their ids; None for bytes, and for ids of other
    tokenizers."""
    settings: TokenizerConfig
    takes_ids: bool = False
    """Whether documents are ids already, as bytes in the dtype of shards; `model`, if there is one, made them."""
    eos_id: int | None = None
    """Of ids of another tokenizer: the one that ends documents."""

    def maker(self) -> "IdMaker":
        """The same object while the recipe and the file stay the same."""
        return _made(self, 0 if self.model is None else self.model.stat().st_mtime_ns)

    def key(self) -> list[object]:
        """What decides the ids, for the name of a folder."""
        if self.settings.type == "ids":
            return [*self._other_tokenizer]
        ids = self.settings.type if self.model is None else sha256_file(self.model)
        return [ids, *self.settings.encoding_settings().items()]

    @property
    def _other_tokenizer(self) -> tuple[str, str | None, int, int | None]:
        """What is known of the tokenizer of ids that are there already."""
        return "ids", self.settings.name, self.settings.vocab_size, self.eos_id

    def entry(self) -> TokenizerEntry:
        """What the manifest says of it."""
        maker = self.maker()
        if self.settings.type == "ids":
            sha256 = sha256_json([*self._other_tokenizer])
            return TokenizerEntry(kind="ids", sha256=sha256, vocab_size=maker.vocab_size, eos_id=maker.eos_id)
        if self.model is None:
            return TokenizerEntry(kind="bytes", vocab_size=BYTE_VALUES)
        return TokenizerEntry(
            kind="sentencepiece" if self.settings.has_model else "symbols",
            file=TOKENIZER_FILE,
            sha256=sha256_file(self.model),
            vocab_size=maker.vocab_size,
            eos_id=maker.eos_id,
        )


class IdMaker:
    """Makes the ids of documents."""

    def __init__(self, recipe: IdRecipe) -> None:
        self._settings = recipe.settings
        self._takes_ids = recipe.takes_ids
        self._tokenizer, self._numbers = None, None
        self.eos_id: int | None = None
        """Id that is put after each document; None if nothing or a text is."""
        self.vocab_size = BYTE_VALUES
        if recipe.settings.type == "ids":
            self.eos_id, self.vocab_size = recipe.eos_id, recipe.settings.vocab_size
        if recipe.model is None:
            return
        if recipe.settings.has_model:
            self._tokenizer = TextTokenizer.load(recipe.model)
            self.vocab_size = self._tokenizer.vocab_size
            self.eos_id = self._tokenizer.eos_id if recipe.settings.separator is None else None
        else:
            symbols = read_symbols(recipe.model)
            self.vocab_size = len(symbols)
            self._numbers = np.zeros(BYTE_VALUES, np.uint8)
            self._numbers[symbols] = np.arange(len(symbols))

    def ids(self, data: bytes) -> np.ndarray:
        """Integers [n]: the ids of a document in UTF-8 (or any bytes, without a model), `eos_id` not among them."""
        if self._takes_ids:
            return np.frombuffer(data, self.dtype)
        if self._tokenizer is None:
            values = np.frombuffer(data, np.uint8)
            return values if self._numbers is None else self._numbers[values]
        text = data.decode("utf-8") + (self._settings.separator or "")
        by_line = self._settings.sentences == "lines"
        return self._tokenizer.encode_lines(text) if by_line else self._tokenizer.encode(text)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the ids in shards."""
        return np.dtype(dtype_name(self.vocab_size))

    def text_bytes(self, data: bytes, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text of a document, given also its ids; 0 where ids have no text."""
        if not self._takes_ids:
            return len(data)
        if self._tokenizer is None:
            return 0
        sizes, prefixes = self._sizes
        return int(sizes[ids].sum()) - int(prefixes[ids[:1]].sum())

    def text_piece(self, number: int) -> str | None:
        """As TextTokenizer's; None where ids have no text."""
        return None if self._tokenizer is None else self._tokenizer.text_piece(number)

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """`piece_bytes` and `prefix_bytes` of the tokenizer."""
        assert self._tokenizer is not None
        return self._tokenizer.piece_bytes(), self._tokenizer.prefix_bytes()


@lru_cache(maxsize=1)  # per process
def _made(recipe: IdRecipe, stamp: int) -> IdMaker:
    return IdMaker(recipe)


def read_symbols(path: Path) -> np.ndarray:
    """uint8 [n]: the byte value of each id. Raises DataError for a file that is no rising list of them."""
    symbols = np.frombuffer(path.read_bytes(), np.uint8)
    if not 2 <= len(symbols) <= BYTE_VALUES or (np.diff(symbols.astype(np.int64)) < 1).any():
        raise DataError(f"{path} is no list of rising byte values; prepare the data again")
    return symbols


def symbols_of(counts: np.ndarray, settings: TokenizerConfig) -> bytes:
    """The file of symbols: the byte values that occur, `counts` int64 [256] of them. Raises DataError."""
    values = np.flatnonzero(counts).astype(np.uint8)
    if "vocab_size" in settings.model_fields_set and settings.vocab_size != len(values):
        raise DataError(
            f"tokenizer.vocab_size: the raw files hold {len(values)} different bytes, not {settings.vocab_size}; set "
            f"it to {len(values)}, or fetch the file again"
        )
    if len(values) < 2:
        raise DataError(f"input: the raw files hold {len(values)} different bytes; two are needed to learn anything")
    return values.tobytes()
