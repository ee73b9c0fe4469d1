"""All that a rank calls in a short run, on tensors without data: its engine is built, a step is taken with its details,
sequences and texts are evaluated."""

from __future__ import annotations

from unittest import mock

import torch

from pretrain.config.schema import Config
from pretrain.engine.details import Survey
from pretrain.engine.micro_steps import Queries
from pretrain.planning.fake_world import fake_world
from pretrain.planning.ledger import CPU, Ledger
from pretrain.planning.record import Call
from pretrain.planning.rehearsal import _Rank


def played_calls(config: Config, num_ranks: int, rank: int, device: torch.device = CPU) -> list[Call]:
    """Of `rank`, in their order, but for the messages in which a stage first says the shapes of what it sends: for the
    one that hears them fake_world.py answers. The process must have no process group."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    with (
        fake_world(config, rank, num_ranks, "even"),
        mock.patch.object(PipelineEngine, "_send_tensor_meta"),
        Ledger(device=device) as ledger,
    ):
        played = _Rank(config, "cuda", ledger, streams=config.batch.global_sequences, device=device)
        executor = played._executor
        survey = Survey(played._engine, config, played._parallel, device, played._reduce.router_names)
        executor.before_update = survey.begin()
        played.step()
        survey.end(0.1)
        batches = played._batches()
        executor.evaluate(batches)
        places = torch.arange(2, device=device)
        executor.log_likelihoods([Queries(batch.tokens, batch.targets[0, :2], places) for batch in batches[:2]])
        return list(ledger.calls)
