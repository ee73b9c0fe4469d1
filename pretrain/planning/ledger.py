"""What a step of fake tensors holds and sends: every storage is followed from its first tensor to its last, and every
collective is written down, whoever calls it (our layers, megatron-core, DeepSpeed).

Nothing is sent, and what a collective would give is whatever its tensors are: fake ones have no values.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.kernels.dtypes import wide_dtype
from model.kernels.ops.linear_cross_entropy import chunk_bytes, chunk_tokens, working_bytes
from pretrain.planning.record import BACKWARD, BUCKETS, GRADIENTS, Call

NCCL_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8}
NCCL_DTYPES |= {torch.uint8, torch.bool}

CPU = torch.device("cpu")

COPIED_BY_GLOO = ("all_gather", "reduce_scatter")
"""Gloo joins what it gathers, and what it is to scatter, in a tensor of its own as large as all ranks' together, also
in a group of one (counted with torch 2.13). NCCL does not, and gloo's other collectives do not either."""


class Ledger(TorchDispatchMode):
    """Follows what happens inside it. What an operator allocates and frees within itself is not seen, but for
    what the loss holds and what gloo copies."""

    def __init__(self, *, by_gloo: bool = False, device: torch.device = CPU) -> None:
        """`by_gloo`: collectives are gloo's, as between CPUs, and not NCCL's. `device`: where this rank computes."""
        super().__init__()
        self._device = device
        self._by_gloo = by_gloo
        self.now = self.peak = 0
        """Bytes of the storages that are alive, and the most of them since `forget_peak`. Those of `elsewhere` do not
        count."""
        self.parts: Counter[str] = Counter()
        """Bytes that are alive, by what they are for."""
        self.at_peak: dict[str, int] = {}
        self.part = "building"
        """What new storages are for, outside backward passes."""
        self.bucket = 0
        """Elements of DeepSpeed's buffers of gradients: a storage of as many is one, whenever it is made."""
        self.elsewhere: set[str] = set()
        """Parts that lie in the memory of the CPU, for a GPU."""
        self.calls: list[Call] = []
        self.when = "micro-step"
        """`part` of the calls."""
        self._alive: dict[int, tuple[int, str]] = {}
        self._was_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls. RELIES-ON torch-fake
            return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _value(args[0]) if _is_unknown(args[0]) else func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        results = func(*args, **kwargs)
        part = self._current()
        for result in tree_leaves(results):
            if not isinstance(result, Tensor) or _device(result).type == "meta":
                continue
            if result.untyped_storage()._cdata not in given:
                is_bucket = result.numel() == self.bucket and result.dim() == 1
                self._add(result.untyped_storage(), BUCKETS if is_bucket else part)
        is_loss = func is torch.ops.switchall.linear_cross_entropy.default
        self._note_peak("loss", self._loss(*args) if is_loss else 0)
        return results

    def hold(self, part: str, tensors: Iterable[Tensor | None]) -> None:
        """From now on the storages of `tensors` are for `part`."""
        for tensor in tensors:
            key = None if tensor is None else tensor.untyped_storage()._cdata
            if key in self._alive:
                size, before = self._alive[key]
                self._count(-size, before)
                self._alive[key] = size, part
                self._count(size, part)

    def rename(self, parts: Callable[[str], bool], name: str) -> None:
        """Everything that is for one of `parts` is for `name` from now on."""
        for key, (size, before) in list(self._alive.items()):
            if parts(before):
                self._count(-size, before)
                self._alive[key] = size, name
                self._count(size, name)

    def forget_peak(self) -> None:
        self.peak, self.at_peak = self.now, dict(self.parts)

    # --------------------------------------------------------------------------------------------------------- storages

    def _note_peak(self, part: str, inside: int) -> None:
        """`inside`: bytes that an operator holds for `part` until it returns."""
        if self.now + inside > self.peak:
            self.peak = self.now + inside
            self.at_peak = {**self.parts, part: inside}

    def _current(self) -> str:
        """What a new storage is for. What a backward pass leaves behind are gradients."""
        is_backward = torch._C._current_graph_task_id() != -1
        if self._was_backward and not is_backward:
            self.rename(lambda part: part == BACKWARD, GRADIENTS)
        self._was_backward = is_backward
        return BACKWARD if is_backward else self.part

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size, part
        self._count(size, part)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        size, part = self._alive.pop(key)
        self._count(-size, part)

    def _count(self, size: int, part: str) -> None:
        self.parts[part] += size
        if part not in self.elsewhere:
            self.now += size

    # ------------------------------------------------------------------------------------------------------ collectives

    def _loss(self, hidden: Tensor, weight: Tensor, *others: Any) -> int:
        """The op that computes the loss (model/kernels/ops/linear_cross_entropy.py) takes chunk by chunk of tokens:
        the bytes that it holds, and two collectives for each chunk if classes are divided."""
        dtype = wide_dtype(hidden.dtype)
        (rows, width), classes, kind = hidden.shape, weight.shape[0], hidden.device.type
        chunk = chunk_tokens(rows, classes * dtype.itemsize, chunk_bytes(kind), kind)
        group_name = others[5]  # RELIES-ON torch-group-name
        if group_name:
            ranks = tuple(dist.get_process_group_ranks(_resolve_process_group(GroupName(group_name))))
            for start in range(0, rows, chunk):
                tokens = min(chunk, rows - start)
                self._call("all_reduce", ranks, dtype, tokens)
                self._call("all_reduce", ranks, dtype, 2 * tokens)
        return working_bytes(rows, classes, width, hidden.dtype, weight.dtype, kind)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """torch.distributed's operators (torch/csrc/distributed/c10d/Ops.cpp): their process group is an argument."""
        name = func._schema.name.partition("::")[2]  # RELIES-ON torch-collectives
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        ranks = tuple(dist.get_process_group_ranks(ProcessGroup.unbox(named["process_group"])))
        work = FakeWork().boxed()
        if name not in _KINDS:
            raise NotImplementedError(f"torch.distributed's {name}, which nothing here calls yet")
        kind, tensors, result = _KINDS[name](named, work)
        if kind in ("send", "receive"):
            other, own = ranks[named["dst" if kind == "send" else "src"]], dist.get_rank()
            ranks = (own, other) if kind == "send" else (other, own)
        dtype = tensors[0].dtype if tensors else torch.uint8
        if self._by_gloo and kind in COPIED_BY_GLOO:
            self._note_peak("gloo", sum(t.numel() * t.element_size() for t in tensors))
        refused = nccl_refusal(named, self._device) if kind != "barrier" else ""
        self._call(kind, ranks, dtype, sum(t.numel() for t in tensors), refused)
        return result

    def _call(self, kind: str, ranks: tuple[int, ...], dtype: torch.dtype, elements: int, refused: str = "") -> None:
        name = str(dtype).removeprefix("torch.")
        self.calls.append(Call(kind, ranks, name, elements, elements * dtype.itemsize, self.when, refused))


