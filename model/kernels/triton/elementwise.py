"""The elementwise ops in Triton, a file each: what the table of backends names."""

from model.kernels.triton.dropout import dropout, keep_mask
from model.kernels.triton.entropy import entropy, entropy_backward
from model.kernels.triton.layer_norm import layer_norm, layer_norm_backward
from model.kernels.triton.rope import rotate, rotate_backward

__all__ = [
    "dropout",
    "entropy",
    "entropy_backward",
    "keep_mask",
    "layer_norm",
    "layer_norm_backward",
    "rotate",
    "rotate_backward",
]
