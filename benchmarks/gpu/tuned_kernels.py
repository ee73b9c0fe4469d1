"""The kernels whose tiles are searched, the costliest of a micro-step first, with today's tiles and what is tried.

Each function below is one module of model/kernels/triton: its own tiles, for which launches they are, and what else
they may be. Sizes are powers of two around today's. What spills is not ruled out here: a compiler says it
(tile_compilation.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.tile_search import DTYPE, Search, Tiles
from benchmarks.op_cases import (
    Case,
    attention_case,
    choice,
    loss_case,
    norm_case,
    output_case,
    rotate_case,
    route_case,
    sigma_moe_case,
    value_case,
)
from model.kernels.ops.switchhead import switchhead_output, switchhead_value
from model.kernels.triton import (
    gated_rows,
    layer_norm,
    linear_cross_entropy,
    relative_attention,
    rope,
    route,
    set_gemm,
    sigma_moe,
)

WARPS, STAGES = (4, 8), (2, 3, 4, 5)


class Model(NamedTuple):
    """The shapes of a micro-step."""

    name: str
    B: int
    T: int
    d: int
    experts: tuple[int, int, int]
    """The feed-forward's: E, k, G."""
    head: tuple[int, int, int, int]
    """SwitchHead's: H, E, k, h."""
    routers: int
    """Of SwitchHead, that choose together."""
    classes: int
    half: int = 0
    """Pairs of a head that RoPE rotates."""

    @property
    def N(self) -> int:
        return self.B * self.T


TINY = Model("tiny", 2, 19, 24, experts=(4, 2, 16), head=(2, 4, 2, 8), routers=4, classes=50, half=2)
SWITCHALL_1B = Model("1b", 8, 2048, 2048, (64, 8, 128), (8, 4, 2, 128), routers=16, classes=32000, half=32)
PUBLISHED_262M = Model("262m", 8, 512, 1024, (32, 4, 128), (4, 4, 2, 112), routers=4, classes=8000)


def searches(*, tiny: bool) -> Iterator[Search]:
    """switchall_1b (8 sequences of 2048 tokens), then the published 262M models (8 of 512)."""
    for model in (TINY,) if tiny else (SWITCHALL_1B, PUBLISHED_262M):
        yield from sigma_moe_searches(model)
        yield from set_gemm_searches(model)
        yield from gated_rows_searches(model)
        yield from softmax_searches(model)
        yield from norm_searches(model)
        if model.half:
            yield from rope_searches(model)
        yield from route_searches(model, model.routers, *model.head[1:3])
        yield from route_searches(model, 1, *model.experts[:2])
        if model is not SWITCHALL_1B:
            yield from relative_attention_searches(model)


