"""The records of a manifest: shards, tokenizer, totals, provenance. `data_prep.shards.format` puts them together."""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from common.splits import SourceSplit

BYTE_VALUES = 256


def _check_name(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(f"file name {name!r} must be relative and stay inside the folder of the manifest")
    return name


SafeName = Annotated[str, AfterValidator(_check_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardEntry(Record):
    """One shard and its index, as listed in the manifest."""

    file: SafeName
    """Name of the tar, relative to the manifest."""
    bytes: Count
    """Size of the tar."""
    sha256: Sha256
    """Hash of the whole tar."""
    tokens: Annotated[int, Field(ge=1)]
    """Token ids in the shard, EOS included."""
    documents: Annotated[int, Field(ge=1)]
    index_file: SafeName
    """Name of the safetensors index, relative to the manifest."""
    index_bytes: Count
    index_sha256: Sha256


class TokenizerEntry(Record):
    """What made the ids: a SentencePiece model, nothing if the ids are the bytes themselves, or another tokenizer."""

    kind: Literal["sentencepiece", "bytes", "symbols", "ids"] = "sentencepiece"
    """bytes: the id is the value of the byte, and the three keys about a model are absent. symbols: the id numbers the
    byte values that `file` holds in rising order. ids: of a tokenizer that is not here, so there is no `file`. A
    manifest without this key is for SentencePiece."""
    file: SafeName | None = None
    """Name of the model or the list of symbols, relative to the manifest."""
    sha256: Sha256 | None = None
    """Hash of the model; of ids that of the name that the preparation was given for their tokenizer."""
    vocab_size: Annotated[int, Field(ge=2)]
    """Number of pieces; every id is below it. 256 for bytes."""
    eos_id: Count | None = None
    """Id that ends every document; null if nothing or a text does (bytes, symbols, tokenizer.separator)."""

    @model_validator(mode="after")
    def _check_kind(self) -> "TokenizerEntry":
        model = (self.file, self.sha256, self.eos_id)
        if self.kind == "bytes" and (model != (None, None, None) or self.vocab_size != BYTE_VALUES):
            raise ValueError(f"bytes have vocab_size {BYTE_VALUES} and neither file, sha256 nor eos_id")
        if self.kind == "sentencepiece" and None in model[:2]:
            raise ValueError("a SentencePiece model needs file and sha256")
        if self.kind == "symbols" and (None in model[:2] or self.eos_id is not None or self.vocab_size > BYTE_VALUES):
            raise ValueError(f"symbols need file and sha256, are {BYTE_VALUES} at most and have no eos_id")
        if self.kind == "ids" and (self.file is not None or None in model[1:]):
            raise ValueError("ids need sha256 and eos_id, and have no file")
        return self

    @property
    def tokens_are_bytes(self) -> bool:
        """Whether every token stands for one byte, so that bits per token are bits per byte."""
        return self.kind in ("bytes", "symbols")

    @property
    def has_text(self) -> bool:
        """Whether ids can be made of a text, and a text of ids."""
        return self.kind != "ids"

    @property
    def end_tokens(self) -> int:
        """Ids that end a document and are not its text: 1 (EOS), or 0 without one."""
        return 0 if self.eos_id is None else 1


class SplitTotals(Record):
    """Sums over one split."""

    documents: Count
    tokens: Count
    """Token ids, EOS included."""
    text_bytes: Count
    """UTF-8 bytes of the documents' text, EOS excluded: bits per byte = nats * tokens / text_bytes / ln 2. 0 where the
    tokenizer is of kind ids, whose texts nobody knows."""


class InputRecord(Record):
    """One raw file that went in."""

    name: str
    """File name, so that the manifest does not depend on where the file lay; if several have that name, preceded by the
    folders that tell them apart."""
    sha256: Sha256
    """Hash of the file as stored (compressed)."""
    bytes: Count
    """Size of the file as stored (compressed)."""
    documents: Count
    """Documents of it that are in the shards."""
    format: str
    """Source format, as in the config; of auto what was found: c4, pes2o, jsonl, parquet or webdataset."""
    split: SourceSplit
    """Where its documents went."""
    quarantined: dict[str, Count] = {}
    """Records that gave no document, by reason; `damaged file` stands for the whole file."""
    filtered: Count = 0
    """Documents that a filter dropped."""
    duplicates: Count = 0
    """Documents dropped as duplicates."""


class RecordFile(Record):
    """A file beside the manifest that says what was left out."""

    file: SafeName
    """Name, relative to the manifest."""
    bytes: Count
    sha256: Sha256


class Provenance(Record):
    """What the shards were made from and with."""

    inputs: tuple[InputRecord, ...]
    """Raw files in reading order."""
    config: dict[str, JsonValue]
    """Every setting that changes the output, and none that does not (paths, workers)."""
    versions: dict[str, str]
    """Versions of the preparation code and of the packages it used."""
    dropped: dict[str, JsonValue] = {}
    """Documents left out: `quarantined`, `filtered` and `duplicates`, each by reason; absent if nothing was. `lines`:
    what filter.c4_lines took out of documents."""
    records: tuple[RecordFile, ...] = ()
    """What was quarantined, and examples of what was filtered and of duplicates, as JSON lines."""
