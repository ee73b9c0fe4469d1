"""Whatever kernel a shipped configuration launches in bf16, benchmarks/compiled.py compiles: the same constants, dtypes
and warps. The configurations run on fake tensors, their ops' bodies on fake CUDA tensors, and launches are recorded."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from benchmarks import compiled
from benchmarks.kernel_cases.case import TYPE_NAMES
from model.kernels.choice import Backends
from model.kernels.op import OPS
from model.kernels.triton import linear_cross_entropy, switchhead_value
from model.kernels.triton.gated_gemm import GemmTiles
from model.kernels.triton.tiles import placed
from model.language_model import LanguageModel
from model.memory import LayerMemory
from pretrain.config.loading import load_config
from pretrain.config.schema import Config
from tests.model.kernels.triton.test_dispatch import _devices, _indexing  # noqa: F401  # fixtures

CONFIGS = Path(__file__).resolve().parents[4] / "configs"
ADDRESSES_ALONE = {"sorted_project_kernel": ("k", "divide"), "sorted_weight_gradient_kernel": ("k", "wide_divide")}
"""Constants of MoA's kernels that the choices of a token decide: rows are slot // k, nothing else depends on them."""

Launch = tuple[str, frozenset[tuple[str, Any]], frozenset[tuple[str, str]], tuple[int, ...]]
"""Kernel, constants, dtypes of pointers, and warps, stages and most registers."""
OpCall = tuple[str, tuple[Any, ...]]


class Described(NamedTuple):
    """A tensor, for comparison."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class OpCalls(TorchDispatchMode):
    """Every call of our ops, tensors as `Described` and lists as tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[OpCall] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "switchall":
            assert not kwargs
            described = [Described(tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in args]
            self.found.add((func._opname, tuple(tuple(a) if isinstance(a, list) else a for a in described)))
        return func(*args, **(kwargs or {}))


def configurations(paths: Iterable[Path], overrides: Sequence[str]) -> Iterator[Config]:
    """One layer of every configuration, each shape once."""
    seen = set()
    for path in paths:
        config = load_config(path, ["model.num_layers=1", *overrides])
        model = config.model
        shape = str((model.attention, model.position, model.feedforward, model.d_model, model.vocab_size))
        if (shape, config.batch.micro_sequences) not in seen:
            seen.add((shape, config.batch.micro_sequences))
            yield config


def op_calls(config: Config, monkeypatch: pytest.MonkeyPatch) -> set[OpCall]:
    """Of a training step."""
    # A memory as long as the chunk.
    monkeypatch.setattr(LayerMemory, "extend", lambda self, hidden, index: torch.cat([hidden, hidden], 1))
    model, sequences = config.model, config.batch.micro_sequences
    has_documents = config.data.document_mask
    backends = Backends.choose("auto", model, device_type="cuda", dtype=torch.bfloat16, document_mask=has_documents)
    with FakeTensorMode(allow_non_fake_inputs=True), OpCalls() as calls:
        torch.set_default_dtype(torch.bfloat16)
        try:
            network = LanguageModel(model, backends=backends)
        finally:
            torch.set_default_dtype(torch.float32)
        tokens = torch.zeros(sequences, model.sequence_length, dtype=torch.int64)
        documents = torch.zeros_like(tokens) if has_documents else None
        network(tokens, tokens, torch.arange(sequences), documents)[0].backward()
    return calls.found


def launches_of(calls: set[OpCall], monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """With the tiles of the kernels' own modules."""
    found: set[Launch] = set()

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3), kwargs.pop("maxnreg", 0)
        parameters = inspect.signature(self.fn)
        given = parameters.bind(*args, **kwargs).arguments
        constants = {
            n: v for n, v in given.items() if v is None or "constexpr" in str(parameters.parameters[n].annotation)
        }
        dtypes = {n: f"*{TYPE_NAMES[v.dtype]}" for n, v in given.items() if isinstance(v, Tensor)}
        found.add(launch(self.fn.__name__, constants, dtypes, *options))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    # Products with an output in fp32, or added to one, for which fake tensors of a CPU build have no answer.
    monkeypatch.setattr(linear_cross_entropy, "multiply", lambda a, b, out, add=False: out)
    monkeypatch.setattr(torch, "addmm", lambda *factors, out: out)
    with FakeTensorMode(), torch.no_grad(), placed([]) as table:
        table.clear()  # what `apply` wrote there is compiled for its own card: benchmarks/compiled_entries.py
        for name, args in calls:
            given = [
                torch.empty(a.shape, dtype=a.dtype, device="cuda") if isinstance(a, Described) else a for a in args
            ]
            OPS[name].body(*("fused" if a == "plain" else a for a in given))  # the model ran on a CPU
    return found


def launch(kernel: str, constants: dict[str, Any], dtypes: dict[str, str], *options: int) -> Launch:
    ignored = ADDRESSES_ALONE.get(kernel, ()) if constants.get("PADDED_E") == 16 else ()
    decide = frozenset((n, v) for n, v in constants.items() if n not in ignored)
    return kernel, decide, frozenset(dtypes.items()), options


def compiled_launches() -> set[Launch]:
    cases = compiled.cases(compiled.case_modules())
    return {
        launch(
            case.kernel.fn.__name__,
            case.constexprs,
            {n: kind for n, kind in case.signature.items() if kind.startswith("*")},
            case.num_warps,
            case.num_stages,
            case.registers,
        )
        for case in cases
    }


def missing(
    paths: Iterable[Path], monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str] = ()
) -> tuple[int, list[str]]:
    """-> how many different launches there are, and those that are not compiled."""
    calls: set[OpCall] = set()
    for config in configurations(paths, overrides):
        calls |= op_calls(config, monkeypatch)
    launched = launches_of(calls, monkeypatch)
    return len(launched), sorted(
        f"{name} {dict(constants)} {rest}" for name, constants, *rest in launched - compiled_launches()
    )


