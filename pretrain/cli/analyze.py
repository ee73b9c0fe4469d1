"""Command line of launch/analyze.py: attention maps and experts of trained models on a text, as one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from common.arguments import Parser, a_path, at_least
from common.tables import counted
from common.terminal import visible
from pretrain.cli.options import add_data, add_device, add_ema
from pretrain.cli.refusals import device_named, exit_code_of


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/analyze.py",
        description="Shows what trained models do with a text: attention maps of each head and their maximum over "
        "heads, the experts that each token chooses, experts that are chosen together, the tokens that each expert "
        "takes most, and dead experts. Several runs stand side by side, e.g. a SwitchAll and a dense model. Reads any "
        "checkpoint in one process; writes one HTML page that needs no network, the pictures as PNG, and the numbers. "
        "docs/analysis.md explains them.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=a_path,
        metavar="RUN",
        help="run folders (the newest checkpoint is taken) or checkpoints (step-...)",
    )
    parser.add_argument(
        "--text",
        type=a_path,
        metavar="FILE",
        help="UTF-8 text; - is standard input (default: a paragraph of the project)",
    )
    parser.add_argument(
        "--out",
        type=a_path,
        metavar="FOLDER",
        help="where the page goes (default: RUN/analysis/step-... of the first run, -with-OTHERS; of a "
        "checkpoint elsewhere, `analysis` beside it)",
    )
    parser.add_argument(
        "--layers",
        metavar="LIST",
        help="layers that are drawn, counted from 0: all, or e.g. 0,4-6 (default: 6 at most, evenly spaced; loads are "
        "of all layers)",
    )
    parser.add_argument(
        "--tokens",
        type=at_least(2),
        default=4096,
        metavar="N",
        help="most tokens of the text that are read (default: 4096)",
    )
    parser.add_argument(
        "--map-tokens", type=at_least(1), default=64, metavar="N", help="tokens that attention maps show (default: 64)"
    )
    parser.add_argument(
        "--window",
        type=at_least(1),
        default=1,
        metavar="N",
        help="which window of model.sequence_length tokens the maps show, counted from 1 (default: 1; later ones show "
        "the memory of models that have one)",
    )
    add_data(parser)
    add_ema(parser)
    add_device(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: analyze(args))


def analyze(args: argparse.Namespace) -> None:
    """Raises UserError."""
    from tqdm import tqdm

    from pretrain.analysis import report  # here: torch and matplotlib, for which --help need not wait
    from pretrain.analysis.text import read_text
    from pretrain.saved_model import find_checkpoint, load_model

    text, text_name = read_text(args.text)
    settings = report.Settings(args.layers, args.tokens, args.map_tokens, args.window - 1)
    checkpoints = [find_checkpoint(place) for place in args.runs]
    paths = [checkpoint.path for checkpoint in checkpoints]
    out = (args.out or report.default_folder(paths, of_average=args.ema)).absolute()
    report.check_folder(out)
    device = device_named(args.device)
    found = []
    for path, label in zip(paths, report.labels(paths), strict=True):
        saved = load_model(path, device=str(device), data=args.data, ema=args.ema)
        ids = report.encoded(saved, text, settings)
        with tqdm(total=len(ids), desc=label, unit=" tokens", leave=False, disable=None) as bar:
            found.append(report.findings_of(saved, label, ids, settings, bar.update, of_average=args.ema))
        run = found[-1]
        loss = f", loss {run.trace.loss:.4f}" if len(ids) > 1 else ""  # the first token's is not known
        print(f"{visible(run.title)}: {counted(len(ids), 'token')}{loss}", flush=True)
        for sentence in run.trace.left_out:
            print(f"warning: {sentence}", file=sys.stderr, flush=True)
        del saved  # one model in memory at a time
    with tqdm(desc="pictures", unit="", leave=False, disable=None) as bar:
        images = report.drawn(found, settings, lambda name: bar.update(1))
    report.write(out, found, images, text_name)
    print(f"{out / report.PAGE}: the page; beside it {len(images)} pictures and the numbers", flush=True)
