"""What a user sees of prepared data: verification table, statistics, documents."""

import sys
import time
from collections.abc import Callable

import numpy as np

from common.errors import DataError
from common.tables import counted, text_table
from common.terminal import visible
from data_prep.config.schema import DataConfig
from data_prep.raw.documents import ID_FORMATS
from data_prep.report.stats import QUANTILES, READ_TOKENS, TOTALS, Lengths, dropped_rows, other_tokenizer, totals_rows
from data_prep.run.preparation import Preparation
from data_prep.shards.format import REBUILD, Manifest
from data_prep.shards.reader import ShardReader, SplitReader
from data_prep.stages.id_maker import read_symbols
from data_prep.stages.ingest import name_bad_files
from data_prep.stages.tokenizer import TextTokenizer


def verify(manifest: Manifest) -> None:
    """Checks everything, every byte included, and prints one row per shard. Raises DataError at the first
    mismatch."""
    started = time.monotonic()
    manifest.check("full", show_progress=True)
    for split in manifest.splits:
        _check_content(manifest, split)
    rows = [(e.file, e.documents, e.tokens, e.bytes, e.sha256[:12], "ok") for e in manifest.entries]
    print(text_table(("shard", "documents", "tokens", "bytes", "sha256", "state"), rows))
    tokenizer = manifest.tokenizer
    if not tokenizer.has_text:
        print(f"tokenizer: not here; {tokenizer.vocab_size} ids of {other_tokenizer(manifest)}")
    elif tokenizer.sha256 is None:
        print(f"tokenizer: bytes, {tokenizer.vocab_size} values, no model")
    else:
        unit = "symbols" if tokenizer.kind == "symbols" else "pieces"
        print(f"tokenizer {tokenizer.file}: {tokenizer.vocab_size} {unit}, sha256 {tokenizer.sha256[:12]}, ok")
    print(f"manifest digest {manifest.digest}, ok: {counted(len(rows), 'shard')} in {time.monotonic() - started:.1f} s")


def _check_content(manifest: Manifest, split: str) -> None:
    """Checks what hashes cannot tell: ids are below the vocabulary's size, and EOS ends documents and is nowhere else.
    Raises DataError with the shard."""
    eos, vocab_size = manifest.tokenizer.eos_id, manifest.tokenizer.vocab_size
    for entry in manifest.split(split):
        reader = ShardReader(manifest, entry, False)
        ends = np.append(reader.document_starts[1:], reader.num_tokens) - 1
        for start in range(0, reader.num_tokens, READ_TOKENS):
            tokens = reader.read(start, min(start + READ_TOKENS, reader.num_tokens))
            if tokens.max() >= vocab_size:
                raise DataError(f"{entry.file} holds the id {tokens.max()}, the vocabulary {vocab_size}")
            low, high = np.searchsorted(ends, [start, start + len(tokens)])
            wrong = np.setxor1d(start + np.flatnonzero(tokens == eos), ends[low:high])
            if eos is not None and len(wrong):
                raise DataError(
                    f"{entry.file}: documents do not end where its index says, first at token {wrong[0]:,}; {REBUILD}"
                )
        reader.close()


def stats(manifest: Manifest) -> None:
    """Prints totals of each split and the distribution of tokens per document (EOS not counted)."""
    lengths = []
    for split, sums in manifest.totals.items():
        if sums.documents:
            of_split = Lengths.of(manifest, split)
            lengths.append((split, *of_split.quantiles(), f"{of_split.mean:,.1f}"))
    print(text_table(TOTALS, totals_rows(manifest)))
    print()
    print("tokens per document")
    print(text_table(("split", *QUANTILES, "mean"), lengths))


def dropped(manifest: Manifest) -> None:
    """Prints how many documents each stage left out, by reason; nothing if none."""
    rows = dropped_rows(manifest)
    if rows:
        print()
        print(text_table(("left out", "reason", "documents"), rows))
    if lines := manifest.provenance.dropped.get("lines"):
        print(f"lines of documents that filter.c4_lines dropped: {lines:,}")


def empty_splits(manifest: Manifest, config: DataConfig) -> None:
    """Warns on stderr of held-out splits without a document, with what would give them some."""
    for split in manifest.splits:
        if split == "train" or manifest.split(split):
            continue
        if config.format == "enwik8":
            fix = "split_bytes gives it none"
        elif config.validation_input:
            fix = f"nothing of {split}_input is left, and the table above says why"
        elif config.validation_fraction == 0:  # as it was told to
            fix = "validation_fraction is 0; train on it without a validation, --set evaluate.sequences=0"
        else:
            fix = _more_for_validation(manifest.totals["train"].documents, config)
        print(f"warning: no document went to {split}; {fix}", file=sys.stderr)


def _more_for_validation(documents: int, config: DataConfig) -> str:
    """What would hold out something of so many documents."""
    if config.held_out_of_files:
        return "the ends of files are left out, as the table above says, or too short; raise validation_fraction"
    alone = "validation_fraction is a share of whole documents, and there is one"
    if config.format in ID_FORMATS and documents == 1:
        return f"{alone}; name a file with its end as validation_input, and one without it as input"
    raised = "raise validation_fraction to get some"
    if config.format not in ("auto", "text") and documents > 1:
        return raised
    by_file = (
        "of plain text (format=text) validation_from=end holds out the end of each file, and "
        "text_documents=blank_lines makes documents of what stands between blank lines"
    )
    return f"{raised}; or, {by_file}" if documents > 1 else f"{alone}; {by_file}"


def found_so_far(preparation: Preparation) -> None:
    """Prints what the steps so far found in the raw files of this slice."""
    states = preparation.file_states(all_slices=False)
    rejected = sum(sum(state.rejected.values()) for state in states)
    text_bytes = sum(part.bytes for part in preparation.parts(all_slices=False))
    rows = [(len(states), sum(state.documents for state in states), text_bytes, rejected)]
    what = "bytes of ids" if preparation.resolved.config.format in ID_FORMATS else "text bytes"
    print(text_table(("raw files", "documents", what, "quarantined"), rows))


def bad_files(preparation: Preparation) -> None:
    """Names on stderr the raw files that were left out whole."""
    name_bad_files(preparation.file_states(all_slices=preparation.slice.is_all))


def show(manifest: Manifest, *, split: str, index: int, count: int) -> None:
    """Prints documents decoded from the shards (bytes that are no UTF-8 as U+FFFD). Raises DataError for an unknown
    split or number."""
    manifest.check("size")
    decode = _decoder(manifest)
    with SplitReader(manifest, split, verify_on_first_read=True) as reader:
        for number in range(index, index + count):
            ids = reader.document(number)
            print(f"=== {split} document {number} of {reader.num_documents:,}: {len(ids):,} tokens ===")
            print(visible(decode(ids)))


def _decoder(manifest: Manifest) -> Callable[[np.ndarray], str]:
    """Ids [n] to text, by the tokenizer of the manifest; to numbers where it is not here."""
    if not manifest.tokenizer.has_text:
        return lambda ids: " ".join(map(str, ids.tolist()))
    if manifest.tokenizer.file is None:
        return lambda ids: ids.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    path = manifest.folder / manifest.tokenizer.file
    if manifest.tokenizer.kind == "symbols":
        symbols = read_symbols(path)
        return lambda ids: symbols[ids].tobytes().decode("utf-8", errors="replace")
    return TextTokenizer.load(path).decode
