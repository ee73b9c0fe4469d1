"""Ops that hand their input on (model/kernels/op.py) in the layouts that hold weights or tokens apart. The CPU's own
backends do not hand on; tensor parallelism, where the experts' ops do not, has a test in test_tensor_parallel.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.pretrain.family import config_of
from tests.pretrain.runs import assert_same, engine_trace, plain_trace

pytestmark = pytest.mark.slow  # ranks of their own


LAYOUTS = ("parallel.zero=3", "parallel.pipeline=2", "parallel.expert=2")


@pytest.mark.parametrize(
    "model, layouts",
    [
        ("switchall", LAYOUTS),
        ("switchall rope with memory", LAYOUTS),
        ("all projections experts", LAYOUTS[:2]),  # its feed-forward has no experts
    ],
)
def test_gradients_that_products_add_up_are_the_same_in_every_layout(
    prepared: Path, model: str, layouts: tuple[str, ...]
) -> None:
    reference = plain_trace(config_of(prepared, model, "batch.micro_sequences=4"), 2, (0, 1))
    keys = ("batch.micro_sequences=2", "kernels.backend=dense")
    configs = [config_of(prepared, model, *keys, layout) for layout in layouts]
    for layout, trace in zip(layouts, run_ranks(engine_trace, 2, configs, 2, (0, 1))[0], strict=True):
        assert_same(trace, reference, f"{layout}, {model}")
