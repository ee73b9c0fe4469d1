"""Counts what a GPU would be asked to do: kernels, the bytes they read and write, and waits of the host.

Used inside `benchmarks.fake_cuda.fake_cuda()`. What counts as one launch:

- an operator of torch that is no view and makes no empty tensor; where torch's CUDA code has several kernels for it,
  as for a sort, a norm's gradient or a sum in two passes, it is still one;
- an operator over lists (`_foreach_*`, `_fused_*`) as often as torch's CUDA code launches for these sizes;
- a Triton kernel, wherever an op's body launches it.

Bytes: every tensor that an operator or a Triton kernel is given is read once or written once, one that it changes in
place both; gathers read the rows they return. Broadcast dimensions are not counted twice. Caches and a kernel's own
rereading are not known.
"""

from __future__ import annotations

import bisect
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.places import place_of_stack
from model.kernels.op import OPS

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm"})
ATTENTION = "_scaled_dot_product"
NO_KERNEL = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_"}
    | {"resize_", "detach_", "_pin_memory", "is_pinned", "is_same_size", "record_stream"}
)
"""Operators that are no views by their schema, and launch nothing."""
WRITES_ALONE = frozenset({"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"})
"""They do not read what they overwrite; nor does an operator its `out`."""
READ_NOTHING = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
"""They take a tensor for its dtype, device or shape alone."""
GATHERS = frozenset({"embedding", "index", "index_select", "gather"})
COPIES = frozenset({"_to_copy", "copy_"})
WAITS = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
    | {"is_nonzero", "bincount", "_linalg_check_errors", "allclose"}
)
"""Operators that read their result on the host, or whose result's size depends on data."""


@dataclass
class Tally:
    """What some part of a step does."""

    kernels: int = 0
    """Launches, Triton's among them."""
    triton: int = 0
    bytes: int = 0
    elementwise_bytes: int = 0
    """Of operators that are neither products, fused attention nor Triton kernels."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> Tally:
        return Tally(*(times * value for value in vars(self).values()))


@dataclass
class Counts:
    """What was counted, by place (benchmarks/places.py)."""

    by_place: dict[str, Tally] = field(default_factory=dict)
    by_operator: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Launches of each (place, operator or kernel)."""
    waits: Counter[str] = field(default_factory=Counter)
    """Each way in which the host waits for the GPU, with its place."""
    to_host: int = 0
    """Copies from the GPU to the host, waiting or not."""
    to_device: int = 0
    """Copies from the host to the GPU, waiting (pageable memory) or not."""

    @property
    def total(self) -> Tally:
        return sum(self.by_place.values(), Tally())

    def add(self, place: str, name: str, tally: Tally) -> None:
        self.by_place[place] = self.by_place.get(place, Tally()) + tally
        self.by_operator[place, name] += tally.kernels

    def plus(self, other: Counts, times: int = 1) -> Counts:
        """These and `times` times the others; -1: without them."""
        places = dict(self.by_place)
        for place, tally in other.by_place.items():
            places[place] = places.get(place, Tally()) + tally * times
        operators, waits = self.by_operator.copy(), self.waits.copy()
        operators.update({key: times * count for key, count in other.by_operator.items()})
        waits.update({key: times * count for key, count in other.waits.items()})
        copies = self.to_host + times * other.to_host, self.to_device + times * other.to_device
        return Counts(places, +operators, +waits, *copies)


