"""launch/import_weights.py: the authors' weights give the authors' outputs, and what does not fit is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from model.config import ModelConfig
from model.language_model import build_model
from pretrain.cli.import_weights import main
from pretrain.config.loading import to_json
from pretrain.config.schema import Config
from pretrain.export.writing import ExportOptions, export
from pretrain.imports.layers import attention
from pretrain.imports.names import AUTHORS, State, renamed
from pretrain.imports.reading import read_state
from pretrain.saved_model import find_checkpoint, load_model
from tests.pretrain.imports.authors_layers import dense, logits, moa, random_state, switchhead
from tests.pretrain.runs import small_config
from tests.pretrain.saved import whole_tensors

D, H, h, E, K, T, M = 12, 2, 5, 3, 2, 5, 4
XL, ROPE = "model.position.type=xl", 'model.position={"type": "rope", "fraction": 0.9}'
SIDES = {"k": "v", "q": "o"}
Shapes = dict[str, tuple[int, ...]]


def switchhead_keys(experts: str, more: Shapes) -> Shapes:
    """Of a training checkpoint, without selectors."""
    shapes: Shapes = {}
    for letter in "qkv":
        shapes[f"projections.{letter}"] = (H * E, D, h) if letter in experts else (H * h, D)
    shapes["projections.o"] = (H * E, h, D) if "o" in experts else (D, H * h)
    return shapes | more


def selectors(letters: str) -> Shapes:
    return {f"selections.{letter}": (H * E, D) for letter in letters}


def attention_of(**keys: Any) -> str:
    settings = {"type": "switchhead", "num_heads": H, "head_dim": h, "num_experts": E, "active_experts": K, **keys}
    return f"model.attention={json.dumps(settings)}"


PUBLIC: Shapes = {
    "q.weight": (H * h, D),
    "k.weight": (H * h, D),
    "v": (H * E, D, h),
    "o": (H * E, h, D),
    "sel_v": (H * E, D),
    "sel_o": (H * E, D),
}
PK: Shapes = {"pos_to_pk": (H * h, D)}
SIZES = {"H": H, "h": h, "E": E, "k": K, "rope": 0, "experts": "vo", "selector": {}}
DENSE = f'model.attention={{"type": "dense", "num_heads": {H}, "head_dim": {h}}}'
KQV = ["query", "key", "value", "output"]
CASES: dict[str, tuple[tuple[str, ...], Shapes, Any, dict[str, Any]]] = {
    "public xl": ((attention_of(), XL), PUBLIC | PK, switchhead, SIZES),
    "public rope": ((attention_of(), ROPE), PUBLIC, switchhead, SIZES | {"rope": 4}),
    "public, one expert": (
        (attention_of(num_experts=1, active_experts=1, expert_projections=["output"]), XL),
        PUBLIC | PK | {"v": (H * h, D), "o": (D, H * h), "sel_o": (H, D), "sel_v": ()},
        switchhead,
        SIZES | {"E": 1, "k": 1, "experts": "o"},
    ),
    "trained xl": ((attention_of(), XL), switchhead_keys("vo", PK | selectors("vo")), switchhead, SIZES),
    "trained rope, all experts": (
        (attention_of(expert_projections=KQV), ROPE),
        switchhead_keys("qkvo", selectors("vo")),
        switchhead,
        SIZES | {"rope": 4, "experts": "qkvo", "selector": SIDES},
    ),
    "trained xl, shared selection": (
        (attention_of(selection="shared"), XL),
        switchhead_keys("vo", PK | selectors("o")),
        switchhead,
        SIZES | {"selector": {"v": "o"}},
    ),
    "trained xl, selector of each": (
        (attention_of(selection="projection", expert_projections=KQV[:3]), XL),
        switchhead_keys("qkv", PK | selectors("qkv")),
        switchhead,
        SIZES | {"experts": "qkv"},
    ),
    "dense xl": (
        (DENSE, XL),
        {
            "data_to_q.weight": (H * h, D),
            "data_to_kv.weight": (2 * H * h, D),
            "pos_to_pq.weight": (H * h, D),
            "global_content_bias": (H, h),
            "global_pos_bias": (H, h),
            "scale": (1,),
            "multi_head_merge.weight": (D, H * h),
        },
        dense,
        {"H": H, "h": h, "rope": 0},
    ),
    "dense rope": (
        (DENSE, ROPE),
        {
            "data_to_q.weight": (H * h, D),
            "data_to_kv.weight": (2 * H * h, D),
            "out_proj.weight": (D, H * h),
        },
        dense,
        {"H": H, "h": h, "rope": 4},
    ),
}
for router in ("softmax", "sigmoid"):
    CASES[f"moa {router}"] = (
        (
            f'model.attention={{"type": "moa", "num_heads": {K}, "head_dim": {h}, "num_experts": {E + 1}, '
            f'"router": "{router}"}}',
            XL,
        ),
        {
            "data_to_q": (E + 1, D, h),
            "data_to_kv": (D, 2 * h),
            "out_proj": (E + 1, h, D),
            "pos_to_pk": (h, D),
            "sel_dst": (E + 1, D),
            "scale": (1,),
        },
        moa,
        {"h": h, "k": K, "softmax": router == "softmax"},
    )


def test_a_module_is_known_by_its_whole_name_and_a_weight_is_not_changed_where_it_is() -> None:
    """`output` is none of `outputs` and of `output_norm`; a tensor that is read twice is the same twice."""
    found = {name: renamed(name, AUTHORS) for name in ("output.weight", "outputs.weight", "output_norm.weight")}
    assert found == {"output.weight": "head.weight", "outputs.weight": "outputs.weight"} | {
        "output_norm.weight": "output_norm.weight"
    }
    assert renamed("unique_layers.12.norm1.bias", AUTHORS) == "blocks.12.attention_norm.bias"
    shapes = switchhead_keys("vo", selectors("vo")) | {"pos_to_pk": (H * h, D)}
    names = {f"blocks.0.attention.{name}": torch.randn(*shape) for name, shape in shapes.items()}
    weight = names["blocks.0.attention.pos_to_pk"]
    before = weight.clone()
    config = ModelConfig.model_validate(
        {
            "d_model": D,
            "num_layers": 1,
            "vocab_size": 9,
            "sequence_length": 4,
            "attention": json.loads(attention_of().partition("=")[2]),
            "position": {"type": "xl"},
        }
    )
    position = attention(State("a test", names, ()), "blocks.0.attention", config)["position.weight"]
    assert torch.equal(position(), position()) and torch.equal(weight, before)
    assert torch.equal(position()[:, ::2], -weight[:, ::2]) and torch.equal(position()[:, 1::2], weight[:, 1::2])


@pytest.mark.parametrize("case", CASES)
def test_every_attention_gives_the_authors_outputs(case: str, prepared: Path) -> None:
    """With tokens of memory before those that ask."""
    overrides, shapes, reference, sizes = CASES[case]
    config = small_config(prepared, f"model.d_model={D}", *overrides).model
    tensors = random_state({name: shape for name, shape in shapes.items() if shape}, seed=7)
    state = State("a test", {f"blocks.0.attention.{name}": value.clone() for name, value in tensors.items()}, [])
    layer = build_model(config, seed=0).eval().get_submodule("blocks.0.attention")
    layer.load_state_dict({name: tensor() for name, tensor in attention(state, "blocks.0.attention", config).items()})
    assert state.left() == []
    context = torch.randn(2, M + T, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, _ = layer(context, T, torch.arange(2))
    for ours, text in zip(found, context, strict=True):
        expected = reference(tensors, text, T, sizes=sizes)
        assert float(expected.abs().max()) > 0.05
        assert torch.allclose(ours, expected, atol=2e-6), float((ours - expected).abs().max())


SWITCHALL = (attention_of(), 'model.position={"type": "xl", "memory_chunks": 0}', f"model.d_model={D}")
TRAINED = {
    "attention": "unique_layers.{}.self_attn",
    "feedforward": "unique_layers.{}.pkm",
    "attention_norm": "unique_layers.{}.norm1",
    "feedforward_norm": "unique_layers.{}.norm2",
    "embedding": "embedding",
    "final_norm": "out_norm",
    "head": "output",
}
MODULES = {
    "attention": "layers.{}.att.inner",
    "feedforward": "layers.{}.moe",
    "attention_norm": "layers.{}.att.norm",
    "feedforward_norm": "layers.{}.moe_norm",
    "embedding": "embed",
    "final_norm": "last",
    "head": "lm",
}
OURS = {
    "attention": "blocks.{}.attention",
    "feedforward": "blocks.{}.feedforward",
    "attention_norm": "blocks.{}.attention_norm",
    "feedforward_norm": "blocks.{}.feedforward_norm",
    "embedding": "embedding",
    "final_norm": "final_norm",
    "head": "head",
}


def model_state(names: dict[str, str], layer: Shapes) -> dict[str, torch.Tensor]:
    """Of a SwitchAll model of two blocks."""
    parts: dict[str, Shapes] = {
        names["embedding"]: {"weight": (400, D)},
        names["final_norm"]: {"weight": (D,), "bias": (D,)},
        names["head"]: {"weight": (400, D), "bias": (400,)},
    }
    for n in range(2):
        parts[names["attention"].format(n)] = layer
        parts[names["feedforward"].format(n)] = {"keys": (5, D, 7), "values": (5, 7, D), "expert_sel": (5, D)}
        for norm in ("attention_norm", "feedforward_norm"):
            parts[names[norm].format(n)] = {"weight": (D,), "bias": (D,)}
    return random_state({f"{at}.{name}": shape for at, of in parts.items() for name, shape in of.items()}, seed=5)


def written_config(folder: Path, prepared: Path, *overrides: str) -> Config:
    config = small_config(prepared, *overrides)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    return config


def compare(out: Path, state: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    saved = load_model(out)
    text = torch.randint(400, (9,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = saved.model.logits(text[None])[0][0]
    expected = logits(state, text, sizes=SIZES, active=2, names=names)
    assert torch.allclose(found, expected, atol=1e-5), float((found - expected).abs().max())


class DotDict(dict):
    """As the authors' code has it, under the name that its checkpoints say."""


