"""The modelling file of exports against the model that was trained: logits, cache, padding, gradients.

tests/pretrain/export/test_fresh.py, slow, does it where nothing of this project is installed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.attention.rope import rope_tables
from model.config import ModelConfig, RopeConfig
from model.language_model import LanguageModel
from pretrain.export import layers_switchall
from pretrain.export.hf_config import NAMES, hf_config
from pretrain.export.layers_switchall import SigmaMoE, relative_shift
from tests.marks import NO_SPACE
from tests.model.options import TRAINING_ALONE, check_kinds, check_options, kinds, sections_of
from tests.pretrain.export.models import CHUNK, MODELS, config_of, model_of, our_logits, some_tokens
from tests.tensors import gradient_of

LENGTH, TOLERANCE = 3 * CHUNK + 2, 1e-5  # the last chunk of a text is seldom whole


def theirs(model: LanguageModel, attention: str) -> Any:
    """The same weights in the exported file's classes, in evaluation mode."""
    from pretrain.export.configuration_switchall import SwitchAllConfig
    from pretrain.export.modeling_switchall import SwitchAllForCausalLM

    tree = hf_config(model.config, dtype="float32", special={"eos_token_id": 1, "pad_token_id": 0})
    found = SwitchAllForCausalLM._from_config(SwitchAllConfig(**tree), attn_implementation=attention)
    found.load_state_dict(model.state_dict())
    return found.eval()


def test_every_option_of_a_model_is_exported_and_compared_here() -> None:
    """One that is not would be lost on the way, and the export compute something else without a word."""
    assert ModelConfig.model_fields.keys() - TRAINING_ALONE <= NAMES.keys()
    lacking = set(kinds()) - set(kinds("export"))
    sections = [section for section in sections_of(ModelConfig) if section not in lacking]
    check_options(map(config_of, MODELS), "MODELS of tests/pretrain/export/models.py", *sections)
    computed = {*layers_switchall.ATTENTIONS, *layers_switchall.FEEDFORWARDS}
    check_kinds(computed, "ATTENTIONS and FEEDFORWARDS of pretrain/export/layers_switchall.py", kinds("export"))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str) -> None:
    ours, tokens = model_of(name), some_tokens(2, LENGTH)
    logits = our_logits(ours, tokens).detach()
    # A memory carries no gradient, while here keys get one from all later tokens: the same within a chunk.
    text = tokens[:, :CHUNK] if ours.config.memory_length else tokens
    F.cross_entropy(our_logits(ours, text)[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
    gradients = {parameter: gradient_of(value) for parameter, value in ours.named_parameters()}
    for attention in ("sdpa", "eager"):
        model = theirs(ours, attention)
        output = model(tokens, output_hidden_states=True, output_attentions=attention == "eager")
        assert torch.allclose(output.logits, logits, atol=TOLERANCE, rtol=0)
        model(text, labels=text).loss.backward()
        found = {parameter: gradient_of(value) for parameter, value in model.named_parameters()}
        assert found.keys() == gradients.keys()
        for parameter, gradient in found.items():
            assert torch.allclose(gradient, gradients[parameter], atol=TOLERANCE, rtol=1e-4), parameter
    states = [tuple(state.shape) for state in output.hidden_states]
    assert states == [(2, LENGTH, ours.config.d_model)] * (ours.config.num_layers + 1)
    assert torch.allclose(model.head(output.hidden_states[-1]), logits, atol=TOLERANCE)
    heads = (2, ours.config.attention.num_heads, LENGTH, LENGTH)
    assert [tuple(weights.shape) for weights in output.attentions] == [heads] * ours.config.num_layers
    sums = torch.stack(output.attentions).sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums)) and not output.attentions[0].triu(1).any()


