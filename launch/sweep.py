#!/usr/bin/env python
"""Entry point of sweeps: python launch/sweep.py --config FILE --vary train.seed=1,2 --sweep-dir runs/seeds"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find launch/pretrain.py instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
import model.openmp  # noqa: E402, F401  # before anything imports torch
from launch.sweeps.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
