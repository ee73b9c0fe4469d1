"""Command line of launch/generate.py: a trained model continues texts."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from common.arguments import Parser, a_path
from common.errors import UserError
from common.terminal import json_line, visible
from pretrain.cli.options import add_data, add_device, add_ema
from pretrain.cli.refusals import INTERRUPTED, device_named, exit_code_of

if TYPE_CHECKING:
    from pretrain.generation import Generated, Settings
    from pretrain.generation.ids import Cost
    from pretrain.saved_model import SavedModel


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/generate.py",
        description="A trained model continues texts. Reads any checkpoint in one process, also while the run goes on, "
        "and prints each text as it comes; speed and memory stand on stderr. docs/use.md explains the options.",
    )
    parser.add_argument(
        "run",
        type=a_path,
        metavar="RUN",
        help="run folder (the newest checkpoint is taken), checkpoint (step-...), or a folder of launch/export.py",
    )
    _add_prompts(parser.add_mutually_exclusive_group(required=True))
    _add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each text, a line each")
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="texts that are computed at once (default: 16)"
    )
    parser.add_argument(
        "--slide",
        action="store_true",
        help="let texts become longer than the context of a model without memory: whenever it is full, the last half "
        "of it is read anew, and what stood before is forgotten",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="compute the whole text for every token: the same texts, slowly, to compare with",
    )
    add_data(parser)
    add_ema(parser)
    add_device(parser)
    return parser


def _add_prompts(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the beginning of a text; repeatable; - is all of standard input",
    )
    group.add_argument(
        "--prompts",
        type=a_path,
        metavar="FILE",
        help="a prompt in each line that is not blank, of FILE.jsonl under the key `prompt`; - is standard input",
    )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts, one after the other, until Ctrl-D; Ctrl-C ends a text early",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="most new tokens of a text, which ends earlier where the model ends it (default: 100, or as many as the "
        "context has room for)",
    )
    parser.add_argument("--until", metavar="TEXT", help="end a text with the first TEXT that the model writes")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="below 1 likely tokens become likelier; 0 always takes the likeliest (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default: 0, from all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        metavar="P",
        help="draw from the fewest likeliest tokens whose probabilities sum to P (default: 0.95; 1: from all)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same texts (default: 0)"
    )
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts of each prompt (default: 1)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 refused, 130 ended by Ctrl-C."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Raises UserError and OSError."""
    from pretrain.export.loading import load_any  # here: torch, for which --help need not wait
    from pretrain.generation import Sampling, Settings
    from pretrain.generation.ids import Cost

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    settings = Settings(args.tokens, sampling, args.samples, args.batch, not args.no_cache, args.slide, args.until)
    prompts = [] if args.interactive else _prompts(args)
    device, cost = str(device_named(args.device)), Cost()
    saved = load_any(args.run, device=device, data=args.data, ema=args.ema)
    if saved.tokenizer.eos_id is None:
        _say("the run's data have no id that ends a text: texts end after --tokens")
    printer = _Printer(as_json=args.json)
    if args.interactive:
        _converse(saved, settings, cost, printer)
        code = 0
    else:
        code = _print_all(saved, prompts, settings, cost, printer)
    if cost.tokens:
        _say(_report(saved, settings, cost))
    return code


def _prompts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(text, what messages call it). Raises UserError."""
    from pretrain.generation.prompts import read_prompts, read_text

    if args.prompts is not None:
        return read_prompts(args.prompts)
    many = len(args.prompt) > 1
    texts = [read_text("--prompt") if text == "-" else text for text in args.prompt]
    return [(text, f"--prompt {number}" if many else "--prompt") for number, text in enumerate(texts, 1)]


def _print_all(
    saved: SavedModel, prompts: list[tuple[str, str]], settings: Settings, cost: Cost, printer: _Printer
) -> int:
    from tqdm import tqdm

    from pretrain.generation.texts import stream

    texts, names = zip(*prompts, strict=True)
    total = len(texts) * settings.samples
    # Where texts are printed on the terminal they are the progress.
    hidden = True if sys.stdout.isatty() or total == 1 else None
    try:
        with tqdm(total=total, desc="texts", unit="", leave=False, disable=hidden) as bar:
            pieces = stream(saved, texts, settings, cost, names=names)
            began = -1
            for piece in pieces:
                if piece.number > began:
                    began = piece.number
                    printer.begin(texts[began // settings.samples], began, total)
                printer.add(piece.content)
                if piece.finished is not None:
                    printer.end(piece.finished)
                    bar.update()
    except KeyboardInterrupt:
        printer.cut()
        return INTERRUPTED
    return 0


def _converse(saved: SavedModel, settings: Settings, cost: Cost, printer: _Printer) -> None:
    """Each line is a prompt of its own."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history in input()

    for prompt in _lines():
        try:
            _print_all(saved, [(prompt, "the prompt")], settings, cost, printer)
        except UserError as error:
            _say(f"error: {error}")


def _lines() -> Iterator[str]:
    """What is typed, until the end of input or Ctrl-C."""
    try:
        while True:
            line = input("> ")
            if line.strip():
                yield line
    except (EOFError, KeyboardInterrupt):
        print(flush=True)


class _Printer:
    """Texts on stdout. Characters that steer a terminal are shown, not sent; a file or a pipe gets them as they are."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._is_terminal = sys.stdout.isatty()

    def begin(self, prompt: str, number: int, total: int) -> None:
        if self._as_json:
            return
        if total > 1:
            print(f"--- {number + 1} of {total}", flush=True)
        self.add(prompt)

    def add(self, content: str) -> None:
        if content and not self._as_json:
            print(visible(content) if self._is_terminal else content, end="", flush=True)

    def end(self, text: Generated) -> None:
        if self._as_json:
            print(json_line(_as_dict(text), sys.stdout), flush=True)
        else:
            print(flush=True)

    def cut(self) -> None:
        if not self._as_json:
            print(flush=True)


def _as_dict(text: Generated) -> dict[str, Any]:
    return {
        "prompt": text.prompt,
        "sample": text.sample,
        "text": text.text,
        "ids": list(text.ids),
        "ended": text.is_ended,
    }


def _report(saved: SavedModel, settings: Settings, cost: Cost) -> str:
    """What the texts cost, and how large the cache is beside that of a dense model."""
    from model.costs import cache_floats, dense_cache_floats

    parts = [
        f"{cost.tokens:,} tokens in {cost.seconds:.2f} s: {cost.prompt_seconds:.2f} s to read the prompts "
        f"({cost.prompt_tokens:,} tokens) and write each text's first"
    ]
    # The first pass of a process also pays for what it loads, so it is no part of the rate.
    if further := cost.tokens - cost.first_tokens:
        speed = further / max(cost.seconds - cost.prompt_seconds, 1e-9)
        parts.append(f"then {speed:,.1f} tokens/s {'with' if settings.is_cached else 'without'} a cache")
    if settings.is_cached:
        config = saved.config.model
        own, dense = 4 * cache_floats(config), 4 * dense_cache_floats(config)
        parts.append(f"cache of {_size(cost.cache_bytes)}, {_size(own)} a token")
        if dense != own:
            parts.append(
                f"dense attention as wide as the model (heads x head_dim = d_model = {config.d_model:,}) keeps "
                f"{_size(dense)}, {dense / own:.2f} times as much"
            )
    return "; ".join(parts)


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
