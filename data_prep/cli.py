"""The command line: `python -m data_prep run|ingest|filter|dedup|tokenizer|encode|shard|verify|stats|show`.

Results go to stdout, progress to stderr. A user's mistake prints one line, `error: ...`, and exits with 2; what may
pass (a lost connection, a full disk, a worker killed for memory) exits with 1, after which SLURM starts a task again.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from common.arguments import Parser, a_path, add_overrides, at_least
from common.errors import SCARCE, DataError, PassingError, UserError, kind_of
from common.folders import check_folder, is_full, no_room
from common.splits import SPLITS
from common.tables import counted
from common.terminal import prepare_streams, reader_may_leave, spare_stdout, visible
from common.urls import without_secrets
from data_prep.config.loading import describe_keys, load_config
from data_prep.config.resolved import ResolvedConfig, output_folder, resolve
from data_prep.report import show
from data_prep.report.stats import REPORT_FOLDER, write_report
from data_prep.run.disk_estimate import WHAT, check_room, fullest, needed_bytes, used_bytes
from data_prep.run.output_files import (
    QUARANTINE_FILE,
    check_manifest_is_own,
    check_output,
    output_lock,
    remove_work,
)
from data_prep.run.pipeline import Pipeline
from data_prep.run.preparation import Preparation, Slice
from data_prep.run.up_to_date import (
    check_tokenizer,
    difference,
    is_up_to_date,
    name_changed_files,
    stamps,
    write_run_record,
)
from data_prep.shards.format import TOKENIZER_FILE, Manifest
from data_prep.stages.lossy import check_given_model
from data_prep.work.folder import WORK
from data_prep.work.parallel import worker_pool

PASSING_ERROR = 1
USER_ERROR = 2
INTERRUPTED = 130


@spare_stdout()
def _steps_command(arguments: argparse.Namespace) -> None:
    """`run` and its steps: each step first does what the steps before it have not done yet."""
    resolved = _resolved(arguments)
    slice = _slice(arguments)
    command = "shard" if arguments.command == "run" else arguments.command
    if losses := check_given_model(resolved):
        print(f"warning: {losses} (tokenizer.allow_lossy)", file=sys.stderr)
    check_folder(resolved.output, "output")
    check_manifest_is_own(resolved.output, force=arguments.force)
    if resolved.unread:
        files = len(resolved.sources), resolved.config.max_input_files, resolved.unread
        print("reading {} raw files, {} of `input` (max_input_files), not its {} others".format(*files))
    if is_up_to_date(resolved, force=arguments.force):
        print(f"up to date: {resolved.output}")
        if command == "shard" and any(resolved.output.glob(f"{WORK}*")):
            with contextlib.suppress(DataError), output_lock(resolved.output, shared=False):
                remove_work(resolved)  # left by a run that was killed after its data were in place
        return
    check_output(resolved, force=arguments.force)
    check_room(resolved)
    if command == "tokenizer" and not resolved.config.tokenizer.has_file:
        print(f"nothing to do: tokenizer.type {resolved.config.tokenizer.type} has no model; go on with `shard`")
        return
    with (
        _full_disk_named(resolved),
        output_lock(resolved.output, shared=not slice.is_all),
        worker_pool(resolved.workers) as workers,
    ):
        if is_up_to_date(resolved, force=arguments.force):  # which another preparation has made since the first look
            print(f"up to date: {resolved.output}")
            return
        takes_published = arguments.command in ("encode", "shard")
        if takes_published:
            check_tokenizer(resolved)
        seen = stamps(resolved)
        preparation = Preparation(resolved, slice, takes_published)
        pipeline = Pipeline(preparation, workers, force=arguments.force)
        pipeline.run(until=command)
        if command in ("shard", "tokenizer"):
            write_run_record(resolved, config_path=arguments.config, seconds=pipeline.seconds, seen=seen)
        if command == "shard":
            remove_work(resolved)
            name_changed_files(resolved, seen)
    took = ", ".join(f"{step} {value:.1f} s" for step, value in pipeline.seconds.items())
    if command == "shard":
        _print_result(preparation, took)
    elif command == "tokenizer":
        print(f"wrote {resolved.output / TOKENIZER_FILE} ({took})")
    else:
        show.found_so_far(preparation)
        print(f"\n{command} is done ({took})")
        show.bad_files(preparation)


@contextlib.contextmanager
def _full_disk_named(resolved: ResolvedConfig) -> Iterator[None]:
    """Turns the error of a full disk, which names neither disk nor bytes, into a PassingError that names both."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        needed = max(1, needed_bytes(resolved) - used_bytes(resolved.work))
        sentence = no_room(fullest(resolved), needed, WHAT, about=True)
        raise PassingError(f"output: {sentence}; make room: the same command goes on where it was") from None


def _print_result(preparation: Preparation, took: str) -> None:
    resolved = preparation.resolved
    manifest = Manifest.load(resolved.output)
    show.stats(manifest)
    show.dropped(manifest)
    print(f"\nwrote {resolved.output / 'manifest.json'}, digest {manifest.digest[:12]} ({took})")
    show.empty_splits(manifest, resolved.config)
    quarantined = manifest.provenance.dropped.get("quarantined")
    if quarantined:
        print(f"warning: records were quarantined, see {resolved.output / QUARANTINE_FILE}", file=sys.stderr)
    show.bad_files(preparation)


def _slice(arguments: argparse.Namespace) -> Slice:
    task, tasks = getattr(arguments, "task", None), getattr(arguments, "tasks", None)
    if (task is None) != (tasks is None):
        raise DataError(
            "--task and --tasks go together, e.g. --task $SLURM_ARRAY_TASK_ID --tasks $SLURM_ARRAY_TASK_COUNT"
        )
    if task is None or tasks is None:
        return Slice()
    if task >= tasks:
        raise DataError(f"--task {task} is not below --tasks {tasks}; array tasks count from 0")
    return Slice(task=task, tasks=tasks)


