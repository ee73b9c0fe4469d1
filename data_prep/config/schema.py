"""The keys of a preparation's configuration: each with its default, its limits and what it does."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from common.json_config import Section
from common.urls import PIPE, URL
from data_prep.config.tokenizer import TokenizerConfig
from data_prep.raw.documents import ENWIK8_SPLIT_BYTES, ID_FORMATS, FormatName
from data_prep.raw.plain_text import TextDocuments


def as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


PathPatterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(as_list)]


SplitBytes = Annotated[
    tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]],
    BeforeValidator(as_list),
]


Share = Annotated[float, Field(ge=0, le=1)]
LanguageCode = Annotated[str, Field(pattern="^[a-z]{2,3}$")]


class IngestConfig(Section):
    """What is read, and when reading stops because too much is damaged."""

    max_document_bytes: int = Field(default=16_777_216, ge=1024, le=1_073_741_824)
    """Longest line (JSON) or article (wikitext) in bytes; a longer one is quarantined. Memory grows with it. A
    longer page of enwik8 is cut in two, which changes no byte."""
    max_bad_records: Share = 0.1
    """Share of malformed records (no JSON, no text, invalid UTF-8, too long) above which the run stops. Empty
    documents are quarantined too but not counted here."""
    max_bad_files: Share = 0.1
    """Share of damaged files (truncated, wrong checksum) above which the run stops; one such file never does,
    unless it is the only one."""


ENGLISH = "en"
"""Code of the language of the stop words of `gopher_quality`."""
RECORDED_STOP_WORDS = "stop_words"
"""In the settings that are recorded: the language in which alone `gopher_quality` asks for stop words."""


class FilterConfig(Section):
    """Rules that drop documents. Off as a whole without this section; every rule has its switch."""

    language: Annotated[tuple[LanguageCode, ...], BeforeValidator(as_list)] = ()
    """Languages to keep, as ISO 639-1 codes, e.g. ["en"]; [] keeps all. py3langid decides on the first
    `language_characters`."""
    language_characters: int = Field(default=500, ge=50, le=100_000)
    """Number of characters that decide the language."""
    min_words: int = Field(default=50, ge=0)
    """Fewest words (Gopher: 50)."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words (Gopher: 100,000)."""
    gopher_quality: bool = True
    """The quality rules of Gopher (arXiv 2112.11446, table A1): mean word length 3 to 10 characters, at most 0.1
    symbols (# or ...) a word, at most 90% of lines with a bullet and 30% ending in an ellipsis, 80% of words with
    a letter, 2 of the words the, be, to, of, and, that, have, with. With `language` the last is asked of English
    documents alone, without it of all."""
    gopher_repetition: bool = True
    """The repetition rules of Gopher (table A1): shares of repeated lines, paragraphs and word n-grams."""
    c4: bool = True
    """The page rules of C4 (arXiv 1910.10683, section 2.2): no "lorem ipsum", no curly bracket, at least
    `c4_min_sentences`. Turn it off for text with code or LaTeX."""
    c4_min_sentences: int = Field(default=3, ge=0)
    """Fewest sentences of a document (C4: 3)."""
    c4_lines: bool = False
    """The line rules of C4: takes out citation markers ([1], [edit], [citation needed]) and drops lines that do not end
    in a terminal mark (. ? ! "), have fewer than 5 words or one of more than 1,000 characters, or mention javascript,
    cookies or terms of use. Changes the text of documents; it runs before all other rules and near-duplicates, while
    `dedup.exact` and `validation_fraction` go by the text as read. With it, `c4` looks at the lines as published."""
    samples: int = Field(default=5, ge=0, le=1000)
    """Dropped documents that are kept as examples for each rule, in filter_samples.jsonl."""

    def settings(self) -> dict[str, Any]:
        """What decides the output, as JSON."""
        settings = self.model_dump(mode="json")
        if self.gopher_quality and set(self.language) - {ENGLISH}:  # data made when it was asked of all are others
            settings[RECORDED_STOP_WORDS] = ENGLISH
        return settings

    @model_validator(mode="after")
    def _check_words(self) -> "FilterConfig":
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}; lower it")
        return self


