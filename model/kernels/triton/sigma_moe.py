"""sigma-MoE feed-forward in Triton: both matrices of an expert in one kernel, each way; no atomics, no host sync.

A program owns BLOCK_ROWS rows of one expert (rows are slots sorted by expert) from the tokens to the slot tensor:

    forward     hidden = ReLU(x[token] W_1[e]), stays on chip      rows[slot] = (hidden * gate) W_2[e]
    backward    d hidden = (grad[token] W_2[e]^T) gate [hidden > 0]   rows[slot] = d hidden W_1[e]^T
    both        y[n] = sum over j of rows[n, j]                     a second kernel, in fp32, always in the same order,
                                                                forward with the residual stream's row, if given

A hidden layer of one expert is narrow (128 in every published model): it fits into registers between the two products,
so a token's row is read once per chosen expert, the gated hidden layer never, and the weights once per BLOCK_ROWS rows.
A kernel for each product with 64 x 64 tiles would read a token's row G / 64 times and a hidden layer d / 64 times.
Wider experts are computed in parts of 128, each of which costs a row of the slot tensor.

Weight gradients: one program per (expert, tile) walks over the expert's rows. With few experts on a rank (expert
parallelism) SPLITS programs share a segment and their fp32 sums are added in a fixed order.

Which expert a tile belongs to is found from `load` in the kernel: the grid is ceil(slots / BLOCK_ROWS) + E whatever the
routing, programs past the last tile leave at once. Slots of experts on other ranks have no row: `present` says so to
the sum. Launches: 2 forward, 4 backward (one more each where slots are missing or segments split).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model.kernels.activation import is_swiglu
from model.kernels.backend import cuda_capability, triton_limit
from model.kernels.ops.sigma_moe import Inputs
from model.kernels.triton.launch import on_its_device
from model.kernels.triton.sigma_moe_kernels import (
    backward_kernel,
    forward_kernel,
    sum_kernel,
    weight_gradient_kernel,
)
from model.kernels.triton.tiles import Tiles, measured

# ------------------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True, kw_only=True)
class ExpertTiles:
    """Block sizes, warps and pipeline stages of one launch."""

    rows: int
    """Slots of a program; of a loop iteration in the weight gradient."""
    hidden: int
    """Columns of an expert's hidden layer that a program holds."""
    reduce: int = 0
    """Columns of x or of the gradient per iteration of the first product."""
    out: int
    """Columns of the model width per iteration of the second product, or per program."""
    piece: int = 16
    """Columns of the hidden layer that backward_kernel takes through the gate at a time."""
    warps: int
    stages: int
    registers: int = 0
    """Of a thread, at most; 0: as the compiler likes."""

    @property
    def launch(self) -> dict[str, int]:
        """Options of a launch."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def mlp_tiles(num_rows: int, num_experts: int, expert_size: int, dtype: torch.dtype, *, swiglu: bool) -> ExpertTiles:
    """Of forward_kernel, and of backward_kernel but for what `backward_tiles` changes. Half a tile per expert is
    padding: 64 rows until experts have 512 of them on average (12% padding with 128), where weights are read half as
    often. SwiGLU holds two hidden layers: 128 rows of them spill."""
    if dtype == torch.float32:
        # No tensor cores: operands live in registers, so little of them at a time. A row of the slot tensor for 16
        # columns of the hidden layer makes this a path for checks, not for training.
        return ExpertTiles(rows=32, hidden=16, reduce=16, out=32, warps=4, stages=2)
    hidden = max(16, min(128, triton.next_power_of_2(expert_size)))
    if swiglu:
        return ExpertTiles(rows=64, hidden=hidden, reduce=64, out=32, warps=8, stages=3)
    if num_rows >= 512 * num_experts:
        return ExpertTiles(rows=128, hidden=hidden, reduce=64, out=64, warps=8, stages=3)
    return ExpertTiles(rows=64, hidden=hidden, reduce=64, out=64, warps=4, stages=3)


FEW_REGISTERS_ON = ((9, 0),)
"""Compute capabilities on which backward_kernel fits `BACKWARD_REGISTERS`, with every Triton that torch brings
(benchmarks/compiled.py)."""
BACKWARD_REGISTERS = {64: 168, 128: 128}
"""Rows of a tile -> registers of a thread. With so few a multiprocessor takes three programs of 64 rows, or two of 128,
as it does forward: one multiplies while another waits for its rows or stores them."""


def backward_tiles(
    tiles: ExpertTiles, d_model: int, expert_size: int, *, swiglu: bool, capability: tuple[int, int] | None = None
) -> ExpertTiles:
    """`tiles` as backward_kernel takes them. Masks of columns, where d_model needs them, take registers too, and so do
    the addresses of hidden layers that 16-byte loads cannot read: of 101 columns, 128 registers leave 624 bytes of
    stack. Of 512 columns of d_model the compiler unrolls the loop over them, whose addresses spill (8 to 24 bytes).
    `capability`: this GPU's if None."""
    if d_model % tiles.reduce != 0 or 256 < d_model <= 512:
        return dataclasses.replace(tiles, piece=32)
    is_few = not swiglu and expert_size % 8 == 0 and (capability or cuda_capability()) in FEW_REGISTERS_ON
    return dataclasses.replace(tiles, registers=BACKWARD_REGISTERS.get(tiles.rows, 0) if is_few else 0)


