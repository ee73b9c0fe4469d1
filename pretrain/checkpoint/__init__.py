"""Checkpoints: written by any layout of ranks, read by any other, whole or not there at all.

A checkpoint is the folder checkpoints/step-NNNNNNNN with
    rank-RRRRR.safetensors   the rectangles of tensors that this rank owned (state.py lists the tensors)
    tensors.json             shape and dtype of every tensor, and the file that holds each of its rectangles
    state.json               everything else, with size and sha256 of the files above
    commit.json              size and sha256 of state.json; written last
It is written as step-NNNNNNNN.partial and renamed once complete. A folder without commit.json is no checkpoint.

torch.distributed.checkpoint (DCP) plans which rank writes and reads what; storage.py stores safetensors and JSON
instead of DCP's pickles. fragments.py describes rectangles, state.py says what is saved, loading.py reads it back,
folder.py knows the folders on the disk, saver.py decides when to save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.folder import (
    FORMAT_VERSION,
    STATE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    Retention,
    list_checkpoints,
    set_aside_newer,
    step_of,
)

if TYPE_CHECKING:
    from pretrain.checkpoint.loading import load_training_state, load_weights, load_weights_together
    from pretrain.checkpoint.saver import Saver
    from pretrain.checkpoint.state import layout, owned_state, versions

__all__ = [
    "FORMAT_VERSION",
    "STATE_FILE",
    "Checkpoint",
    "DamagedCheckpoint",
    "Retention",
    "Saver",
    "layout",
    "list_checkpoints",
    "load_training_state",
    "load_weights",
    "load_weights_together",
    "owned_state",
    "set_aside_newer",
    "step_of",
    "versions",
]


def __getattr__(name: str) -> Any:
    """Imports what needs an engine, or DCP, at its first use: a dry run needs neither, and a start no DCP."""
    if name == "Saver":
        from pretrain.checkpoint import saver

        return saver.Saver
    if name in ("load_training_state", "load_weights", "load_weights_together"):
        from pretrain.checkpoint import loading

        return getattr(loading, name)
    if name in ("layout", "owned_state", "versions"):
        from pretrain.checkpoint import state

        return getattr(state, name)
    raise AttributeError(name)
