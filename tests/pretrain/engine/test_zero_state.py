"""Where pretrain/engine/zero_state.py finds a parameter, with every switch of DeepSpeed's ZeRO that is passed on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from model.language_model import build_model
from model.parallel.sharding import local_part
from model.parameters import parameter_specs
from pretrain.config.deepspeed_keys import EXTRA
from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from pretrain.engine.zero_state import pieces, refresh_weights
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

ON_GPUS_ALONE = ("zero_optimization.zero_quantized_weights",)


def switches(zero: int) -> dict[str, bool]:
    """All of a stage, on."""
    return {
        key.partition(".")[2]: True
        for key, extra in EXTRA.items()
        if key.startswith("zero_optimization.") and extra.type is bool and zero in extra.stages
        if key not in ON_GPUS_ALONE and ".stage3_" not in key  # the same keys once more
    }


def misplaced(rank: int, configs: list[Config]) -> list[tuple[list[str], int]]:
    """Of each configuration the parameters whose pieces hold other elements, or that are others, or not as whole, once
    the model has got its weights from the pieces after a step, or that are not zero once all pieces are; and the
    elements of all pieces."""
    found = []
    for config in configs:
        trainer, specs = trainer_of(config), parameter_specs(config.model)
        parallel, whole = trainer.setup.parallel, build_model(config.model, seed=config.train.seed)
        expected = {name: local_part(p.detach(), specs[name], parallel) for name, p in whole.named_parameters()}
        own = list(pieces(trainer.engine, rank=parallel.data_rank, world_size=parallel.data_size, for_saving=True))
        wrong = [
            piece.name
            for piece in own
            if not torch.equal(piece.master, expected[piece.name].flatten()[piece.start :][: piece.master.numel()])
        ]
        module, elements = trainer.engine.module, sum(piece.master.numel() for piece in own)
        one_step(trainer, Progress(0, 0))
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        refresh_weights(trainer.engine)
        wrong += [name for name, value in module.named_parameters() if not torch.equal(value, before[name])]
        for piece in own:
            piece.master.zero_()
        refresh_weights(trainer.engine)
        wrong += [name for name, value in module.named_parameters() if value.any()]
        found.append((wrong, elements))
        trainer.engine.destroy()
    return found


def test_every_element_is_where_it_is_said_to_be(prepared: Path) -> None:
    """Else a checkpoint holds other weights than the model, and the resumed run goes on with them."""
    odd = "model.d_model=23"  # many a parameter is not divided evenly by two ranks
    configs = [
        small_config(
            prepared, odd, f"parallel.zero={zero}", f"deepspeed.zero_optimization={json.dumps(switches(zero))}"
        )
        for zero in (1, 2, 3)
    ]
    assert all(len(switches(zero)) > 4 for zero in (1, 2, 3))
    # Each of two tensor-parallel ranks is alone in the group over which ZeRO 3 divides.
    configs.append(
        small_config(prepared, odd, "parallel.zero=3", "parallel.tensor=2", "model.feedforward.num_experts=6")
    )
    specs = parameter_specs(configs[-1].model).values()
    replicated = sum(math.prod(spec.shape) for spec in specs if spec.divided is None)
    ranks = run_ranks(misplaced, 2, configs)
    for config, (wrong, elements), (others, more) in zip(configs, *ranks, strict=True):
        assert not wrong and not others
        total = sum(p.numel() for p in build_model(config.model, seed=0).parameters())
        twice = replicated if config.parallel.tensor > 1 else 0
        assert elements + more == total + twice and elements == pytest.approx(more, rel=0.1)
