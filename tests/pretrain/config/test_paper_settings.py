"""The files of configs/paper against the papers: which models there are, and how each is trained and validated."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.loading import load_config
from pretrain.config.schema import Config

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "paper"
PAPER = sorted(path.stem for path in FOLDER.glob("*.json"))
SIGMA_MOE_PAPER = {
    "wt103_sigma_moe_47m": (16, 0.0, 1e-3),
    "wt103_sigma_moe_237m": (128, 0.05, 1e-3),
    "wt103_sigma_moe_262m": (32, 0.1, 1e-3),
    "enwik8_sigma_moe_41m": (16, 0.05, 1e-4),
    "c4_sigma_moe_47m": (16, 0.0, 0.0),
    "c4_sigma_moe_262m": (32, 0.1, 1e-3),
    "pes2o_sigma_moe_47m": (16, 0.0, 0.0),
    "pes2o_sigma_moe_262m": (32, 0.1, 1e-3),
    "wt103_dense_238m": (),
}
"""Experts, expert dropout and gamma of the sweeps of github.com/RobertCsordas/moe; the last has none of them."""
ABLATIONS = ("o", "ko", "vko", "vqo", "v", "qo", "vq", "vkqo", "kqo", "vkq", "vk", "q", "k", "kq")


@pytest.mark.parametrize("name", PAPER)
def test_training_settings_are_those_of_the_paper(name: str) -> None:
    config = load_config(FOLDER / f"{name}.json")
    model, optimizer = config.model, config.optimizer
    large = model.d_model == 1024
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (
        2.5e-4,
        (0.9, 0.999),
        1e-8,
        0.0,
    )
    small_clip = model.d_model == 412 and model.feedforward.type == "dense"
    assert optimizer.clip_norm == (0.1 if small_clip else 0.25)
    assert model.dropout == (0.2 if large else 0.1)
    schedule = config.schedule
    assert (schedule.shape, schedule.warmup_steps, schedule.final_ratio) == ("published", 4000 if large else 0, 0.0)
    assert config.batch.global_sequences == (32 if "enwik8" in name else 64)
    assert model.vocab_size == (205 if "enwik8" in name else 8000)
    initialization = "published_sigma_moe" if name in SIGMA_MOE_PAPER else "published"
    assert (model.initialization, model.init_scale, config.train.steps) == (initialization, "paper", 100_000)
    assert model.memory_length == (0 if "rope" in name and "memory" not in name else model.sequence_length)
    if model.feedforward.type == "sigma_moe":
        assert model.feedforward.entropy_scope == "micro_batch"
        N, dropout, gamma = SIGMA_MOE_PAPER.get(name, (32, 0.1, 1e-3) if large else (16, 0.0, 1e-4))
        layer = model.feedforward
        assert (layer.num_experts, layer.expert_size, layer.active_experts) == (N, 128, 4)
        assert (layer.expert_dropout, layer.entropy_weight) == (dropout, gamma)
    if model.attention.type == "switchhead":
        assert model.attention.normalized_init == (name == "pes2o_switchhead_262m")
        assert model.attention.expert_dropout == (0.1 if "switchall_259m" in name else 0.0)
    folder = {"c4": "c4", "pes2o": "pes2o", "wt103": "wikitext103", "enwik8": "enwik8"}[name.split("_")[0]]
    assert config.data.manifest == f"data/paper/{folder}/manifest.json" and config.description
    _check_published_order(name, config)


# What the authors' code reads for validation: (206,453,965 // T) x 0.005 windows of C4, (842,021,184 // T) x 0.005 of
# peS2o, and the whole split of the others.
VALIDATION_WINDOWS = {"c4": {256: 4032, 512: 2016, 1024: 1008}, "pes2o": {256: 16445, 512: 8222}}


def _check_published_order(name: str, config: Config) -> None:
    """Contiguous streams of the first tokens in training, the first windows in validation."""
    corpus, T, G = name.split("_")[0], config.model.sequence_length, config.batch.global_sequences
    assert config.data.order == "streams" and config.evaluate.streams == G
    assert config.data.max_tokens == (G * T * 100_100 if corpus in VALIDATION_WINDOWS else None)
    of_test = corpus in ("wt103", "enwik8") and "moa" not in name and "ablation" not in name
    assert config.evaluate.split == ("test" if of_test else "validation")
    assert config.evaluate.placement == "start"
    whole_split = {"wt103": 4096, "enwik8": 10_000}
    windows = VALIDATION_WINDOWS[corpus][T] if corpus in VALIDATION_WINDOWS else whole_split[corpus]
    assert config.evaluate.sequences == windows


def test_every_row_of_the_paper_has_a_config() -> None:
    rows = ("dense_47m", "dense_2heads_47m", "switchhead_47m", "switchall_47m", "dense_262m", "switchhead_262m")
    expected = {f"{corpus}_{row}" for corpus in ("c4", "pes2o", "wt103") for row in (*rows, "switchall_259m")}
    expected |= {"c4_dense_4heads_262m", "pes2o_dense_4heads_262m", "wt103_dense_2heads_262m"}
    expected |= {"enwik8_dense_41m", "enwik8_dense_2heads_41m", "enwik8_switchhead_41m"}
    expected |= {f"{corpus}_{kind}_rope_45m" for corpus in ("c4", "wt103") for kind in ("dense", "switchhead")}
    expected |= {"c4_dense_rope_244m", "c4_switchhead_rope_244m"}
    expected |= {"c4_switchhead_rope_memory_244m", "wt103_dense_2heads_rope_45m"}
    rope_244m = ("dense_rope", "dense_2heads_rope", "switchhead_rope", "switchhead_rope_memory")
    expected |= {f"wt103_{kind}_244m" for kind in rope_244m}
    expected |= {f"c4_switchhead_{kind}" for kind in ("mac_63m", "mac_376m", "rope_mac_54m", "rope_mac_314m")}
    expected |= {f"{corpus}_switchhead_shared_{size}" for corpus in ("c4", "wt103") for size in ("47m", "262m")}
    expected |= {f"wt103_moa_{heads}heads_{size}" for heads in (2, 4, 6, 8) for size in ("47m", "262m")}
    expected |= {"wt103_moa_12heads_262m"}
    expected |= {f"wt103_ablation_{projections}_47m" for projections in ABLATIONS}
    assert set(PAPER) == expected | SIGMA_MOE_PAPER.keys()


@pytest.mark.parametrize("name", [name for name in SIGMA_MOE_PAPER if "238m" not in name])
def test_a_sigma_moe_has_the_rest_of_its_dense_baseline(name: str) -> None:
    """The sweeps differ from the dense ones in the feed-forward layer, and at d_model 412 in the clipping."""
    corpus, size = name.split("_")[0], name.rpartition("_")[2]
    config = load_config(FOLDER / f"{name}.json")
    baseline = load_config(FOLDER / f"{corpus}_dense_{size.replace('237', '47')}.json")
    other = {"feedforward": config.model.feedforward, "initialization": config.model.initialization}
    assert config.model == baseline.model.model_copy(update=other)
    assert config.optimizer.model_copy(update={"clip_norm": 0.1}) == baseline.optimizer.model_copy(
        update={"clip_norm": 0.1}
    )
    for section in ("data", "batch", "schedule", "train", "parallel", "evaluate"):
        assert getattr(config, section) == getattr(baseline, section), section