@pytest.mark.parametrize("name", MODELS)
def test_cache_and_padding(name: str) -> None:
    """Pieces of a text with the cache give what the text gives in one go; rows with padding what they give alone."""
    ours, tokens = model_of(name), some_tokens(2, LENGTH)
    with torch.no_grad():
        model, logits = theirs(ours, "sdpa"), our_logits(ours, tokens)
        cache, parts = None, []
        for piece in tokens.split([5, 1, 1, 2, 7, LENGTH - 16], dim=1):
            output = model(piece, cache=cache, use_cache=True)
            cache = output.cache
            parts.append(output.logits)
        assert torch.allclose(torch.cat(parts, dim=1), logits, atol=TOLERANCE, rtol=0)
        assert cache is not None
        heads = 1 if ours.config.attention.type == "moa" else ours.config.attention.num_heads
        heads = 2 if name.startswith("grouped") else heads  # of 6
        assert cache.layers[0].keys.shape[1] == cache.layers[0].values.shape[1] == heads
        if ours.config.memory_length:
            kept = cache.layers[0].keys.shape[2]
            assert kept == min(LENGTH, ours.config.memory_length + CHUNK - 1) < LENGTH

        pad = 4
        mask = torch.ones(2, LENGTH + pad, dtype=torch.int64)
        mask[0, :pad] = mask[1, LENGTH:] = 0
        rows = torch.zeros_like(mask)
        rows[0, pad:], rows[1, :LENGTH] = tokens
        for each in (model, theirs(ours, "eager")):
            padded = each(rows, attention_mask=mask).logits
            assert torch.allclose(padded[0, pad:], logits[0], atol=TOLERANCE, rtol=0)
            assert torch.allclose(padded[1, :LENGTH], logits[1], atol=TOLERANCE, rtol=0) and padded.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_config_json_says_what_the_configuration_derives(name: str) -> None:
    """Other programs read the file alone."""
    from pretrain.export.configuration_switchall import SwitchAllConfig

    tree = hf_config(config_of(name), dtype="float32", special={})
    found = SwitchAllConfig(**tree)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert tree[key] == getattr(found, key), key
    for key in ("sliding_window", "layer_types"):  # of models with memory
        assert tree.get(key) == getattr(found, key, None), key


def test_angles_are_rounded_as_in_training_but_where_positions_have_no_end() -> None:
    from pretrain.export.configuration_switchall import SwitchAllConfig

    for name in ("dense", "switchhead shared, rope with memory"):
        ours, positions = config_of(name), torch.arange(100_000, 100_010)
        config = SwitchAllConfig(**hf_config(ours, dtype="float32", special={}))
        found = torch.stack(layers_switchall.rope_tables(positions[None], config))[:, 0, 0]
        assert isinstance(ours.position, RopeConfig)
        rounded = torch.stack(rope_tables(positions, ours.attention.head_dim, ours.position))[:, :, 0]
        width = 2 * found.shape[-1]
        angles = positions.double()[:, None] * 500.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        exact = torch.stack([angles.cos(), angles.sin()]).float()
        assert not torch.equal(rounded, exact)
        assert torch.equal(found, exact if ours.memory_length else rounded), name


def test_what_is_refused() -> None:
    model, tokens = theirs(model_of("dense"), "sdpa"), some_tokens(2, 5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 4\]; \[2, 5\] is needed"):
        model(tokens, attention_mask=torch.ones(2, 4))
    cache = model(tokens).cache
    model.train().gradient_checkpointing_enable()
    assert model(tokens).cache is None
    with pytest.raises(ValueError, match="a cache cannot be given"):
        model(tokens, cache=cache)


@pytest.mark.parametrize("mask", ["of a cache of fixed size", "of layers by name"])
def test_masks_that_are_made_already_are_refused_in_words(mask: str) -> None:
    """transformers makes them where `cache_implementation` is static, of models with memory one for each kind."""
    model, tokens = theirs(model_of("dense xl"), "sdpa"), some_tokens(1, 5)
    made: Any = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="leave out cache_implementation"):
        model(tokens, attention_mask=made if mask == "of a cache of fixed size" else {"sliding_attention": made})


