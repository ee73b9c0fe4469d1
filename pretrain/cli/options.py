"""Options that several commands share: which weights of a checkpoint, its data, and the device that computes."""

from __future__ import annotations

import argparse

from common.arguments import not_empty


def add_data(parser: argparse.ArgumentParser, *, used_for: str = "for the tokenizer") -> None:
    """--data, repeatable: `args.data` is a list of folders."""
    parser.add_argument(
        "--data",
        action="append",
        type=not_empty,
        default=[],
        metavar="FOLDER",
        help=f"where prepared data are now, {used_for}, if they are not where the run read them; repeatable",
    )


def add_ema(parser: argparse.ArgumentParser) -> None:
    """--ema: `args.ema` is whether it was given."""
    parser.add_argument(
        "--ema", action="store_true", help="the moving average (train.ema_decay) instead of the weights"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, cpu or cuda: see refusals.device_named."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the model computes (default: cpu)"
    )
