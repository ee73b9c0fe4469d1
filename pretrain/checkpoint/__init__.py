"""Checkpoints: written by any layout of ranks, read by any other, whole or not there at all.

A checkpoint is the folder checkpoints/step-NNNNNNNN with
    rank-RRRRR.safetensors   rectangles of tensors, those that this rank owned (state.py says which tensors there are)
    tensors.json             shape and dtype of every tensor, and which rectangle of it lies in which file
    state.json               everything else, with size and sha256 of the files above
    commit.json              size and sha256 of state.json; written last
It is written as step-NNNNNNNN.partial and renamed once complete. A folder without commit.json is no checkpoint.

torch.distributed.checkpoint (DCP) plans who writes and who reads what; storage.py stores safetensors and JSON instead
of its pickles. fragments.py knows rectangles, state.py what is saved, folder.py what lies on the disk, saver.py when.
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
    from pretrain.checkpoint.saver import Saver
    from pretrain.checkpoint.state import layout, load_training_state, load_weights, owned_state, versions

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
    "owned_state",
    "set_aside_newer",
    "step_of",
    "versions",
]


def __getattr__(name: str) -> Any:
    """What needs DCP is imported when it is used: a dry run does not wait for it (1 s)."""
    if name == "Saver":
        from pretrain.checkpoint import saver

        return saver.Saver
    if name in ("layout", "load_training_state", "load_weights", "owned_state", "versions"):
        from pretrain.checkpoint import state

        return getattr(state, name)
    raise AttributeError(name)
