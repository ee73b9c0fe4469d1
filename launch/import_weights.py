#!/usr/bin/env python
"""Entry point for weights of other programs: python launch/import_weights.py FILE --config CONFIG --to DIR"""

import sys
from pathlib import Path

# Python puts this file's folder first, where `import pretrain` would find launch/pretrain.py instead of the package.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import common.interruption  # noqa: E402, F401  # before anything that takes long
import model.openmp  # noqa: E402, F401  # before anything imports torch
from pretrain.cli.import_weights import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
