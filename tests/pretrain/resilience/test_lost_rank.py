"""A rank that ends while others wait for it: they say that it is gone, and their code is not that of a fault of their
own, by which the SLURM job would take their nodes for bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.parallel.lost_ranks import lost_connection
from pretrain.trainer import Trainer
from tests.harness import run_ranks
from tests.pretrain.resilience.faults import before_steps, outcome, train_with
from tests.pretrain.runs import events, light_config

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] {}. This is typically caused by a remote worker."


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RuntimeError(GLOO.format("Connection closed by peer [10.0.0.7]:2455")),
            "Connection closed by peer [10.0.0.7]",
        ),
        (
            RuntimeError(GLOO.format("Read error [127.0.0.1]:45271: Connection reset by peer")),
            "Read error [127.0.0.1]: Connection reset by peer",
        ),
        (
            RuntimeError(GLOO.format("writev [fe80::1]:7: Broken pipe")),
            "writev [fe80::1]: Broken pipe",
        ),
        *(  # the system's words (errno.h), in whatever function gloo met them
            (RuntimeError(GLOO.format(f"connect [10.0.0.7]:2455: {words}")), f"connect [10.0.0.7]: {words}")
            for words in (
                "Connection timed out",
                "No route to host",
                "Network is unreachable",
                "Network is down",
                "Host is down",
            )
        ),
        (
            dist.DistBackendError("NCCL error in: a.cpp:9, remote process exited or there was a network error, NCCL 2"),
            "remote process exited or there was a network error",
        ),
        (dist.DistNetworkError("failed to recv, got 0 bytes\nmore"), "failed to recv, got 0 bytes"),
        (RuntimeError("Connection closed by peer"), None),  # of something else than gloo
        (RuntimeError("[/pytorch/third_party/gloo/gloo/allreduce.cc:9] shapes differ"), None),
        (dist.DistBackendError("NCCL error in: a.cpp:9, unhandled system error"), None),
        (ConnectionResetError("Connection reset by peer"), None),
    ],
)
def test_which_errors_are_of_another_rank(error: Exception, reason: str | None) -> None:
    assert lost_connection(error) == reason


def fail_alone(trainer: Trainer) -> None:
    def fail(step: int) -> None:
        if dist.get_rank() == 1 and step == 3:
            raise ArithmeticError("planted")

    before_steps(trainer, fail)


def alone(rank: int, config: Config, run_dir: Path) -> str:
    """How the run ended on a rank; one that failed closes its connections, as the end of its process does."""
    try:
        return train_with(rank, config, run_dir, fail_alone)
    except ArithmeticError:
        dist.destroy_process_group()
        return "failed"


def test_a_rank_whose_peer_ends_says_so_in_one_sentence_with_a_code_of_its_own(prepared: Path, tmp_path: Path) -> None:
    config = light_config(prepared, "train.steps=4", "checkpoint.every_steps=2", "evaluate.sequences=0", ranks=2)
    said, failed = run_ranks(alone, 2, config, tmp_path)
    assert failed == "failed"
    assert said.startswith("CUT_OFF: another rank is gone in phase '") and "of step 3 (" in said and "\n" not in said
    assert said.endswith(". The last whole checkpoint is that of step 2: the same command goes on from it")
    assert outcome(tmp_path)["exit_code"] == 7 and outcome(tmp_path)["reason"] in said
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [2]
