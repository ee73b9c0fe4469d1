"""Tensor parallelism, and sequence parallelism inside its group: every model of the family, alone and with data
parallelism and ZeRO 0 to 3, gives the losses, gradient norms and gradients of plain PyTorch in one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.harness import run_ranks
from tests.pretrain.family import MODELS, config_of
from tests.pretrain.runs import (
    assert_near,
    assert_same,
    engine_trace,
    plain_trace,
)

STEPS, GRADIENT_STEPS = 8, (0, 3, 7)
FEW_STEPS, FEW_GRADIENT_STEPS = 4, (0, 3)
"""Of what every commit runs."""
TENSOR = ("parallel.tensor=2",)
SEQUENCE = (*TENSOR, "parallel.sequence=true")
FAST = {
    ("switchall xl", 4): (3,),
    ("moa xl", 2): (0,),
    ("dense xl", 2): (0,),
    ("dense xl, grouped queries", 2): (0,),
    ("all projections experts", 2): (0,),
}
"""What every commit runs with sequence parallelism, with its ZeRO stages. All others are as long and go to the slow
tier; without sequence parallelism the fast tier has the layouts in test_matrix.py."""


def check_numbers(
    prepared: Path, model: str, keys: tuple[str, ...], zeros: dict[int, tuple[int, ...]], steps: int
) -> None:
    """In groups of 2: `zeros` has the ZeRO stages for each number of ranks."""
    gradient_steps = GRADIENT_STEPS if steps == STEPS else FEW_GRADIENT_STEPS
    # micro_batch scope: 4 sequences per micro-step in every layout.
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), steps, gradient_steps)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    for ranks, stages in zeros.items():
        micro = f"batch.micro_sequences={4 * 2 // ranks}"
        configs = [config_of(prepared, model, *keys, micro, f"parallel.zero={zero}") for zero in stages]
        for zero, trace in zip(stages, run_ranks(engine_trace, ranks, configs, steps, gradient_steps)[0], strict=True):
            assert_same(trace, reference, f"{keys}, DP {ranks // 2}, ZeRO {zero}, {model}")


@pytest.mark.parametrize("model, ranks", FAST)
def test_some_models_with_sequence_parallelism(prepared: Path, model: str, ranks: int) -> None:
    check_numbers(prepared, model, SEQUENCE, {ranks: FAST[model, ranks]}, FEW_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [TENSOR, SEQUENCE], ids=["TP", "TP with SP"])
@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"switchall", "switchall, every dropout", "switchall xl"}))
def test_every_model_gives_the_same_numbers(prepared: Path, model: str, keys: tuple[str, ...]) -> None:
    """Those that test_matrix.py::test_all does not have."""
    check_numbers(
        prepared, model, keys, {2: (0, 1), 4: (0, 1, 2, 3)} if keys == SEQUENCE else {2: (2,), 4: (3,)}, STEPS
    )


@pytest.mark.slow
def test_a_head_per_rank_by_the_gemms_of_all_experts_and_of_sets(prepared: Path) -> None:
    """The backends of SwitchHead's projections that are asked for by name, whose gradients overlap with the sum over
    ranks as those of the others do. One rank's are held by test_switchhead.py, the division by test_matrix.py."""
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), 3, (0, 2))
    keys = ("batch.micro_sequences=8", *TENSOR)
    configs = [config_of(prepared, "switchall", *keys, f"kernels.backend={backend}") for backend in ("dense", "sets")]
    for backend, trace in zip(("dense", "sets"), run_ranks(engine_trace, 2, configs, 3, (0, 2))[0], strict=True):
        assert_same(trace, reference, f"TP 2, {backend}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, sizes",
    [
        (("parallel.tensor=4",), ()),
        (("parallel.tensor=4", "parallel.sequence=true"), ("model.dropout=0.1", "train.seed=8")),
    ],
    ids=["alone", "with sequence parallelism"],
)
def test_reference_kernels_and_four_way_division(
    prepared: Path, layout: tuple[str, ...], sizes: tuple[str, ...]
) -> None:
    keys = (*sizes, "model.feedforward.num_experts=8", "model.vocab_size=404", "batch.micro_sequences=8")
    reference = plain_trace(config_of(prepared, "switchall", *keys), STEPS, GRADIENT_STEPS)
    configs = [
        config_of(prepared, "switchall", *keys, *layout, f"kernels.backend={backend}")
        for backend in ("reference", "cpu")
    ]
    for trace in run_ranks(engine_trace, 4, configs, STEPS, GRADIENT_STEPS)[0]:
        assert_same(trace, reference, f"{layout}")


@pytest.mark.slow
@pytest.mark.parametrize("layout, zeros", [(TENSOR, (1, 3)), (SEQUENCE, (1, 2, 3))], ids=["TP", "TP with SP"])
def test_bf16_stays_near_fp32(prepared: Path, layout: tuple[str, ...], zeros: tuple[int, ...]) -> None:
    reference = plain_trace(config_of(prepared, "switchall", "batch.micro_sequences=8"), STEPS, ())
    keys = (*layout, "train.precision=bf16", "batch.micro_sequences=4")
    configs = [config_of(prepared, "switchall", *keys, f"parallel.zero={zero}") for zero in zeros]
    for zero, trace in zip(zeros, run_ranks(engine_trace, 4, configs, STEPS, ())[0], strict=True):
        assert_near(trace, reference, f"ZeRO {zero}")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("parallel.tensor=3",), "tensor: 3 does not divide model.attention.num_heads = 4; set parallel.tensor to 2"),
        ((*TENSOR, "model.vocab_size=401"), "tensor: 2 does not divide model.vocab_size = 401; set parallel.tensor to"),
        (
            (*TENSOR, "model.feedforward.num_experts=5"),
            "tensor: 2 does not divide model.feedforward.num_experts = 5; set",
        ),
        (
            ("parallel.sequence=true",),
            "sequence: divides the tokens over tensor-parallel ranks, but parallel.tensor is 1; set",
        ),
        (
            (*SEQUENCE, "model.sequence_length=15"),
            "sequence: parallel.tensor = 2 does not divide model.sequence_length = 15; set parallel.sequence to false "
            "or model.sequence_length to 16",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(prepared: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"parallel.{message}")):
        config_of(prepared, "switchall", *overrides)
