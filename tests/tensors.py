"""What torch's types leave open and a test knows: that a gradient is there, and that a sum has terms."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_of(tensor: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Of at least one term; the built-in `sum` gives the int 0 for none."""
    return functools.reduce(torch.add, terms)