def launch_tiles(phase: str, inputs: Inputs) -> ExpertTiles:
    """Of a launch of forward_kernel or backward_kernel: what was measured, else those that the shape decides."""
    x, scores, order, load, up, down, _ = inputs
    num_rows, total, (here, G, d), swiglu = order.shape[0], load.shape[0], down.shape, is_swiglu(up, down)
    own = mlp_tiles(num_rows, total, G, x.dtype, swiglu=swiglu)
    if phase == "backward":
        own = backward_tiles(own, d, G, swiglu=swiglu)
    shape = {"d": d, "E": total, "here": here, "k": scores.shape[1], "G": G, "swiglu": int(swiglu)}
    found = measured(f"sigma_moe {phase}", x.dtype, at=num_rows, **shape)
    return own if found is None else dataclasses.replace(own, **found)


WIDE_TILES_ON = ((9, 0),)
"""Compute capabilities on which weight_gradient_kernel takes 256 columns of d_model: 128 sums a thread."""


def weight_tiles(
    width: int, d_model: int, num_experts: int, dtype: torch.dtype, capability: tuple[int, int] | None = None
) -> ExpertTiles:
    """Of weight_gradient_kernel for `num_experts` here. With 256 columns of d_model it reads the narrow rows half as
    often: where there are as many programs as multiprocessors nevertheless. `capability`: this GPU's if None."""
    if dtype == torch.float32:
        return ExpertTiles(rows=16, hidden=32, out=32, warps=4, stages=2)
    hidden = 128 if width > 64 else 64
    programs = num_experts * triton.cdiv(width, hidden) * triton.cdiv(d_model, 256)
    is_wide = hidden == 128 and programs >= MIN_WIDE_PROGRAMS and (capability or cuda_capability()) in WIDE_TILES_ON
    # The order of the rows is loaded before the rows: of 5 stages each takes two, so 3 tiles are in flight.
    return ExpertTiles(rows=64, hidden=hidden, out=256 if is_wide else 128, warps=8, stages=5 if is_wide else 3)


def launch_weight_tiles(narrow: Tensor, source: Tensor, inputs: Inputs) -> ExpertTiles:
    """Of a launch of weight_gradient_kernel, as `launch_tiles`."""
    width, total, k = narrow.shape[1], inputs.load.shape[0], inputs.scores.shape[1]
    d, here = source.shape[1], inputs.down_experts.shape[0]
    own = weight_tiles(width, d, here, source.dtype)
    shape = {"d": d, "E": total, "here": here, "k": k, "width": width}
    found = measured("sigma_moe weight gradient", source.dtype, at=narrow.shape[0], **shape)
    return own if found is None else dataclasses.replace(own, **found)


SUM_TILES: Tiles = {"tokens": 2, "columns": 512, "warps": 4}
MIN_WIDE_PROGRAMS, MIN_PROGRAMS = 128, 256
"""About one and two for each of the 132 (H100) or 108 (A100) multiprocessors: of wide tiles it takes one at a time.
Segments are split until there are so many."""
MAX_SPLITS = 16


def sum_tiles(source: Tensor, rows_each: int) -> Tiles:
    """Of a launch of sum_kernel that adds up `rows_each` rows to each of the tokens of `source` [N, d]."""
    N, d = source.shape
    return measured("sigma_moe sum", source.dtype, at=N, d=d, rows_each=rows_each) or SUM_TILES


