"""SwitchHead's gate-scaled GEMMs and sorted slots (backend `triton`), interpreted: what decides between them, tiles,
limits, and the bytes and FLOPs of every kernel. That their results are those of the fp64 loops is in
test_switchhead.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernel_cases.recording import recording
from model.kernels.triton import gated_gemm, switchhead_output
from model.kernels.triton import switchhead_value as value_kernels
from tests.model.kernels.test_switchhead import VALUE, Op, Shape, both_ops, computed, inputs, run
from tests.model.kernels.triton.small_tiles import gemm_bytes, of_kernels, use_tiles
from tests.model.kernels.triton.test_switchhead import GATED, SORTED, assert_equals_loop

SMALL = GATED.small


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16)


def test_fewer_experts_share_a_tile_where_tensor_memory_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability 10: 4 or 5 of 128 columns do not fit by Triton 3.7.1, which torch 2.13 brings."""
    shared = value_kernels.shared_experts
    assert [[shared(E, 128, major) for E in (2, 3, 4, 5, 8, 64)] for major in (9, 10)] == [
        [2, 3, 4, 5, 4, 4],
        [2, 3, 2, 1, 2, 2],
    ]
    assert [shared(E, 64, 10) for E in (4, 5)] == [4, 5]
    monkeypatch.undo()
    asked: list[int] = []

    def noted(*given: int) -> int:
        asked.append(shared(*given))
        return asked[-1]

    monkeypatch.setattr(value_kernels, "shared_experts", noted)
    monkeypatch.setattr(value_kernels, "cuda_capability", lambda: (10, 0))
    assert_equals_loop(VALUE, GATED, Shape(20, 40, 1, 100, 4, 2), torch.bfloat16)
    assert asked == [2]


@pytest.mark.parametrize("E, k, strategy", [(4, 2, "gated"), (5, 3, "gated"), (5, 2, "sorted"), (8, 4, "gated")])
@both_ops
def test_half_of_the_experts_decides(op: Op, E: int, k: int, strategy: str) -> None:
    with recording(check=False) as launches:
        computed(op, ("triton", None))(inputs(op, Shape(3, 4, 1, 4, E, k), torch.float32))
    gated_kernel = f"{op.name.removeprefix('switchhead_')}_forward_kernel"
    assert (gated_kernel in {launch.kernel for launch in launches}) == (strategy == "gated")


@both_ops
def test_dtypes_that_no_kernel_has_are_refused(op: Op) -> None:
    with pytest.raises(ValueError, match=r"not torch\.float64 by torch\.float64"):
        op.call(*inputs(op, SMALL, torch.float64), backend="triton")
    case = inputs(op, SMALL, torch.float32)
    with pytest.raises(ValueError, match=r"not torch\.float32 by torch\.bfloat16"):
        op.call(case.rows, case.choice, case.experts.bfloat16(), backend="triton")


@both_ops
def test_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles, half precision: at most 1.1 times what plain GEMMs over K-concatenated experts ask for (gates,
    and the rows for their gradient, are the rest), and less where a tile of x serves all experts: value forward."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k, _ = shape = Shape(256, 128, 2, 64, 4, 2)
    with recording(check=False) as launches:
        run(computed(op, GATED), inputs(op, shape, torch.bfloat16), torch.ones(()))
    to_narrow, to_wide = (N, H * h, E * d), (N, d, H * E * h)
    forward, backward, share = (to_narrow, to_wide, 0.75) if op is VALUE else (to_wide, to_narrow, 1.1)
    name = op.name.removeprefix("switchhead_")
    for kernel, size, limit in (
        (f"{name}_forward_kernel", forward, share),
        (f"{name}_backward_kernel", backward, 1.1),
        ("gated_weight_gradient_kernel", (H * E * d, h, N), 1.1),
    ):
        requested, flops = of_kernels(launches, kernel)
        assert flops == E / k * 2 * N * H * k * d * h
        assert requested <= limit * gemm_bytes(64, 2, size), kernel
    requested, _ = of_kernels(launches, "dense_gates_kernel", "gate_gradient_kernel")
    assert requested <= 0.2 * sum(of_kernels(launches, launch.kernel)[0] for launch in launches)