@pytest.mark.parametrize(
    "name",
    ["switchall_1b", "paper/wt103_moa_8heads_47m", "paper/wt103_ablation_vkqo_47m"],
    ids=lambda name: Path(name).name,
)
def test_what_a_configuration_launches_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, absent = missing([CONFIGS / f"{name}.json"], monkeypatch)
    assert launched >= 10 and not absent, "\n".join(absent)


@pytest.mark.parametrize("overrides", [["data.document_mask=true"], ["model.position.memory_chunks=1"]], ids=str)
def test_what_attention_launches_for_documents_and_memory_is_compiled(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shipped configuration has either with RoPE."""
    with monkeypatch.context() as patch:
        plain = missing([CONFIGS / "switchall_1b.json"], patch)[0]
    launched, absent = missing([CONFIGS / "switchall_1b.json"], monkeypatch, overrides)
    of_attention = [name for name in absent if "QUERIES" in name]
    assert launched >= plain + 3 and not of_attention, "\n".join(of_attention)


@pytest.mark.slow
def test_what_all_configurations_launch_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, absent = missing(sorted([*CONFIGS.glob("*.json"), *CONFIGS.glob("paper/*.json")]), monkeypatch)
    assert launched > 150 and not absent, "\n".join(absent)


def test_a_kernel_that_is_not_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compiled_launches()
    sizes = {"x": (4, 128), "scores": (4, 4, 2), "index": (4, 4, 2), "order": (4, 8), "load": (4, 4)}
    sizes |= {"experts": (4, 4, 128, 32)}
    dtypes = {"scores": torch.float32} | dict.fromkeys(("index", "order", "load"), torch.int64)
    tensors = (Described(size, dtypes.get(name, torch.bfloat16)) for name, size in sizes.items())
    call = (*tensors, "triton", "gated")
    assert launches_of({("switchhead_value", call)}, monkeypatch) <= known
    monkeypatch.setattr(switchhead_value, "forward_tiles", lambda *_: GemmTiles(64, 32, 32, 4, 3))
    absent = launches_of({("switchhead_value", call)}, monkeypatch) - known
    assert [kernel for kernel, *_ in absent] == ["value_forward_kernel"]


def test_every_kernel_has_a_case() -> None:
    """Also those that no shipped configuration launches; cases of one name are one case."""
    package = importlib.import_module("model.kernels.triton")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    cases = list(compiled.cases(compiled.case_modules()))
    assert {case.kernel.fn.__name__ for case in cases} == kernels and len(kernels) >= 20
    different = {(case.name, case.kernel.fn.__name__, str(case.constexprs), str(case.signature)) for case in cases}
    assert len({case.name for case in cases}) == len(different) >= 250
