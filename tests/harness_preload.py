"""What the fork server imports once; every rank starts with these modules loaded.

DeepSpeed imports much when the first engine of a process is built, which takes longer than most of our tests compute,
and every rank would pay for it. ZeRO 3 imports TorchDynamo; TorchInductor is left to the few tests that compile. No
module listed here may start a thread, because a process that forks must have one alone; tests/test_harness.py looks.
"""

import gc
import importlib
import os
import pkgutil
import warnings

gc.disable()  # while much is imported that stays
warnings.filterwarnings("ignore")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Otherwise TorchInductor, where a test imports it, starts processes that compile at once.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from pretrain.engine.build import import_muon_without_a_compiler  # noqa: E402

import_muon_without_a_compiler()

import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.pipe.engine  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import numpy.ma  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401

import model.kernels.cpu  # noqa: E402
import model.parallel.megatron_core  # noqa: E402
import pretrain.checkpoint.planners  # noqa: E402
import pretrain.cli.train  # noqa: E402
import pretrain.engine.pipeline  # noqa: E402
import pretrain.loop  # noqa: E402
import pretrain.report.pictures  # noqa: E402, F401  # matplotlib, which a run with a board draws with
import tests.pretrain.runs  # noqa: E402, F401

for backend in pkgutil.iter_modules(model.kernels.cpu.__path__, "model.kernels.cpu."):
    importlib.import_module(backend.name)

# A collection in a rank would write to, and so copy, the pages of all these objects.
gc.collect()
gc.freeze()
gc.enable()
