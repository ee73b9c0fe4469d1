"""What a start of training does not import, for it takes longer than all the rest: torch's compiler and what it brings
(2 s), torch.distributed.checkpoint (2 s), matplotlib (1 s), transformers."""

from __future__ import annotations

import subprocess
import sys

from common.paths import REPOSITORY

CODE = """
import sys
from pathlib import Path
import torch
import pretrain.loop, pretrain.segment, pretrain.trainer
from pretrain.config.loading import load_config
from pretrain.engine.optimizer import build_optimizer

config = load_config(Path("configs/switchall_tiny.json"))
module = torch.nn.Sequential()
module.register_module("final_norm", torch.nn.LayerNorm(2))
optimizer = build_optimizer(module, config)
for parameter in optimizer.param_groups[0]["params"]:
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
slow = {"torch._dynamo", "sympy", "torch.distributed.checkpoint", "matplotlib", "transformers"}
print(sorted(slow & set(sys.modules)))
import model.parallel.megatron_core  # of a model that is divided
print(sorted({"torch._dynamo"} & set(sys.modules)))
"""


def test_a_start_does_not_import_what_takes_seconds() -> None:
    """In a process of its own. tests/model/kernels/test_op.py has the same of a model's step."""
    done = subprocess.run([sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["[]", "[]"], done.stderr
