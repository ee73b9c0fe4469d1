r"""Quality of the models at a size that a CPU affords: tuned alike, trained on the same tokens, compared by perplexity.

    python -m data_prep run --config configs/data/c4.json            # or --set input=... for other text: 20 MB at least
    python -m benchmarks.quality run --data data/c4/manifest.json    # many hours; again: goes on where it was
    python -m benchmarks.quality table                               # at any time; also writes the picture

Fifteen runs of 2 million tokens choose a learning rate for each model, twelve of 8 million are compared. One is trained
at a time, by launch/pretrain.py, with checkpoints: Ctrl-C loses at most 100 steps. Of each, the metrics are kept in
--results, and its run folder can be removed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.quality.plan import Training, next_training
from benchmarks.quality.records import RESULTS, keep, read_records, record_of
from benchmarks.quality.table import picture, table
from common.errors import DataError, UserError
from common.paths import REPOSITORY
from pretrain.report.exit_codes import ExitCode

PICTURE = REPOSITORY / "docs" / "pictures" / "quality.png"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="run: manifest of the prepared text, 8,000 pieces")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="run folders (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="metrics of finished runs")
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="run: stop after N runs")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="table: the PNG that it writes")
    args = parser.parse_args()
    try:
        if args.what == "table":
            records = read_records(args.results)
            print(table(records))
            picture(records, args.picture)
            return 0
        if args.data is None:
            raise DataError("--data: name the manifest.json of the prepared text")
        return run(args.data, args.runs, args.results, args.most)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(data: Path, runs: Path, results: Path, most: int) -> int:
    """Trains what has no record yet. Returns the exit code: that of a run that did not end."""
    for _ in range(most):
        losses = {record.name: record.last_loss for record in read_records(results)}
        training = next_training(losses)
        if training is None:
            break
        print(f"== {training.name}, {len(losses)} of 27 runs have a result", flush=True)
        code, folder = train(training, data, runs)
        if code not in (0, ExitCode.DIVERGED):
            print(f"error: {training.name} ended with exit code {code}; the same command goes on", file=sys.stderr)
            return code
        keep(record_of(training, folder, data, diverged=code != 0), results)
    return 0


def train(training: Training, data: Path, runs: Path) -> tuple[int, Path]:
    """-> exit code and run folder. What exists is continued."""
    folder = runs / training.name
    command = [sys.executable, str(REPOSITORY / "launch" / "pretrain.py"), "--config", str(training.config)]
    command += ["--run-dir", str(folder), "--set", f"data.manifest={data}"]
    command += [part for override in training.overrides for part in ("--set", override)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, env=environment, check=False).returncode, folder


if __name__ == "__main__":
    sys.exit(main())
