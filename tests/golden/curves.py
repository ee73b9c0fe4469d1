"""Golden curves: loss and gradient norm of 20 training steps of four tiny models, kept in curves.json.

    python -m tests.golden.curves            compares this tree's curves with the file
    python -m tests.golden.curves --write    writes the file anew
    python -m tests.golden.curves --bits     prints every number in full, to compare two trees on one machine with diff

Every other test of training compares two ways to compute the same thing, so both sides can move together; these
numbers stand still. They hold the whole way from text to loss: tokenizer, order of the data, initial weights, dropout
masks, routers, auxiliary losses, clipping, AdamW and its schedule.

Writing is allowed when a commit changes the mathematics or the data on purpose; the commit then says what changed and
why. It is not allowed to make a refactoring, a new kernel or a new library version pass: those must give these numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TypedDict

FILE = Path(__file__).with_name("curves.json")
STEPS = 20
TOLERANCE = 1e-5
"""Relative, on any CPU. AVX-512, AVX2, no vector unit and two threads differ by less than a twentieth of it. The seeds
below see to that: no router's choice is nearer to a tie than 1e-5, so rounding never changes an expert."""

SWITCHHEAD = '"type": "switchhead", "num_heads": 2, "head_dim": 6, "num_experts": 3, "active_experts": 2'
MOA = '"type": "moa", "num_heads": 2, "head_dim": 6, "num_experts": 5'
MODELS: dict[str, tuple[str, ...]] = {
    "switchall rope": (f"model.attention={{{SWITCHHEAD}}}",),
    "switchhead xl, dense feed-forward, dropout": (
        f'model.attention={{{SWITCHHEAD}, "expert_dropout": 0.1}}',
        'model.feedforward={"type": "dense", "hidden_size": 22}',
        "model.position.type=xl",
        "model.dropout=0.1",
        "train.seed=9",
    ),
    "moa with its losses, micro-batch scope": (
        f'model.attention={{{MOA}, "z_loss_weight": 0.01, "switch_loss_weight": 0.3, "cv_loss_weight": 0.3}}',
        "model.feedforward.entropy_scope=micro_batch",
        "train.seed=3",
    ),
    "dense swiglu, weight decay, tied embedding": (
        'model.attention={"type": "dense", "num_heads": 4, "head_dim": 5}',
        'model.feedforward={"type": "swiglu", "hidden_size": 18}',
        "model.tied_embedding=true",
        "optimizer.weight_decay=0.1",
    ),
}
"""Overrides of tests.pretrain.runs.small_config: 2 layers, 8 sequences of 16 tokens a step, fp32, clipping active."""


class Curve(TypedDict):
    losses: list[float]
    grad_norms: list[float]


class Golden(TypedDict):
    data: str
    """sha256 of the tokens in the shards, so that changed data are told from changed mathematics."""
    curves: dict[str, Curve]


def compute(prepared: Path, steps: int = STEPS) -> Golden:
    """Trains every model with the real trainer in one forked rank, on the data set of `tests.corpus`; the first `steps`
    steps of the curves."""
    from tests.harness import run_ranks
    from tests.pretrain.runs import engine_trace, small_config

    configs = [small_config(prepared, "batch.micro_sequences=2", *overrides) for overrides in MODELS.values()]
    traces = run_ranks(engine_trace, 1, configs, steps, ())[0]
    curves = {
        name: Curve(losses=trace.losses, grad_norms=trace.grad_norms)
        for name, trace in zip(MODELS, traces, strict=True)
    }
    return Golden(data=digest(prepared), curves=curves)


def digest(prepared: Path) -> str:
    """sha256 over the names and contents of all members of the shards, in the order of the shards' names."""
    total = hashlib.sha256()
    for shard in sorted(prepared.rglob("*.tar")):
        with tarfile.open(shard) as members:
            for member in members:
                total.update(member.name.encode())
                total.update(members.extractfile(member).read())  # type: ignore[union-attr]
    return total.hexdigest()


def differences(found: Golden, golden: Golden) -> dict[str, float]:
    """Per model the largest relative difference of a loss or a gradient norm, over the steps that were found."""
    assert found["curves"].keys() == golden["curves"].keys() == MODELS.keys()
    largest = {}
    for name, theirs in golden["curves"].items():
        ours = found["curves"][name]
        steps = len(ours["losses"])
        assert 1 < steps <= STEPS == len(theirs["losses"])
        numbers = [*ours["losses"], *ours["grad_norms"]]
        expected = [*theirs["losses"][:steps], *theirs["grad_norms"][:steps]]
        assert all(map(math.isfinite, numbers)), f"{name}: {numbers}"
        largest[name] = max(abs(a - b) / abs(b) for a, b in zip(numbers, expected, strict=True))
    return largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--write", action="store_true", help="write curves.json anew")
    choice.add_argument("--bits", action="store_true", help="print every number in full")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from tests.corpus import prepare_corpus

    with tempfile.TemporaryDirectory() as folder:
        found = compute(prepare_corpus(Path(folder)))
    if args.bits:
        print("data", found["data"])
        for name, curve in found["curves"].items():
            for step, (loss, norm) in enumerate(zip(curve["losses"], curve["grad_norms"], strict=True)):
                print(f"{name}: step {step} loss {loss.hex()} norm {norm.hex()}")
    elif args.write:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {FILE.name}")
    else:
        golden: Golden = json.loads(FILE.read_text())
        print("data:", "the same" if found["data"] == golden["data"] else "DIFFERENT")
        for name, difference in differences(found, golden).items():
            print(f"{difference:.1e}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