def _resolved(arguments: argparse.Namespace) -> ResolvedConfig:
    return resolve(load_config(arguments.config, arguments.overrides))


def _manifest(arguments: argparse.Namespace) -> Manifest:
    """The manifest that a reading command is about: FOLDER, or the output of --config."""
    if (arguments.folder is None) == (arguments.config is None):
        raise DataError(f"{arguments.command} needs either the FOLDER of prepared data or --config CONFIG")
    folder = arguments.folder or output_folder(load_config(arguments.config, arguments.overrides))
    return Manifest.load(folder)


def _verify_command(arguments: argparse.Namespace) -> None:
    show.verify(_manifest(arguments))
    if arguments.config is not None:
        try:
            resolved = _resolved(arguments)
        except UserError as error:
            print(f"raw files not checked: {error}")
            return
        changed = difference(resolved, Manifest.load(resolved.output), hash_all=True)
        if changed:
            raise DataError(f"{resolved.output} is not what {arguments.config} makes: {changed}")
        print(f"raw files and settings of {arguments.config}: ok, {counted(len(resolved.sources), 'file')}")


def _stats_command(arguments: argparse.Namespace) -> None:
    manifest = _manifest(arguments)
    show.stats(manifest)
    show.dropped(manifest)
    manifest.check("size")
    path = write_report(manifest, arguments.out or manifest.folder / REPORT_FOLDER)
    print(f"\nwrote {path} and its plots")


def _show_command(arguments: argparse.Namespace) -> None:
    show.show(_manifest(arguments), split=arguments.split, index=arguments.index, count=arguments.count)


def _add_config(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "--config", type=a_path, required=required, metavar="FILE", help="JSON config, see configs/data/"
    )
    add_overrides(command, "override a key, e.g. tokenizer.vocab_size=4000")


def _add_step(command: argparse.ArgumentParser) -> None:
    """The arguments of `run` and its steps, which write."""
    _add_config(command, required=True)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = f"keys of the config:\n{describe_keys()}"
    command.add_argument(
        "--force",
        action="store_true",
        help="rebuild although the output holds other data, and replace files in the way that no preparation made",
    )


def _add_slice(command: argparse.ArgumentParser) -> None:
    """The arguments of the steps that SLURM array tasks share."""
    help_text = (
        "take only every N-th raw file (or batch of small ones), from the K-th (0 to N - 1): one array task; see "
        "docs/data.md"
    )
    command.add_argument("--task", type=at_least(0), metavar="K", help=help_text)
    command.add_argument("--tasks", type=at_least(1), metavar="N", help="number of array tasks")


def _add_reader(command: argparse.ArgumentParser) -> None:
    """The arguments of `verify`, `show` and `stats`, which read."""
    command.add_argument("folder", nargs="?", type=a_path, metavar="FOLDER", help="prepared data (or use --config)")
    _add_config(command, required=False)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m data_prep",
        description="Turns raw C4, peS2o, Wikitext-103, Enwik8, JSON lines, Parquet, webdataset tars and text into a "
        "SentencePiece model and webdataset shards, and token ids of Megatron-LM or plain arrays into shards.",
        epilog="Example: python -m data_prep run --config configs/data/sample.json --set workers=4",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, handler: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(handler=handler)
        return command

    _add_step(add("run", _steps_command, "all steps in one go; nothing if the output is up to date"))
    for name, text, sliced in (
        ("ingest", "read the raw files, quarantine what is damaged", True),
        ("filter", "ingest, then apply the filters", True),
        ("dedup", "filter, then find duplicates (with --task: sign the documents of some files)", True),
        ("tokenizer", "all steps before, then train (or copy) the SentencePiece model into the output", False),
        ("encode", "tokenise with the model that `tokenizer` left in the output", True),
        ("shard", "encode what is left, write shards and manifest", False),
    ):
        step = add(name, _steps_command, text)
        _add_step(step)
        if sliced:
            _add_slice(step)
    _add_reader(
        add(
            "verify", _verify_command, "check every size, sha256 and end of document (with --config also the raw files)"
        )
    )
    stats = add("stats", _stats_command, "print documents, tokens, bytes and lengths; write a report with plots")
    _add_reader(stats)
    stats.add_argument("--out", type=a_path, metavar="DIR", help="folder of the report (default: FOLDER/report)")
    show = add("show", _show_command, "print documents, decoded from the shards")
    _add_reader(show)
    show.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    show.add_argument("--index", type=at_least(0), default=0, help="first document, from 0 (default: 0)")
    show.add_argument("--count", type=at_least(1), default=1, help="number of documents (default: 1)")
    return parser


def _one_line(error: Exception) -> str:
    """The error as one line, whatever names and messages of other programs it contains."""
    return visible(f"error: {without_secrets(' '.join(str(error).split()))}")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = _build_parser().parse_args(argv)
    prepare_streams()
    try:
        with reader_may_leave():
            arguments.handler(arguments)
    except UserError as error:
        print(_one_line(error), file=sys.stderr)
        return PASSING_ERROR if isinstance(error, PassingError) else USER_ERROR
    except OSError as error:  # disk full, no permission: the system's own words name the file
        print(_one_line(error), file=sys.stderr)
        is_short = error.errno in SCARCE or is_full(error)  # of memory to start a process, on a node of many
        return PASSING_ERROR if is_short or kind_of(error) is PassingError else USER_ERROR
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it was" if arguments.handler is _steps_command else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return INTERRUPTED
    return 0
