#!/usr/bin/env python
"""Entry point of data preparation on SLURM: python launch/slurm/submit_data_prep.py --config FILE --tasks 64 ..."""

import sys
from pathlib import Path

# Python puts this file's folder first; the packages are two folders up.
sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
from launch.slurm.preparation import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
