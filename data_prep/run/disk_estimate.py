"""How much disk a preparation will take, compared with the free space before it begins.

bytes = text (stored as zstd) + ids, twice (as made, and in shards) + signatures, with

    text        stored bytes of the raw files, 3 times that where they are packed
    as zstd     text / 2.5; nothing where ids are made while reading
    ids         text / 4 tokens (bytes, symbols: text) of 2 bytes, above 65,536 pieces of 4
    signatures  500 bytes a document of 2,000, for near-duplicates

Token ids that are there already take their stored bytes twice. Files behind URLs and commands are not counted. Filters
may leave much less, so a disk with less room than the estimate gives a warning; the preparation is refused only if less
than a quarter of the estimate is free.
"""

import contextlib
import os
import sys
from pathlib import Path

from common.errors import DataError
from common.folders import free_bytes, no_room
from data_prep.config.resolved import ResolvedConfig
from data_prep.raw.documents import ID_FORMATS
from data_prep.raw.unpack import PACKED_SUFFIXES

UNPACKED = 3  # bytes of text for a stored one, of JSON lines in gzip or zstd
ZSTD = 2.5
BYTES_PER_TOKEN = 4
SIGNATURE_BYTES, DOCUMENT_BYTES = 500, 2000
REFUSED_BELOW = 4
WHAT = "the work folder and the shards"


def needed_bytes(resolved: ResolvedConfig) -> int:
    """The estimate at the top of this file, for all of a preparation."""
    config, text = resolved.config, 0
    for source in resolved.sources:
        if isinstance(source.path, Path) and source.path.is_file():
            packed = source.path.suffix.lower() in (*PACKED_SUFFIXES, ".parquet")
            text += source.path.stat().st_size * (UNPACKED if packed else 1)
    if config.format in ID_FORMATS:
        return 2 * text
    has_model = config.tokenizer.has_model  # else an id is a byte, or the number of one
    id_bytes = 4 if has_model and config.tokenizer.vocab_size > 65_536 else 2
    needed = 2 * id_bytes * text / (BYTES_PER_TOKEN if has_model else 1)
    if not resolved.may_encode_while_reading:
        needed += text / ZSTD
    if config.dedup is not None and config.dedup.near:
        needed += text / DOCUMENT_BYTES * SIGNATURE_BYTES
    return int(needed)


def used_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, 0 if there is none: what a run that was killed has done already."""
    used = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # other array tasks rename what they have finished
                used += os.lstat(os.path.join(place, name)).st_size
    return used


def fullest(resolved: ResolvedConfig) -> Path:
    """`output`, or the work folder if that is a link to a disk with less room."""
    return min(resolved.output, resolved.work, key=free_bytes)


def check_room(resolved: ResolvedConfig) -> None:
    """Warns if the disk of `output` has less room than estimated; raises DataError if it has less than a quarter of
    that."""
    needed, folder = needed_bytes(resolved), fullest(resolved)
    free = free_bytes(folder)
    if free >= needed:  # then every array task need not walk over a work folder of 200,000 files, as C4's has
        return
    needed -= used_bytes(resolved.work)
    if free >= needed:
        return
    sentence = f"output: {no_room(folder, needed, WHAT, about=True)}"
    if free * REFUSED_BELOW < needed:
        raise DataError(f"{sentence}; make room, or choose another `output`")
    print(f"warning: {sentence}; filters may leave less text, else it stops there", file=sys.stderr)
