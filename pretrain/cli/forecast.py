"""The process that estimates a run while it starts (pretrain/report/forecast.py): configuration and number of ranks as
JSON on stdin, the estimate as JSON on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys

LONGEST_SECONDS = 600
"""A run that was killed cannot end this process; it ends by itself."""


def main() -> int:
    """Returns the exit code."""
    os.nice(19)
    signal.alarm(LONGEST_SECONDS)
    from pretrain.config.loading import parse_config
    from pretrain.gpus import card_name, planned_device_type
    from pretrain.report.memory_text import run_estimate

    given = json.load(sys.stdin)
    config = parse_config(given["config"])
    device = planned_device_type(config.train.device)
    card = card_name() if device == "cuda" else None
    found = run_estimate(config, given["ranks"], device, card=card, ranks_per_node=given["ranks_per_node"])
    print(json.dumps(found.to_json()))
    return 0


if __name__ == "__main__":
    import model.openmp  # noqa: F401  # before anything imports torch

    sys.exit(main())
