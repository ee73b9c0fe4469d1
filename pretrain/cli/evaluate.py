"""Command line of launch/evaluate.py: the tasks of a trained model, as a table and as JSON, in any layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common.arguments import Parser, a_path, add_overrides, at_least
from common.errors import UserError
from pretrain.cli.options import add_data, add_device, add_ema
from pretrain.cli.refusals import code_of_failure, device_named, exit_code_of
from pretrain.config.validated import MEMORY
from pretrain.ranks import Ranks
from pretrain.report.exit_codes import ExitCode

TASK_NAMES = ("validation", "lambada", "blimp", "cbt")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/evaluate.py",
        usage="[python | deepspeed --num_gpus N] launch/evaluate.py RUN [--tasks LIST] [--harness LIST] [options]",
        description="Evaluates a checkpoint: held-out loss, LAMBADA, BLiMP and the Children's Book Test by "
        "the protocols of the SwitchHead paper, and any task of EleutherAI's lm-evaluation-harness. Prints a table and "
        "writes a JSON file for each task. One process, or the ranks of a launcher in any layout (--set "
        "parallel.tensor=2), give the same numbers. docs/use.md says what is computed.",
    )
    parser.add_argument(
        "run",
        type=a_path,
        metavar="RUN",
        help="a run folder (its newest checkpoint), a step-... folder, or in one process what launch/export.py wrote",
    )
    parser.add_argument(
        "--tasks",
        metavar="LIST",
        help=f"some of {','.join(TASK_NAMES)}, with commas; NAME=PATH says where the published files are (default: "
        "evaluate.tasks of the run, else raw/NAME), validation=FOLDER takes the held-out split of other prepared data "
        "of the same tokenizer. Default: validation, if there is no --harness",
    )
    parser.add_argument(
        "--harness",
        metavar="LIST",
        help="tasks of lm-evaluation-harness, with commas: its own names, which need the hub or its cache; NAME=FILE "
        "reads a local file of JSON lines instead, NAME=FOLDER its train.jsonl, validation.jsonl and test.jsonl; "
        "switchall_lambada, switchall_blimp and switchall_cbt read published files, as --tasks does. One process",
    )
    parser.add_argument(
        "--shots",
        type=at_least(0),
        metavar="N",
        help="examples before each question of --harness (default: as each task says; of a task whose data are one "
        "local file none)",
    )
    parser.add_argument(
        "--log-samples",
        action="store_true",
        help="writes each question of --harness too, with what the model answered (harness-samples.jsonl)",
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="the first N examples of each file, for a quick look"
    )
    parser.add_argument(
        "--batch", type=at_least(1), default=16, metavar="N", help="texts of one forward pass (default: 16)"
    )
    parser.add_argument(
        "--context",
        type=at_least(1),
        metavar="N",
        help="most tokens that the model looks back to (default: as in training, sequence_length and the memory); of "
        "longer texts the beginning is cut off",
    )
    add_data(parser, used_for="for tokenizer and held-out split")
    add_ema(parser)
    add_device(parser)
    parser.add_argument(
        "--out", type=a_path, metavar="FOLDER", help="folder of the JSON files (default: RUN/evaluation/step-...)"
    )
    keys = "of parallel (the layout), evaluate (the held-out split) or kernels, or model.position.memory_chunks"
    add_overrides(parser, f"a key {keys}; repeatable")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: evaluate(args))


def wanted_tasks(text: str | None, *, default: bool) -> dict[str, str | None]:
    """--tasks: name -> place, None where none is named. Raises UserError."""
    wanted: dict[str, str | None] = {}
    if text is None:
        return {"validation": None} if default else wanted
    for part in text.split(","):
        name, equals, place = part.strip().partition("=")
        if name not in TASK_NAMES or (equals and not place):
            raise UserError(f"--tasks: {part.strip()!r} is none of {', '.join(TASK_NAMES)}, alone or as NAME=PATH")
        if name in wanted:
            raise UserError(f"--tasks: names {name} twice; name it once")
        wanted[name] = place or None
    return wanted


def evaluate(args: argparse.Namespace) -> int | None:
    """Raises UserError."""
    wanted = wanted_tasks(args.tasks, default=args.harness is None)
    ranks = Ranks.from_environment()
    for option, given in (("--shots", args.shots is not None), ("--log-samples", args.log_samples)):
        if given and args.harness is None:
            raise UserError(f"{option}: is for the tasks of --harness, and there is none; leave it out")
    if args.harness is not None and ranks.world_size > 1:
        raise UserError("--harness: computes in one process; start it with python, without the launcher")

    has_memory = any(override.startswith(f"{MEMORY}=") for override in args.overrides)
    if has_memory and (args.harness is not None or set(wanted) != {"validation"}):
        raise UserError(
            f"--set {MEMORY}: is of a validation alone; leave out --harness, and --tasks but for validation"
        )

    from pretrain.cli.evaluate_checkpoint import (  # here: torch, for which --help need not wait
        Choices,
        evaluate_checkpoint,
    )

    choices = Choices(
        wanted=wanted,
        harness=args.harness,
        shots=args.shots,
        keeps_samples=args.log_samples,
        limit=args.limit,
        batch=args.batch,
        context=args.context,
        data=tuple(args.data),
        out=args.out,
        overrides=tuple(args.overrides),
        ema=args.ema,
    )
    if ranks.world_size == 1:
        evaluate_checkpoint(args.run, choices, device_named(args.device))
        return None
    from pretrain import device as devices
    from pretrain.config.schema import TrainConfig
    from pretrain.parallel.agreement import PeerFailed

    def together() -> None:
        evaluate_checkpoint(args.run, choices, devices.start(ranks, TrainConfig(device=args.device)))

    code: int = ExitCode.UNFORESEEN
    try:
        code = exit_code_of(together)
    except PeerFailed:
        code = ExitCode.REFUSED
    except devices.Unreachable as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = ExitCode.CUT_OFF
    except Exception as error:
        code = code_of_failure(error)
    finally:
        devices.stop(code)
    return code