@pytest.mark.parametrize("length", [1, 8])
def test_a_cache_of_fixed_size_is_refused_in_words(length: int) -> None:
    """At its first tokens: then it says that it has seen 0, and gives keys of all its size, most of them empty."""
    from transformers import StaticCache

    model, tokens = theirs(model_of("dense"), "sdpa"), some_tokens(1, length)
    with pytest.raises(ValueError, match="leave out cache_implementation"):
        model(tokens, cache=StaticCache(config=model.config, max_cache_len=9))


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_takes_tensors(name: str) -> None:
    """LoRA's all-linear, and what quantizes a model, puts another layer in the place of each."""

    class Other(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    model, tokens = theirs(model_of(name), "sdpa"), some_tokens(2, 9)
    expected = model(tokens).logits
    layers = [place for place, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    for place in layers:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, Other(model.get_submodule(place)))
    assert layers and torch.equal(model(tokens).logits, expected)


@torch.no_grad()
def test_weights_that_change_under_a_model_change_its_positions_too() -> None:
    """As DeepSpeed's optimizers and averages of weights write them: torch counts no change."""
    ours, tokens = model_of("switchall xl"), some_tokens(2, 9)
    model = theirs(ours, "sdpa")
    model(tokens)
    for part in (ours, model):
        for parameter in part.parameters():
            parameter.data.mul_(1.5)
    assert torch.allclose(model(tokens).logits, our_logits(ours, tokens), atol=TOLERANCE, rtol=1e-4)


@torch.no_grad()
def test_keys_of_positions_are_computed_once_in_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = theirs(model_of("dense xl"), "sdpa"), some_tokens(1, 9)
    computed, compute = list[int](), layers_switchall.PositionKeys.forward

    def counted(keys: layers_switchall.PositionKeys, L: int) -> torch.Tensor:
        computed.append(L)
        return compute(keys, L)

    monkeypatch.setattr(layers_switchall.PositionKeys, "forward", counted)
    model.generate(tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert computed == [16] * model.config.num_hidden_layers


@torch.no_grad()
def test_no_head_of_keys_is_given_by_a_stride_of_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """With which a kernel of torch for GPUs takes heads for queries, and gives them the masks of other rows."""
    model, tokens = theirs(model_of("moa"), "sdpa"), some_tokens(2, 9)
    attend, strides = F.scaled_dot_product_attention, list[int]()

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        assert k.shape[1] == v.shape[1] == q.shape[1] > 1
        strides.extend((k.stride(1), v.stride(1)))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(strides) == 3 * 2 * model.config.num_hidden_layers and all(strides)


def test_only_the_logits_that_are_asked_for() -> None:
    model, tokens = theirs(model_of("switchall xl"), "sdpa"), some_tokens(2, 9)
    logits = model(tokens).logits
    for kept, expected in ((1, logits[:, -1:]), (4, logits[:, -4:]), (torch.tensor([7, 2]), logits[:, [7, 2]])):
        assert torch.allclose(model(tokens, logits_to_keep=kept).logits, expected, atol=1e-6)


def test_experts_of_a_compiler_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed shapes instead of a loop over the chosen experts."""
    layer, x = theirs(model_of("switchall xl"), "sdpa").blocks[0].feedforward, torch.randn(2, 5, 22)
    assert isinstance(layer, SigmaMoE)
    by_loop = layer(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(layer(x), by_loop, atol=1e-6) and by_loop.abs().max() > 0.1


@NO_SPACE
@pytest.mark.slow  # test_experts_of_a_compiler_are_the_same has what is computed otherwise there
@pytest.mark.parametrize("name", ["switchall", "switchall xl", "dense xl", "moa xl, sigmoid"])
def test_logits_and_gradients_of_inductor(name: str) -> None:
    """Programs of torch.compile's own compiler, in one graph, against the model operator by operator."""
    torch._dynamo.reset()
    model, tokens = theirs(model_of(name), "sdpa"), some_tokens(2, LENGTH)
    expected = model(tokens, use_cache=False, labels=tokens)
    expected.loss.backward()
    gradients = {parameter: value.grad for parameter, value in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    found = compiled(tokens, use_cache=False, labels=tokens)
    assert torch.allclose(found.logits, expected.logits, atol=TOLERANCE, rtol=0)
    found.loss.backward()
    for parameter, value in model.named_parameters():
        assert torch.allclose(value.grad, gradients[parameter], atol=TOLERANCE, rtol=1e-4), parameter


def test_relative_shift() -> None:
    """Against its definition, index by index."""
    x = torch.arange(4 * 9).view(4, 9)
    shifted = relative_shift(x)
    for i in range(4):
        for j in range(9 - 4 + i + 1):
            assert shifted[i, j] == x[i, j + 3 - i]
