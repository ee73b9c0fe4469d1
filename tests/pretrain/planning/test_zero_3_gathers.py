"""What ZeRO 3 gathers by DeepSpeed's rules, beside rehearsed steps, in which DeepSpeed itself decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.config.loading import load_config
from pretrain.planning.layout_plan import rehearsed
from pretrain.planning.zero_3_gathers import Gathered, gathered
from tests.pretrain.runs import MOA, small_config

ONE_BILLION = Path(__file__).resolve().parents[3] / "configs" / "switchall_1b.json"


@pytest.mark.parametrize(
    "keys, expected",
    [
        # Those of rehearsed steps of 8 ranks, to the element: 1.32 and 1.15 times all of its parameters.
        ((), Gathered(1_474_691_072, 2_542_848)),
        (("train.recompute=full",), Gathered(1_474_691_072, 2_542_848)),
        (("parallel.tensor=2",), Gathered(646_184_960, 1_347_200)),
    ],
)
def test_a_billion_parameters(keys: tuple[str, ...], expected: Gathered) -> None:
    assert gathered(load_config(ONE_BILLION, ["parallel.zero=3", *keys])) == expected


def limits(persistence: int, prefetch: int, live: int, reuse: int) -> str:
    names = ("param_persistence_threshold", "prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
    found = {f"stage3_{name}": value for name, value in zip(names, (persistence, prefetch, live, reuse), strict=True)}
    return f"deepspeed={json.dumps({'zero_optimization': found})}"


NOTHING_STAYS = limits(0, 0, 0, 0)
SOME_STAYS = limits(100, 3000, 10_000, 30_000)
NOTHING_AHEAD = limits(500, 0, 10**9, 12_000)


def test_all_is_gathered_twice_where_nothing_may_stay_and_once_an_update_where_all_may(prepared: Path) -> None:
    config = small_config(prepared, "parallel.zero=3")
    everything = gathered(config).update
    assert gathered(config) == (0, everything), "all tensors are small"
    half = {"zero_optimization": {"stage3_model_persistence_threshold": everything // 2}}
    some = gathered(small_config(prepared, "parallel.zero=3", f"deepspeed={json.dumps(half)}"))
    assert 0 < some.update <= everything // 2 and some.micro_step > 0
    twice = gathered(small_config(prepared, "parallel.zero=3", NOTHING_STAYS))
    # The embedding is followed by a block, the output layer by its own backward pass, and each module by itself.
    assert twice.update == 0 and everything < twice.micro_step <= 2 * everything
    # As the rehearsed step below gathers: what is fetched ahead leaves room for what is there.
    keys = ("parallel.zero=3", "model.num_layers=4", "batch.micro_sequences=2", SOME_STAYS)
    assert gathered(small_config(prepared, *keys)) == (64_336, 432)


DENSE = 'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}'
FEEDFORWARD = 'model.feedforward={"type": "dense", "hidden_size": 32}'
TIED = ("model.position.type=xl", "model.tied_embedding=true")
OF_ATTENTION = "model.attention.entropy_weight=0.1"
MODELS = [(), ("train.recompute=full",), (MOA,), (DENSE, FEEDFORWARD), (FEEDFORWARD, OF_ATTENTION), TIED]
AGAIN = (MODELS[1], NOTHING_STAYS)
"""Blocks are computed again where every module is let go at once."""
OTHERS = [(m, given) for m in MODELS for given in (SOME_STAYS, NOTHING_AHEAD, NOTHING_STAYS) if (m, given) != AGAIN]


@pytest.mark.parametrize("model, given", [AGAIN, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_a_rehearsed_micro_step_gathers_as_much(prepared: Path, model: tuple[str, ...], given: str) -> None:
    layers = 2 if (model, given) == AGAIN else 4
    keys = ("parallel.zero=3", f"model.num_layers={layers}", "batch.micro_sequences=2")
    config = small_config(prepared, *keys, given, *model)
    step = rehearsed(config, 2, 0, "cuda")
    first = step.calls[step.starts[0] : step.starts[1]]
    elements = sum(call.num_bytes for call in first if call.kind == "all_gather") / 4
    update = sum(call.num_bytes for call in step.calls if call.kind == "all_gather" and call.part == "update") / 4
    assert gathered(config) == (elements, update)
