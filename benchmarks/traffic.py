"""What the Triton kernels move and multiply, counted in the interpreter: no GPU, no timing, the same numbers every run.

    TRITON_INTERPRET=1 python -m benchmarks.traffic [--markdown] [--tokens 256 1024] [--d-model 512] [--per-tensor]

Per layer, forward + backward in bf16 with the shipped tiles:

requested   bytes that the kernels' loads and stores ask for, lane by lane, plus inputs and outputs of torch operators.
            What L2 keeps between two programs is not in it: HBM traffic is lower.
once        every input, output and gradient of the layer's ops exactly once: nothing can move less.
tiled       the least that separate sorted GEMMs in 64 x 64 tiles request: each tile reads its two panels once, slots
            padded to full tiles of an expert; no slot tensor, no permutation. What `requested` is measured against.
flops       of every tl.dot, padding included, against the useful ones: k experts per token.
authors     arithmetic of the authors' design (cvmm, arXiv 2310.10837 and 2312.07987): 14 passes over a slot tensor
            [T, H k, d]. Narrow tensors and weights come on top.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import marked
from common.arguments import at_least
from common.tables import text_table

BYTES, TILE = 2, 64  # bf16
AUTHORS_PASSES = {
    "gather of the input of the wide-to-narrow product": 1,
    "its input gradient per slot: written, read by the sum": 2,
    "gather for its weight gradient": 1,
    "output per slot: written, read by the gated sum": 2,
    "gradient of the gates: output per slot read, its fp32 copy written and read": 1 + 2 + 2,
    "gated gradient per slot: written, read by the input and by the weight gradient": 3,
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: two matrices per expert, between `d` and `narrow`; `heads` routers."""

    name: str
    heads: int
    num_experts: int
    active: int
    narrow: int
    authors_launches: int


LAYERS = (
    Layer(name="SwitchHead V+O, H4 E4 k2 h112", heads=4, num_experts=4, active=2, narrow=112, authors_launches=68),
    Layer(name="SwitchHead V+O, H4 E5 k3 h112", heads=4, num_experts=5, active=3, narrow=112, authors_launches=68),
    Layer(name="SwitchHead V+O, H4 E8 k2 h112", heads=4, num_experts=8, active=2, narrow=112, authors_launches=68),
    Layer(name="σ-MoE 32 x 128, k4", heads=1, num_experts=32, active=4, narrow=128, authors_launches=43),
)


@dataclass
class Count:
    """What one layer did, forward and backward."""

    requested: int = 0
    once: int = 0
    flops: int = 0
    atomics: int = 0
    launches: int = 0
    """Kernels, and torch operators that would launch one."""
    by_tensor: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class TorchOperators(TorchDispatchMode):
    """Counts operators that would be a kernel on a GPU, and the bytes of what they read and write."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from benchmarks.kernel_cases.recording import is_running

        result = func(*args, **(kwargs or {}))
        if (
            not is_running()  # the interpreter's own copies
            and func.namespace == "aten"
            and not func.is_view
            and "empty" not in func._opname
            and "alias" not in func._opname
        ):
            moved = tensor_bytes(tree_leaves((args, kwargs, result)))
            self.count.launches += 1
            self.count.requested += moved
            self.count.by_tensor[f"torch.{func._opname}"] += moved
        return result


def tensor_bytes(values: Any) -> int:
    """Of every tensor in `values`."""
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def routing(layer: Layer, T: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random scores and index [T, H, k], order [H, T k], load [H, E]; about the same load for every expert."""
    scores, index = torch.rand(T, layer.heads, layer.num_experts, generator=generator).topk(layer.active, dim=-1)
    slots = index.transpose(0, 1).reshape(layer.heads, -1)
    load = torch.stack([row.bincount(minlength=layer.num_experts) for row in slots])
    return scores, index, slots.sort(dim=-1, stable=True).indices, load