def current_capability() -> tuple[int, int]:
    """Of this machine's GPU, asked for whether or not CUDA has started; without one that of an H100."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def sigma_moe_searches(model: Model) -> Iterator[Search]:
    N, d, (E, k, G), capability = model.N, model.d, model.experts, current_capability()
    forward = sigma_moe.mlp_tiles(N * k, E, G, DTYPE, swiglu=False)
    backward = sigma_moe.backward_tiles(forward, d, G, swiglu=False, capability=capability)
    weights = sigma_moe.weight_tiles(G, d, E, DTYPE, capability)
    sizes = {"d": d, "E": E, "here": E, "k": k}
    both, common = sizes | {"G": G, "swiglu": 0}, {"out": (32, 64, 128), "stages": STAGES}
    for what, phase, shape, rows, own, values in (
        # 256 rows read weights half as often as 128, and a multiprocessor holds one program of them.
        ("forward", "forward", both, N * k, _named(forward, without=("piece", "registers")),
         common | {"rows": (64, 128, 256), "reduce": (32, 64, 128), "warps": (4, 8, 16)}),
        # All columns at once, and as many registers as the compiler likes, are what an H200 ran in 2026.
        ("backward", "backward", both, N * k, _named(backward),
         common | {"rows": (64, 128), "piece": (16, 128), "registers": (0, 128, 168)}),
        ("weight gradient", "backward", sizes | {"width": G}, N * k,
         _named(weights, without=("reduce", "piece", "registers")),
         {"rows": (32, 64, 128), "hidden": (64, 128), "out": (64, 128, 256), "warps": WARPS, "stages": STAGES}),
        ("sum", "forward", {"d": d, "rows_each": k * -(-G // forward.hidden)}, N, dict(sigma_moe.SUM_TILES),
         {"tokens": (1, 2, 4, 8), "columns": (256, 512, 1024, 2048), "warps": (2, 4, 8)}),
    ):  # fmt: skip
        yield Search(
            name=f"sigma_moe {what} {model.name} N={N} d={d} E={E} k={k} G={G}",
            kernels=(f"{what.replace(' ', '_')}_kernel",),
            phase=phase,
            build=functools.partial(sigma_moe_case, N, d, E, k, G),
            backend="triton",
            kernel=f"sigma_moe {what}",
            shape=shape,
            rows=rows,
            own=own,
            values=values,
        )


def set_gemm_searches(model: Model) -> Iterator[Search]:
    """kernels.backend=sets, which `auto` takes nowhere before a GPU has timed it."""
    N, d, (H, E, k, h) = model.N, model.d, model.head
    shape = f"{model.name} N={N} d={d} H={H} E={E} k={k} h={h}"
    capability = current_capability()
    project = set_gemm.project_tiles(h, k, DTYPE, capability)
    gradient = set_gemm.gradient_tiles(d, h, H * E, DTYPE, capability)
    for what, phase, kernel, flag, own, case in (
        ("value forward", "forward", "project", {"transposed": 0}, project, value_case),
        ("output backward", "backward", "project", {"transposed": 1}, project, output_case),
        ("value", "backward", "gradient", {"narrow_first": 0}, gradient, value_case),
        ("output", "backward", "gradient", {"narrow_first": 1}, gradient, output_case),
    ):
        rows, most = ((64, 128), 128 // k) if kernel == "project" else ((64, 128, 256), 128)
        yield Search(
            name=f"set_gemm {kernel} {what} {shape}",
            kernels=(f"set_{kernel}_kernel",),
            phase=phase,
            build=functools.partial(case, N, d, H, E, k, h),
            backend="sets",
            kernel=f"set_gemm {kernel}",
            shape={"d": d, "H": H, "E": E, "k": k, "h": h} | flag,
            rows=N,
            own=own._asdict(),
            values={"rows": rows, "columns": (32, 64, 128), "depth": (32, 64, 128), "warps": WARPS, "stages": STAGES},
            fits=functools.partial(_sums_fit, most),
        )


def _sums_fit(most: int, tiles: Tiles) -> bool:
    """At most `most` sums a thread in each accumulator."""
    return tiles["rows"] * tiles["columns"] <= 32 * tiles["warps"] * most


def gated_rows_searches(model: Model) -> Iterator[Search]:
    """Beside cuBLAS's products (kernels.backend=dense)."""
    N, d, (H, E, k, h) = model.N, model.d, model.head
    blocks = gated_rows.tile(h, k)
    for what, phase, kernel, flags in (
        ("value", "forward", "gated_sum", {"keep": 1, "dot": 0}),
        ("output", "backward", "gated_sum", {"keep": 0, "dot": 1}),
        ("value", "backward", "gated_spread", {"dot": 1}),
        ("output", "forward", "gated_spread", {"dot": 0}),
    ):
        yield Search(
            name=f"{kernel} {what} {model.name} N={N} H={H} E={E} k={k} h={h}",
            kernels=(f"{kernel}_kernel",),
            phase=phase,
            build=functools.partial(dense_case, what, N, d, H, E, k, h),
            backend="dense",
            kernel=kernel,
            shape={"E": E, "k": k, "h": h} | flags,
            own={"rows": blocks["BLOCK_M"], "columns": blocks["BLOCK_N"], "warps": gated_rows.WARPS},
            values={"rows": (8, 16, 32, 64), "columns": (32, 64, 128), "warps": (2, 4, 8)},
        )


def dense_case(what: str, *sizes: int) -> Case:
    """SwitchHead's op whose dense backend takes the Triton kernels on every device."""
    op, rows = (switchhead_value, "x") if what == "value" else (switchhead_output, "a")
    case = (value_case if what == "value" else output_case)(*sizes)

    def compute(t: dict[str, Tensor], backend: str) -> tuple[Tensor, ...]:
        strategy = "fused" if backend == "dense" else None
        return (op(t[rows], choice(t), t["experts"], backend=backend, strategy=strategy),)

    return case._replace(compute=compute)


def softmax_searches(model: Model) -> Iterator[Search]:
    N, d, V = model.N, model.d, model.classes
    _, block, warps = linear_cross_entropy.blocks(V, holds_row=True)
    yield Search(
        name=f"softmax {model.name} N={N} d={d} V={V}",
        kernels=("softmax_kernel",),
        phase="forward",
        build=functools.partial(loss_case, N, d, V),
        backend="triton",
        kernel="softmax",
        shape={"V": V, "holds_row": 1},
        own={"block": block, "warps": warps},
        values={"block": (2048, 4096, 8192, 16384, 32768), "warps": (4, 8, 16, 32)},
        fits=lambda tiles: tiles["block"] <= max(block, 2 * V),  # half of a longer one is empty
    )


