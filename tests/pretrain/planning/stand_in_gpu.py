"""A device that stands for a GPU: torch's place for a device of one's own, without kernels, for tensors without data.

It tells where a tensor is. An operator with tensors of the CPU and of the GPU is an error as it would be there, and so
is, in a rehearsal, a tensor of the CPU that goes to NCCL (pretrain/planning/ledger.py). No stream orders anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils import backend_registration

NAME = "gpu"


class _Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:  # so that tensors without data ask for no device
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Stream:
    """Of one queue, in which everything waits for what was queued before."""

    def __init__(self, *_: Any, **options: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record_event = record = synchronize = wait_stream

    def query(self) -> bool:
        return True


class _Accelerator(CPU_Accelerator):
    """What DeepSpeed asks."""

    Stream = Event = _Stream

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(NAME, device_index or 0)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{NAME}:0"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return _Stream()

    default_stream = current_stream

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor

    def __getattribute__(self, name: str) -> Any:
        if name in ("FloatTensor", "IntTensor", "LongTensor", "ByteTensor"):
            kinds = {"FloatTensor": torch.float32, "IntTensor": torch.int32, "LongTensor": torch.int64}
            return lambda values: torch.tensor(values, dtype=kinds.get(name, torch.uint8), device=self.device())
        return super().__getattribute__(name)


@contextlib.contextmanager
def stand_in_gpu() -> Iterator[torch.device]:
    """Inside, this process computes on such a GPU, whose ranks speak by NCCL. For a process of its own: it keeps the
    device."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    device = torch.device(NAME, 0)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (real_accelerator, "ds_accelerator", _Accelerator()),
            (dist, "get_backend", lambda group=None: "nccl"),
            (torch.cuda, "current_device", lambda: device),
            (torch.Tensor, "cuda", lambda tensor: tensor.to(device)),
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield device
