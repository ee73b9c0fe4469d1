"""data.document_mask: a document in a window of several is computed as if it stood alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from data_prep.shards.reader import SplitReader
from model.config import SwitchHeadConfig
from model.documents import Documents
from model.language_model import build_model
from pretrain.config.rules import choose_backends
from pretrain.data.sources import Sources
from pretrain.data.windows import TrainingStream
from tests.data_prep.split_writer import joined, random_documents, write_data
from tests.harness import run_ranks
from tests.model.options import ATTENTIONS, check_kinds, kinds
from tests.pretrain.runs import MOA, engine_trace, gradient_error, plain_trace, small_config
from tests.tensors import gradient_of

DENSE = 'model.attention={"type": "dense", "num_heads": 2, "head_dim": 6}'
SWIGLU = 'model.feedforward={"type": "swiglu", "hidden_size": 20}'
MASK = "data.document_mask=true"
ATTENTION = ("", DENSE, MOA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 30 tokens, so that most windows of 16 hold several; shards and members end inside windows."""
    rng, base = np.random.default_rng(3), tmp_path_factory.mktemp("documents")
    documents = [rng.integers(2, 400, int(rng.integers(0, 30))) for _ in range(300)]
    write_data(base / "data", documents, vocab_size=400, tokens_per_shard=333, tokens_per_member=50)
    return base / "data"


def test_positions_and_ranges_by_hand() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]))
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert documents.first.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert documents.end.tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6]


def test_every_attention_that_knows_documents_is_compared(folder: Path) -> None:
    types = {small_config(folder, *filter(None, [override])).model.attention.type for override in ATTENTION}
    wanted = [kind for kind in kinds("documents") if kind in ATTENTIONS]
    check_kinds(types, "ATTENTION of tests/pretrain/data/test_documents.py", wanted)


