"""The numbers behind the pictures, for other programs: arrays as safetensors, the rest as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from pretrain.analysis.findings import Findings

MARK = "switchall analysis"
"""The `kind` of analysis.json, by which a folder is known as ours."""


def arrays(findings: Sequence[Findings]) -> bytes:
    """A safetensors file. RUN/tokens int64 [N], RUN/losses fp32 [N - 1] (nats, of the tokens from the second on),
    RUN/blocks.L.attention/weights fp32 [heads, queries, keys]; of each router RUN/NAME/index int64 [N, heads, k],
    RUN/NAME/gates fp32 like it, RUN/NAME/load int64 [heads, E] and RUN/NAME/together int64 [heads, E, E]."""
    found: dict[str, np.ndarray] = {}
    for run in findings:
        found[f"{run.label}/tokens"], found[f"{run.label}/losses"] = run.tokens, run.trace.losses
        for layer, maps in run.trace.maps.items():
            found[f"{run.label}/blocks.{layer}.attention/weights"] = maps
        for router, counts in zip(run.trace.routers, run.counts, strict=True):
            place = f"{run.label}/{router.name}"
            found |= {f"{place}/index": router.index, f"{place}/gates": router.gates}
            found |= {f"{place}/load": counts.load, f"{place}/together": counts.together}
    return safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in found.items()})


def description(findings: Sequence[Findings], pictures: Sequence[str]) -> dict[str, Any]:
    """The content of analysis.json."""
    return {"kind": MARK, "pictures": list(pictures), "runs": [_run(run) for run in findings]}


def _run(run: Findings) -> dict[str, Any]:
    return {
        "label": run.label,
        "checkpoint": str(run.place),
        "step": run.step,
        "moving_average": run.of_average,
        "parameters": run.num_parameters,
        "model": run.model.model_dump(mode="json"),
        "loss": run.trace.loss,
        "pieces": run.pieces,
        "left_out": run.trace.left_out,
        "maps": {"layers": run.map_layers, "first_query": run.trace.first_query, "first_key": run.trace.first_key},
        "routers": [
            {
                "name": router.name,
                "title": router.title,
                "layer": router.layer,
                "experts": counts.experts,
                "dead_experts": counts.dead,
                "load_max": counts.load_max,
                "entropy": counts.entropy,
                "favourites": [
                    [[f._asdict() for f in of_expert] for of_expert in of_head]
                    for of_head in run.favourites[router.name]
                ],
            }
            for router, counts in zip(run.trace.routers, run.counts, strict=True)
        ],
    }
