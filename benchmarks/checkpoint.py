r"""What a checkpoint costs, measured: how long training stands still for it, and how much longer it takes with it.

    python -m benchmarks.checkpoint --ranks 1 2 --repeats 5 --keep

On so many ranks of one machine an engine (fp32 master weights and Adam's moments, ZeRO 1, filled with noise) is saved
in turns: by ours, at once and behind the training; by torch.distributed.checkpoint (DCP) with the same tensors, at once
and by async_save; by DeepSpeed's save_checkpoint. Every save is of the whole state, into an empty folder on the disk of
--folder. One save of each, which does not count, comes first.

stall   seconds of the call, while nothing is trained
commit  seconds until the method says that all is written. Ours and DCP flush their files; ours hashes them too
disk    seconds until the system has brought all to the disk (commit, and sync): DeepSpeed flushes nothing itself
lost    what training loses: seconds of some steps with a save beside them, less those of as many steps without one,
        just before. It holds the stall, and what a save behind takes from the steps
shares  of the stall, and of what is lost, in the time of --every steps with one save
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.marked import markdown
from benchmarks.pictures import Bar, draw_bars
from benchmarks.rounds import ratio
from common.errors import UserError
from common.paths import REPOSITORY
from common.tables import text_table

HEADER = [
    *("ranks", "saved by", "stall s", "commit s", "disk s", "stall share", "lost s", "lost share", "files MB"),
    "stall of ours, behind, over it",
]
OURS = "ours, behind"


def run(ranks: int, repeats: int, folder: Path | None) -> dict[str, Any]:
    """What `ranks` processes measured. Raises UserError with the end of what they said if they failed."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "found.json"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        line += ["-m", "benchmarks.checkpoint_run", "--repeats", str(repeats), "--json", str(target)]
        line += [] if folder is None else ["--folder", str(folder.resolve())]
        done = subprocess.run(line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise UserError(f"--ranks {ranks}: no measurement; the end of what the ranks said:\n{done.stdout[-2000:]}")
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return found


def step_seconds(job: Any) -> float:
    """Of a step without a save."""
    plain = [save["plain"] for saves in job["saves"].values() for save in saves]
    return statistics.median(plain) / int(job["steps_beside"])


def stalls(saves: Sequence[Any]) -> list[float]:
    return [save["stall"] for save in saves]


def lost(saves: Sequence[Any]) -> float:
    """Seconds, the median."""
    return statistics.median(save["beside"] - save["plain"] for save in saves)


def share(seconds: float, job: Any, every: int) -> str:
    """Of `seconds` in the time of `every` steps and a save; "-" where steps scatter by more than a save costs."""
    return f"{seconds / (every * step_seconds(job) + seconds):.2%}" if seconds > 0 else "-"


def rows(found: Any) -> list[list[str]]:
    """A line for each number of ranks and method."""
    lines = []
    for ranks, job in found["ranks"].items():
        for name, saves in job["saves"].items():
            stall, commit = (statistics.median(save[key] for save in saves) for key in ("stall", "commit"))
            disk = statistics.median(save["commit"] + save["flush"] for save in saves)
            over, costs = ratio(stalls(job["saves"][OURS]), stalls(saves)), lost(saves)
            lines.append(
                [
                    *(ranks, name, f"{stall:.3f}", f"{commit:.2f}", f"{disk:.2f}"),
                    *(share(stall, job, found["every"]), f"{costs:.2f}", share(costs, job, found["every"])),
                    *(f"{saves[-1]['files'] / 1e6:.0f}", f"{over:.3f}"),
                ]
            )
    return lines


def remarks(found: Any) -> str:
    """Of what state and with which steps."""
    jobs = found["ranks"]
    state = next(iter(jobs.values()))
    steps = " and ".join(f"{step_seconds(job):.2f} s on {in_words(ranks)}" for ranks, job in jobs.items())
    return (
        f"{state['parameters']:,} parameters, whose state is {state['state_bytes'] / 1e6:.0f} MB in fp32; medians of "
        f"{found['repeats']} saves. Shares are of training with a save every {found['every']} steps; a step takes "
        f"{steps}."
    )


def in_words(ranks: str) -> str:
    return f"{ranks} rank{'s' * (ranks != '1')}"


def page(found: Any) -> str:
    """The table of docs/benchmarks.md."""
    return f"{markdown(HEADER, rows(found))}\n\n{remarks(found)}"


def draw(found: Any, path: Path) -> None:
    """PNG: the stall of each method, and that of ours, behind, over it; a panel for each number of ranks."""
    panels = {}
    for ranks, job in found["ranks"].items():
        bars = []
        for name, saves in job["saves"].items():
            stall, over = statistics.median(stalls(saves)), ratio(stalls(saves), stalls(job["saves"][OURS]))
            bars.append(Bar(name, stall, f"{stall:.2f} s" + ("" if name == OURS else f" ({over:.1f} times)")))
        panels[f"{in_words(ranks)} (times {OURS})"] = bars
    draw_bars(panels, "seconds that training stands still", path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 and 2")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="saves of each kind (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=100, metavar="N", help="steps from save to save (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    records.add_option(parser)
    args = parser.parse_args(arguments)
    if min(*args.ranks, args.repeats, args.every, 8) < 1 or any(8 % ranks for ranks in args.ranks):
        parser.error("--ranks must divide 8, the sequences of a step; --repeats and --every must be at least 1")
    about = records.machine()
    try:
        jobs = {str(ranks): run(ranks, args.repeats, args.folder) for ranks in args.ranks}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {"ranks": jobs, "repeats": args.repeats, "every": args.every}
    text = f"{text_table(HEADER, rows(found), left={1})}\n{remarks(found)}"
    records.show(args.keep, "checkpoint-stall", about, found, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
