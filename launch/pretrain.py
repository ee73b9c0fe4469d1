#!/usr/bin/env python
"""Entry point of training: deepspeed launch/pretrain.py --config configs/switchall_tiny.json"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find this very file instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import model.openmp  # noqa: E402, F401  # before anything imports torch
from pretrain.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
