"""Ranks load weights together: every part is read once by one of those that hold it, and all have what is stored."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.kernels.choice import Backends
from model.language_model import build_model
from model.parallel.sharding import shard_place
from model.parameters import parameter_specs
from pretrain.checkpoint import Checkpoint
from pretrain.checkpoint.loading import load_weights, load_weights_together
from pretrain.checkpoint.storage import Reader
from pretrain.checkpoint.weights import WeightsOrigin, write_weights
from pretrain.config.schema import Config
from pretrain.engine.build import build_module
from pretrain.parallel.context import parallel_context
from tests.harness import run_ranks
from tests.pretrain.runs import small_config

SIX = "model.feedforward.num_experts=6"
LAYOUTS = [
    (SIX,),
    (SIX, "parallel.pipeline=2"),
    (SIX, "parallel.expert=2", "parallel.tensor=2", "parallel.sequence=true"),
]


def _load(rank: int, configs: list[Config], folder: Path) -> list[tuple[bool, list[tuple[str, int]]]]:
    """Of each layout: whether every parameter is bit by bit what this rank reads alone, and what it read together with
    the others, with the number of its part."""
    found, read_data = [], Reader.read_data
    for config in configs:
        parallel = parallel_context(config)
        model = build_module(config, parallel, Backends())
        checkpoint, specs = Checkpoint.open(folder), parameter_specs(config.model)
        load_weights(checkpoint, model, parallel)
        expected = {name: value.detach().clone() for name, value in model.named_parameters()}
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(torch.nan)
        read: set[str] = set()

        def reading(self: Reader, plan: Any, planner: Any, read: set[str] = read) -> Any:
            read |= {item.dest_index.fqn.removeprefix("master/") for item in plan.items}
            return read_data(self, plan, planner)

        Reader.read_data = reading
        load_weights_together(checkpoint, model, parallel)
        Reader.read_data = read_data
        same = all(torch.equal(value, expected[name]) for name, value in model.named_parameters())
        found.append((same, [(name, shard_place(specs[name], parallel)[0]) for name in sorted(read)]))
    dist.barrier()
    return found


def test_each_part_is_read_by_one_rank_and_all_have_it(prepared: Path, tmp_path: Path) -> None:
    configs = [small_config(prepared, *layout) for layout in LAYOUTS]
    weights = dict(build_model(configs[0].model, seed=5).named_parameters())
    origin = WeightsOrigin(config=configs[0], source="a test", tokenizer=None)
    tensors = {name: (lambda value=value: value.detach()) for name, value in weights.items()}
    write_weights(tmp_path / "weights", origin, tensors)
    ranks = run_ranks(_load, 4, configs, tmp_path / "weights")
    for number, config in enumerate(configs):
        assert all(rank[number][0] for rank in ranks), config.parallel
        times = collections.Counter(part for rank in ranks for part in rank[number][1])
        assert {name for name, _ in times} == weights.keys(), config.parallel
        # Each tensor-parallel rank reads what all of them hold; nothing else is read twice.
        assert set(times.values()) <= {1, config.parallel.tensor}, (config.parallel, times)
        readers = [len(rank[number][1]) for rank in ranks]
        assert min(readers) > 0, (config.parallel, readers)
