"""What `lm_eval --model switchall` is told of the model: --model_args, --batch_size and --device; and by a task of the
texts that it wants."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from pretrain.evaluation.greedy import GREEDY
from pretrain.generation.sampling import Sampling
from pretrain.gpus import usable_device, usable_gpus

BATCH = 16
"""Texts of one forward pass where nothing is said, and of --batch_size auto."""
DRAWN_BY = ("temperature", "top_k", "top_p")
"""Of a task's generation_kwargs."""
KNOWN = ("pretrained", "batch_size", "max_batch_size", "device", "max_length", "data", "ema")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The arguments, checked."""

    run: Path
    """pretrained=: a run folder, or a checkpoint."""
    batch: int = BATCH
    """batch_size=, which changes the time, not the numbers. `auto` is 16: how many texts fit is not searched."""
    device: str = "cpu"
    context: int | None = None
    """max_length=: most tokens that the model looks back to; None: as in training."""
    data: tuple[str, ...] = ()
    """data=: where prepared data have moved to."""
    ema: bool = False
    """ema=true: the moving average of the weights."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ModelArgs:
        """Raises UserError for an argument that is missing, unknown or has a wrong value."""
        if unknown := [name for name in given if name not in KNOWN]:
            raise UserError(f"model_args: there is no {unknown[0]}; switchall knows {', '.join(KNOWN)}")
        if not given.get("pretrained"):
            raise UserError("model_args: names no model; write pretrained=RUN, a run folder or a step-... folder")
        ema = str(given.get("ema", "false")).lower()
        if ema not in ("true", "false"):
            raise UserError(f"model_args: ema is {given['ema']!r}; write ema=true or ema=false")
        batch, most = str(given.get("batch_size", BATCH)), given.get("max_batch_size", BATCH)
        is_auto = batch.partition(":")[0] == "auto"  # also auto:4, which would search anew now and then
        return cls(
            run=Path(str(given["pretrained"])),
            batch=min(BATCH, _number("max_batch_size", most)) if is_auto else _number("batch_size", batch),
            device=str(given.get("device", "cpu")),
            context=_number("max_length", given["max_length"]) if "max_length" in given else None,
            data=(str(given["data"]),) if "data" in given else (),
            ema=ema == "true",
        )

    def usable_device(self) -> torch.device:
        """Where the model is computed. The command `lm_eval` says cuda:0 where nobody has said anything; without a GPU
        that is the CPU, as for the library's own models, with a line on stderr. Raises UserError for another name."""
        if self.device == "cuda:0" and not usable_gpus():
            print("note: there is no usable GPU; switchall computes on the CPU", file=sys.stderr, flush=True)
            return torch.device("cpu")
        return usable_device(self.device)


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """How a task's texts are written, by its generation_kwargs as lm_eval normalizes them. Drawn ones (`do_sample`)
    have the temperature 1 where none is given, and all ids to draw from. Raises UserError."""
    if not settings["do_sample"]:
        return GREEDY
    given = {key: value for key, value in settings.items() if value is not None}
    if unknown := sorted(given.keys() - DRAWN_BY - {"do_sample", "until", "max_gen_toks"}):
        raise UserError(
            f"--harness: a task draws its texts with {unknown[0]}; switchall draws by {', '.join(DRAWN_BY)}; leave the "
            f"task out"
        )
    try:
        return Sampling(
            **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | {key: given[key] for key in given.keys() & DRAWN_BY}
        )
    except UserError as error:
        raise UserError(f"--harness: a task draws its texts so: {error}") from None


def pairs(text: str) -> dict[str, str]:
    """`a=1,b=2` of the command line. Raises UserError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if "=" not in part]:
        raise UserError(f"model_args: {wrong[0]!r} has no value; write NAME=VALUE, with commas between")
    return dict(part.split("=", 1) for part in parts)


def _number(name: str, value: Any) -> int:
    try:
        found = int(str(value))
    except ValueError:
        found = 0
    if found < 1:
        also = f", or auto, which is {BATCH}" if name == "batch_size" else ""
        raise UserError(f"{name}: is {value!r}; give a whole number of at least 1{also}")
    return found
