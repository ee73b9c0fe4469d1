"""What tells one start of a run from another: software, machine and layout, as texts for a board."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import torch

from pretrain.checkpoint.state import versions
from pretrain.config.schema import Config
from pretrain.device import device_name
from pretrain.report.layout_text import stage_text
from pretrain.report.model_text import model_family, model_text, parameter_count


def start_facts(config: Config, layout: dict[str, int], device: torch.device) -> dict[str, str]:
    """Title -> Markdown. layout: see checkpoint.layout."""
    count = parameter_count(config.model)
    software = {**versions(), "host of rank 0": platform.node(), "device of rank 0": device_name(device)}
    stages = {f"stage {n}": stage_text(config, n) for n in range(config.parallel.pipeline)}
    model = {
        "family": model_family(config.model),
        "shape": model_text(config.model),
        "parameters": f"{count.total:,}, {count.active:,} of them active",
    }
    return {
        "model": _table(model),
        "layout": _table({**layout, **stages}),
        "software": _table(software),
    }


def _table(rows: Mapping[str, object]) -> str:
    """A table in Markdown."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
