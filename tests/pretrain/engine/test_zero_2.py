"""ZeRO 2 that reduces on a stream of its own (deepspeed.zero_optimization.overlap_comm), with an accelerator in place
of a CPU's whose kernels run later."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pretrain.config.schema import Config
from pretrain.data.progress import Progress
from tests.harness import run_ranks
from tests.pretrain.runs import one_step, small_config, trainer_of

BUCKET = 4000


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


def handed_over(rank: int, config: Config) -> list[tuple[int, bool]]:
    """Of each piece of a gradient that is reduced: elements of the memory that it lies in, and whether the allocator
    was told of the stream before."""
    from deepspeed.accelerator import get_accelerator

    trainer = trainer_of(config)
    optimizer, accelerator = trainer.engine.optimizer, get_accelerator()
    optimizer.reduction_stream = Stream()
    reduce, told, found = optimizer.allreduce_bucket, set(), []  # type: Any, set[int], list[tuple[int, bool]]

    def reducing(pieces: list[torch.Tensor], *args: Any, **options: Any) -> Any:
        for piece in pieces:
            memory = piece.untyped_storage()
            found.append((memory.nbytes() // piece.element_size(), memory.data_ptr() in told))
        return reduce(pieces, *args, **options)

    def recording(tensor: torch.Tensor, stream: Any) -> None:
        if stream is optimizer.reduction_stream:
            told.add(tensor.untyped_storage().data_ptr())

    optimizer.allreduce_bucket = reducing
    with (
        mock.patch.object(accelerator, "resolves_data_dependency", return_value=False),
        mock.patch.object(accelerator, "current_stream", Stream),
        mock.patch.object(accelerator, "stream", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.Tensor, "record_stream", recording),
    ):
        one_step(trainer, Progress(0, 0))
    return found


def test_a_gradient_larger_than_a_bucket_is_kept_until_it_is_reduced(prepared: Path) -> None:
    """It is reduced in its own memory, which a rank that owns no part of it drops as soon as that is queued."""
    keys = ("overlap_comm=true", f"reduce_bucket_size={BUCKET}")
    config = small_config(prepared, "parallel.zero=2", *(f"deepspeed.zero_optimization.{key}" for key in keys))
    for found in run_ranks(handed_over, 2, config):
        of_large = [was_told for elements, was_told in found if elements > BUCKET]
        assert len(of_large) >= 2 and all(of_large), "embedding and output layer"
