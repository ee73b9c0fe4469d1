"""Expert parallelism"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.runs import engine_trace, plain_trace
from tests.pretrain.test_layouts import assert_same
from tests.pretrain.test_tensor_parallel import MODELS, config_of

STEPS, GRADIENT_STEPS = 8, (0, 3, 7)
SEQUENCE = ("parallel.tensor=2", "parallel.sequence=true")
LAYOUTS = {
    "EP 2": (2, ("parallel.expert=2",)),
    "EP 2 with TP 2 and SP": (4, ("parallel.expert=2", *SEQUENCE)),
}


@pytest.mark.parametrize("model", [m for m in MODELS if "switchall" in m])
def test_every_model_gives_the_same_numbers(prepared: Path, model: str) -> None:
    # micro_batch scope: 4 sequences per micro-step in every layout.
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), STEPS, GRADIENT_STEPS)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    for label, (ranks, layout) in LAYOUTS.items():
        configs = [
            config_of(prepared, model, *layout, "batch.micro_sequences=2", f"parallel.zero={zero}") for zero in (1, 2)
        ]
        for zero, trace in zip((1, 2), run_ranks(engine_trace, ranks, configs, STEPS, GRADIENT_STEPS)[0], strict=True):
            assert_same(trace, reference, f"{label}, ZeRO {zero}, {model}")
