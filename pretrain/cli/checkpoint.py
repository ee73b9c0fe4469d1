"""Command line of launch/checkpoint.py: lists and verifies a run's checkpoints, averages them, and exports weights for
other programs."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from common.arguments import Parser, a_path, not_empty
from common.errors import UserError
from common.progress_bar import count_bytes
from common.tables import text_table
from pretrain.checkpoint.convert import convert
from pretrain.checkpoint.folder import (
    CHECKPOINT_NAME,
    OWN_FILE,
    PARTIAL,
    STATE_FILE,
    Checkpoint,
    DamagedCheckpoint,
    check_new_checkpoint,
    check_no_export,
    list_checkpoints,
    while_they_are_there,
)
from pretrain.checkpoint.shares import read_weights, shares_of
from pretrain.cli.options import add_ema
from pretrain.cli.refusals import exit_code_of
from pretrain.report.exit_codes import ExitCode


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/checkpoint.py",
        description="Lists and verifies the checkpoints of a run, averages them, and exports their weights for other "
        "programs.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = commands.add_parser(
        "list",
        help="the checkpoints of a run: step, time, size, layout, state, losses",
        description="Prints a line per checkpoint. `whole` means committed and of the right sizes; `verify` reads all.",
    )
    listing.add_argument(
        "folder", type=a_path, metavar="RUN_DIR", help="run folder, or its checkpoints folder, or a checkpoint"
    )
    verify = commands.add_parser(
        "verify",
        help="compare every file with its sha256",
        description="Reads every file of a checkpoint, or of all checkpoints of a run, and compares it with its "
        "sha256. Exit code 2 if one is not whole.",
    )
    verify.add_argument("folder", type=a_path, metavar="PATH", help="a checkpoint, or a run folder")
    convert = commands.add_parser(
        "convert",
        help="the fp32 weights as one model.safetensors, with the tokenizer",
        description="Writes the fp32 weights, each parameter whole, to DIR/model.safetensors, beside them the run's "
        "configuration (config.json), its tokenizer (tokenizer.model) and where the weights come from (weights.json: "
        "step, tokens read, data set). Needs memory for the largest parameter only. docs/checkpoints.md shows how to "
        "load them.",
    )
    convert.add_argument("folder", type=a_path, metavar="PATH", help="a checkpoint, or a run folder for its newest")
    convert.add_argument("out", type=a_path, nargs="?", help=argparse.SUPPRESS)  # as it was written before --to
    convert.add_argument("--to", type=a_path, metavar="DIR", help="folder to write to; must not hold a model yet")
    convert.add_argument(
        "--data",
        type=not_empty,
        metavar="FOLDER",
        help="where the run's prepared data are now, for the tokenizer (default: where the run read them)",
    )
    add_ema(convert)
    average = commands.add_parser(
        "average",
        help="the mean of the weights of several checkpoints, as a checkpoint",
        description="Writes the mean of the weights of checkpoints of one model and tokenizer as the new checkpoint "
        "DIR: weights alone, which analyze, convert and load_model read like any other, and which a new run begins "
        "with (train.init_from). Computed in fp64, one parameter in memory at a time.",
    )
    average.add_argument(
        "folders", type=a_path, nargs="+", metavar="CHECKPOINT", help="checkpoints, or run folders for their newest"
    )
    average.add_argument("--to", type=a_path, required=True, metavar="DIR", help="the new checkpoint; must not exist")
    average.add_argument(
        "--weights", metavar="LIST", help="the share of each, e.g. 1,1,2; divided by their sum (default: equal)"
    )
    average.add_argument(
        "--ema",
        action="store_true",
        help="of the moving averages (train.ema_decay) instead of the weights; one checkpoint is enough",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused or damaged."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """The exit code of the command. Raises UserError and OSError."""
    if args.command == "list":
        print_list(args.folder)
    elif args.command == "verify":
        return verify_all(args.folder)
    elif args.command == "average":
        average_of(args)
    else:
        convert_one(args)
    return 0


def convert_one(args: argparse.Namespace) -> None:
    """Raises UserError."""
    if (args.to is None) == (args.out is None):
        what = "is missing" if args.to is None else f"is {args.to}, and {args.out} is another argument"
        raise UserError(f"--to: {what}; name the one folder to write to, --to DIR")
    folder = _newest(args.folder)
    with while_they_are_there([folder], "PATH"):
        convert(folder, args.to or args.out, data=args.data, ema=args.ema)


def average_of(args: argparse.Namespace) -> None:
    """Raises UserError."""
    if len(args.folders) == 1 and not args.ema:
        raise UserError("CHECKPOINT: the mean of one checkpoint is itself; name two or more, or --ema")
    weights = None if args.weights is None else read_weights(args.weights)
    shares_of(weights, len(args.folders))
    check_new_checkpoint(args.to, "--to")  # before every file is read
    folders = [_newest(folder) for folder in args.folders]
    from pretrain.checkpoint.average import average  # imports torch, for which what is refused above need not wait

    kind = "ema" if args.ema else "master"
    with while_they_are_there(folders, "PATH"):
        average(folders, args.to, weights=weights, kind=kind)


def _checkpoints_folder(folder: Path) -> Path:
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def _is_checkpoint(folder: Path) -> bool:
    return not (folder / "checkpoints").is_dir() and not list_checkpoints(folder)


def _check_folder(folder: Path, argument: str) -> None:
    if not folder.is_dir():
        raise UserError(f"{argument}: there is no folder {folder}; name a checkpoint (step-...) or a run folder")
    check_no_export(folder, argument)


def _newest(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, or the newest checkpoint of the run folder `folder`. Raises UserError."""
    _check_folder(folder, "PATH")
    if _is_checkpoint(folder):
        return folder
    paths = list_checkpoints(_checkpoints_folder(folder))
    if not paths:
        raise UserError(f"PATH: {folder} holds no checkpoints")
    return paths[-1]


