"""What benchmarks.monitoring makes of its times, and what it refuses in a sentence."""

from __future__ import annotations

import pytest

from benchmarks.monitoring import main, report


def test_ratios_are_those_of_a_round_and_details_are_spread_over_their_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Blocks of 10 steps on a machine that was twice as slow in the second round; details in one step of 100."""
    seconds = {"off": [1.0, 2.0, 1.0], "curves": [1.1, 2.2, 1.1], "details": [1.5, 3.0, 1.5]}
    ratios = report("worked", seconds, 10, 100)
    assert ratios == pytest.approx({"off": 1.0, "curves": 1.1, "details": 1.5, "all": 1.1 + 0.4 / 10})
    assert "monitored / not monitored, details every 100 steps: 1.1400" in capsys.readouterr().out
    assert report("worked", seconds, 10, 0)["all"] == pytest.approx(1.1)


def test_what_is_wrong_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for setting, words in (("train.stepz=1", "unknown key"), ("data.manifest=nowhere", "data.manifest: there is no")):
        assert main(["--set", setting]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
