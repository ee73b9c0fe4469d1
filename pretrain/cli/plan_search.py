"""`plan.py search`: the legal layouts of a run on a machine, ranked, and a configuration file with the best."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.progress_bar import count_bar
from common.strict_json import dumps
from common.tables import counted, text_table
from common.units import GIB
from pretrain.cli.plan_fit import machine_text, seconds_text
from pretrain.cli.plan_machine import WantedPlan
from pretrain.config.obstacles import another_loss
from pretrain.config.schema import Config
from pretrain.planning.layout_file import chosen_tree, write_config
from pretrain.planning.machine import Machine
from pretrain.planning.measured import RESULTS
from pretrain.planning.memory import USABLE
from pretrain.planning.search import SHOWN, Found, SearchReport, search


def print_search(args: argparse.Namespace, wanted: WantedPlan) -> None:
    """Raises UserError; also where nothing fits."""
    path, config, found = wanted
    with count_bar(enabled=not args.json) as bar:
        told = ""

        def progress(what: str, done: int, total: int) -> None:
            nonlocal told
            if what != told:
                told = what
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        report = search(config, found, results=args.results or RESULTS, progress=progress)
    if args.json:
        print(dumps(as_json(config, report, found), indent=1))
    else:
        print("\n".join(lines_of(path, config, report, found)))
    if not report.best:
        raise UserError(_why_none(report, found))
    if args.write is not None:
        _write(args, path, report, found)


def _why_none(report: SearchReport, found: Machine) -> str:
    """Why no layout is left, and what would help."""
    machine = f"{found.num_gpus} x {found.device.name}"
    if not report.excluded:
        _, said = max(report.refused.values())
        return f"--gpus: the rules of configurations allow no layout on {machine}, e.g. {said}"
    return (
        f"--gpus: no layout fits {machine}; give more GPUs, larger ones, or a smaller batch.global_sequences or model"
    )


def _write(args: argparse.Namespace, path: Path, report: SearchReport, found: Machine) -> None:
    words = f"{found.num_gpus} x {found.device.name}"
    best = report.best[0]
    tree = chosen_tree(path, args.overrides, _overrides(best, report), words)
    write_config(args.write, tree, force=args.force)
    quoted = shlex.quote(str(args.write))
    print(
        f"wrote {args.write}: check it with python launch/pretrain.py --config {quoted} --dry-run --ranks "
        f"{found.num_gpus}",
        file=sys.stderr if args.json else sys.stdout,
    )


def lines_of(path: Path, config: Config, report: SearchReport, found: Machine) -> Iterator[str]:
    """The table of the best, and why the others are not in it."""
    yield f"{path} on {machine_text(found)}"
    capacity = USABLE * (found.capacity or 0)
    yield (
        f"{report.layouts:,} layouts, {report.traced} of them traced or rehearsed; an estimate may fill "
        f"{capacity / GIB:.1f} GiB ({USABLE:.0%} of the memory)\n"
    )
    if report.best:
        rows = [_row(number, one, capacity, found.num_gpus) for number, one in enumerate(report.best, 1)]
        yield text_table(_header(), rows)
        if (others := other_losses(config, report, found)) is not None:
            yield f"\n{others}"
        yield "\nthe first as options: " + " ".join(f"--set {setting}" for setting in settings(report.best[0], report))
    if report.excluded or report.refused:
        yield "\nnot in the table"
    for reason, count in sorted(report.excluded.items(), key=lambda item: -item[1]):
        yield f"  {count:>7,}  {reason}"
    for key, (count, said) in sorted(report.refused.items(), key=lambda item: -item[1][0]):
        yield f"  {count:>7,}  refused by a rule of {key}, e.g. {said.partition(': ')[2]}"
    yield "\ntimes are ranges from data sheets and assumed efficiencies: plan.py fit prints them for one layout"


def other_losses(config: Config, report: SearchReport, found: Machine) -> str | None:
    """Which rows change the loss too, where some do: of a run with a regulariser of a micro-step's batch."""
    others = {
        str(number): loss
        for number, one in enumerate(report.best, 1)
        if (loss := another_loss(config, one.layout.applied(config), found.num_gpus)) is not None
    }
    if not others:
        return None
    loss = next(iter(others.values()))
    return (
        f"another loss than the run's: {counted(len(others), 'row')} ({', '.join(others)}), where micro_sequences x "
        f"data is not {loss.run_sequences} ({' and '.join(loss.keys)} = micro_batch)"
    )


def _header() -> list[str]:
    return [
        "",
        "step",
        "headroom GiB",
        "data",
        "tensor",
        "pipeline",
        "expert",
        "ZeRO",
        "sequence",
        "recompute",
        "micro_sequences",
    ]


def _row(number: int, one: Found, capacity: float, gpus: int) -> list[object]:
    layout = one.layout
    return [
        str(number),
        f"{seconds_text(one.time.fast.total)} - {seconds_text(one.time.slow.total)}",
        f"{(capacity - one.needed) / GIB:.1f}",
        gpus // (layout.tensor * layout.pipeline),
        layout.tensor,
        layout.pipeline,
        layout.expert,
        layout.zero,
        "yes" if layout.sequence else "no",
        layout.recompute,
        layout.micro_sequences,
    ]


def settings(one: Found, report: SearchReport) -> list[str]:
    """KEY=VALUE of a layout, for --set."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in _overrides(one, report).items()
    ]


def _overrides(one: Found, report: SearchReport) -> dict[str, Any]:
    return one.layout.overrides() | report.beside


def as_json(config: Config, report: SearchReport, found: Machine) -> dict[str, Any]:
    """Exact numbers: bytes and seconds."""
    losses = (another_loss(config, one.layout.applied(config), found.num_gpus) for one in report.best)
    return {
        "usable_bytes": int(USABLE * (found.capacity or 0)),
        "layouts": report.layouts,
        "traced": report.traced,
        "best": [
            {
                "set": _overrides(one, report),
                "seconds": {"fast": dataclasses.asdict(one.time.fast), "slow": dataclasses.asdict(one.time.slow)},
                "total_seconds": {"fast": one.time.fast.total, "slow": one.time.slow.total},
                "needed_bytes": one.needed,
                "another_loss": None if loss is None else loss._asdict(),
            }
            for one, loss in zip(report.best, losses, strict=True)
        ],
        "excluded": report.excluded,
        "refused": {key: {"count": count, "example": said} for key, (count, said) in report.refused.items()},
        "shown": SHOWN,
    }
