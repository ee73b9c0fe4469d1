"""`plan.py layout`: which ranks form which groups, and what every rank holds."""

from __future__ import annotations

from common.tables import counted, text_table
from common.units import GIB
from pretrain.config.schema import Config, ParallelConfig
from pretrain.parallel.layout import group_ranks, mesh, rank_bytes
from pretrain.report.layout_text import groups_text, stage_text


def print_layout(config: Config, data_size: int) -> None:
    """`plan.py layout`: prints the mesh of a run, and what every rank holds compared with one process."""
    parallel = config.parallel
    ranks = mesh(config, data_size)
    print(
        f"{counted(ranks.size, 'rank')} = pipeline {parallel.pipeline} x data {data_size} x tensor {parallel.tensor}; "
        f"rank = (pipeline_rank x {data_size} + data_rank) x {parallel.tensor} + tensor_rank"
    )
    for name, groups in group_ranks(config, data_size).items():
        print(f"  {name + ' groups':<16}  {groups_text(groups)}")
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    rows = [("all", "one", rank_bytes(alone, 1)[0], "the whole model in one process, ZeRO 1")]
    for entry in rank_bytes(config, data_size):
        of_stage = ranks[entry.stage].ravel()
        rows.append((str(entry.stage), f"{of_stage[0]}-{of_stage[-1]}", entry, stage_text(config, entry.stage)))
    header = ("stage", "ranks", "parameters", "weights", "optimizer", "both", "holds")
    table = []
    for stage, which, entry, holds in rows:
        sizes = (entry.weights, entry.optimizer, entry.weights + entry.optimizer)
        table.append([stage, which, entry.parameters, *(f"{size / GIB:.3f}" for size in sizes), holds])
    average = ", moving average" if config.train.ema_decay else ""
    print(
        f"\nper rank, GiB; without gradients, activations and padding; optimizer: master weights and moments{average}"
    )
    print(text_table(header, table, left={0, 1, 6}))
