#!/usr/bin/env python
"""Entry point of training: deepspeed launch/pretrain.py --config configs/switchall_tiny.json"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find this very file instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
from pretrain.report import console  # noqa: E402
from pretrain.resilience.signals import ProcessState, Stop, is_launched  # noqa: E402

if __name__ == "__main__":
    console.protect(is_run := not {"--dry-run", "--help", "-h"} & set(sys.argv))
    stop = Stop()
    if is_run:
        stop.enter(ProcessState.LOADING)
        stop.install(launched=is_launched())  # before the slow imports

    import model.openmp  # noqa: F401  # before anything imports torch
    from pretrain.cli.train import main

    sys.exit(main(stop=stop))
