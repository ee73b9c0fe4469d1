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

from pretrain.checkpoint.folder import (
    Checkpoint,
    DamagedCheckpoint,
    Retention,
    list_checkpoints,
    set_aside_newer,
    step_of,
)

__all__ = [
    "Checkpoint",
    "DamagedCheckpoint",
    "Retention",
    "list_checkpoints",
    "set_aside_newer",
    "step_of",
]
