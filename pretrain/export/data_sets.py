"""What the model card says of the data: of every data set that the run has read, not only the one of the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from data_prep.shards.format import Manifest
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.prepared_data import data_at, moved_data
from pretrain.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One of those that a run has read."""

    name: str
    digest: str
    tokens: int
    """How many the run has read of it, over all epochs, without what a rollback left out."""
    provenance: dict[str, Any] | None
    """See `provenance_of`; None if the prepared data were not found."""


def data_sets_of(checkpoint: Checkpoint, config: Config, places: Sequence[str]) -> list[DataSet]:
    """All of a run that has read several, those of earlier stages included; none of another. `places`: --data."""
    stages = checkpoint.progress.stages
    if not stages or len(stages[-1].sources) < 2:
        return []
    last, length = stages[-1], config.model.sequence_length
    read, left_out = iter(last.counts(checkpoint.progress.position)), checkpoint.progress.left_out()
    where = [source.manifest for source in moved_data(checkpoint, config, places).data.sources]
    found = {}
    for place in [*where, *places]:
        try:
            manifest = data_at(checkpoint, config, place)
        except (UserError, OSError):
            continue
        found[manifest.digest] = provenance_of(manifest)
    return [
        DataSet(
            name=source.name,
            digest=source.digest,
            tokens=((next(read) if source.weight else source.read) - left_out[source.digest]) * length,
            provenance=found.get(source.digest),
        )
        for source in last.sources
    ]


def provenance_of(manifest: Manifest) -> dict[str, Any]:
    """`totals` and the raw files of a data set."""
    tree = manifest.model_dump(mode="json", include={"totals", "provenance"})
    return {"totals": tree["totals"], "inputs": tree["provenance"]["inputs"]}
