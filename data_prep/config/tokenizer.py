"""The section `tokenizer` of a preparation's configuration."""

from typing import Any, Literal

from pydantic import Field, model_validator

from common.json_config import Section
from data_prep.shards.format import BYTE_VALUES


class TokenizerConfig(Section):
    """Which tokenizer: an existing SentencePiece model, or how to train one, or none (`type` bytes, symbols, ids)."""

    model: str | None = None
    """Path of an existing SentencePiece model, which is copied into `output`; null trains one. The other keys of this
    section, except `allow_lossy`, `separator` and `sentences`, are for training; a `vocab_size` that is given must be
    that of the model."""
    vocab_size: int = Field(default=8000, ge=8, le=1_000_000)
    """Number of pieces, the special ones and 256 byte pieces included. Above 65,536 ids take 4 bytes instead
    of 2."""
    name: str | None = Field(default=None, min_length=1)
    """What the tokenizer of `type` ids is called, such as gpt2; data sets of two names are not mixed."""
    type: Literal["bpe", "unigram", "bytes", "symbols", "ids"] = "bpe"
    """SentencePiece model type. unigram encodes 5 times faster and trains 30 times slower than bpe. bytes: no
    model; an id is the value of a byte, 256 in all, and nothing is put between documents. symbols: the same, but ids
    number the byte values that occur in the raw files, in rising order; a `vocab_size` that is given must be their
    number (205 in Enwik8, as published). Both are for the formats enwik8 and wikitext, without other keys here. ids:
    those of another tokenizer, which is not here: `name` and `vocab_size` say all that is known of it, and
    `end_of_document` its end. For the formats megatron and token_array."""
    allow_lossy: bool = False
    """Whether a model may change text: whether `model` may be one that normalises (SentencePiece's default, nmt_nfkc,
    loses newlines, tabs, repeated blanks and half the symbols) or that has no pieces for bytes."""
    split_digits: bool = True
    """Whether every digit is a piece of its own."""
    byte_fallback: bool = True
    """Whether characters outside the vocabulary become their UTF-8 bytes; if false they become unk and are
    lost."""
    normalization: Literal["identity", "nmt_nfkc"] = "identity"
    """How a trained model changes text. identity: text comes back as it was. nmt_nfkc: SentencePiece's own defaults,
    with which the papers' models were made: symbols are rewritten, newlines and tabs become blanks, repeated blanks go,
    a blank comes before each text; needs `allow_lossy`."""
    sentences: Literal["cut_lines", "documents", "lines"] = "cut_lines"
    """What SentencePiece gets as one sentence. cut_lines: lines in training, cut if they are too long for it;
    afterwards whole documents. documents: whole documents in both, with the `separator`; those above 4,192 bytes are
    left out of training. lines: lines in both, as with a text file given to SentencePiece; the same limit."""
    separator: str | None = None
    """Text that is put after each document before encoding, instead of the id that ends a document, e.g.
    "<STORY_SEP>"; "" puts nothing there. null: the id."""
    sample_files: int | None = Field(default=None, ge=1)
    """Sample only this many raw files of `input`, the first ones; null: all."""
    sample_bytes: int | None = Field(default=20_000_000, ge=1)
    """Most UTF-8 bytes of text to train on; null: all of it, in its order. With bpe and 8,000 pieces, held-out bytes
    per token (one training each) 3.081 from 10 MB, 3.114 from 20, 3.129 from 50; memory 0.14 GB for 10 MB, 0.37 for 50
    and 0.56 for 100. Up to the default of 20 MB the other steps take more memory, so memory does not depend on how much
    text there is."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Chooses the documents to train on when there is more text than `sample_bytes`."""

    @property
    def has_model(self) -> bool:
        """Whether ids are SentencePiece's, not byte values, their numbers, or ids of another tokenizer."""
        return self.type in ("bpe", "unigram")

    @property
    def has_file(self) -> bool:
        """Whether a file beside the shards says what ids stand for."""
        return self.type not in ("bytes", "ids")

    @model_validator(mode="after")
    def _check_type(self) -> "TokenizerConfig":
        known = {"type", "vocab_size"} | ({"name"} if self.type == "ids" else set())
        useless = sorted(self.model_fields_set - known)
        if not self.has_model and useless:
            raise ValueError(
                f"{', '.join(useless)} has no effect with type {self.type}; keep of the section "
                f"{', '.join(sorted(known & self.model_fields_set))} alone"
            )
        if self.type != "ids" and self.name is not None:
            raise ValueError("name: has no effect without type ids; drop it")
        for key in ("name", "vocab_size"):
            if self.type == "ids" and key not in self.model_fields_set:
                raise ValueError(f"{key}: with type ids nothing else says it; set it to that of the ids' tokenizer")
        if self.type == "bytes" and "vocab_size" in self.model_fields_set and self.vocab_size != BYTE_VALUES:
            raise ValueError(f"vocab_size is {BYTE_VALUES} with type bytes; drop it or set it to that")
        if self.normalization != "identity" and not self.allow_lossy and self.model is None:
            raise ValueError(
                f"normalization {self.normalization} changes text, for example newlines to blanks; set allow_lossy to "
                "true to lose that, or normalization to identity"
            )
        return self

    def training_settings(self) -> dict[str, Any]:
        """What decides a model that is trained, and the ids of documents. Keys that are newer than the first manifests
        are left out at their defaults, so that older data stay up to date."""
        young = {"normalization", "sentences", "separator", "sample_files", "name"}
        settings = self.model_dump(mode="json", exclude={"model", "allow_lossy"})
        defaults = TokenizerConfig().model_dump(mode="json")
        return {key: value for key, value in settings.items() if key not in young or value != defaults[key]}

    def encoding_settings(self) -> dict[str, Any]:
        """What decides the ids of documents, apart from a given model; newer keys as in `training_settings`."""
        return {key: value for key, value in self.training_settings().items() if key in ("sentences", "separator")}
