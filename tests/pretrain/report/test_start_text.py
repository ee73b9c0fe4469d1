"""What a run says of itself at its start: the model that is trained, and what the data are too small for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.config import MoAConfig, SigmaMoEConfig
from pretrain.cli.train import print_derived
from pretrain.config.loading import load_config, to_json
from pretrain.data.sources import Sources
from pretrain.data.warnings import data_warnings, epoch_warnings
from pretrain.report.model_text import model_family, model_text
from tests.corpus import VOCAB_SIZE
from tests.pretrain.runs import MOA, small_config

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "configs" / "switchall_tiny.json"


def test_a_changed_model_is_described_as_it_is(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.attention.type=dense", "train.steps=7", "monitor.print_every_steps=1"]
    config = load_config(TINY, [*overrides, f"data.manifest={prepared}"])
    print_derived(config, 1, Sources.load(config), prepared / "run")
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == "switchall_tiny.json with other values of data.manifest, model.attention.type, train.steps"
    (row,) = [row.split(maxsplit=1)[1] for row in rows if row.startswith("  model ")]
    assert row.startswith("sigma-MoE") and "dense attention: 8 heads of 64; sigma-MoE: 4 of 16 experts of 64" in row
    assert to_json(config)["description"] == first
    (windows,) = (int(row.split()[3].replace(",", "")) for row in rows if row.startswith("  windows per epoch "))
    (epochs,) = (row.split()[1] for row in rows if row.startswith("  epochs "))
    assert epochs == f"{7 * config.batch.global_sequences / windows:.2f}" and not float(epochs).is_integer()


def test_packages_of_other_versions_are_told(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared)
    monkeypatch.setattr("pretrain.cli.train.misfits", lambda: ["torch is another"])
    print_derived(config, 1, Sources.load(config), prepared / "run")
    assert "warning: torch is another" in capsys.readouterr().out.splitlines()


def test_a_loss_that_depends_on_the_layout_is_told(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of regularisers that are summed over a micro-step, on all ranks; none of weight 0, none of the global batch."""
    entropy = "model.feedforward.entropy_scope=micro_batch"
    moa = MOA.replace('"moa"', '"moa", "loss_scope": "micro_batch", "switch_loss_weight": 0.01')
    told: dict[tuple[str, ...], list[str]] = {
        (entropy, "model.feedforward.entropy_weight=0.1"): ["feedforward.entropy_scope"],
        (entropy, "model.feedforward.entropy_weight=0"): [],
        ("model.feedforward.entropy_weight=0.1",): [],
        (moa, entropy, "model.feedforward.entropy_weight=0.1"): ["feedforward.entropy_scope", "attention.loss_scope"],
    }
    for overrides, keys in told.items():
        config = small_config(prepared, "batch.micro_sequences=2", "batch.global_sequences=8", *overrides)
        print_derived(config, 2, Sources.load(config), prepared / "run")
        rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines() if "regulariser" in row]
        begin = "a regulariser's batch 4 of 8 sequences micro_sequences x DP; another product is another loss"
        assert rows == [f"{begin} (model.{key} = micro_batch)" for key in keys]


def test_a_start_says_that_no_loss_keeps_experts_in_use(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one row, with the keys and what the project's configurations have; not where settings say that it is meant."""
    swapped = "model.feedforward.type=sigma_moe"
    feedforward = "model.feedforward.entropy_weight is not set (0.0001 to 0.001 in configs/paper)"
    attention = "model.attention.z_loss_weight and switch_loss_weight are not set (0.001 and 0.01 in configs/paper)"
    told: dict[tuple[str, ...], str] = {
        (): feedforward,
        ("model.attention.type=moa",): f"{attention}; {feedforward}",
        ("model.attention.type=moa", "model.feedforward.entropy_weight=0.001"): attention,
        ("model.feedforward.entropy_weight=0",): "",
        ("model.feedforward.expert_dropout=0.05",): "",
        ("model.feedforward.num_experts=4",): "",  # every token takes all
        ("model.attention.type=moa", "model.attention.cv_loss_weight=0.1", "model.feedforward.type=dense"): "",
        ("model.attention.type=moa", "model.attention.router=sigmoid", "model.feedforward.type=dense"): "",
    }
    dense = ROOT / "configs" / "quality" / "dense.json"
    for overrides, words in told.items():
        config = load_config(dense, [f"data.manifest={prepared}", "model.vocab_size=400", swapped, *overrides])
        print_derived(config, 1, Sources.load(config), prepared / "run")
        rows = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines() if "experts kept" in row]
        assert rows == [f"experts kept in use by no loss {words}"] * bool(words), overrides


