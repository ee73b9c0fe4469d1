"""Which documents of a part the stages before have kept, and their text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from common.presence import exists
from data_prep.stages.c4_rules import clean_page
from data_prep.stages.filter import filtered_out
from data_prep.work.parts import Part, read_documents, read_index

EXACT, NEAR = 1, 2  # what the dedup stage says of a document; 0 keeps it


def duplicate_verdicts(folder: Path, part: Part) -> np.ndarray:
    """uint8 [documents]: 0, EXACT or NEAR."""
    path = folder / f"{part.name}.safetensors"
    if not exists(path):  # no file for a part without duplicates
        return np.zeros(part.documents, np.uint8)
    verdicts: np.ndarray = safetensors.numpy.load_file(path)["verdict"]
    return verdicts


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The results of the stages up to some point; small, so that tasks carry it."""

    ingest: Path
    filter: Path | None = None
    dedup: Path | None = None
    clean_lines: bool = False
    """Whether the line rules of C4 change the text."""

    def keep(self, part: Part) -> np.ndarray:
        """bool [documents]: which documents of a part are left."""
        kept = np.ones(part.documents, np.bool_)
        if self.filter is not None:
            kept &= ~filtered_out(self.filter, part)
        if self.dedup is not None:
            kept &= duplicate_verdicts(self.dedup, part) == 0
        return kept

    def documents(self, part: Part, chosen: np.ndarray | None = None) -> Iterator[tuple[int, bytes]]:
        """(number in the part, bytes) of the documents that are left, or of those `chosen` (bool [documents])."""
        chosen = self.keep(part) if chosen is None else chosen
        index = read_index(self.ingest, part.name)
        for number, data in enumerate(read_documents(self.ingest, part.name, index.size)):
            if chosen[number]:
                yield number, clean_page(data.decode("utf-8")).text.encode("utf-8") if self.clean_lines else data
