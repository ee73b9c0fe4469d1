#!/usr/bin/env python
"""Entry point for trying the command of a run's alerts: python launch/alert.py runs/switchall_tiny"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find launch/pretrain.py instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
from pretrain.cli.alert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