class LaunchCounter(TorchDispatchMode):
    """Enter it inside `fake_cuda()`; what runs then goes to `counts`, which may be exchanged between parts."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._place: str | None = None
        self._made: tuple[list[int], list[str]] = ([], [])
        """For each operator of a forward pass: the number of the next node of autograd, and the operator's place."""
        self._stack, self._depth = contextlib.ExitStack(), 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:  # a body of an op enters again
            self._stack.enter_context(_launches_go_to(self))
            self._stack.enter_context(mock.patch.object(FakeTensor, "tolist", _tolist))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if self._depth == 0:
            self._stack.close()

    def before_node(self, node: Any) -> None:
        """For `fake_cuda.backward`: a node's operators belong where the node was made. None: to the code that runs."""
        numbers, places = self._made
        at = bisect.bisect_right(numbers, node._sequence_nr())
        self._place = places[at] if at < len(places) else None

    def after_backward(self) -> None:
        self._place, self._made = None, ([], [])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":
            return func(*args, **kwargs)
        place = self._place or place_of_stack(sys._getframe(1))
        if self._place is None:
            self._made[0].append(torch.autograd._get_sequence_nr())
            self._made[1].append(place)
        if func.namespace == "switchall":
            # The body instead of its promise; it goes on at the place of the call.
            with self, torch.no_grad(), self.at(place):
                return OPS[func._opname].body(*args, **kwargs)
        # In the body of an op torch hands on whole what it makes of other operators; of these, casts and copies that
        # may be views are views by their schema.
        with self, self.at(place):
            if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                return made
        self._notice_reads(place, func, (args, kwargs))
        is_pinned = kwargs.pop("pin_memory", None) or func._opname == "_pin_memory"
        result = self._result(func, args, kwargs)
        if is_pinned:
            result.is_pinned_here = True
        self._count(place, func, (args, kwargs), result)
        return result

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        before, self._place = self._place, place
        yield
        self._place = before

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func._opname == "_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else 1  # of no data: a finite number
        if func._opname == "is_pinned":
            return hasattr(args[0], "is_pinned_here")
        if func._opname == "_pin_memory":
            return torch.ops.aten.alias(args[0])
        if func._opname in ("mm", "addmm") and func._overloadname.startswith("dtype"):
            # Halves whose product is fp32: the fake tensors of a CPU build have no answer.
            a, b = args[-3:-1] if not func._overloadname.endswith("out") else args[-2:]
            return kwargs["out"] if "out" in kwargs else a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
        return func(*args, **kwargs)

    def _count(self, place: str, func: Any, given: Any, result: Any) -> None:
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not any(t.is_cuda for t in (*tensors, *results)):
            return
        name, counts = func._opname, self.counts
        self._notice_copies(place, func, tensors, results)
        crosses = len({t.is_cuda for t in (*results, *tensors[-1:])}) > 1
        if name == "_local_scalar_dense" or (name in COPIES and crosses):
            return  # a copy between host and GPU; a number of the host beside tensors of the GPU is an argument
        if name in NO_KERNEL or func.is_view:
            return
        moved = bytes_moved(func, given, result)
        is_product = name in PRODUCTS or name.startswith(ATTENTION)
        tally = Tally(launches_of(func, given), 0, moved, 0 if is_product else moved)
        counts.add(place, name, tally)

    def _notice_reads(self, place: str, func: Any, given: Any) -> None:
        """Before the operator runs, for a fake tensor has no answer to most of them."""
        name, counts = func._opname, self.counts
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        if not any(t.is_cuda for t in tensors):
            return
        if name in ("index", "index_put_") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:]):
            name = f"{name} with a mask"
        elif name not in WAITS and not (name == "repeat_interleave" and func._overloadname == "Tensor"):
            return
        counts.to_host += 1
        counts.waits[f"{name} ({place})"] += 1

    def _notice_copies(self, place: str, func: Any, tensors: list[Tensor], results: list[Tensor]) -> None:
        counts = self.counts
        if func._opname not in COPIES:
            return
        target, source = (results[0], tensors[0]) if func._opname == "_to_copy" else (tensors[0], tensors[-1])
        if target.is_cuda == source.is_cuda:
            return
        counts.to_device += target.is_cuda
        counts.to_host += source.is_cuda
        if not hasattr(source if target.is_cuda else target, "is_pinned_here"):
            direction = "copy from pageable memory" if target.is_cuda else "copy to the host"
            counts.waits[f"{direction} ({place})"] += 1

    def launched(self, kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """A Triton kernel with what it was given."""
        place = self._place or place_of_stack(sys._getframe(1))
        moved = sum(_bytes(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        self.counts.add(place, kernel.fn.__name__, Tally(1, 1, moved, 0))


@contextlib.contextmanager
def _launches_go_to(counter: LaunchCounter) -> Iterator[None]:
    """Triton's launches, compiled or (with TRITON_INTERPRET=1) interpreted, are noted and not done."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        counter.launched(self, args, kwargs)

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(InterpretedFunction, "run", run):
        yield


def _tolist(tensor: Tensor) -> Any:
    """One copy to the host; zeros, for there is no data."""
    tensor.cpu()
    return torch.utils._pytree.tree_map(float, _zeros(tuple(tensor.shape)))


def _zeros(shape: tuple[int, ...]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0.0


def _bytes(tensor: Tensor) -> int:
    """What the tensor holds; a dimension of stride 0 holds one element."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def bytes_moved(func: Any, given: Any, result: Any) -> int:
    """Read and written by one operator, tensors of the GPU alone."""
    args, kwargs = given
    schema, name = func._schema, func._opname
    written: list[Tensor] = []
    read: list[Tensor] = []
    for number, argument in enumerate(schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written:
            written += tensors
        if not is_written or not (name in WRITES_ALONE or argument.is_out):
            read += tensors
    results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    fresh = [t for t in results if not any(t is w for w in written)]
    if name in READ_NOTHING:
        read = []
    if name in GATHERS:
        read = [t for t in (*results, *(t for t in read if not t.is_floating_point()))]
    once = {id(t): t for t in read}.values()
    return sum(_bytes(t) for group in (once, written, fresh) for t in group if t.is_cuda)


# ---------------------------------------------------------------------------------------------- operators over lists

CHUNK, MOST_BLOCKS, MOST_TENSORS = 65536, 2240, (770, 448, 336, 252, 210)
"""Elements that a block takes, blocks of a launch, and tensors of a launch for 1, 2, ... lists: multi_tensor_apply's in
builds for CUDA 13 (torch's aten/src/ATen/native/cuda/MultiTensorApply.cuh); those for CUDA 12 launch more often."""


def launches_of(func: Any, given: Any) -> int:
    name, args = func._opname, given[0]
    if not name.startswith(("_foreach_", "_fused_")):
        return 1
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    depth = len(lists) + (not name.endswith("_"))  # the results are a list too
    if name.startswith("_fused_"):
        depth = sum(a[0].dim() > 0 or a[0].numel() > 1 for a in lists) or 1  # without the step counters
    elif name == "_foreach_norm":
        return foreach_launches([t.numel() for t in lists[0]], 1) + 1  # and the sum of each tensor's parts
    return foreach_launches([t.numel() for t in lists[0]], min(depth, len(MOST_TENSORS)))


def foreach_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches for tensors of these `sizes`, `depth` lists of them."""
    launches = blocks = tensors = 0
    for size in sizes:
        if size == 0:
            continue
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(1, chunks + 1):
            blocks += 1
            is_last = chunk == chunks
            if blocks == MOST_BLOCKS or (tensors == MOST_TENSORS[depth - 1] and is_last):
                launches += 1
                blocks, tensors = 0, 0 if is_last else 1
    return launches + (blocks > 0)