def norm_searches(model: Model) -> Iterator[Search]:
    B, T, d = model.B, model.T, model.d
    any_warps, resident = {"warps": (1, 2, 4, 8, 16)}, {"resident": (1024, 2048, 4096, 8192)}
    sums = {"rows": (32, 64, 128, 256), "columns": (16, 32, 64), "warps": WARPS}
    for what, phase, own, values in (
        ("forward", "forward", {"warps": layer_norm.warps(d)}, any_warps),
        ("backward", "backward", layer_norm.backward_tiles(d), any_warps | resident),
        ("sum", "backward", layer_norm.SUM_TILES, sums),
    ):
        yield Search(
            name=f"norm {what} {model.name} B={B} T={T} d={d}",
            kernels=(f"norm_{what}_kernel",),
            phase=phase,
            build=functools.partial(norm_case, B, T, d, 0.0),
            backend="triton",
            kernel=f"norm {what}",
            shape={"d": d},
            own=dict(own),
            values=values,
        )


def rope_searches(model: Model) -> Iterator[Search]:
    B, T, (H, _, _, h), half = model.B, model.T, model.head, model.half
    yield Search(
        name=f"rope {model.name} B={B} T={T} H={H} h={h} half={half}",
        kernels=("rotate_kernel",),
        phase="forward",
        build=functools.partial(rotate_case, B, T, H, h, half),
        backend="triton",
        kernel="rope",
        shape={"h": h, "half": half},
        own={"tile": rope.TILE, "warps": rope.WARPS},
        values={"tile": (512, 1024, 2048, 4096), "warps": (2, 4, 8)},
    )


def route_searches(model: Model, R: int, E: int, k: int) -> Iterator[Search]:
    N, d, own = model.N, model.d, route.RouterTiles.of(R, E, DTYPE)
    tiles = {"tokens": own.tokens, "depth": own.depth}
    tiles |= {"warps": own.options["num_warps"], "stages": own.options["num_stages"]}
    places = {"placers": route.MAX_PLACERS, "counts": route.COUNTS}
    choosing = {"tokens": (16, 32, 64, 128), "depth": (32, 64, 128), "warps": WARPS, "stages": STAGES}
    placing = {"placers": (64, 128, 256, 512), "counts": (16, 32, 64, 128)}
    for what, kernels, found, values in (
        (
            "choose and place",
            ("choose_kernel", "place_kernel"),
            tiles,
            choosing,
        ),  # both go by the same blocks of tokens
        ("place", ("place_kernel",), places, placing),
    ):
        yield Search(
            name=f"route {what} {model.name} N={N} d={d} R={R} E={E} k={k}",
            kernels=kernels,
            phase="forward",
            build=functools.partial(route_case, N, d, R, E, k),
            backend="triton",
            kernel=f"route {what}",
            shape={"d": d, "R": R, "E": E, "k": k},
            rows=N,
            own=found,
            values=values,
        )


def relative_attention_searches(model: Model) -> Iterator[Search]:
    B, T, (H, _, _, h) = model.B, model.T, model.head
    places = {"queries": (64, 128), "keys": (64, 128, 256), "depth": (32, 64, 128), "warps": WARPS, "stages": STAGES}
    others = {"queries": (16, 32, 64, 128), "keys": (32, 64, 128), "warps": WARPS, "stages": (1, *STAGES)}
    every = {what: ("key_gradient_kernel", others) for what in relative_attention.TILES[relative_attention.widest(h)]}
    every |= {"forward": ("forward_kernel", others), "queries": ("query_gradient_kernel", others)}
    for what, (kernel, values) in {"places": ("position_logits_kernel", places), **every}.items():
        tiles = relative_attention.PLACES
        if what != "places":
            tiles = relative_attention.tiles(h, what, current_capability()[0])
        names = ("queries", "keys", "warps", "stages", *(("depth",) if what == "places" else ()))
        yield Search(
            name=f"relative_attention {what} {model.name} B={B} T={T} H={H} h={h}",
            kernels=(kernel,),
            phase="forward" if what in ("places", "forward") else "backward",
            build=functools.partial(attention_case, B, T, H, h),
            backend="triton",
            kernel=f"relative_attention {what}",
            shape={"h": -(-h // 8) * 8},
            own={name: tiles[relative_attention.OWN_NAMES[name]] for name in names},
            values=values,
            # Of more, the logits alone fill the registers.
            fits=lambda tiles: "depth" in tiles or tiles["queries"] * tiles["keys"] <= 8192,
        )


def _named(tiles: sigma_moe.ExpertTiles, without: Sequence[str] = ()) -> Tiles:
    """By name, but for those that a kernel does not have."""
    return {name: value for name, value in vars(tiles).items() if name not in without}
