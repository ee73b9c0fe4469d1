"""`python -m tests.slurm.cluster`: what it says of itself, without SLURM."""

from __future__ import annotations

import pytest

from tests.slurm import cluster


def test_help_starts_no_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cluster, "Cluster", lambda: pytest.fail("a cluster"))
    for options, code in ((["--help"], 0), (["--nodes", "3"], 2)):
        monkeypatch.setattr("sys.argv", ["cluster", *options])
        with pytest.raises(SystemExit) as stop:
            cluster.main()
        assert stop.value.code == code
    assert "usage: python -m tests.slurm.cluster" in capsys.readouterr().out
