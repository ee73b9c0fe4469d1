"""What all Triton kernels of this package share: the device that they run on.

Importing it under TRITON_INTERPRET=1 repairs the interpreter's bf16 (model/kernels/triton/interpreter.py): every kernel
module imports it, so no kernel ever runs on the interpreter's own bf16, which is silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from model.kernels.backend import interpreting, triton_limit

if interpreting():
    from model.kernels.triton.interpreter import repair

    repair()

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(host: Callable[P, R]) -> Callable[P, R]:
    """For host functions: Triton launches on the calling thread's current device, wherever the tensors are. Raises
    RuntimeError for tensors that it has no kernels for. The first tensor of the arguments, records included, says which
    device it is."""

    @functools.wraps(host)
    def launching(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(_devices(args))
        limit = triton_limit(device.type, None)
        if limit is not None:  # else Triton's own words: "0 active drivers"
            raise RuntimeError(f"{host.__module__} got tensors on {device}: {limit}")
        if device.type == "cpu":
            return host(*args, **kwargs)
        with torch.cuda.device(device):  # GPU-ONLY triton-device
            return host(*args, **kwargs)

    return launching


def _devices(args: Iterable[Any]) -> Iterator[torch.device]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg.device
        elif isinstance(arg, tuple):
            yield from _devices(arg)
