"""A tokenizer apart from its data set: beside the data, or inside a checkpoint of weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.shards.format import Manifest
from data_prep.shards.manifest_records import TokenizerEntry
from pretrain.checkpoint.folder import Checkpoint, DamagedCheckpoint


@dataclass(frozen=True, kw_only=True)
class StoredTokenizer:
    """The entry of a manifest, and the folder that holds the file it names."""

    entry: TokenizerEntry
    folder: Path
    by_line: bool = False
    """Whether the data were encoded line by line, as `tokenizer.sentences` of their preparation says."""

    @classmethod
    def of(cls, manifest: Manifest) -> StoredTokenizer:
        """The tokenizer of a data set, where the data set is."""
        settings = manifest.provenance.config.get("tokenizer")
        by_line = isinstance(settings, dict) and settings.get("sentences") == "lines"
        return cls(entry=manifest.tokenizer, folder=manifest.folder, by_line=by_line)

    @classmethod
    def inside(cls, checkpoint: Checkpoint) -> StoredTokenizer | None:
        """The tokenizer that lies in a checkpoint of weights alone, if one does. Raises DamagedCheckpoint."""
        found = (checkpoint.state.get("weights_only") or {}).get("tokenizer")
        if found is None:
            return None
        try:
            entry = TokenizerEntry.model_validate(found["entry"])
            return cls(entry=entry, folder=checkpoint.path, by_line=bool(found["by_line"]))
        except (ValidationError, KeyError, TypeError):
            raise DamagedCheckpoint(f"checkpoint {checkpoint.path}: its tokenizer cannot be read") from None

    @property
    def use(self) -> dict[str, Any]:
        """How the data use the file, which its sha256 does not say: what ends a document (tokenizer.separator), and
        what is encoded at once (tokenizer.sentences). Checkpoints record it."""
        return {"eos_id": self.entry.eos_id, "by_line": self.by_line}

    @property
    def path(self) -> Path | None:
        """The model, or the list of symbols; None if ids are bytes."""
        return None if self.entry.file is None else self.folder / self.entry.file