def test_the_index_of_documents_follows_eos(folder: Path) -> None:
    config = small_config(folder, "evaluate.sequences=0", MASK)
    sources = Sources.load(config)
    reader = sources.reader("train", config)
    windows = np.arange(reader.num_windows)
    tokens, index = reader.read(windows)[0], reader.documents(windows)
    ended = torch.cumsum((tokens == 1).long(), 1)
    assert torch.equal(index, torch.cat([torch.zeros(len(windows), 1, dtype=torch.int64), ended[:, :-1]], 1))
    batch = TrainingStream(reader, config, data_rank=0, data_size=1).batch(16, 0)
    assert batch.documents is not None and batch.documents.max() > 0
    with SplitReader(sources.sources[0].manifest, "train", True) as split:
        assert split.document_index(np.array([0]), split.num_tokens).max() == split.num_documents - 1


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("feedforward", ["", SWIGLU])
def test_a_document_among_others_is_computed_as_if_alone(folder: Path, attention: str, feedforward: str) -> None:
    """fp64, every token's loss and the gradient of the sum; without the mask it differs."""
    overrides = [o for o in (attention, feedforward) if o]
    config = small_config(folder, "evaluate.sequences=0", MASK, "model.dropout=0.0", *overrides)
    network = build_model(config.model, seed=1).double().eval()
    lengths = [[5, 1, 7, 3], [16], [9, 7]]
    index = torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths])
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(400, (2, 3, 16), generator=generator)

    def losses(x: torch.Tensor, y: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
        logits, _ = network.logits(x, documents=documents)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        network.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}

    together = losses(tokens, targets, index)
    alone = torch.zeros_like(together)
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            part = (slice(row, row + 1), slice(start, start + size))
            alone[part] = losses(tokens[part], targets[part])
            start += size
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)  # routing scores are fp32 whatever the model is
    one, other = gradients(together.sum()), gradients(alone.sum())
    assert max(gradient_error(one[name], other[name]) for name in one) < 1e-5
    unmasked = losses(tokens, targets)
    assert (unmasked - alone)[0].abs().max() > 1e-3
    torch.testing.assert_close(unmasked[1], alone[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "ranks, overrides",
    [
        (2, ("parallel.tensor=2", "parallel.sequence=true")),
        pytest.param(2, ("parallel.zero=3",), marks=pytest.mark.slow),
    ],
)
def test_layouts_train_with_the_mask_as_one_process(folder: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    keys = ("evaluate.sequences=0", MASK, "model.feedforward.num_experts=6", "batch.micro_sequences=4")
    reference = plain_trace(small_config(folder, *keys), 3, ())
    unmasked = plain_trace(small_config(folder, *keys[:1], *keys[2:]), 3, ())
    assert abs(unmasked.losses[-1] - reference.losses[-1]) > 1e-4
    trace = run_ranks(engine_trace, ranks, [small_config(folder, *keys, *overrides)], 3, ())[0][0]
    assert trace.losses == pytest.approx(reference.losses, rel=1e-5)
    assert trace.grad_norms == pytest.approx(reference.grad_norms, rel=1e-4)


MEMORY = 'model.position={"type": "rope", "memory_chunks": 1}'


@pytest.mark.parametrize(
    "override", [pytest.param(MASK, id="documents"), pytest.param(MEMORY, id="memory", marks=pytest.mark.slow)]
)
def test_the_triton_kernels_train_with_the_losses_of_the_cpu(folder: Path, override: str) -> None:
    """Interpreted, through the real trainer; losses, gradient norms and every gradient of the second step, the first
    with a memory. Adam has moved the weights by then, which magnifies a difference of rounding. Every layer calls the
    same kernels: there is one."""
    shape = ("evaluate.sequences=0", "batch.global_sequences=2", "batch.micro_sequences=2", "model.num_layers=1")
    configs = [small_config(folder, *shape, override, f"kernels.backend={name}") for name in ("cpu", "triton")]
    assert choose_backends(configs[1], "cpu").causal_attention == "triton"
    cpu, triton = run_ranks(engine_trace, 1, configs, 2, (1,))[0]
    assert len(set(cpu.losses)) == 2
    assert triton.losses == pytest.approx(cpu.losses, rel=1e-5)
    assert triton.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-5)
    assert max(gradient_error(triton.gradients[1][name], g) for name, g in cpu.gradients[1].items()) < 1e-4


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(folder: Path, mode: str) -> None:
    config = small_config(folder, "evaluate.sequences=0", MASK)
    reader = Sources.load(config).reader("train", config)
    batch = TrainingStream(reader, config, data_rank=0, data_size=1).batch(0, 0)
    found = []
    for recompute in ("none", mode):
        network = build_model(config.model, seed=1, recompute=recompute)  # type: ignore[arg-type]
        network(*batch.model_inputs())[0].backward()
        found.append({n: gradient_of(p) for n, p in network.named_parameters()})
    assert max(gradient_error(found[1][n], found[0][n]) for n in found[0]) < 1e-6


def test_where_it_is_impossible_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"data\.document_mask: Transformer-XL"):
        small_config(folder, MASK, "model.position.type=xl")
    with pytest.raises(ConfigError, match=r"data\.document_mask: memory reaches .*memory_chunks to 0"):
        small_config(folder, MASK, 'model.position={"type": "rope", "memory_chunks": 1}')
    with pytest.raises(ConfigError, match=r"data\.document_mask: .*parallel\.pipeline to 1"):
        small_config(folder, MASK, "parallel.pipeline=2")
    monkeypatch.setattr(SwitchHeadConfig, "lacks", {"documents": "it sees all that came before"})
    with pytest.raises(ConfigError, match=r"data\.document_mask: model\.attention\.type is switchhead: it sees all"):
        small_config(folder, MASK)


def test_windows_across_shards_keep_their_tokens(folder: Path) -> None:
    documents = random_documents(np.random.default_rng(9), 30, 400)
    manifest = write_data(folder.parent / "more", documents, vocab_size=400, tokens_per_shard=500, tokens_per_member=64)
    everything = joined(documents)
    with SplitReader(manifest, "train", True, max_open_shards=2) as split:
        starts = np.append(np.random.default_rng(0).integers(0, len(everything) - 700, 50), len(everything) - 700)
        rows = split.read_rows(starts, 700)
        for row, start in zip(rows, starts.tolist(), strict=True):
            np.testing.assert_array_equal(row, everything[start : start + 700])
        with pytest.raises(IndexError, match="windows of 700 tokens leave"):
            split.read_rows(np.array([len(everything) - 699]), 700)
