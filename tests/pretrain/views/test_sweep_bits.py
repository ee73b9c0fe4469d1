"""A sweep over data of several tokenizers: ranked by what their losses have in common."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from pretrain.views.sweep import Result, loss_name, table, table_csv
from pretrain.views.sweep_means import means_csv, means_latex, summarised
from pretrain.views.sweep_picture import losses_drawn
from tests.pretrain.views.swept import result


def test_runs_of_different_data_are_ranked_by_bits_per_byte(tmp_path: Path) -> None:
    """As those of two tokenizers: the lower loss per token is of shorter tokens. By loss if a run has not recorded
    them."""

    def of_data(value: str, loss: float, bits: float | None, digest: str) -> Result:
        found = result(tmp_path, value, [loss - 0.1], key="data.manifest")
        assert found.view is not None
        events = [{"event": "started", "step": 0, "data_digest": digest * 64}]
        events += [{"event": "validation", "split": "validation", "step": 1, "loss": loss, "bits_per_byte": bits}]
        (found.view.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return Result.read(found.run, tmp_path, None, "")

    results = [of_data("8k", 3.0, 1.5, "a"), of_data("32k", 4.0, 1.4, "b")]
    assert loss_name(results) == "validation bits per byte"
    header, first, second = table(results, ["data.manifest"])
    assert header[4:7] == ["validation bits per byte", "validation", "training"]
    assert first[1] == "32k" and first[4:6] == ["1.4000", "4.0000"] and second[4:6] == ["1.5000", "3.0000"]
    (best, _) = csv.DictReader(io.StringIO(table_csv(results, ["data.manifest"])))
    assert (best["validation_bits_per_byte"], best["validation_loss"]) == ("1.4", "4.0")
    assert losses_drawn(results, ["data.manifest"])
    best_mean, other = summarised(results, ["data.manifest"])
    assert (best_mean.values["data.manifest"], best_mean.losses) == ("32k", [1.4])
    assert other.has_bits
    (row, _) = csv.DictReader(io.StringIO(means_csv([best_mean, other], ["data.manifest"])))
    assert row["validation_bits_per_byte_mean"] == "1.4"
    drawn = means_latex([best_mean, other], ["data.manifest"])
    assert "& bits per byte" in drawn and "& 1.4000" in drawn and "perplexity" not in drawn
    same = [of_data("x", 3.0, 1.5, "a"), of_data("y", 4.0, 1.4, "a")]
    unknown = [results[0], of_data("z", 4.0, None, "b")]
    assert loss_name(same) == loss_name(unknown) == "validation"