def measure(layer: Layer, T: int, d: int) -> Count:
    """Runs the layer's host functions, forward and backward, under the interpreter's counters."""
    from benchmarks.kernel_cases.recording import recording
    from model.kernels.ops.route import Choice
    from model.kernels.ops.sigma_moe import Inputs as SigmaMoEInputs
    from model.kernels.ops.switchhead import Inputs
    from model.kernels.triton import sigma_moe, switchhead_output, switchhead_value

    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16)

    H, E, G = layer.heads, layer.num_experts, layer.narrow
    scores, index, order, load = routing(layer, T, generator)
    x, grad_wide, count = normal(T, d), normal(T, d), Count()
    narrow, grad_narrow, into, out_of = normal(T, H, G), normal(T, H, G), normal(H, E, d, G), normal(H, E, G, d)
    with recording(check=False) as launches, TorchOperators(count):
        if H > 1:
            strategy = "gated" if 2 * layer.active >= E else "sorted"
            for module, rows, grad, experts in (
                (switchhead_value, x, grad_narrow, into),
                (switchhead_output, narrow, grad_wide, out_of),
            ):
                inputs = Inputs(rows, Choice(scores, index, order, load), experts, strategy)
                y, *saved = module.forward(inputs)
                grads = module.backward(grad, inputs, tuple(saved))
                count.once += 2 * tensor_bytes((rows, scores, index, experts)) + tensor_bytes((y, grad, *grads))
        else:
            tensors = (x, scores[:, 0], order[0], load[0], into[0], out_of[0])
            single = SigmaMoEInputs(*tensors, first_expert=0)
            y, hidden = sigma_moe.forward(single)
            grads = sigma_moe.backward(grad_wide, single, hidden)
            count.once += 2 * tensor_bytes(tensors) + tensor_bytes((y, grad_wide, *grads))
    for launch in launches:
        count.flops += launch.dot_flops
        count.atomics += launch.atomics
        for tensor, traffic in launch.tensors.items():
            count.by_tensor[f"{launch.kernel}.{tensor}"] += traffic.requested_bytes
    count.launches += len(launches)
    count.requested += sum(launch.requested_bytes for launch in launches)
    return count


def tiled_bytes(layer: Layer, T: int, d: int) -> int:
    """`tiled` of the module's docstring, with equal loads."""
    H, E, k, G = layer.heads, layer.num_experts, layer.active, layer.narrow
    rows = ceil(T * k / E / TILE) * TILE  # of one expert, padded
    wide, narrow, tiles = ceil(d / TILE), ceil(G / TILE), rows // TILE
    into = rows * d * narrow + tiles * d * G  # wide to narrow
    back = rows * G * wide + tiles * G * d  # narrow to wide
    weights = rows * (d * narrow + G * wide)
    # Two matrices: each has a product each way (one of them its input gradient) and a weight gradient.
    panels = H * E * 2 * (into + back + weights)
    outputs = 2 * T * d + 2 * T * H * G * (1 if H > 1 else k) + 2 * H * E * d * G
    return BYTES * (panels + outputs)


def useful_flops(layer: Layer, T: int, d: int) -> int:
    """Two matrices, a product and two gradients each, k experts per token."""
    return 12 * T * layer.heads * layer.active * d * layer.narrow


def authors_bytes(layer: Layer, T: int, d: int) -> int:
    return sum(AUTHORS_PASSES.values()) * BYTES * T * layer.heads * layer.active * d


COLUMNS: dict[str, Callable[[Layer, int, int, Count], str]] = {
    "layer": lambda layer, T, d, c: layer.name,
    "T": lambda layer, T, d, c: str(T),
    "requested MB": lambda layer, T, d, c: f"{c.requested / 1e6:.1f}",
    "/ once": lambda layer, T, d, c: f"{c.requested / c.once:.2f}",
    "/ tiled": lambda layer, T, d, c: f"{c.requested / tiled_bytes(layer, T, d):.2f}",
    "once MB": lambda layer, T, d, c: f"{c.once / 1e6:.1f}",
    "tiled MB": lambda layer, T, d, c: f"{tiled_bytes(layer, T, d) / 1e6:.1f}",
    "flops / useful": lambda layer, T, d, c: f"{c.flops / useful_flops(layer, T, d):.2f}",
    "atomics": lambda layer, T, d, c: str(c.atomics),
    "launches": lambda layer, T, d, c: str(c.launches),
    "authors MB": lambda layer, T, d, c: f"{authors_bytes(layer, T, d) / 1e6:.1f}",
    "authors launches": lambda layer, T, d, c: str(layer.authors_launches),
}


def table(rows: list[tuple[Layer, int, int, Count]], *, markdown: bool) -> str:
    head, cells = list(COLUMNS), [[column(*row) for column in COLUMNS.values()] for row in rows]
    return marked.markdown(head, cells, marked.TIGHT) if markdown else text_table(head, cells, left=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=at_least(1), nargs="+", default=[256, 1024], help="T (default: 256 1024, a minute each)"
    )
    parser.add_argument(
        "--d-model", type=at_least(1), default=512, help="default: 512; 1024, the 262M model's, takes twice the time"
    )
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="a table for docs/kernels.md")
    parser.add_argument("--per-tensor", action="store_true", help="requested bytes of every kernel's tensors too")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1: the counters are the interpreter's")
    rows = [
        (layer, T, options.d_model, measure(layer, T, options.d_model))
        for layer in LAYERS
        if options.layers in layer.name
        for T in options.tokens
    ]
    print(table(rows, markdown=options.markdown))
    if options.per_tensor:
        for layer, T, _, count in rows:
            print(f"\n{layer.name}, T={T}")
            for name, size in sorted(count.by_tensor.items(), key=lambda item: -item[1]):
                print(f"  {size / 1e6:9.2f} MB  {name}")


if __name__ == "__main__":
    main()
