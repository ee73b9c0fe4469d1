#!/usr/bin/env python
"""Entry point of the smoke test: deepspeed launch/smoke.py --config configs/switchall_tiny.json"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find launch/pretrain.py instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
from pretrain.resilience.signals import Stop, is_launched  # noqa: E402

if __name__ == "__main__":
    stop = Stop()
    if not {"--help", "-h"} & set(sys.argv):
        stop.install(launched=is_launched())  # before the slow imports

    import model.openmp  # noqa: F401  # before anything imports torch
    from pretrain.smoke.cli import main

    sys.exit(main(stop=stop))
