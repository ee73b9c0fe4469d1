"""Command line of launch/import_weights.py: weights of other programs as a checkpoint."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from common.arguments import Parser, a_path, add_overrides
from common.errors import UserError
from common.progress_bar import count_bytes
from common.tables import listed
from pretrain.cli.refusals import exit_code_of
from pretrain.config.loading import load_config


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/import_weights.py",
        description="Writes weights of other programs as a checkpoint of weights alone, which the other commands read "
        "like any other and which a new run begins with (train.init_from). Nothing in a file is executed. Sources: "
        "weights of the SwitchHead authors' modules (github.com/RobertCsordas/switchhead and moe_layer) and their "
        "training checkpoints (moe_attention), files of torch.save or safetensors; folders that launch/export.py, or "
        "transformers after fine-tuning one, wrote. docs/use.md has examples.",
    )
    parser.add_argument("source", type=a_path, metavar="SOURCE", help="the file of weights, or the exported folder")
    parser.add_argument("--to", type=a_path, required=True, metavar="DIR", help="the new checkpoint; must not exist")
    parser.add_argument(
        "--from",
        dest="kind",
        choices=("auto", *READERS),
        default="auto",
        help="what SOURCE is (default: auto, by its content)",
    )
    parser.add_argument(
        "--config",
        type=a_path,
        metavar="FILE",
        help="for the authors' weights: configuration of a run of the same model, e.g. "
        "configs/paper/c4_switchhead_47m.json, whose data have the tokenizer of the weights",
    )
    add_overrides(parser, "override one dotted key of the configuration, repeatable: --set model.attention.num_heads=4")
    parser.add_argument(
        "--tokenizer",
        type=a_path,
        metavar="FILE",
        help="SentencePiece model that the weights were trained with (default: that of the configuration's data)",
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="what a module of SOURCE is here, {} being a block's number, repeatable: "
        "'layers.{}.att=blocks.{}.attention'. NEW is one of embedding, blocks.{}.attention_norm, blocks.{}.attention, "
        "blocks.{}.feedforward_norm, blocks.{}.feedforward, final_norm, head; those of training checkpoints are known",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Raises UserError and OSError."""
    origin, tensors, ignored = READERS[_kind(args)](args)
    from pretrain.checkpoint.shapes import full_shapes
    from pretrain.checkpoint.weights import write_weights

    shapes = full_shapes(origin.config.model)
    count = sum(math.prod(shape) for shape in shapes.values())
    checkpoint = write_weights(args.to, origin, tensors, wrote=count_bytes(args.to.name, 4 * count))
    if ignored:
        print(f"left out, for no output depends on it: {listed(ignored, 1)}", flush=True)
    print(f"{checkpoint.path}: {len(shapes)} tensors, {count:,} parameters, {origin.source}", flush=True)


def _kind(args: argparse.Namespace) -> str:
    """What SOURCE is: --from, or found out from its content."""
    if not args.source.exists():
        raise UserError(f"SOURCE: {args.source} is not there; name a file of weights, or an exported folder")
    if args.kind != "auto":
        return str(args.kind)
    return "huggingface" if args.source.is_dir() else "authors"


def _authors(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    from pretrain.imports.authors import read_authors  # here: torch, for which --help need not wait
    from pretrain.imports.names import parse_rename

    if args.config is None:
        raise UserError("--config: name the configuration of the model that SOURCE holds, e.g. one of configs/paper")
    renames = [parse_rename(text) for text in args.rename]
    config = load_config(args.config, args.overrides)
    return read_authors(args.source, config, renames=renames, tokenizer=args.tokenizer)


def _huggingface(args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    from pretrain.export.reading import open_export  # here: torch, for which --help need not wait

    for option, given in (
        ("--config", args.config),
        ("--tokenizer", args.tokenizer),
        ("--rename", args.rename),
        ("--set", args.overrides),
    ):
        if given:
            raise UserError(
                f"{option}: an exported folder has its own configuration, tokenizer and names; leave it out"
            )
    exported = open_export(args.source)
    return exported.weights_origin(), exported.tensors, []


READERS: dict[str, Callable[[argparse.Namespace], tuple[Any, Any, list[str]]]] = {
    "authors": _authors,
    "huggingface": _huggingface,
}
"""--from -> what reads such a source, see `read_authors`."""
