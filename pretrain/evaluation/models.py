"""A checkpoint as the model of this rank: in one process, or in any layout of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import UserError
from model.language_model import prepare_to_answer
from model.parallel.context import ParallelContext
from pretrain.checkpoint.folder import Checkpoint
from pretrain.checkpoint.prepared_data import find_data, moved_data
from pretrain.config.loading import apply_override, parse_config, to_json
from pretrain.config.rules import check_ranks, choose_backends
from pretrain.config.schema import Config
from pretrain.config.validated import MEMORY
from pretrain.engine.build import build_module
from pretrain.engine.micro_steps import Evaluator
from pretrain.engine.without_engine import ModelEvaluator
from pretrain.evaluation.likelihood import Place
from pretrain.parallel.agreement import agreed
from pretrain.parallel.context import parallel_context
from pretrain.saved_model.loading import tokenizer_of
from pretrain.saved_model.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A model that answers, on this rank."""

    checkpoint: Checkpoint
    config: Config
    """The run's, with this evaluation's layout, batch and place of the data."""
    tokenizer: Tokenizer
    evaluator: Evaluator
    place: Place


def evaluation_config(
    checkpoint: Checkpoint, saved: Config, *, data: Sequence[str], overrides: Sequence[str], batch: int, ranks: int
) -> tuple[Config, Tokenizer]:
    """The configuration to evaluate with, and the tokenizer. `data`: folders of prepared data, where they are looked
    for if they are no longer where the run read them; others are refused, for their numbers would pass for theirs.
    `overrides`: --set; the layout is that of data parallelism alone unless they say otherwise. No weight depends on the
    chunks of memory, so that an evaluation may have more. Raises UserError."""
    tree = to_json(saved)
    tree["parallel"], tree["deepspeed"], tree["kernels"] = {}, {}, {}
    tree["train"] |= {"precision": "fp32", "recompute": "none", "cuda_graph": "off", "compile": "off"}
    tree["train"] |= {"record_routing": False, "replay_routing": None}
    tree["batch"] = {"global_sequences": batch * ranks, "micro_sequences": batch}
    for override in overrides:
        if not override.startswith(("parallel.", "evaluate.", "kernels.", f"{MEMORY}=")):
            raise UserError(
                f"--set {override}: an evaluation takes keys of parallel, evaluate and kernels, and {MEMORY}; the rest "
                f"is the checkpoint's"
            )
        apply_override(tree, override)
    tokenizer = tokenizer_of(checkpoint, saved.model, data)
    for folder in data:
        try:
            find_data(checkpoint, folder)
        except UserError as error:
            raise UserError(f"{error}; other data's held-out split: --tasks validation=FOLDER") from None
    tree["data"] = to_json(moved_data(checkpoint, saved, data))["data"]
    config = parse_config(tree)
    check_ranks(config, ranks)
    return config, tokenizer


def open_model(
    checkpoint: Checkpoint,
    config: Config,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    ema: bool = False,
    weights: Mapping[str, Callable[[], Tensor]] | None = None,
) -> OpenedModel:
    """Checks every file of the checkpoint and loads this rank's part of its weights, or with `ema` of their moving
    average, fp32. Collective; several ranks need a process group. `weights`: functions that read whole parameters, by
    canonical name, in the place of the checkpoint's; of one process. Raises UserError, agreed."""
    has_group = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if has_group else (0, 1)

    agreed(lambda: checkpoint.check_files(rank=rank, world_size=world_size))
    parallel = parallel_context(config) if has_group else ParallelContext()
    backends = agreed(lambda: choose_backends(config, device.type))
    module = build_module(config, parallel, backends)
    if weights is None:
        from pretrain.checkpoint.loading import load_weights_together  # imports DCP, which a start does without

        load_weights_together(checkpoint, module, parallel, kind="ema" if ema else "master")
    else:
        assert not has_group
        with torch.no_grad():
            for name, read in weights.items():
                module.get_parameter(name).copy_(read())
    prepare_to_answer(module, device)
    evaluator = ModelEvaluator(module, in_stages=parallel.pipeline_size > 1)
    return OpenedModel(checkpoint, config, tokenizer, evaluator, Place(parallel, device))
