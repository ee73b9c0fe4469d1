"""Settings of the stages before tokenising: what is refused as damaged, what is filtered, what is a duplicate."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Share = Annotated[float, Field(ge=0, le=1)]
LanguageCode = Annotated[str, Field(pattern="^[a-z]{2,3}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


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


class FilterConfig(Section):
    """Rules that drop documents. Off as a whole without this section; every rule has its switch."""

    language: Annotated[tuple[LanguageCode, ...], BeforeValidator(as_list)] = ()
    """Languages to keep, as ISO 639-1 codes, e.g. ["en"]; [] keeps all. py3langid decides on the first
    `language_characters`."""
    language_characters: int = Field(default=500, ge=50, le=100_000)
    """Characters that decide the language; 500 cost about 0.4 ms a document."""
    min_words: int = Field(default=50, ge=0)
    """Fewest words (Gopher: 50)."""
    max_words: int = Field(default=100_000, ge=1)
    """Most words (Gopher: 100,000)."""
    gopher_quality: bool = True
    """The quality rules of Gopher (arXiv 2112.11446, table A1): mean word length 3 to 10 characters, at most 0.1
    symbols (# or ...) a word, at most 90% of lines with a bullet and 30% ending in an ellipsis, 80% of words with
    a letter, 2 of the words the, be, to, of, and, that, have, with. The last is for English."""
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
    """Memory of one external sort; more makes fewer runs on disk. Does not change the output."""

    @model_validator(mode="after")
    def _check_some(self) -> "DedupConfig":
        if not (self.exact or self.near):
            raise ValueError("exact and near are both false, so nothing would be removed; drop the section")
        return self
