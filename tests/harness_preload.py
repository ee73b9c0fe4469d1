"""What the fork server imports once; every rank starts with these modules loaded."""

import os
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402, F401

import pretrain.loop  # noqa: E402, F401
