"""A CUDA device that computes nothing: tensors have shapes, dtypes and `cuda:0`, but no data, on a machine without GPU.

`fake_cuda()` runs the code that a GPU would run: Python's branches on the device, torch's operators, the bodies of our
ops, Triton's launches. PyTorch's fake tensors do most of it. What a CPU build of torch lacks is added here:

- a device guard for CUDA, which autograd asks for when it makes a node: the registry of libc10 gets that of the meta
  device, which does nothing, until the end of the context;
- the backward pass: torch's engine wants a stream of the device, so `backward` walks the graph itself;
- events, which the device would record;
- the choice of a fused attention kernel, and products of halves whose result is fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
"""c10::impl::device_guard_impl_registry: a pointer for each device type."""
CUDA_TYPE, META_TYPE = 1, 14
"""c10::DeviceType."""


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, `device="cuda"` makes fake tensors; nothing outside the context may use them. Not reentrant."""
    optimizers: Any = importlib.import_module("torch.optim.optimizer")  # torch.optim hides it
    types = [*optimizers._foreach_supported_types, FakeTensor]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())
        stack.enter_context(mock.patch.object(torch.cuda, "_exchange_device", return_value=0))
        stack.enter_context(mock.patch.object(torch.cuda, "_maybe_exchange_device", return_value=0))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch.object(torch, "Event"))
        stack.enter_context(mock.patch.object(FunctionCtx, "set_materialize_grads", set_materialize_grads))
        # A fake parameter is no nn.Parameter by type, so that optimizers would take their loop over parameters.
        stack.enter_context(mock.patch.object(optimizers, "_foreach_supported_types", types))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_CudaForMeta())
        yield


class _CudaForMeta(TorchDispatchMode):
    """The guard that does nothing is the meta device's, and so is its current device: `x.to("cuda")` asks for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = torch.device("cuda", 0)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    if torch.cuda.is_available():
        yield
        return
    registry = device_guards()
    before = registry[CUDA_TYPE]
    assert registry[META_TYPE], "this torch has no device guard for meta tensors"
    registry[CUDA_TYPE] = registry[META_TYPE]
    try:
        yield
    finally:
        registry[CUDA_TYPE] = before


def device_guards() -> ctypes.Array[ctypes.c_void_p]:
    """torch's registry of device guards, up to that of meta tensors; CUDA's is empty in a CPU build."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * (META_TYPE + 1)).in_dll(library, GUARDS)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """What torch calls on CUDA: the flash kernel without a mask; with one, which becomes a bias, the memory-efficient
    one. Rows that are no multiple of 16 bytes, which torch pads, stay as they are."""
    scale = options.get("scale")
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    if options.get("enable_gqa"):  # copies, as torch makes them for this kernel
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    bias = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype).expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, 0.0, is_causal, scale=scale)[0]


def set_materialize_grads(ctx: Any, value: bool) -> None:
    """FunctionCtx's, for the walk."""
    ctx.materialize_grads = value
    ctx.materializes_in_walk = value  # the attribute above cannot be read


def backward(loss: Tensor, before_node: Callable[[Any], None] = lambda node: None) -> None:
    """`loss.backward()` in the order of torch's engine: nodes that were made last come first. `before_node` is called
    with each node before it runs. Hooks of tensors and nodes are not called."""
    assert loss.grad_fn is not None
    waiting = _uses(loss.grad_fn)
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    ready = [(-loss.grad_fn._sequence_nr(), 0, loss.grad_fn)]
    count = 0
    # One backward pass: outside torch's engine every look at a saved tensor would compute the region again.
    with torch.no_grad(), mock.patch.object(torch._C, "_current_graph_task_id", return_value=0):
        while ready:
            _, _, node = heapq.heappop(ready)
            before_node(node)
            results = _run(node, grads.pop(node, {}))
            for (following, number), grad in zip(_edges(node), results, strict=True):
                before = grads[following].get(number)
                if grad is not None:
                    grad = _fitted(grad, following._input_metadata[number])
                    grads[following][number] = grad if before is None else before + grad
                waiting[following] -= 1
                if waiting[following] == 0:
                    count += 1  # of two nodes with one number, the first: nodes cannot be compared
                    heapq.heappush(ready, (-following._sequence_nr(), count, following))


def _uses(root: Any) -> dict[Any, int]:
    """How many edges lead to each node."""
    found: dict[Any, int] = {root: 0}
    stack = [root]
    while stack:
        for following, _ in _edges(stack.pop()):
            if following not in found:
                found[following] = 0
                stack.append(following)
            found[following] += 1
    return found


def _edges(node: Any) -> list[tuple[Any, int]]:
    """The nodes that get a gradient from `node`, each with the number of its result."""
    return [(following, number) for following, number in node.next_functions if following is not None]


def _fitted(grad: Tensor, wanted: Any) -> Tensor:
    """In the shape and dtype of the result whose gradient it is, as torch's engine makes it."""
    if list(grad.shape) != list(wanted.shape):
        grad = grad.sum_to_size(tuple(wanted.shape))
    return grad.to(wanted.dtype)


def _run(node: Any, grads: dict[int, Tensor]) -> list[Tensor | None]:
    """The gradient for each of the node's edges, from those of its results, by number."""
    if not grads:
        return [None] * len(_edges(node))
    metadata = node._input_metadata
    arguments: list[Tensor | None] = [grads.get(number) for number in range(len(metadata))]
    if hasattr(node, "variable"):
        _accumulate(node.variable, grads[0])
        return []
    if not isinstance(node, BackwardCFunction):
        results = node(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return [r for r, (following, _) in zip(results, node.next_functions, strict=False) if following is not None]
    if getattr(node, "materializes_in_walk", True):
        arguments = [
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=next(iter(grads.values())).device)
            if grad is None
            else grad
            for m, grad in zip(metadata, arguments, strict=True)
        ]
    results = node.apply(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    # torch lets a function return more Nones than it has inputs.
    return [r for r, is_needed in zip(results, node.needs_input_grad, strict=False) if is_needed]


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    """As torch's AccumulateGrad, which takes a gradient that nobody else holds without copying it."""
    if leaf.grad is not None:
        leaf.grad.add_(grad)
    else:
        leaf.grad = grad.detach() if grad.stride() == leaf.stride() else grad.clone()
