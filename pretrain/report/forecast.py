"""The estimate of a run, made while it starts: by a process of its own, at the lowest priority, so that no step waits
for it, and because it changes defaults of torch that the run must not see changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from common.paths import REPOSITORY
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.ranks import Ranks
from pretrain.report.estimate import RunEstimate

COMMAND = (sys.executable, "-P", "-m", "pretrain.cli.forecast")
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that would make the process a rank of the run."""


class Forecast:
    """On rank 0. A process that fails costs the estimate, not the run."""

    def __init__(self, config: Config, ranks: Ranks, command: Sequence[str] = COMMAND) -> None:
        """Starts the process. `command` reads {config, ranks, ranks_per_node} and prints what RunEstimate.to_json
        gives."""
        environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
        environment["OMP_NUM_THREADS"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C and a launcher's signals are for the run, which ends this process
            )
            assert self._process.stdin is not None
            with self._process.stdin as given:  # some KB: a pipe holds them, and nobody waits
                sizes = {"ranks": ranks.world_size, "ranks_per_node": ranks.local_size}
                json.dump({"config": to_json(config), **sizes}, given)
        except OSError:  # no memory for a process, or it has ended already
            self.close()

    def take(self) -> RunEstimate | None:
        """The estimate, once, when it is there. Waits for nothing."""
        process = self._process
        if process is None or process.poll() is None:
            return None
        self._process = None
        assert process.stdout is not None
        with process.stdout as printed:
            try:
                return RunEstimate.from_json(json.loads(printed.read()))
            except (ValueError, KeyError, TypeError):
                return None

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
