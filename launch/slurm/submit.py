#!/usr/bin/env python
"""Entry point of training on SLURM: python launch/slurm/submit.py --config FILE --nodes 2 --time 12:00:00"""

import sys
from pathlib import Path

# Python puts this file's folder first; the packages are two folders up.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
import model.openmp  # noqa: E402, F401  # before anything imports torch
from launch.slurm.training import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