def print_list(folder: Path) -> None:
    """Prints a line per checkpoint, oldest first, then those that no run uses any more and the remains of unfinished
    ones; of a checkpoint, which may have any name where it holds weights alone, its own."""
    _check_folder(folder, "RUN_DIR")
    place = _checkpoints_folder(folder)
    is_one = _is_checkpoint(folder) and (folder / STATE_FILE).exists()
    rows = [_row(folder.absolute())] if is_one else _rows(place)
    if not rows:
        raise UserError(f"RUN_DIR: {place} holds no checkpoints; name a run folder that has saved one")
    titles = ("checkpoint", "saved", "bytes", "layout", "state", "loss", "validation")
    print(text_table(titles, rows, left=None))


def _rows(place: Path, looks: int = 5) -> list[tuple[str, ...]]:
    """If a run that goes on renames or removes one meanwhile, looks again, at most `looks` times; the last time without
    those that are gone."""
    paths = list_checkpoints(place)
    others = [p for p in place.iterdir() if re.search(r"step-\d{8,}", p.name) and p not in paths and p.is_dir()]
    others.sort(key=lambda p: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", p.name)])
    rows = [_row_if_there(path) for path in [*paths, *others]]
    return _rows(place, looks - 1) if None in rows and looks > 1 else [row for row in rows if row is not None]


def _row_if_there(path: Path) -> tuple[str, ...] | None:
    """None where the folder went away while it was read."""
    try:
        row = _row(path)
    except FileNotFoundError:
        return None  # also where a file got its name in it: another look sees that
    return row if path.is_dir() else None


def _row(path: Path) -> tuple[str, ...]:
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    if path.name.endswith(PARTIAL):
        size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
        return path.name, saved, f"{size:,}", "", "partial: being written, or left by a stopped save", "", ""
    try:
        checkpoint = Checkpoint.open(path)
    except DamagedCheckpoint as error:
        return path.name, saved, "", "", f"damaged: {_reason(error, path)}", "", ""
    except UserError as error:
        return path.name, saved, "", "", _reason(error, path), "", ""
    state = checkpoint.state
    names = {"tensor": "TP", "pipeline": "PP", "data": "DP", "expert": "EP"}
    layout = " ".join(f"{names[key]}{state['layout'][key]}" for key in names) + f" ZeRO-{state['layout']['zero']}"
    layout = layout if checkpoint.weights_source is None else "weights alone"
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state["time"]))
    split = state["config"].get("evaluate", {}).get("split", "validation")
    validation = _loss(state["validation_loss"])
    losses = (_loss(state["loss"]), f"{validation} ({split})" if validation and split != "validation" else validation)
    return path.name, saved, f"{checkpoint.bytes:,}", layout, "whole", *losses


def _reason(error: Exception, path: Path) -> str:
    return str(error).removeprefix(f"checkpoint {path}: ")


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def verify_all(folder: Path) -> int:
    """Prints a line per checkpoint. Returns the exit code. Raises UserError."""
    _check_folder(folder, "PATH")
    paths = [folder] if _is_checkpoint(folder) else list_checkpoints(_checkpoints_folder(folder))
    has_name = CHECKPOINT_NAME.fullmatch(folder.absolute().name)
    if not paths or (
        paths == [folder] and not has_name and not any(OWN_FILE.fullmatch(f.name) for f in folder.iterdir())
    ):
        raise UserError(f"PATH: {folder} holds no checkpoints; name a checkpoint (step-...) or a run folder")
    code = 0
    for path in (path.absolute() for path in paths):  # "." has no name of its own
        try:
            checkpoint = Checkpoint.open(path)
            problem = checkpoint.damaged_file(read=count_bytes(path.name, checkpoint.bytes))
        except UserError as error:
            if path.is_dir() and not isinstance(error, DamagedCheckpoint):
                raise
            problem = _reason(error, path)
        if problem and not path.is_dir():
            print(f"{path.name}: removed meanwhile, by a run that goes on (checkpoint.keep_last)", flush=True)
            continue
        if problem:
            code = ExitCode.REFUSED
        print(f"{path.name}: {f'DAMAGED: {problem}' if problem else 'whole, every sha256 matches'}", flush=True)
    return code