def nccl_refusal(arguments: dict[str, Any], device: torch.device) -> str:
    """Why NCCL refuses an operator of torch.distributed with these arguments, by torch 2.13's ProcessGroupNCCL, where
    `device` stands for the GPU; empty if it takes them. gloo takes any dense layout, whose elements are then in the
    same order on all ranks."""
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor):
            if _device(tensor).type != device.type:
                return f"a tensor is on {_device(tensor)}"
            if tensor.dtype not in NCCL_DTYPES:
                return f"{str(tensor.dtype).removeprefix('torch.')} is no dtype of NCCL"
            if not tensor.is_contiguous():
                return f"a tensor with the strides {tensor.stride()} is not contiguous"
    return ""


def _device(tensor: Tensor) -> torch.device:
    """Of a fake tensor without the operator that `device` is."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _is_unknown(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


def _value(tensor: Tensor) -> float | int | bool:
    """A number that the host reads and only a device could know: nothing overflows, and a norm is 1."""
    if tensor.is_floating_point():
        return 1.0
    return False if tensor.dtype == torch.bool else 0


def _in_place(kind: str) -> Callable[[dict[str, Any], Any], Any]:
    return lambda named, work: (kind, named["tensors"], (named["tensors"], work))


_KINDS: dict[str, Callable[[dict[str, Any], Any], tuple[str, list[Tensor], Any]]] = {
    "allreduce_": _in_place("all_reduce"),
    "broadcast_": _in_place("broadcast"),
    "reduce_": lambda named, work: ("reduce", named["tensors"], work),
    "allgather_": lambda named, work: (
        "all_gather", named["output_tensors"][0], (named["output_tensors"], work),
    ),
    "_allgather_base_": lambda named, work: (
        "all_gather", [named["output_tensor"]], (named["output_tensor"], work),
    ),
    "allgather_into_tensor_coalesced_": lambda named, work: ("all_gather", named["outputs"], work),
    "reduce_scatter_": lambda named, work: (
        "reduce_scatter", named["input_tensors"][0], (named["output_tensors"], work),
    ),
    "_reduce_scatter_base_": lambda named, work: (
        "reduce_scatter", [named["input_tensor"]], (named["output_tensor"], work),
    ),
    "reduce_scatter_tensor_coalesced_": lambda named, work: ("reduce_scatter", named["inputs"], work),
    "alltoall_base_": lambda named, work: ("all_to_all", [named["input"]], work),
    "alltoall_": lambda named, work: ("all_to_all", named["input_tensors"], (named["output_tensors"], work)),
    "send": lambda named, work: ("send", named["tensors"], work),
    "recv_": lambda named, work: ("receive", named["tensors"], work),
    "barrier": lambda named, work: ("barrier", [], work),
}  # fmt: skip