def test_the_weights_that_a_start_names_are_those_of_the_configurations() -> None:
    models = [load_config(path).model for path in sorted((ROOT / "configs" / "paper").glob("*.json"))]
    moa = [model.attention for model in models if isinstance(model.attention, MoAConfig)]
    sigma_moe = [model.feedforward for model in models if isinstance(model.feedforward, SigmaMoEConfig)]
    assert {(layer.z_loss_weight, layer.switch_loss_weight) for layer in moa} == {(0.001, 0.01)}
    assert {layer.entropy_weight for layer in sigma_moe} - {0.0} == {0.0001, 0.001}


@pytest.mark.parametrize("name_of_copy", ["config.json", "config-5f0c7a9be1d2.json"])
def test_the_description_of_a_run_keeps_what_it_began_with(tmp_path: Path, name_of_copy: str) -> None:
    """However often it is continued with --set: the name of its own configuration says nothing, nor that of a job's
    copy."""
    saved = tmp_path / name_of_copy
    for begun, name in ((["train.seed=3"], "switchall_tiny.json"), ([], load_config(TINY).description.rstrip("."))):
        saved.write_text(json.dumps(to_json(load_config(TINY, begun))))
        for override in ("train.stop_after_steps=7", "train.stop_after_steps=9", "evaluate.sequences=8"):
            saved.write_text(json.dumps(to_json(load_config(saved, [override]))))
        keys = ["evaluate.sequences", *(["train.seed"] if begun else []), "train.stop_after_steps"]
        assert load_config(saved).description == f"{name} with other values of {', '.join(keys)}"
    saved.write_text(json.dumps({**to_json(load_config(TINY)), "description": ""}))
    assert load_config(saved, ["train.seed=3"]).description == ""


def test_a_description_stays_where_nothing_that_it_speaks_of_changed() -> None:
    plain = load_config(TINY)
    assert load_config(TINY, ["monitor.tensorboard=false", "checkpoint.keep_last=2"]).description == plain.description
    assert load_config(TINY, ["train.seed=3", "description=mine"]).description == "mine"


@pytest.mark.parametrize(
    "overrides, family, text",
    [
        ((), "SwitchAll", "2 x (SwitchHead: 2 heads of 6, 2 of 3 experts; sigma-MoE: 2 of 5 experts of 7), d_model 24"),
        ((MOA,), "MoA with sigma-MoE", "MoA: 2 of 5 heads of 6"),
        (('model.feedforward={"type": "swiglu", "hidden_size": 22}',), "SwitchHead", "SwiGLU feed-forward: 22"),
        (("model.position.type=xl",), "SwitchAll", "Transformer-XL positions, 16 tokens of context and 16 of memory"),
        (
            (
                'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}',
                'model.feedforward={"type": "dense", "hidden_size": 22}',
            ),
            "dense",
            "dense feed-forward: 22",
        ),
    ],
)
def test_models_in_a_line(prepared: Path, overrides: tuple[str, ...], family: str, text: str) -> None:
    model = small_config(prepared, *overrides).model
    assert model_family(model) == family
    assert text in model_text(model)


def test_more_than_four_epochs_are_warned_of_with_the_tokens_needed(prepared: Path) -> None:
    # 82,094 tokens are 5,130 windows of 16; 8 sequences a step read them 4 times in 2,565 steps.
    assert not data_warnings(small_config(prepared, "train.steps=2565"), Sources.load(small_config(prepared)))
    config = small_config(prepared, "train.steps=5130")
    (warning,) = data_warnings(config, Sources.load(config))
    assert warning.startswith("data.manifest: the run reads the 82,080 tokens of ") and " 8.0 times" in warning
    assert "prepare 164,160 tokens, or set train.steps to at most 2565" in warning
    few = small_config(prepared, "train.steps=100", "data.max_tokens=1600")  # 800 windows of 100
    (warning, *_) = data_warnings(few, Sources.load(few))
    assert warning.startswith("data.manifest: the run reads the first 1,600 tokens of ") and " 8.0 times" in warning
    assert "prepare 3,200 tokens and raise data.max_tokens, or set train.steps to at most 50" in warning