@both_ops
def test_sorted_traffic(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 x 64 tiles and 256 tokens per expert: flops 1.3 times the useful ones, bytes of every GEMM 1.5 times those
    of its useful rows; a slot's wide row is read once more, to be summed."""
    use_tiles(monkeypatch, 64)
    N, d, H, h, E, k, _ = shape = Shape(512, 128, 1, 64, 4, 2)
    with recording(check=False) as launches:
        run(computed(op, SORTED), inputs(op, shape, torch.bfloat16), torch.ones(()))
    useful, slots = 2 * N * H * k * d * h, N * H * k
    to_narrow, to_wide = (slots, h, d), (slots, d, h)
    projections = [launch for launch in launches if launch.kernel == "sorted_project_kernel"]
    sizes = (to_narrow, to_wide) if op is VALUE else (to_wide, to_narrow)
    for launch, size in zip(projections, sizes, strict=True):
        assert launch.dot_flops <= 1.3 * useful
        assert launch.requested_bytes <= 1.5 * gemm_bytes(64, 2, size)
    requested, flops = of_kernels(launches, "sorted_weight_gradient_kernel")
    assert flops <= 1.3 * useful
    assert requested <= 1.5 * (gemm_bytes(64, 2, (d, h, slots)) + 2 * E * d * h)
    assert of_kernels(launches, "sum_slots_kernel")[0] == 2 * (slots + N) * d


@both_ops
def test_gradients_of_gates_beyond_2_to_the_31(op: Op) -> None:
    """What the column tiles saw of them, [tiles, H, E, N], is the one tensor that many tokens make that long. As bytes,
    of which 16 tokens' alone are touched; 32-bit offsets would be negative."""
    N, E, tile = 2**29, 4, 16
    partial = torch.empty(2, 1, E, N, dtype=torch.int8)
    gates = torch.empty(1, E, N, dtype=torch.int8)
    gates[:, :, :tile] = 1
    narrow, wide = tile, 2 * tile  # of the gradient, and of the rows, which are cut into two tiles
    kernel, d, h = (
        (value_kernels.value_backward_kernel, wide, narrow)
        if op is VALUE
        else (switchhead_output.output_backward_kernel, narrow, wide)
    )
    grad, rows = torch.ones(tile, narrow), torch.ones(tile, wide)
    experts, target = torch.full((1, E, d * h), 1 / tile), torch.zeros_like(rows)
    kernel[(2,)](grad, rows, gates, experts, target, partial, N, d, h, 1, E, tile, tile, tile)
    assert (partial[:, 0, :, :tile] == tile).all() and (target == E).all()
    index, scores = torch.full((tile, 1, 1), E - 1), torch.empty(tile, 1, 1)
    gated_gemm.gate_gradient_kernel[(1, 1)](partial, index, scores, N, E, 2, 1, 1, tile)
    assert (scores == 2 * tile).all()


@pytest.mark.parametrize(
    "width, largest, tile",
    [
        (112, 128, 128),  # 1.14 times as wide
        (98, 128, 128),  # 1.31 with each tile: none fits, and of those that pad least the widest
        (99, 128, 128),  # 1.29
        (76, 128, 32),  # 96: 1.26
        (132, 128, 32),  # 160: 1.21; 192 and 256 are too wide
        (64, 128, 64),
        (128, 128, 128),
        (40, 128, 64),  # no tile fits, and of those that pad least the widest
        (112, 64, 64),
        (7, 64, 32),
    ],
)
def test_a_tile_is_the_widest_that_multiplies_few_zeros(width: int, largest: int, tile: int) -> None:
    assert gated_gemm.column_tile(width, largest) == tile
