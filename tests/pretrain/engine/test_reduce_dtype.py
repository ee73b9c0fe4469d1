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

REDUCTIONS = ("all_reduce", "reduce_scatter")
RANKS = {
    2: {"ZeRO 1": (), "ZeRO 2": ("parallel.zero=2",), "ZeRO 3": ("parallel.zero=3",)},
    4: {
        "PP2 DP2": ("parallel.pipeline=2",),
        "EP2 of DP4": ("parallel.expert=2", "model.feedforward.num_experts=4", "batch.micro_sequences=2"),
    },
}
STANDS = "optimizer.learning_rate=1e-30"
"""Weights stay: those of gradients that were rounded would choose other experts, to which other tokens are sent."""
Gradients = dict[str, torch.Tensor]


def gradients(config: Config) -> Gradients:
    """Of the parts of the first step that this rank owns, by parameter: doubled first moments."""
    trainer = trainer_of(config)
    one_step(trainer, Progress(0, 0))
    owned = owned_state(trainer.engine, parallel_context(config))
    found = {}
    for key, fragments in owned.items():
        if key.startswith("exp_avg/"):
            found[key] = 2.0 * torch.cat([values.flatten() for values in fragments.chunks.values()])
    trainer.close()
    return found


def measured(rank: int, configs: list[tuple[Config, Config]]) -> list[list[tuple[Gradients, list[Call]]]]:
    """Of each run with both types, this rank's gradients and calls."""
    return [[(gradients(config), measured_calls(rank, config)) for config in both] for both in configs]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_cross_the_network_in_bf16_and_are_those_of_fp32_sums_rounded(prepared: Path, ranks: int) -> None:
    """With one micro-step, because ZeRO 2 and 3 add up in fp32 what each has rounded. Adam's first moment after a step
    is half of the gradient, exactly."""
    configs = []
    for overrides in RANKS[ranks].values():
        keys = ("train.precision=bf16", "optimizer.betas=[0.5, 0.95]", "optimizer.clip_norm=0", STANDS, *overrides)
        fp32, bf16 = (small_config(prepared, *keys, f"parallel.reduce_dtype={dtype}") for dtype in ("fp32", "bf16"))
        configs.append((fp32, bf16))
    found = run_ranks(measured, ranks, configs)
    for i, name in enumerate(RANKS[ranks]):
        pairs = [of_rank[i] for of_rank in found]
        check_gradients(name, ranks, [(exact, rounded) for (exact, _), (rounded, _) in pairs])
        (_, fp32_calls), (_, bf16_calls) = pairs[0]
        check_calls(name, fp32_calls, bf16_calls)


def check_gradients(name: str, ranks: int, pairs: list[tuple[Gradients, Gradients]]) -> None:
    differing = 0
    for exact, rounded in pairs:
        assert exact.keys() == rounded.keys()
        for key, values in exact.items():
            found = rounded[key]
            assert torch.equal(found, found.bfloat16().float()), (name, key)
            # The part of each rank is rounded, and every sum. Where parts nearly cancel, that weighs more.
            assert (found - values).norm() <= 2 ** -(8 if ranks == 2 else 6) * values.norm() + 1e-9, (name, key)
            differing += int((found != values).sum())
    assert differing > 1000, name


def sums(calls: list[Call], dtype: str) -> Counter[tuple[str, int]]:
    return Counter((c.kind, c.elements) for c in calls if c.kind in REDUCTIONS and c.dtype == dtype)


def check_calls(name: str, fp32: list[Call], bf16: list[Call]) -> None:
    """Half the bytes are sent for gradients, and nothing else changes."""
    large = Counter({call: times for call, times in sums(fp32, "float32").items() if call[1] > 1000})
    small = sums(fp32, "float32") - large
    assert sum(elements * times for (_, elements), times in large.items()) > 10_000, name
    assert sums(bf16, "bfloat16") - sums(fp32, "bfloat16") == large, name
    assert sums(bf16, "float32") == small, name
    assert [c for c in fp32 if c.kind not in REDUCTIONS] == [c for c in bf16 if c.kind not in REDUCTIONS], name


def test_other_precisions_sum_in_fp32(prepared: Path) -> None:
    for precision in ("fp32", "fp16"):
        wanted = re.escape(f"parallel.reduce_dtype: gradients of a run in {precision} are summed in fp32; set ")
        with pytest.raises(ConfigError, match=wanted):
            small_config(prepared, f"train.precision={precision}", "parallel.reduce_dtype=bf16")