@pytest.mark.parametrize("blocks", ["unique_layers", "layers"])
def test_a_training_checkpoint(
    prepared: Path, tmp_path: Path, blocks: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {part: there.replace("unique_layers", blocks) for part, there in TRAINED.items()}
    state = model_state(names, switchhead_keys("vo", PK | selectors("vo")))
    counters = {f"{blocks}.{n}.pkm.kv_sel_counts_100": torch.zeros(5, 7) for n in range(2)}
    name = "framework.data_structures.dotdict"
    module = ModuleType(name)
    module.DotDict = DotDict  # type: ignore[attr-defined]
    monkeypatch.setattr(DotDict, "__module__", name)
    with monkeypatch.context() as patched:
        for parent in ("framework", "framework.data_structures"):
            patched.setitem(sys.modules, parent, ModuleType(parent))
        patched.setitem(sys.modules, name, module)
        kept = {"model": state | counters, "state": DotDict(iter=5, best=DotDict()), "optimizer": {"state": {0: {}}}}
        torch.save(kept, tmp_path / "model-5.pth")
    written_config(tmp_path, prepared, *SWITCHALL)
    out = tmp_path / "out"
    assert main([str(tmp_path / "model-5.pth"), "--config", str(tmp_path / "config.json"), "--to", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"left out, for no output depends on it: {blocks}.0.pkm.kv_sel_counts_100 and 1 more" in said
    assert "imported from model-5.pth" in said
    compare(out, state, names)


def test_a_model_of_public_modules_under_names_of_its_own(prepared: Path, tmp_path: Path) -> None:
    """In safetensors, as bf16 where that loses nothing, with its tokenizer named, for there are no data."""
    state = {name: value.bfloat16().float() for name, value in model_state(MODULES, PUBLIC | PK).items()}
    save_file({name: value.bfloat16() for name, value in state.items()}, tmp_path / "weights")
    written_config(tmp_path, prepared, *SWITCHALL, "data.manifest=nowhere")
    renames = [f"{theirs}={OURS[key]}" for key, theirs in MODULES.items()]
    command = [str(tmp_path / "weights"), "--config", str(tmp_path / "config.json"), "--to", str(tmp_path / "out")]
    command += ["--tokenizer", str(prepared / "tokenizer.model")]
    assert main([*command, *(part for rename in renames for part in ("--rename", rename))]) == 0
    compare(tmp_path / "out", state, MODULES)
    assert load_model(tmp_path / "out").tokenizer.decode(load_model(tmp_path / "out").tokenizer.encode("a b")) == "a b"
    export(find_checkpoint(tmp_path / "out"), tmp_path / "exported", ExportOptions())
    assert main([str(tmp_path / "exported"), "--to", str(tmp_path / "again")]) == 0
    first, again = (whole_tensors(tmp_path / name) for name in ("out", "again"))
    assert first.keys() == again.keys() and all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("wrappers", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_a_saved_model_are_no_part_of_its_names(wrappers: str, tmp_path: Path) -> None:
    state = {"layers.0.module.weight": torch.randn(3), "out.bias": torch.randn(2)}
    torch.save({f"{wrappers}{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    assert read_state(tmp_path / "w.pth").keys() == state.keys()
    torch.save({**state, "module.weight": torch.randn(1)}, tmp_path / "w.pth")  # of a module that is called so
    assert read_state(tmp_path / "w.pth").keys() == {*state, "module.weight"}


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_copied_in_part_is_refused_wherever_it_ends(is_zip: bool, tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2), "b": torch.ones(3)}, tmp_path / "w", _use_new_zipfile_serialization=is_zip)
    content = (tmp_path / "w").read_bytes()
    for length in range(0, len(content) - 1, 5):
        (tmp_path / "w").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"^SOURCE: .*(damaged or no file of torch\.save|holds more than tensors)"):
            read_state(tmp_path / "w")


class Executes:
    """What a file must not do when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_what_does_not_fit_is_named(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = model_state(TRAINED, switchhead_keys("vo", PK | selectors("vo")))
    written_config(tmp_path, prepared, *SWITCHALL)
    source = tmp_path / "w.pth"

    def refused(words: str, tensors: Any, *options: str) -> None:
        if tensors is not None:
            torch.save(tensors, source)
        assert main([str(source), "--config", "config.json", "--to", "out", *options]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not Path("out").exists() and not Path("out.partial").exists() and not Path("executed").exists()

    key = "unique_layers.1.self_attn.projections.v"
    refused(
        "blocks.1.attention.projections.v: is missing in w.pth; there is unique_layers.1.self_attn.",
        {name: value for name, value in state.items() if name != key},
    )
    refused(
        f"{key}: has shape [6, 5, 12] in w.pth, the configuration means [6, 12, 5]",
        state | {key: torch.zeros(6, 5, 12)},
    )
    refused(
        "unique_layers.0.self_attn.norm_ret.weight: w.pth holds this, which the configured model has no place for",
        state | {"unique_layers.0.self_attn.norm_ret.weight": torch.zeros(5)},
    )
    refused(f"{key}: holds torch.int64 in w.pth, weights are floating", state | {key: torch.zeros(6, 12, 5).long()})
    refused(
        "model.num_layers: is 2, but w.pth holds 1 blocks; set it to 1",
        {name: value for name, value in state.items() if not name.startswith("unique_layers.1")},
    )
    refused(
        "blocks.0: is missing in w.pth, which has block 1",
        {name: value for name, value in state.items() if not name.startswith("unique_layers.0")},
    )
    refused("out_norm.bias: holds numbers that are not finite", state | {"out_norm.bias": torch.full((D,), torch.nan)})
    refused(
        "expert_projections: w.pth holds the public module with 3 experts a head; set it to",
        model_state(TRAINED, PUBLIC | PK),
        "--set",
        'model.attention.expert_projections=["value"]',
    )
    refused(
        "the authors' layers are sigma_moe with activation relu and dense",
        state,
        "--set",
        'model.feedforward={"type": "swiglu", "hidden_size": 8}',
    )
    refused(
        "model.attention.num_kv_heads: is 1, but the authors' layers have keys and values of each head; set it to null",
        state,
        "--set",
        'model.attention={"type": "dense", "num_heads": 2, "num_kv_heads": 1, "head_dim": 5}',
    )
    refused("holds more than tensors", {"model": state, "more": Executes()})
    refused("weights_only=False", None)
    refused("holds no state dict and no `model` that is one", {"model": 3})
    refused("--rename: 'a.{}=b' is not OLD=NEW", state, "--rename", "a.{}=b")
    refused("both become", state | {"other.weight": torch.zeros(1)}, "--rename", "other=embedding")
    refused("--tokenizer FILE", state, "--set", "data.manifest=nowhere")
    refused("--tokenizer: config.json is not a SentencePiece model", state, "--tokenizer", "config.json")
    source.write_bytes(b"PK\x03\x04 torn")
    refused("w.pth is damaged or no file of torch.save", None)
    source.write_bytes(b"\x10\0\0\0\0\0\0\0{ torn")
    refused("w.pth is no safetensors file", None)
    source.unlink()
    assert main(["w.pth", "--config", "config.json", "--to", "out"]) == 2
    assert "SOURCE: w.pth is not there; name a file of weights" in capsys.readouterr().err
    assert main([str(tmp_path), "--config", "config.json", "--to", "out"]) == 2
    assert "--config: an exported folder has its own configuration" in capsys.readouterr().err
    assert main(["w.pth", "--to", "out"]) == 2
    assert "SOURCE: w.pth is not there; name a file of weights" in capsys.readouterr().err
    source.write_bytes(b"")
    assert main(["w.pth", "--to", "out"]) == 2
    assert "--config: name the configuration of the model that SOURCE holds" in capsys.readouterr().err