class DedupConfig(Section):
    """Removal of duplicates over all files and splits; the first document in reading order stays. Off as a whole
    without this section."""

    exact: bool = True
    """Whether to drop documents whose text has been seen before, byte for byte (128 bits of its sha256)."""
    near: bool = True
    """Whether to drop documents that are nearly the same as a kept one before them, by MinHash."""
    threshold: float = Field(default=0.8, ge=0.5, le=1.0)
    """Jaccard similarity of word n-grams, estimated from 256 hashes (standard error 0.02), from which a document
    is dropped."""
    shingle_words: int = Field(default=5, ge=1, le=50)
    """Words of an n-gram; words are runs of letters and digits in lower case."""
    samples: int = Field(default=20, ge=0, le=10_000)
    """Dropped documents that are kept as examples, in duplicate_samples.jsonl."""
    memory_bytes: int = Field(default=67_108_864, ge=1_048_576)
    """Memory of one external sort, of which each process holds up to two; more makes fewer runs on disk. Does not
    change the output."""

    @model_validator(mode="after")
    def _check_some(self) -> "DedupConfig":
        if not (self.exact or self.near):
            raise ValueError("exact and near are both false, so nothing would be removed; drop the section")
        return self


class ShardConfig(Section):
    """Sizes of shards and their members."""

    tokens_per_shard: int = Field(default=67_108_864, ge=1)
    """Tokens after which a shard closes, at the next end of a document. The default makes files of 128
    MiB."""
    tokens_per_member: int = Field(default=131_072, ge=1, le=16_777_216)
    """Tokens of a tar member; 65,536 to 262,144 read fastest. Documents span members."""

    @model_validator(mode="after")
    def _check_sizes(self) -> "ShardConfig":
        if self.tokens_per_member > self.tokens_per_shard:
            member = self.tokens_per_member
            raise ValueError(f"tokens_per_member {member} is more than tokens_per_shard {self.tokens_per_shard}")
        return self


