"""The same numbers in every layout: data-parallel ranks, ZeRO stages and micro-batch sizes against plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.runs import Trace, engine_trace, gradient_error, plain_trace, small_config

STEPS = 20
GRADIENT_STEPS = (0, 7, 19)
TOLERANCE = 1e-5

# ranks: [(ZeRO stage, micro_sequences)]; 8 sequences a step, so 1 to 8 micro-steps.
LAYOUTS = {
    1: [(0, 8), (0, 1), (1, 2), (2, 4), (3, 8), (3, 2)],
    2: [(0, 4), (0, 2), (1, 4), (1, 1), (2, 2), (3, 4), (3, 1)],
    4: [(0, 2), (0, 1), (1, 1), (1, 2), (2, 2), (2, 1), (3, 1), (3, 2)],
}


def assert_same(trace: Trace, reference: Trace, label: str) -> None:
    assert reference.smallest_margin > 1e-6, f"a routing choice is decided by {reference.smallest_margin}: choose a seed"
    assert len(trace.losses) == STEPS
    for step in range(STEPS):
        assert trace.losses[step] == pytest.approx(reference.losses[step], rel=TOLERANCE), f"{label}: loss of step {step}"
        norm, expected = trace.grad_norms[step], reference.grad_norms[step]
        assert norm == pytest.approx(expected, rel=TOLERANCE), f"{label}: gradient norm of step {step}"
    for step, gradients in reference.gradients.items():
        assert gradients.keys() == trace.gradients[step].keys()
        for name, expected_gradient in gradients.items():
            error = gradient_error(trace.gradients[step][name], expected_gradient)
            assert error < TOLERANCE, f"{label}: gradient of {name} at step {step} is off by {error:.1e}"


@pytest.fixture(scope="module")
def reference(prepared: Path) -> Trace:
    trace = plain_trace(small_config(prepared, "batch.micro_sequences=8"), STEPS, GRADIENT_STEPS)
    assert max(trace.grad_norms) > 0.5, "clipping was never active"
    return trace


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_data_parallel_layout_gives_the_same_numbers(prepared: Path, reference: Trace, ranks: int) -> None:
    configs = [
        small_config(prepared, f"parallel.zero={zero}", f"batch.micro_sequences={micro}") for zero, micro in LAYOUTS[ranks]
    ]
    traces = run_ranks(engine_trace, ranks, configs, STEPS, GRADIENT_STEPS)[0]
    for (zero, micro), trace in zip(LAYOUTS[ranks], traces, strict=True):
        assert_same(trace, reference, f"{ranks} ranks, ZeRO {zero}, micro {micro}")
