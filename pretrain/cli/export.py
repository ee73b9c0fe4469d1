"""Command line of launch/export.py: a trained model as a folder that transformers loads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from common.arguments import MOST_DIGITS, Parser, a_path, quoted
from common.errors import UserError
from pretrain.cli.options import add_data, add_ema
from pretrain.cli.refusals import exit_code_of

UNITS = {"MB": 10**6, "GB": 10**9}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/export.py",
        description="Writes a trained model in the format of Hugging Face transformers: weights as safetensors, "
        "configuration, tokenizer, the code of the model, and a model card. AutoModelForCausalLM.from_pretrained loads "
        "the folder with trust_remote_code=True; nothing of this project is needed there. docs/use.md explains the "
        "format.",
    )
    parser.add_argument(
        "run", type=a_path, metavar="RUN", help="run folder (the newest checkpoint is taken) or checkpoint (step-...)"
    )
    parser.add_argument(
        "--to",
        type=a_path,
        required=True,
        metavar="FOLDER",
        help="where it goes; must not be there yet, or be empty, or an older export, which is replaced",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights: float32 as trained (default), or rounded to half the size",
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="weights of more than this go to several files, e.g. 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--license",
        default="unknown",
        metavar="ID",
        help="licence of the weights for the model card, as the Hugging Face hub calls it, e.g. apache-2.0 or "
        "cc-by-4.0 (default: unknown)",
    )
    add_data(parser)
    add_ema(parser)
    parser.add_argument(
        "--verify",
        action="store_true",
        help="load the folder with transformers before it gets its name, and compare ids and logits with the "
        "checkpoint's (needs transformers, and memory for the model)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Raises UserError."""
    most_bytes = size_of(args.max_shard_size)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(
            f"--license: {args.license!r} is no licence that the hub knows; give its identifier, e.g. apache-2.0, or "
            f"other"
        )
    from pretrain.export.verify import check_transformers  # here: torch, for which --help need not wait
    from pretrain.export.writing import ExportOptions, export
    from pretrain.saved_model import find_checkpoint

    if args.verify:
        check_transformers()
    options = ExportOptions(
        dtype=args.dtype,
        most_bytes=most_bytes,
        license=args.license,
        data=args.data,
        verify=args.verify,
        ema=args.ema,
    )
    export(find_checkpoint(args.run), args.to, options)


def size_of(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or a number of bytes. Raises UserError."""
    found = re.fullmatch(rf"(\d{{1,{MOST_DIGITS}}})(MB|GB)?", text)
    size = int(found[1]) * UNITS.get(found[2], 1) if found else 0
    if size < 1:
        raise UserError(f"--max-shard-size: {quoted(text)} is no size; give e.g. 5GB, 500MB or a number of bytes")
    return size
