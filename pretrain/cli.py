"""Command line of launch/pretrain.py: arguments, help, checks before anything is allocated, dry run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data_prep.shard_format import DataError, Manifest
from pretrain.config import FREE, Config
from pretrain.config_io import fields, load_config, to_json
from pretrain.errors import EXIT_USER_ERROR, UserError
from pretrain.rules import check_device, check_ranks

USAGE = "deepspeed [--num_gpus N] launch/pretrain.py --config FILE [--set key=value]... [--run-dir DIR] [--dry-run]"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py",
        usage=USAGE,
        description="Pretrains a SwitchAll, SwitchHead or dense language model. Without the deepspeed launcher "
        "(python launch/pretrain.py ...) it trains as one process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=keys_help(),
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the run as JSON, e.g. configs/switchall_tiny.json"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override one dotted key, repeatable: --set train.steps=200 --set model.attention.type=dense "
        "(values are JSON where they parse as JSON: true, false, null, 1e-4, [1,2])",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="run folder (default: runs/NAME, NAME being the config "
        "file's); started again with the same folder, a run continues",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration, data and layout, print the resolved configuration and derived values, and stop",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --dry-run: check the layout for N ranks (default: the product of the parallel sizes)",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit code: 0 done, 2 refused, 3 diverged."""
    from pretrain.device import Ranks, die_with_parent

    args = build_parser().parse_args(arguments)
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        die_with_parent()
    try:
        if args.ranks is not None and not args.dry_run:
            raise UserError("--ranks: goes with --dry-run; the launcher's --num_gpus decides the ranks of a run")
        config = load_config(args.config, args.overrides)
        run_dir = (args.run_dir or Path("runs") / args.config.stem).absolute()
        if args.dry_run:
            world_size = args.ranks or config.parallel.tensor * config.parallel.pipeline
        else:
            world_size = ranks.world_size
        manifest, data_size = preflight(config, world_size, run_dir, show_progress=ranks.rank == 0)
        if ranks.rank == 0:
            report(config, data_size, manifest, run_dir, with_config=args.dry_run)
        if args.dry_run:
            return 0
        return run(config, manifest, run_dir, ranks)
    except (UserError, DataError) as error:
        # Every rank finds the same fault at the same place; one of them says so.
        if ranks.local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def preflight(config: Config, world_size: int, run_dir: Path, *, show_progress: bool) -> tuple[Manifest, int]:
    """Everything that can be refused without a process group or an allocation. Returns the manifest and DP size."""
    from pretrain.checkpoint import Checkpoint
    from pretrain.data import open_manifest
    from pretrain.device import device_type
    from pretrain.resume import candidates, changed_settings

    data_size = check_ranks(config, world_size)
    check_device(config, device_type())
    manifest = open_manifest(config)
    manifest.check(config.data.verify, progress=show_progress)
    for path in candidates(config, run_dir):
        try:
            newest = Checkpoint.open(path)
        except UserError:
            continue  # damaged: whether an older one serves is decided, and said, when the ranks have met
        changed_settings(config, newest, manifest.digest)
        break
    return manifest, data_size


def run(config: Config, manifest: Manifest, run_dir: Path, ranks: object) -> int:
    """Joins the process group and trains."""
    from pretrain import device as devices
    from pretrain.loop import EXIT_DIVERGED, Diverged, train

    assert isinstance(ranks, devices.Ranks)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = devices.start(ranks, config.train.threads)
    try:
        train(config, manifest, run_dir, device)
    except Diverged as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_DIVERGED
    finally:
        devices.stop()
    return 0


def report(config: Config, data_size: int, manifest: Manifest, run_dir: Path, *, with_config: bool) -> None:
    """Prints the resolved configuration (dry run) and the derived values with their formulas."""
    from pretrain.derived import derived_values

    if with_config:
        print(json.dumps(to_json(config), indent=1))
    if config.description:
        print(config.description)
    rows = derived_values(config, data_size, manifest, str(run_dir))
    width, value_width = (max(len(getattr(row, part)) for row in rows) for part in ("name", "value"))
    for row in rows:
        print(f"  {row.name:<{width}}  {row.value:<{min(value_width, 40)}}  {row.formula}")
    sys.stdout.flush()


def keys_help() -> str:
    """Every configuration key with its type, default and docstring."""
    lines = ["configuration keys (for the file and for --set):", ""]
    heading: tuple[str, type[BaseModel]] | None = None
    for dotted, section, name in fields():
        field = section.model_fields[name]
        if heading != (heading := (dotted.rpartition(".")[0], section)):
            lines += ["", f"{heading[0] or 'top level'}: {' '.join((section.__doc__ or '').split())}"]
        free = "; may change on resume" if field.json_schema_extra == FREE else ""
        lines.append(f"  {dotted} = {_default(section, field)}{free}")
        lines += textwrap.wrap(
            " ".join((field.description or "").split()), 96, initial_indent="      ", subsequent_indent="      "
        )
    return "\n".join(lines)


def _default(section: type[BaseModel], field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    return json.dumps(field.get_default(call_default_factory=True), default=str)
