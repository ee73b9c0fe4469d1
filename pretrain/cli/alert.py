"""Command line of launch/alert.py: sends one alert of a run, as a test, or for a script that knows what happened."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import get_args

from common.arguments import Parser, a_path, add_overrides, at_least
from common.errors import UserError
from pretrain.cli.refusals import exit_code_of
from pretrain.config.alert_kinds import AlertKind, command_words
from pretrain.config.loading import load_config
from pretrain.report.alerts import LIMIT_SECONDS, Alert, Command, check_command
from pretrain.report.run_paths import config_file, run_folder


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch/alert.py",
        description="Starts monitor.alert_command of a run, shows what it prints, and says whether it worked: without "
        "--event as a test. With --event and --text for a script that knows what happened: it does nothing if the run "
        "has no command, or if monitor.alerts leaves the event out.",
    )
    parser.add_argument("run", type=a_path, metavar="RUN", help="a run folder, or a configuration")
    add_overrides(parser)
    parser.add_argument(
        "--run-dir",
        metavar="DIR",
        help="the run folder of a configuration, also before there is a run (default: as in launch/pretrain.py)",
    )
    parser.add_argument("--event", choices=get_args(AlertKind), metavar="KIND", help="one of monitor.alerts")
    parser.add_argument("--text", metavar="TEXT", help="what happened")
    parser.add_argument(
        "--seconds",
        type=at_least(1),
        default=int(LIMIT_SECONDS),
        metavar="N",
        help=f"how long the command may take (default: {LIMIT_SECONDS:.0f})",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 sent, or not wanted; 2 refused, or the command failed."""
    args = build_parser().parse_args(arguments)
    return exit_code_of(lambda: send(args))


def send(args: argparse.Namespace) -> None:
    """Raises UserError if the command cannot be started, or failed."""
    if (args.event is None) != (args.text is None):
        raise UserError("--event: goes with --text; give both, or neither for a test")
    path = config_file(args.run, "RUN")
    monitor = load_config(path, args.overrides, option="RUN").monitor
    words = command_words(monitor.alert_command)
    if args.event is not None and (not words or args.event not in monitor.alerts):
        return
    if not words:
        raise UserError(f"monitor.alert_command: is not set in {path}; --set monitor.alert_command=... tries one")
    check_command(monitor)
    text = "a test of its alerts" if args.text is None else args.text
    event = {"event": args.event or "test", "time": time.time(), "reason": text}
    alert = Alert(run_folder(path, args.run_dir), event, text=text)
    with _signals_exit():
        failure = Command(words, alert, is_shown=True).run(args.seconds)
    if failure is not None:
        raise UserError(f"monitor.alert_command: {failure}; what it printed stands above")
    print(f"sent: {alert.sentence}", flush=True)


@contextlib.contextmanager
def _signals_exit() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does, so that its command ends too, which has a session of its own
    and ignores SIGTERM. One that the caller ignores stays ignored: a job's script sends alerts while SLURM ends it."""
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
