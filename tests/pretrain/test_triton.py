"""Training with `kernels.backend: triton` in the interpreter: the numbers of the other backends, in one process and
with experts divided over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.kernels.backend import BACKENDS
from pretrain.config.rules import choose_backends
from tests.harness import run_ranks
from tests.pretrain.matrix import Layout, config_of
from tests.pretrain.runs import assert_same, engine_trace, gradient_error, plain_trace, small_config

TOLERANCE = 1e-5
"""Relative, fp32: the tolerance of every layout test."""


@pytest.mark.slow  # the fast one: test_the_triton_kernels_train_with_the_losses_of_the_cpu in data/test_documents.py
def test_two_steps_give_the_losses_of_the_cpu_backend(prepared: Path) -> None:
    """Losses, gradient norms and every gradient, through the real trainer; regulariser and clipping on."""
    shape = ("batch.global_sequences=2", "batch.micro_sequences=2", "model.sequence_length=7")
    configs = [small_config(prepared, *shape, f"kernels.backend={name}") for name in ("cpu", "triton")]
    assert {name for name in vars(choose_backends(configs[1], "cpu")).values()} == {"triton"}
    assert len(vars(choose_backends(configs[1], "cpu"))) == len(BACKENDS)
    cpu, triton = run_ranks(engine_trace, 1, configs, 2, (0, 1))[0]
    assert len(set(cpu.losses)) == 2
    for step in range(2):
        assert triton.losses[step] == pytest.approx(cpu.losses[step], rel=TOLERANCE)
        assert triton.grad_norms[step] == pytest.approx(cpu.grad_norms[step], rel=TOLERANCE)
        for name, expected in cpu.gradients[step].items():
            assert gradient_error(triton.gradients[step][name], expected) < TOLERANCE, name


LAYOUTS = {
    "TP2": [Layout(tensor=2, zero=1, micro=8), Layout(tensor=2, sequence=True, zero=2, micro=8)],
    "EP2": [Layout(data=2, expert=2, zero=1, micro=4), Layout(data=2, expert=2, zero=2, micro=4, recompute="full")],
}


@pytest.mark.slow
@pytest.mark.parametrize("with_dropouts", [False, True], ids=["without dropout", "with every dropout"])
@pytest.mark.parametrize("model", ["switchall", "moa"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(prepared: Path, name: str, model: str, with_dropouts: bool) -> None:
    """The equality matrix's model, seeds and tolerance, against plain PyTorch in one process."""
    steps, gradient_steps = 3, (0, 2)
    reference = plain_trace(
        config_of(prepared, model, Layout(micro=8), with_dropouts=with_dropouts), steps, gradient_steps
    )
    configs = [
        config_of(prepared, model, layout, "kernels.backend=triton", with_dropouts=with_dropouts)
        for layout in LAYOUTS[name]
    ]
    traces = run_ranks(engine_trace, 2, configs, steps, gradient_steps, timeout_seconds=900)[0]
    for layout, trace in zip(LAYOUTS[name], traces, strict=True):
        assert_same(trace, reference, f"{model} {layout} triton")
