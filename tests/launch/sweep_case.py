"""A sweep whose runs train nothing: a program takes the place of a training."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from launch.sweeps.command import main
from pretrain.config.loading import to_json
from tests.pretrain.runs import small_config

RATE = "optimizer.learning_rate"
VARY = ("--vary", f"{RATE}=1e-3,2e-3")
FAKE = """
import json, pathlib, signal, sys, time
own, arguments = pathlib.Path(__file__).parent, sys.argv[2:]
folder = pathlib.Path(arguments[arguments.index("--run-dir") + 1])
rate = [a for a in arguments if a.startswith("optimizer.learning_rate=")][-1].partition("=")[2]
with (own / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
code = json.loads((own / "codes.json").read_text()).get(rate, 0)
print("trains", rate, flush=True)
if code == 2:
    sys.exit(2)
if code == "is killed":
    signal.raise_signal(signal.SIGKILL)
if code == "waits":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: (own / "got").write_text(str(number)))
    (own / "waits").touch()
    while not (own / "got").exists():  # no signal.pause(): the signal may come before it
        time.sleep(0.01)
    code = 85
folder.mkdir(exist_ok=True)
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "config.json").write_text('{"train": {"steps": 2}}')
rows = [{"step": n, "loss": 9 - n + float(rate), "tokens": n, "tokens_per_second": 5} for n in (1, 2)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
validation = json.dumps({"event": "validation", "step": 2, "loss": float(rate)}) + "\\n"
(folder / "events.jsonl").write_text("" if "evaluate.sequences=0" in arguments else validation)
(folder / "outcome.json").write_text(json.dumps({"exit_code": code, "time": time.time()}))
sys.exit(1 if code else 0)  # as deepspeed, which may return another code
"""
"""Trains nothing, and ends as codes.json beside it says: rate -> exit code, `is killed`, or `waits` for a signal."""


class Case:
    """A sweep whose runs are FAKE's."""

    def __init__(self, folder: Path, prepared: Path) -> None:
        self.folder, self.dir = folder, folder / "sweep"
        self.config = folder / "x.json"
        self.config.write_text(json.dumps(to_json(small_config(prepared))))
        (folder / "fake.py").write_text(FAKE)
        self.launcher = shlex.join([sys.executable, str(folder / "fake.py")])
        self.ends()

    def ends(self, **codes: int | str) -> None:
        (self.folder / "codes.json").write_text(json.dumps({name.replace("_", "-"): c for name, c in codes.items()}))

    def line(self, *more: str) -> list[str]:
        return ["--config", str(self.config), "--sweep-dir", str(self.dir), *more]

    def run(self, *more: str) -> int:
        return main(self.line("--launcher", self.launcher, *more))

    @property
    def trained(self) -> list[str]:
        """Rates of all starts so far."""
        path = self.folder / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line[-1].partition("=")[2] for line in lines]
