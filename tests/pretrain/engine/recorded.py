"""A CUDA graph's stand-in on the CPU, for pretrain/engine/graphed.py.

As on a GPU, a recording computes nothing that anyone may use: the operators do run, so that the code which is recorded
gets tensors, but what they wrote to tensors from outside is undone. A replay runs the same operators again on the same
memory, without Python's code around them. Memory from outside is known by its address alone: what was freed meanwhile,
or replaced by another tensor, is an error, where a GPU would read whatever lies there. What would make the host wait
for the device, or depends on its data, is refused as in a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten: Any = torch.ops.aten
NOT_CAPTURED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Address(NamedTuple):
    """A tensor from outside, as a kernel gets it."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> Address:
        ref = StorageWeakRef(t.untyped_storage())
        return cls(ref, t.dtype, int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"memory that a graph reads or writes was freed: {self.size} {self.dtype}"
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Call(NamedTuple):
    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[tuple[int, Tensor]]
    """Those in new memory, by their place among the results."""


class Pool:
    """Memory that recordings allocated; graphs that are replayed one after the other share it."""

    def __init__(self) -> None:
        self.own: dict[int, torch.UntypedStorage] = {}
        self.replays = 0
        self.graphs: list[RecordedGraph] = []

    def make_graph(self) -> RecordedGraph:
        self.graphs.append(RecordedGraph(self))
        return self.graphs[-1]

    def owns(self, t: Tensor) -> bool:
        return t.untyped_storage()._cdata in self.own


class RecordedGraph:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.calls: list[Call] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        assert not self.calls, "a graph is recorded once"
        recorder = _Recorder(self)
        with recorder:
            yield
        for changed, before in recorder.changed.values():
            changed.copy_(before)

    def replay(self) -> None:
        self.pool.replays += 1
        with torch.no_grad():
            for operator, arguments, options, results in self.calls:
                arguments, options = _with_tensors((arguments, options))
                found, _ = tree_flatten(operator(*arguments, **options))
                for place, result in results:
                    result.copy_(found[place])


def _with_tensors(tree: Any) -> Any:
    return tree_map(lambda x: x.tensor() if isinstance(x, Address) else x, tree, is_leaf=_is_address)


def _is_address(x: Any) -> bool:
    return isinstance(x, Address)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph, self._pool = graph, graph.pool
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        """Storages from outside that were written to, as bytes: now, and before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NOT_CAPTURED:
            raise RuntimeError(f"{func} waits for the device\nwhile a graph is recorded")
        self._keep_what_changes(func, args, kwargs)
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        assert not any(t.dtype == torch.bool for t in _indices(func, args)), "the shape depends on the data"
        frozen_args, frozen_kwargs = tree_map(self._frozen, (args, kwargs))
        found = func(*args, **kwargs)
        results: list[tuple[int, Tensor]] = []
        for place, result in enumerate(tree_flatten(found)[0]):
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in known:
                storage = result.untyped_storage()
                self._pool.own[storage._cdata] = storage
                results.append((place, result.detach()))
        self._graph.calls.append(Call(func, frozen_args, frozen_kwargs, results))
        return found

    def _frozen(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach() if self._pool.owns(x) else Address.of(x)

    def _keep_what_changes(self, func: Any, args: Any, kwargs: Any) -> None:
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            for t in value if isinstance(value, list | tuple) else [value]:
                if isinstance(t, Tensor) and not self._pool.owns(t) and t.untyped_storage()._cdata not in self.changed:
                    whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                    self.changed[t.untyped_storage()._cdata] = whole, whole.clone()


def _indices(func: Any, args: Any) -> list[Tensor]:
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return []
    return [t for t in args[1] if t is not None]
