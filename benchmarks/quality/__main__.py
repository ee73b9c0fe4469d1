r"""Quality of the models at a size that a CPU affords: tuned alike, trained on the same tokens, compared by perplexity.

    python -m data_prep run --config configs/data/c4.json            # or --set input=... for other text: 20 MB at least
    python -m benchmarks.quality run --data data/c4/manifest.json --results runs/quality-c4   # hours; again: goes on
    python -m benchmarks.quality table --results runs/quality-c4     # at any time; also writes the picture

Runs of 2 million tokens choose a learning rate for each model: three, and further ones while the best is the highest or
the lowest that was tried. Twelve runs of 8 million tokens are compared. They are trained by launch/pretrain.py, with
checkpoints: Ctrl-C loses at most 100 steps. One at a time, or --jobs of them. Of each, the metrics are kept in
--results, and its run folder can be removed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.marked import rewrite
from benchmarks.quality.plan import Training, missing
from benchmarks.quality.records import RESULTS, SHIPPED, check_data, keep, read_records, record_of
from benchmarks.quality.table import page, picture, report
from common.arguments import add_overrides, set_options
from common.errors import DataError, UserError
from common.paths import REPOSITORY
from pretrain.report.exit_codes import ExitCode


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="run: manifest of the prepared text, 8,000 pieces")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="run folders (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="metrics of finished runs (default: ours)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the runs (default: %(default)s)")
    add_overrides(parser, "run: of every run; repeatable")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run: so many at a time (default: 1)")
    parser.add_argument(
        "--most", type=int, default=sys.maxsize, metavar="N", help="run: stop after N runs (default: none)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        help="table: the PNG that it writes (default: quality.png in --results; of ours, in docs/pictures)",
    )
    parser.add_argument("--page", type=Path, help="table: also the page that has it between its marks")
    args = parser.parse_args()
    try:
        if args.what == "table":
            if not args.results.is_dir():
                raise DataError(f"--results: there is no folder {args.results}; `run` with it makes it")
            records = read_records(args.results)
            print(report(records))
            shown = SHIPPED.get(args.results.resolve(), SHIPPED[RESULTS]._replace(picture=args.results / "quality.png"))
            picture(records, args.picture or shown.picture)
            if args.page is not None:
                rewrite(args.page, lambda text: page(text, records, shown.mark), "--page")
            return 0
        if args.data is None:
            raise DataError("--data: name the manifest.json of the prepared text")
        settings = [f"train.device={args.device}", *args.overrides]
        return run(args.data, args.runs, args.results, args.most, args.jobs, settings)
    except (UserError, OSError) as error:  # of the system its own words, which name the file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(data: Path, runs: Path, results: Path, most: int, jobs: int, settings: Sequence[str]) -> int:
    """Trains what has no record yet. Returns the exit code: that of the first run that did not end, after which those
    that run are awaited and no other begins. Raises DataError."""
    check_data(data, results)
    code, begun, running = 0, 0, dict[Future[tuple[int, Path]], Training]()
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        while True:
            losses = {record.name: record.last_loss for record in read_records(results)}
            for training in missing(losses):
                if code == 0 and begun < most and len(running) < max(1, jobs) and training not in running.values():
                    print(f"== {training.name}, {len(losses)} runs have a result", flush=True)
                    log = runs / f"{training.name}.log" if jobs > 1 else None
                    running[pool.submit(train, training, data, runs, settings, log)] = training
                    begun += 1
            if not running:
                return code
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                training = running.pop(future)
                ended, folder = future.result()
                if ended in (0, ExitCode.DIVERGED):
                    keep(record_of(training, folder, data, diverged=ended != 0), results)
                    continue
                print(f"error: {training.name} ended with exit code {ended}; the same command goes on", file=sys.stderr)
                code = code or ended


def train(
    training: Training, data: Path, runs: Path, settings: Sequence[str], log: Path | None = None
) -> tuple[int, Path]:
    """-> exit code and run folder. What exists is continued. `log`: where it says what it does, if not here."""
    folder = runs / training.name
    command = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(training.config)]
    command += ["--run-dir", str(folder), "--set", f"data.manifest={data}"]
    command += set_options([*training.overrides, *settings])
    environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if "train.device=cpu" in settings else {})
    if log is None:
        return subprocess.run(command, env=environment, check=False).returncode, folder
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as to:
        return subprocess.run(command, env=environment, check=False, stdout=to, stderr=to).returncode, folder


if __name__ == "__main__":
    sys.exit(main())