class DataConfig(Section):
    """One preparation: which raw files become which shards."""

    input: PathPatterns = Field(min_length=1)
    """Raw files of the train split: a path, a glob, a URL that fsspec opens (s3://bucket/c4/*.json.gz), the output of
    a command (pipe:xz -dc a.jsonl.xz), or a list of them; {00..09} and {a,b} are expanded. Read in the order of the
    list, each glob sorted. Plain, gzip and zstd."""
    max_input_files: int | None = Field(default=None, ge=1)
    """Read only this many of the files that `input` matches, the first ones, for example as many as a run needs; null:
    all."""
    validation_input: PathPatterns = ()
    """Raw files of the validation split, as `input`. Without it, `validation_fraction` applies."""
    test_input: PathPatterns = ()
    """Raw files of the test split, as `input`; without it there is none. Needs `validation_input`."""
    validation_fraction: float = Field(default=0.005, ge=0, lt=1)
    """Share of the documents of `input` that go to validation, chosen by a hash of their text, so equal texts
    never end up on both sides; or that share of each file, see `validation_from`. Used only without
    `validation_input`."""
    validation_from: Literal["documents", "end"] = "documents"
    """What `validation_fraction` is a share of. documents: of all documents, whole ones. end: of each file of format
    text with `text_documents` file, its end, which becomes a document of its own. So one long text has both splits."""
    split_bytes: SplitBytes | None = None
    """Sizes [train, validation, test] of the consecutive parts of an enwik8 file, which must add up to its
    size; null is the standard 90, 5 and 5 million. Test may be 0. Only with `format` enwik8."""
    output: str = Field(min_length=1)
    """Folder for shards, tokenizer.model and manifest.json."""
    format: FormatName = "auto"
    """Source format of the raw files. auto looks at the first bytes of each file (Parquet, a webdataset tar) and at the
    keys of its first line, and takes anything else with a text for jsonl; c4, pes2o and jsonl skip that look and ask
    only for a text in each line, see `text_key`. parquet: the column `text_key`. webdataset: tars of .txt or .json
    members. text: plain UTF-8 text, see `text_documents`. wikitext: wiki.train.raw (or wiki.train.tokens) as `input`,
    wiki.valid.raw as `validation_input`, wiki.test.raw as `test_input`, a document is an article. enwik8: the one file
    as `input`, see `split_bytes`. For these two a zip as downloaded also does, and documents stay in the order of the
    file. megatron and token_array: token ids of `tokenizer.model`, or of another tokenizer (`tokenizer.type` ids), as
    data sets of Megatron-LM (NAME.bin and NAME.idx) or as arrays of integers."""
    text_key: str = Field(default="text", min_length=1)
    """Where the text of a JSON record or a row of Parquet is; dotted for a key inside another: a.b is
    `{"a": {"b": "..."}}`."""
    text_documents: TextDocuments = "file"
    """What a document is in files of format text: file, the whole file; blank_lines, what stands between lines that
    are blank."""
    end_of_document: int | None = Field(default=None, ge=0)
    """The id that ends each document, or comes before it, in files of format megatron and token_array; it is stored as
    the tokenizer's own and need be no piece. null: the tokenizer's own. With `tokenizer.type` ids it is the tokenizer's
    own, and must be given."""
    id_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Integers of a token_array without a header, little-endian. A .npy and the header of llm.c say it themselves."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Processes; 0 takes every CPU that this process may use. The output does not depend on it."""
    keep_work: bool = False
    """Whether OUTPUT/.work, which holds the finished parts of every stage, stays after the data are published. Then a
    run with other filters or another tokenizer does not read the raw files again. The folder needs about as much disk
    as they do."""
    ingest: IngestConfig = IngestConfig()
    """Limits of reading."""
    filter: FilterConfig | None = None
    """Filters; null for none. Not with wikitext, enwik8 and token ids."""
    dedup: DedupConfig | None = None
    """Removal of duplicates; null for none. Not with wikitext, enwik8 and token ids."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    shard: ShardConfig = ShardConfig()
    """Shard sizes."""

    @model_validator(mode="after")
    def _check_output(self) -> "DataConfig":
        if URL.match(self.output):
            raise ValueError(f"output: {self.output!r} is a URL; name a local folder and copy it when it is done")
        return self

    @model_validator(mode="after")
    def _check_format_keys(self) -> "DataConfig":
        set_keys = self.model_fields_set
        if "text_key" in set_keys and self.format in ("text", "wikitext", "enwik8", *ID_FORMATS):
            raise ValueError(f'text_key: has no effect with format "{self.format}", which is no JSON; drop it')
        if "text_documents" in set_keys and self.format != "text":
            raise ValueError('text_documents: has no effect without format "text"; drop it or set the format')
        if self.validation_from == "end" and (self.format, self.text_documents) != ("text", "file"):
            raise ValueError(
                'validation_from: end is for files that are one document; set format to "text" and text_documents to '
                '"file", or drop it'
            )
        if "end_of_document" in set_keys and self.format not in ID_FORMATS:
            raise ValueError('end_of_document: has no effect without format "megatron" or "token_array"; drop it')
        if "id_dtype" in set_keys and self.format != "token_array":
            raise ValueError('id_dtype: has no effect without format "token_array"; drop it or set the format')
        if self.format in ID_FORMATS:
            self._check_ids()
        return self

    def _check_ids(self) -> None:
        if self.tokenizer.type == "ids":
            if self.end_of_document is None:
                raise ValueError(
                    "end_of_document: tokenizer.type ids does not say it; set it to the id between documents"
                )
            if self.end_of_document >= self.tokenizer.vocab_size:
                raise ValueError(
                    f"end_of_document: {self.end_of_document} is no id below tokenizer.vocab_size "
                    f"{self.tokenizer.vocab_size}, which counts it"
                )
        elif self.tokenizer.model is None:
            raise ValueError(
                f'tokenizer.model: format "{self.format}" is token ids; name the SentencePiece model that made them, '
                "or set tokenizer.type to ids if another tokenizer did"
            )
        if self.tokenizer.separator is not None:
            raise ValueError(f'tokenizer.separator: has no effect with format "{self.format}"; drop it')
        if self.format == "megatron" and any(URL.match(name) or name.startswith(PIPE) for name in self._patterns):
            raise ValueError('input: format "megatron" is read from local files, a .bin and its .idx; copy them here')

    @property
    def _patterns(self) -> tuple[str, ...]:
        return (*self.input, *self.validation_input, *self.test_input)

    @model_validator(mode="after")
    def _check_splits(self) -> "DataConfig":
        if self.format == "enwik8":
            self._check_enwik8()
        elif self.split_bytes is not None:
            raise ValueError('split_bytes: has no effect without format "enwik8"; drop it')
        if self.format == "wikitext" and not self.validation_input:
            raise ValueError('format: "wikitext" comes in splits; set validation_input to its wiki.valid.raw')
        if self.tokenizer.type == "ids":
            if self.format not in ID_FORMATS:
                raise ValueError(
                    f"tokenizer.type: ids is for formats that hold token ids ({', '.join(ID_FORMATS)}), not "
                    f'"{self.format}"; use bpe or unigram'
                )
        elif not self.tokenizer.has_model and self.format not in ("enwik8", "wikitext"):
            raise ValueError(
                f"tokenizer.type: {self.tokenizer.type} have no end-of-document id, which the documents of format "
                f'"{self.format}" need; use bpe or unigram'
            )
        for key in ("filter", "dedup"):
            if getattr(self, key) is not None and self.format in ("enwik8", "wikitext"):
                raise ValueError(f'{key}: format "{self.format}" is used whole, in its order; drop the section')
            if getattr(self, key) is not None and self.format in ID_FORMATS:
                raise ValueError(
                    f'{key}: format "{self.format}" is token ids, and {key} looks at text; drop the section'
                )
        if self.test_input and not self.validation_input:
            raise ValueError("test_input: needs validation_input; set it too")
        for key in ("validation_fraction", "validation_from"):
            if self.validation_input and key in self.model_fields_set:
                raise ValueError(f"{key}: has no effect with validation_input; drop it or set validation_input=[]")
        return self

    def _check_enwik8(self) -> None:
        for key in ("validation_input", "test_input", "validation_fraction"):
            if key in self.model_fields_set:
                raise ValueError(f'{key}: has no effect with format "enwik8", whose splits are split_bytes; drop it')
        if self.tokenizer.type not in ("bytes", "symbols"):
            raise ValueError('tokenizer.type: format "enwik8" is bytes; set tokenizer to {"type": "bytes"}')

    def stage_settings(self) -> dict[str, Any]:
        """The settings of ingest, filter and dedup that change the output; the default limits and what is off are left
        out."""
        sections = {
            "ingest": self.ingest.model_dump(mode="json", exclude_defaults=True, include={"max_document_bytes"}),
            **self.reading_settings(),
            "filter": self.filter and self.filter.settings(),
            "dedup": self.dedup and self.dedup.model_dump(mode="json", exclude={"memory_bytes"}),
        }
        return {name: settings for name, settings in sections.items() if settings}

    def reading_settings(self) -> dict[str, Any]:
        """The settings that decide which text of a record is a document; empty if they are the defaults."""
        settings: dict[str, Any] = {} if self.text_key == "text" else {"text_key": self.text_key}
        if self.format == "text":
            settings["text_documents"] = self.text_documents
        if self.held_out_of_files:
            settings["validation_from"] = [self.validation_from, self.validation_fraction]
        if self.format in ID_FORMATS:
            settings["end_of_document"] = self.end_of_document
        if self.format == "token_array":
            settings["id_dtype"] = self.id_dtype
        return settings

    @property
    def held_out_of_files(self) -> float:
        """The share of each file that is held out, its end; 0 where whole documents are."""
        return self.validation_fraction if self.validation_from == "end" else 0.0

    @property
    def enwik8_split_bytes(self) -> tuple[int, int, int]:
        """`split_bytes`, null resolved."""
        return self.split_bytes or ENWIK8_SPLIT_BYTES
