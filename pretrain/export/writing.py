"""A checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import write_file, write_json
from common.folders import free_bytes, no_room
from common.paths import REPOSITORY
from common.progress_bar import count_bytes, heartbeat
from data_prep.shards.format import Manifest
from pretrain.checkpoint.folder import Checkpoint, while_they_are_there
from pretrain.checkpoint.prepared_data import find_data
from pretrain.checkpoint.tokenizer_file import StoredTokenizer
from pretrain.config.schema import Config
from pretrain.export import folder as names
from pretrain.export.card import NO_LICENSE, CardFacts, card
from pretrain.export.data_sets import DataSet, data_sets_of, provenance_of
from pretrain.export.folder import checked_output, new_folder
from pretrain.export.hf_config import check_layers, hf_config
from pretrain.export.origin import origin_of
from pretrain.export.tokenizer_config import check_tokenizer, special_ids, tokenizer_config
from pretrain.export.verify import verify
from pretrain.export.weights import DTYPES, bytes_of, write_weights
from pretrain.saved_model.loading import config_of, find_tokenizer

OPTION = "--to"
BESIDE_WEIGHTS = 4 << 20
"""Bytes that the other files take at most, but for the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    most_bytes: int = 5 * 10**9
    """Bytes of tensors in one file."""
    license: str = NO_LICENSE
    """Of the weights, an identifier that the Hugging Face hub knows."""
    data: Sequence[str | Path] = ()
    """Folders of prepared data, where to look for the tokenizer."""
    verify: bool = False
    """Whether the folder is loaded with transformers, and its logits compared, before it gets its name."""
    ema: bool = False
    """Whether the moving average is exported instead of the weights."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What an export is made of."""

    checkpoint: Checkpoint
    config: Config
    tokenizer: StoredTokenizer
    content: bytes
    """Of the tokenizer's file."""
    manifest: Manifest | None
    """Of the data, where they are."""
    data_sets: list[DataSet]
    """Of a run that has read several."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, data: Sequence[str | Path]) -> _Source:
        config = config_of(checkpoint)
        tokenizer, manifest = find_tokenizer(checkpoint, data)
        return cls(
            checkpoint=checkpoint,
            config=config,
            tokenizer=tokenizer,
            content=check_tokenizer(tokenizer, config.model),
            manifest=find_data(checkpoint)[0] if manifest is None else manifest,
            data_sets=data_sets_of(checkpoint, config, [str(place) for place in data]),
        )


def export(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> None:
    """Writes the export `out`; an older export of that name is replaced. Raises UserError; `out` is then what it was.

    The checkpoint's files are compared with their sha256 first.
    """
    out = checked_output(out, OPTION)
    check_layers(config_of(checkpoint).model)
    with while_they_are_there([checkpoint.path], "RUN"):
        _export(checkpoint, out, options)


def _export(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> None:
    source = _Source.of(checkpoint, options.data)
    size = bytes_of(checkpoint.state["parameters"], options.dtype)
    needed = size + len(source.content) + BESIDE_WEIGHTS
    if free_bytes(out.parent) < needed:
        raise UserError(f"{OPTION}: {no_room(out, needed, 'the export')}; free some, or name a folder on another disk")
    checkpoint.check_files()
    with new_folder(out, OPTION) as place:
        write_weights(
            place,
            checkpoint,
            dtype=options.dtype,
            most_bytes=options.most_bytes,
            wrote=count_bytes("writing weights", size),
            ema=options.ema,
        )
        _write_rest(place, source, options, name=out.name)
        found = ""
        if options.verify:
            with heartbeat("loading it with transformers and comparing logits"):  # half of the time that all takes
                found = verify(place, checkpoint, DTYPES[options.dtype], data=options.data, ema=options.ema)
        count = len(list(place.iterdir()))
    kind = "weights' moving average" if options.ema else "weights"
    print(f"{out}: step {checkpoint.progress.step:,}, {size:,} bytes of {kind}, {count} files", flush=True)
    if found:
        print(found, flush=True)


def _write_rest(place: Path, source: _Source, options: ExportOptions, *, name: str) -> None:
    """Everything but the weights."""
    model, tokenizer, content = source.config.model, source.tokenizer, source.content
    origin = origin_of(source.checkpoint, source.config, tokenizer, ema=options.ema)
    special = special_ids(tokenizer, content)
    document_end = tokenizer.entry.eos_id if source.config.data.document_mask else None
    architecture = hf_config(model, dtype=options.dtype, special=special, document_end=document_end)
    write_json(place / names.CONFIG, architecture, indent=2)
    write_json(place / names.GENERATION, {key: value for key, value in special.items() if value is not None}, indent=2)
    has_text = tokenizer.entry.has_text
    if has_text:
        write_file(place / names.TOKENIZER, content)
        write_json(place / names.TOKENIZER_CONFIG, tokenizer_config(tokenizer, content, model, special), indent=2)
    write_json(place / names.ORIGIN, origin, indent=2)
    for file in names.CODE if has_text else names.CODE_OF_MODEL:
        write_file(place / file, (Path(__file__).parent / file).read_bytes())
    write_file(place / names.LICENSE, (REPOSITORY / "LICENSE").read_bytes())
    facts = CardFacts(
        name=name,
        license=options.license,
        dtype=options.dtype,
        origin=origin,
        provenance=None if source.manifest is None else provenance_of(source.manifest),
        data_sets=source.data_sets,
        tokens_are_bytes=tokenizer.entry.tokens_are_bytes,
        has_eos=tokenizer.entry.eos_id is not None,
        has_text=has_text,
        sees_one_document=document_end is not None,
    )
    write_file(place / names.CARD, card(model, facts).encode())
