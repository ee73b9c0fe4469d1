"""SwitchHead's tokens grouped by the set of their chosen experts (backend `sets`), interpreted: FLOPs, tiles, limits.
That its results are those of the fp64 loops is in test_switchhead.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.kernel_cases.recording import recording
from model.kernels.backend import resolve
from model.kernels.triton import set_gemm
from tests.model.kernels.test_switchhead import OUTPUT, VALUE, Shape, computed, gradient, inputs, run
from tests.model.kernels.triton.small_tiles import use_tiles
from tests.model.kernels.triton.test_switchhead import SETS

SMALL = Shape(20, 17, 2, 19, 4, 2)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def test_only_the_chosen_experts_are_multiplied() -> None:
    """Beside the tiles that a set leaves partly empty: 6 sets of 2 of 4 experts, a head."""
    shape = Shape(16 * 16, 32, 2, 16, 4, 2)
    case = inputs(VALUE, shape, torch.float32)
    with recording(check=False) as launches:
        run(computed(VALUE, SETS), case, gradient(VALUE, shape, torch.float32))
    useful = 2 * shape.N * shape.H * shape.k * shape.d * shape.h
    forward, backward = (
        sum(launch.dot_flops for launch in launches if launch.kernel == f"set_{name}_kernel")
        for name in ("project", "gradient")
    )
    padding = 16 / shape.N
    assert useful <= forward <= useful * (1 + 6 * padding)
    assert useful <= backward <= useful * (1 + 2 * 4 * padding)  # an expert has N / 2 tokens


@triton.jit
def list_tiles_kernel(load, found, SETS: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    number, first, stop = set_gemm.find_set(load, tile, SETS, BLOCK_M)
    tl.store(found + 3 * tile + 0, number)
    tl.store(found + 3 * tile + 1, first)
    tl.store(found + 3 * tile + 2, stop)


@pytest.mark.parametrize(
    "load", [[0, 5, 0, 40, 16, 1, 0, 33], [0] * 8, [0, 0, 0, 64, 0, 0, 0, 0], [16] * 8, [1] * 8, [17, 0] * 4]
)
def test_tiles_of_sets_are_counted_in_rounds(load: list[int]) -> None:
    begin = [0, *itertools.accumulate(load)]
    rounds = range(max(load) // 16 + 1)
    expected = [
        (number, begin[number] + 16 * turn, begin[number + 1])
        for turn in rounds
        for number, count in enumerate(load)
        if count > 16 * turn
    ]
    found = torch.full((len(expected) + 5, 3), -1)
    list_tiles_kernel[(len(found),)](torch.tensor(load), found, SETS=8, BLOCK_M=16)
    assert [tuple(row) for row in found[: len(expected)].tolist()] == expected
    assert all(first >= stop for _, first, stop in found[len(expected) :].tolist()), "a tile of no set has no row"


@pytest.mark.parametrize("capability, most", [((8, 0), 64), ((9, 0), 128), ((10, 0), 64)])
def test_the_sums_of_the_shipped_tiles_fit_the_registers(
    capability: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of 8 warps has `most` of them; the widest tiles have as many, or a GPU idles."""
    monkeypatch.undo()
    seen: dict[str, int] = {}
    for dtype, h, k in itertools.product((torch.bfloat16, torch.float32), (4, 16, 64, 76, 128, 256), range(1, 7)):
        project = set_gemm.project_tiles(h, k, dtype, capability)
        gradient = set_gemm.gradient_tiles(2048, h, 16, dtype, capability)
        for name, tiles, experts in (("project", project, triton.next_power_of_2(k)), ("gradient", gradient, 1)):
            assert tiles.columns == triton.next_power_of_2(tiles.columns) >= 16
            seen[name] = max(seen.get(name, 0), tiles.rows * tiles.columns * experts // (32 * tiles.warps))
    assert seen == {"project": most, "gradient": most}
    narrow = set_gemm.gradient_tiles(2048, 128, 15, torch.bfloat16, capability)
    assert narrow.rows == 128, "wide tiles were fewer than the SMs of an H100"


def test_what_cannot_be_grouped_is_refused() -> None:
    def resolved(dtype: torch.dtype, *widths: int) -> str:
        return resolve("sets", VALUE.name, "cuda", dtype=dtype, widths=widths)

    assert resolved(torch.bfloat16, 2048, 128, 4, 2) == resolved(torch.float32, 12, 4, 6, 3) == "sets"
    for dtype, widths, words in (
        (torch.bfloat16, (1024, 64, 8, 4), "the sets of at most 6 experts, not 8"),
        (torch.bfloat16, (1024, 100, 4, 2), "100 is no multiple of 8"),
        (torch.float32, (10, 4, 4, 2), "10 is no multiple of 4"),
        (torch.float64, (1024, 64, 4, 2), "take float32, bfloat16 and float16"),
    ):
        with pytest.raises(
            ValueError, match=f"^kernels.backend=sets cannot compute switchhead_value on cuda: .*{words}"
        ):
            resolved(dtype, *widths)
    for op in (VALUE, OUTPUT):
        case = inputs(op, SMALL, torch.float32)
        with pytest.raises(
            ValueError, match=r"backend=sets .* of the same dtype, not torch\.float32 by torch\.bfloat16"
        ):
            op.call(case.rows, case.choice, case.experts.bfloat16(), backend="sets")