def weight_splits(tiles: ExpertTiles, num_rows: int, num_experts: int, width: int, d_model: int) -> int:
    """Programs that share the rows of one expert: a power of two, with four iterations or more for each on average."""
    programs = num_experts * triton.cdiv(width, tiles.hidden) * triton.cdiv(d_model, tiles.out)
    enough = MIN_WIDE_PROGRAMS if tiles.out == 256 else MIN_PROGRAMS
    wanted = min(MAX_SPLITS, enough // programs, num_rows // (4 * tiles.rows * num_experts))
    return 1 << max(1, wanted).bit_length() - 1


# -------------------------------------------------------------------------------------------------------------- host


@on_its_device
def forward(inputs: Inputs, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `model.kernels.ops.sigma_moe._sigma_moe`."""
    inputs = _prepare(inputs)
    hidden = inputs.x.new_empty(inputs.order.shape[0], inputs.up_experts.shape[2])
    return _launch("forward", inputs, residual, x_ptr=inputs.x, hidden_ptr=hidden), hidden


def backward(grad: Tensor, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, scores, up_experts, down_experts for the output's gradient `grad` [N, d]."""
    grad_x, grad_scores, kept = input_gradients(grad, inputs, hidden)
    return grad_x, grad_scores, *expert_gradients(grad, inputs, hidden, kept)


@on_its_device
def input_gradients(grad: Tensor, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """-> gradients of x and scores; and the gradient of the hidden layer before its activation and the hidden layer
    times its gate, for `expert_gradients`."""
    inputs = _prepare(inputs)
    x, scores = inputs.x, inputs.scores
    num_rows, G = inputs.order.shape[0], inputs.down_experts.shape[1]
    grad_hidden, gated = torch.empty_like(hidden), x.new_empty(num_rows, G)
    chunks = triton.cdiv(G, launch_tiles("backward", inputs).hidden)
    # No program writes the gate of a slot whose expert is not here.
    new = scores.new_zeros if _some_missing(inputs) else scores.new_empty
    grad_scores = new((*scores.shape, chunks), dtype=scores.dtype if chunks == 1 else torch.float32)
    grad_x = _launch(
        "backward",
        inputs,
        None,
        grad_ptr=grad.to(x.dtype).contiguous(),
        hidden_ptr=hidden,
        grad_hidden_ptr=grad_hidden,
        gated_ptr=gated,
        grad_scores_ptr=grad_scores,
    )
    grad_scores = grad_scores[..., 0] if chunks == 1 else grad_scores.sum(-1).to(scores.dtype)
    return grad_x, grad_scores, (grad_hidden, gated)


@on_its_device
def expert_gradients(
    grad: Tensor, inputs: Inputs, hidden: Tensor, kept: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """-> gradients of up_experts and down_experts; `kept` is what `input_gradients` gave for them."""
    x, order, load = (t.contiguous() for t in (inputs.x, inputs.order, inputs.load))
    (grad_hidden, gated), grad = kept, grad.to(x.dtype).contiguous()
    inputs = inputs._replace(x=x, order=order, load=load)
    grad_up = expert_weight_gradient(grad_hidden, x, inputs, width_first=False).to(inputs.up_experts.dtype)
    grad_down = expert_weight_gradient(gated, grad, inputs, width_first=True).to(inputs.down_experts.dtype)
    return grad_up, grad_down


def _prepare(inputs: Inputs) -> Inputs:
    """Contiguous; the experts in the dtype of `x`."""
    x, scores, order, load, up_experts, down_experts, first_expert = inputs
    reason = triton_limit(x.device.type, x.dtype)
    if reason is not None:
        raise ValueError(f"kernels.backend=triton cannot compute sigma_moe: {reason}. Possible: auto, reference")
    return Inputs(
        x.contiguous(),
        scores.contiguous(),
        order.contiguous(),
        load.contiguous(),
        up_experts.to(x.dtype).contiguous(),
        down_experts.to(x.dtype).contiguous(),
        first_expert,
    )


def _some_missing(inputs: Inputs) -> bool:
    """Whether slots may belong to experts of other ranks."""
    return inputs.order.shape[0] < inputs.scores.numel() or inputs.load.shape[0] > inputs.down_experts.shape[0]


def _launch(phase: str, inputs: Inputs, residual: Tensor | None, **own: Tensor) -> Tensor:
    """The expert kernel of a phase, "forward" or "backward", which takes `own` tensors beside those of `inputs`; the
    first of them [N, d] is its source. And the sum over k, to which `residual` [N, d] is added if given -> [N, d]."""
    _, scores, order, load, up, down, first_expert = inputs
    source = next(iter(own.values()))
    (num_tokens, d), k, num_rows = source.shape, scores.shape[1], order.shape[0]
    (num_experts, G, _), total = down.shape, load.shape[0]
    if num_rows == 0:
        return torch.zeros_like(source) if residual is None else residual.clone()
    swiglu = is_swiglu(up, down)
    tiles, kernel = launch_tiles(phase, inputs), {"forward": forward_kernel, "backward": backward_kernel}[phase]
    chunks, some_missing = triton.cdiv(G, tiles.hidden), _some_missing(inputs)
    present = None
    if k * chunks == 1:  # one row per token: it is the output
        row_stride, rows = d, (torch.zeros_like if some_missing else torch.empty_like)(source)
    else:
        row_stride = triton.cdiv(d, 8) * 8  # 16-byte rows where d = 412
        rows = source.new_empty(num_tokens * k * chunks, row_stride)
        present = source.new_zeros(num_tokens * k, dtype=torch.int8) if some_missing else None
    # Every expert with rows can have one tile that is not full.
    grid = (num_rows + min(num_rows, num_experts) * (tiles.rows - 1)) // tiles.rows, chunks
    kernel[grid](
        scores_ptr=scores,
        order_ptr=order,
        load_ptr=load,
        up_ptr=up,
        down_ptr=down,
        rows_ptr=rows,
        present_ptr=present,
        **own,
        **mlp_constants(phase, tiles, d, G, k, row_stride, swiglu=swiglu),
        **expert_constants(first_expert, num_experts, total),
        **tiles.launch,
    )
    if k * chunks == 1:
        return rows if residual is None else residual + rows
    y = torch.empty_like(source if residual is None else residual, memory_format=torch.contiguous_format)
    summing = sum_tiles(source, k * chunks)
    grid = triton.cdiv(num_tokens, summing["tokens"]), triton.cdiv(d, summing["columns"])
    sum_kernel[grid](
        rows_ptr=rows,
        present_ptr=present,
        residual_ptr=None if residual is None else residual.contiguous(),
        y_ptr=y,
        num_tokens=num_tokens,
        **sum_constants(d, k, chunks, row_stride, summing),
        num_warps=summing["warps"],
    )
    return y


def expert_weight_gradient(narrow: Tensor, source: Tensor, inputs: Inputs, *, width_first: bool) -> Tensor:
    """sum over the rows r of every expert here of narrow[r] (x) source[token of r]: `narrow` [R, width] sorted by
    expert, `source` [N, d] -> [num_experts, width, d], or [num_experts, d, width] unless `width_first`."""
    width, d, k = narrow.shape[1], source.shape[1], inputs.scores.shape[1]
    num_experts, total = inputs.down_experts.shape[0], inputs.load.shape[0]
    tiles = launch_weight_tiles(narrow, source, inputs)
    splits = weight_splits(tiles, narrow.shape[0] * num_experts // total, num_experts, width, d)
    shape = (num_experts, width, d) if width_first else (num_experts, d, width)
    out = source.new_empty(splits, *shape, dtype=source.dtype if splits == 1 else torch.float32)
    grid = triton.cdiv(width, tiles.hidden) * triton.cdiv(d, tiles.out), num_experts * splits
    weight_gradient_kernel[grid](
        narrow_ptr=narrow,
        source_ptr=source,
        order_ptr=inputs.order,
        load_ptr=inputs.load,
        out_ptr=out,
        **weight_constants(tiles, d, width, k, splits, width_first=width_first),
        **expert_constants(inputs.first_expert, num_experts, total),
        **tiles.launch,
    )
    return out[0] if splits == 1 else out.sum(0).to(source.dtype)


def expert_constants(first_expert: int, num_experts: int, total: int) -> dict[str, int]:
    """Constants of every kernel that goes by expert: those here, of `total` that were routed to."""
    power = max(2, triton.next_power_of_2(total))
    names = ("FIRST_EXPERT", "NUM_EXPERTS", "TOTAL_EXPERTS", "EXPERTS_POWER")
    return dict(zip(names, (first_expert, num_experts, total, power), strict=True))


def mlp_constants(
    phase: str, tiles: ExpertTiles, d: int, G: int, k: int, row_stride: int, *, swiglu: bool
) -> dict[str, int | bool]:
    """Constants of the kernel of a phase. Widths are among them: d = 412 gets 8-byte loads, not 2-byte ones."""
    piece = {"BLOCK_PIECE": tiles.piece} if phase == "backward" else {}
    return piece | {
        "D": d,
        "G": G,
        "K": k,
        "ROW_STRIDE": row_stride,
        "SWIGLU": swiglu,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_HIDDEN": tiles.hidden,
        "BLOCK_REDUCE": tiles.reduce,
        "BLOCK_OUT": tiles.out,
    }


def sum_constants(d: int, k: int, chunks: int, row_stride: int, tiles: Tiles = SUM_TILES) -> dict[str, int]:
    blocks = {"BLOCK_TOKENS": tiles["tokens"], "BLOCK_OUT": tiles["columns"]}
    return {"D": d, "K": k, "CHUNKS": chunks, "ROW_STRIDE": row_stride, **blocks}


def weight_constants(
    tiles: ExpertTiles, d: int, width: int, k: int, splits: int, *, width_first: bool
) -> dict[str, int]:
    """Constants of weight_gradient_kernel."""
    return {
        "D": d,
        "WIDTH": width,
        "K": k,
        "D_STRIDE": 1 if width_first else width,
        "WIDTH_STRIDE": d if width_first else 1,
        "SPLITS": splits,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_WIDTH": tiles.hidden,
        "BLOCK_D": tiles.out,
    }