def test_the_steps_that_are_few_enough_count_what_was_read_before(prepared: Path) -> None:
    """Of a run that goes on after 1,283 of 5,130 steps, in which it has read 10,264 of 5,130 windows."""
    config = small_config(prepared, "train.steps=5130")
    (warning,) = epoch_warnings(config, Sources.load(config), [41_040], [10_264])
    assert "set train.steps to at most 2565" in warning
    (warning,) = epoch_warnings(config, Sources.load(config), [41_040], [20_528])  # four epochs are over
    assert "train.steps" not in warning


def test_vocabulary_that_is_never_trained_is_warned_of(prepared: Path) -> None:
    fits = small_config(prepared, f"model.vocab_size={VOCAB_SIZE + 112}")  # the next multiple of 128
    assert not data_warnings(fits, Sources.load(fits))
    for rows, warned in ((VOCAB_SIZE + 127, False), (VOCAB_SIZE + 128, True)):
        config = small_config(prepared, f"model.vocab_size={rows}")
        assert len(data_warnings(config, Sources.load(config))) == warned
    config = small_config(prepared, "model.vocab_size=2000")
    (warning,) = data_warnings(config, Sources.load(config))
    assert "1,600 of 2,000 rows are no piece of the tokenizer" in warning
    assert "cost 76,800 parameters; set it to 400, or to 512" in warning  # 2 x 1600 x d_model 24
    (warning,) = data_warnings(config.replaced("model", tied_embedding=True), Sources.load(config))
    assert "cost 38,400 parameters" in warning


def test_pieces_that_are_never_met_are_warned_of(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # H_400 = 6.5699...: 26,280 tokens for the rarest of 400 pieces to be met 10 times.
    config = small_config(prepared)
    sources = Sources.load(config)
    monkeypatch.setattr(type(sources.sources[0].manifest), "num_tokens", lambda self, split: 26_279)
    (warning,) = data_warnings(config, sources)
    assert warning.startswith("data.manifest: in its 26,279 tokens the rarest of the tokenizer's 400 pieces are met")
    assert warning.endswith("prepare 26,280 tokens, or set a smaller tokenizer.vocab_size in the preparation")
    settings = sources.sources[0].manifest.provenance.config
    for given in ({"model_sha256": "0" * 64}, {"type": "ids", "name": "gpt2", "vocab_size": 400}):
        monkeypatch.setitem(settings, "tokenizer", given)  # no key of a preparation makes that one smaller
        assert data_warnings(config, sources)[0].endswith("prepare 26,280 tokens, or take a smaller tokenizer")
    monkeypatch.setattr(type(sources.tokenizer), "tokens_are_bytes", True)  # all of them are there, used or not
    assert not data_warnings(config, sources)
    monkeypatch.undo()
    few = small_config(prepared, "data.max_tokens=26000", "train.steps=100")
    (warning,) = data_warnings(few, Sources.load(few))
    assert "in its 26,000 tokens the rarest" in warning


def test_sizes_that_trained_weights_decide_are_not_warned_of(prepared: Path) -> None:
    """Fewer rows or pieces, as the warnings advise, would be refused."""
    few = ("data.max_tokens=26000", "train.steps=100", "model.vocab_size=2000")
    config = small_config(prepared, *few)
    assert len(data_warnings(config, Sources.load(config))) == 2
    config = small_config(prepared, *few, "train.init_from=runs/other")
    assert not data_warnings(config, Sources.load(config))


def test_a_validation_longer_than_its_split_is_warned_of(prepared: Path) -> None:
    """Of N tokens each window takes T, and the last one a target more."""
    config = small_config(prepared)
    there = (Sources.load(config).sources[0].manifest.num_tokens("validation") - 1) // config.model.sequence_length
    for wanted, warned in ((0, False), (there, False), (there + 1, True)):
        config = small_config(prepared, f"evaluate.sequences={wanted}")
        found = [
            line for line in data_warnings(config, Sources.load(config)) if line.startswith("evaluate.sequences: ")
        ]
        assert len(found) == warned
        assert not found or f"has {there:,} sequences of 16 tokens" in found[0]
