"""Pipeline parallelism: every model of the family, divided into stages, gives the losses, gradient norms and gradients
of plain PyTorch in one process; auxiliary losses, evaluation, memory, tied weights and checkpoints too."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import Config
from tests.harness import run_ranks
from tests.pretrain.runs import engine_trace, plain_trace, small_config
from tests.pretrain.test_layouts import assert_same
from tests.pretrain.test_tensor_parallel import MODELS

STEPS, GRADIENT_STEPS = 8, (0, 3, 7)
LAYERS = ("model.num_layers=4",)


def config_of(prepared: Path, model: str, *overrides: str) -> Config:
    return small_config(prepared, *MODELS[model], *LAYERS, f"train.seed={SEEDS.get(model, 17)}", *overrides)


SEEDS: dict[str, int] = {}


@pytest.mark.parametrize("model", MODELS)
def test_every_model_gives_the_same_numbers(prepared: Path, model: str) -> None:
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), STEPS, GRADIENT_STEPS)
    assert max(reference.grad_norms) > 0.5, "clipping was never active"
    config = config_of(prepared, model, "parallel.pipeline=2", "batch.micro_sequences=4")
    trace = run_ranks(engine_trace, 2, [config], STEPS, GRADIENT_STEPS)[0][0]
    assert_same(trace, reference, f"PP 2, {model}")
