"""Files that ranks make in the run folder beside a checkpoint's, and who reads them when the run hangs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.scale.figures import Figure
from pretrain.phases import Phases, Record
from pretrain.resilience import collectives
from pretrain.resilience.watchdog import Report, describe, read_reports


def figures(ranks: int) -> list[Figure]:
    identity = {"host": "node-0001", "boot": "0" * 36, "namespace": "pid:[1]", "pid": 1, "start": 1}
    with tempfile.TemporaryDirectory() as folder:
        beats, hang = Path(folder) / "ranks", Path(folder) / "hang"
        beats.mkdir()
        hang.mkdir()
        started = time.process_time()
        for rank in range(ranks):
            phases = Phases()
            phases.keep_in(beats / f"rank-{rank:05d}.phase")
            phases.enter("forward")
            phases.close()
        phase_seconds = time.process_time() - started
        record = Record(0.0, 7, 3, "adding up over ranks")
        for rank in range(1, ranks):
            Report(rank, identity, 600.0, record).write(hang)
        started = time.process_time()
        reports = read_reports(hang)
        silent = [rank for rank in range(ranks) if rank not in reports]
        text = describe(reports, silent, {0: "process 1 on node-0000"}, "a limit of 600 s", hang) if reports else ""
        read_seconds = time.process_time() - started
        for rank in range(1, ranks):
            collectives.write(hang, rank, _groups(rank, ranks))
        started = time.process_time()
        calls = collectives.explain(collectives.read(hang))
        call_seconds = time.process_time() - started
        assert ranks == 1 or any(call.endswith("of rank 0 there is no record") for call in calls)
        assert ranks == 1 or "Did not arrive: rank 0: no sign of life" in text
        phase_bytes = sum(path.stat().st_size for path in beats.iterdir())

    return [
        Figure("ranks/: files while the run goes on", 2 * ranks, "files"),
        Figure("  bytes of phases", phase_bytes, "bytes"),
        Figure("  CPU of a rank to begin one", 1e3 * phase_seconds / ranks, "ms"),
        Figure("hang/: files after a hang", 3 * ranks + 2, "files"),
        Figure("  reports that are read: by one rank", ranks, "files"),
        Figure("  by all, ten times a second, before", ranks * ranks, "files"),
        Figure("  CPU to read and describe them once", 1e3 * read_seconds, "ms"),
        Figure("  CPU to read and compare their collectives", 1e3 * call_seconds, "ms"),
        Figure("slurm/: logs of a job", ranks + 1, "files"),
    ]


def _groups(rank: int, ranks: int) -> list[collectives.Group]:
    """All ranks twice, 8 neighbours, and every 8th rank; of each group as many collectives as a rank writes."""
    first = rank // 8 * 8
    everyone = list(range(ranks))
    groups = {
        "0": everyone,
        "1": everyone,
        f"tensor {first}": everyone[first : first + 8],
        f"data {rank % 8}": everyone[rank % 8 :: 8],
    }
    number = collectives.NEWEST
    calls = [collectives.Call(n, "all_reduce of float [123456]", n < number, n) for n in range(1, number + 1)]
    return [collectives.Group(name, "", members, calls) for name, members in groups.items()]
