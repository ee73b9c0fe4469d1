"""Dropout's masks on the device: the CPU's, bit for bit, whatever computes them there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.command import Context, Failed, Part
from benchmarks.gpu.equality import backends_on
from model.dropout import Draw
from model.kernels.ops import elementwise

KEY = 0x1234_5678_9ABC_DEF1


def parts() -> Iterator[Part]:
    yield Part("dropout masks", masks)


def masks(context: Context) -> dict[str, Any]:
    """Masks and dropped values of sequences far apart and of a later token, in fp32 and bf16."""
    from model.dropout import keep_mask

    B, T, d = (2, 8, 24) if context.tiny else (4, 512, 1024)
    sequence = torch.tensor([0, 3, 2**31 + 7, 2**40 + 11])[:B]
    there = sequence.to(context.device)
    rates = {}
    for probability, first_token in ((0.1, 0), (0.2, 5), (0.999, 0)):
        settings = {"probability": probability, "key": KEY, "first_token": first_token}
        here = keep_mask(sequence_index=sequence, shape=(B, T, d), **settings)  # type: ignore[arg-type]
        found = keep_mask(sequence_index=there, shape=(B, T, d), **settings)  # type: ignore[arg-type]
        for backend, why_not in backends_on("elementwise", context.device.type, torch.float32).items():
            if why_not is None:
                drawn = elementwise.keep_mask(
                    (len(sequence), T, d), Draw(probability, KEY, there, first_token), backend=backend
                )
                _compare(drawn, here, f"{backend}, p {probability}")
        _compare(found, here, f"torch's operators, p {probability}")
        rates[str(probability)] = round(1.0 - found.double().mean().item(), 5)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(B, T, d).to(dtype)
            wanted, dropped = (
                elementwise.dropout(x.to(index.device), Draw(probability, KEY, index, first_token), backend="reference")
                for index in (sequence, there)
            )
            torch.testing.assert_close(dropped.cpu(), wanted)
    return {"shape": [B, T, d], "dropped": rates}


def _compare(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    differ = (found.cpu() != wanted).sum().item()
    if differ:
        raise Failed(f"{differ} of {wanted.numel()} mask bits differ ({what})")
