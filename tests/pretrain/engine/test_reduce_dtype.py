"""parallel.reduce_dtype = bf16: gradients cross the network in half the bytes, rounded to bf16 and changed no more."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError
from pretrain.checkpoint.state import owned_state
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.parallel.context import parallel_context
from pretrain.planning.record import Call
from tests.harness import run_ranks
from tests.pretrain.planning.test_rehearsal import measured_calls
from tests.pretrain.runs import one_step, small_config, trainer_of

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ZeRO 1": (2, ()),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "PP2 DP2": (4, ("parallel.pipeline=2",)),
    "EP2 of DP4": (4, ("parallel.expert=2", "model.feedforward.num_experts=4", "batch.micro_sequences=2")),
}


def configs(prepared: Path, name: str) -> tuple[int, Config, Config]:
    """Ranks, and the run with gradients summed in fp32 and in bf16. With one micro-step, because ZeRO 2 and 3 add up in
    fp32 what each has rounded. Adam's first moment after a step is half of the gradient, exactly."""
    ranks, overrides = LAYOUTS[name]
    keys = ("train.precision=bf16", "optimizer.betas=[0.5, 0.95]", "optimizer.clip_norm=0", *overrides)
    fp32, bf16 = (small_config(prepared, *keys, f"parallel.reduce_dtype={dtype}") for dtype in ("fp32", "bf16"))
    return ranks, fp32, bf16


def gradients(rank: int, config: Config) -> dict[str, torch.Tensor]:
    """Of the parts of the first step that this rank owns, by parameter: doubled first moments."""
    trainer = trainer_of(config)
    one_step(trainer, Progress(0, 0))
    owned = owned_state(trainer.engine, parallel_context(config))
    found = {}
    for key, fragments in owned.items():
        if key.startswith("exp_avg/"):
            found[key] = 2.0 * torch.cat([values.flatten() for values in fragments.chunks.values()])
    trainer.engine.destroy()
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_fp32_sums_rounded_to_bf16(prepared: Path, name: str) -> None:
    ranks, *both = configs(prepared, name)
    exact, rounded = (run_ranks(gradients, ranks, config) for config in both)
    differing = 0
    for of_exact, of_rounded in zip(exact, rounded, strict=True):
        assert of_exact.keys() == of_rounded.keys()
        for key, values in of_exact.items():
            found = of_rounded[key]
            assert torch.equal(found, found.bfloat16().float()), key
            # The part of each rank is rounded, and every sum. Where parts nearly cancel, that weighs more.
            assert (found - values).norm() <= 2 ** -(8 if ranks == 2 else 6) * values.norm() + 1e-9, key
            differing += int((found != values).sum())
    assert differing > 1000


@pytest.mark.parametrize("name", ["ZeRO 1", pytest.param("ZeRO 3", marks=pytest.mark.slow), "PP2 DP2"])
def test_half_the_bytes_are_sent_for_gradients_and_nothing_else_changes(prepared: Path, name: str) -> None:
    ranks, *both = configs(prepared, name)
    fp32, bf16 = (run_ranks(measured_calls, ranks, config)[0] for config in both)
    reductions = ("all_reduce", "reduce_scatter")

    def sums(calls: list[Call], dtype: str) -> Counter[tuple[str, int]]:
        return Counter((c.kind, c.elements) for c in calls if c.kind in reductions and c.dtype == dtype)

    large = Counter({call: times for call, times in sums(fp32, "float32").items() if call[1] > 1000})
    small = sums(fp32, "float32") - large
    assert sum(elements * times for (_, elements), times in large.items()) > 10_000
    assert sums(bf16, "bfloat16") - sums(fp32, "bfloat16") == large
    assert sums(bf16, "float32") == small
    assert [c for c in fp32 if c.kind not in reductions] == [c for c in bf16 if c.kind not in reductions]


def test_other_precisions_sum_in_fp32(prepared: Path) -> None:
    for precision in ("fp32", "fp16"):
        wanted = re.escape(f"parallel.reduce_dtype: gradients of a run in {precision} are summed in fp32; set ")
        with pytest.raises(ConfigError, match=wanted):
            small_config(prepared, f"train.precision={precision}", "parallel.reduce_dtype=bf16")
