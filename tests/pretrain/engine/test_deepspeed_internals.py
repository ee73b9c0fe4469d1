"""What pretrain uses of DeepSpeed that DeepSpeed does not document is there in the installed version.

The table is the list to go through when the version in pyproject.toml changes. A name that is gone is said here, with
its file, before a run meets it; that it still means the same is for the tests of layouts and checkpoints to show.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.state import LOSS_SCALER_FIELDS
from pretrain.engine import build

ROOT = Path(__file__).resolve().parents[3]
DEEPSPEED = {
    "utils.mixed_precision_linkage": "_hp_mapping",
    "utils.tensor_fragment": "param_group_index hp_fragment_address lp_fragment_address start numel",
    "utils.groups": "mpu _EXPERT_PARALLEL_GROUP _EXPERT_PARALLEL_GROUP_RANKS _EXPERT_DATA_PARALLEL_GROUP "
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
    "runtime.engine": "get_global_grad_norm zero_optimization_stage fp16_enabled _do_optimizer_sanity_check "
    "_take_model_step allreduce_no_retain zero_cpu_offload timers",
    "runtime.pipe.engine": "train_batch eval_batch _allocate_or_extend_buffers _grad_layer_buf _recv_tensor_meta",
    "utils.timer": "NoopTimer",
    "runtime.pipe.module": "_grid _topo _set_bounds _partition_layers forward_funcs parts global_rank "
    "get_tied_weights_and_groups",
    "runtime.pipe.topology": "pp_group dp_group slice_group",
    "runtime.zero.stage_1_and_2": "check_grad_overflow overflow loss_scale param_groups use_grad_accum_attribute "
    "_fill_param_grad_accum_attribute grad_accum update_lp_params averaged_gradients reset_cpu_buffers "
    "_record_gradient_stream overlap_comm partition_gradients "
    "flatten unflatten check_overflow unscale_and_clip_grads has_moe_layers cpu_offload mpu "
    "is_invalid_grad_norm get_grad_norm_direct is_model_parallel_parameter model_parallel_rank dp_process_group "
    "_model_parallel_all_reduce _zero_padding scaled_global_norm bit16_groups params_in_partition "
    "param_buffer_of_bit16_for_cpu_offload_groups temp_grad_buffer_for_cpu_offload",
    "runtime.zero.stage3": "grad_position get_param_id fp32_partitioned_groups_flat overflow "
    "_reassign_or_swap_out_partitioned_parameters checkpoint_event_prologue checkpoint_event_epilogue "
    "get_grad_norm_direct model_parallel_rank offload_optimizer is_model_parallel_parameter "
    "grad_partitions_flat_buffer",
    "runtime.zero.partition_parameters": "ds_process_group ds_tensor ds_numel ds_shape ds_persist",
    "runtime.fp16.loss_scaler": "cur_scale cur_iter last_overflow_iter cur_hysteresis raise_error_at_min_scale",
    "runtime.bf16_optimizer": "overflow update_lp_params fp32_groups_gradients_flat",
    "moe.layer": "set_deepspeed_parallelism num_experts num_local_experts ep_size expert_group_name",
    "ops": "__compatible_ops__",
    "runtime.compiler": "compile",
    "comm.comm": "new_group cdb",
}
"""Module of DeepSpeed -> attributes, functions and globals that stand in it."""
ENGINE, PIPELINE, ZERO = "runtime.engine", "runtime.pipe.engine", "runtime.zero.stage_1_and_2"
REPLACED = {
    (ENGINE, "_do_optimizer_sanity_check"): ("self basic_optimizer", ENGINE),
    (ENGINE, "allreduce_no_retain"): ("self bucket dp_group numel_per_bucket dp_world_size", ENGINE),
    (ENGINE, "_take_model_step"): ("self lr_kwargs", PIPELINE),
    (PIPELINE, "_recv_tensor_meta"): ("self send_stage", PIPELINE),
    ("runtime.pipe.module", "_partition_layers"): ("self method", "runtime.pipe.module"),
    ("runtime.pipe.module", "get_tied_weights_and_groups"): ("self", PIPELINE),
    (ZERO, "_record_gradient_stream"): ("self tensor stream", ZERO),
    (ZERO, "reset_cpu_buffers"): ("self", ZERO),
    (ZERO, "get_grad_norm_direct"): ("self gradients params norm_type", ZERO),
    (ZERO, "scaled_global_norm"): ("self norm_type", ZERO),
    (ZERO, "check_overflow"): ("self partition_gradients", ZERO),
    (ZERO, "unscale_and_clip_grads"): ("self grad_groups_flat total_norm", ZERO),
    (ZERO, "_fill_param_grad_accum_attribute"): ("self param", ZERO),
    ("runtime.zero.stage3", "get_grad_norm_direct"): ("self gradients params norm_type", "runtime.zero.stage3"),
    ("runtime.utils", "is_invalid_grad_norm"): ("norm", ZERO),
    ("runtime.zero.utils", "assert_ints_same_as_other_ranks"): ("ints", "runtime.zero.partitioned_param_coordinator"),
    ("runtime.compiler", "compile"): ("", "runtime.zero.muon.original_muon"),
    ("comm.comm", "new_group"): ("ranks", "runtime.pipe.topology"),
    ("accelerator.abstract_accelerator", "is_fp16_supported"): ("self", ENGINE),
    ("moe.layer", "set_deepspeed_parallelism"): ("self use_data_before_expert_parallel_", ENGINE),
}
"""(Module of DeepSpeed, function that ours takes the place of) -> its arguments, and a module that calls it: ours would
no longer run, without a word, where nobody called it."""


def file_of(module: str) -> Path:
    package = importlib.util.find_spec("deepspeed")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def defined(path: Path) -> set[str]:
    """Names that a file defines, imports, assigns to (also as attributes), or declares as fields."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("__"):
            found.add(node.value)  # of a module's __getattr__
    return found


def foreign_private_names(path: Path) -> Iterator[str]:
    """`x._name` of a file, where x is neither self nor a module of torch or Python."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if not (isinstance(root, ast.Name) and root.id in ("self", "cls", "torch", "os", "argparse")):
                yield node.attr
            elif isinstance(node.value, ast.Attribute) and isinstance(root, ast.Name) and root.id == "self":
                yield node.attr  # self.engine._name


@pytest.mark.parametrize("module", DEEPSPEED)
def test_the_installed_version_has_them(module: str) -> None:
    missing = set(DEEPSPEED[module].split()) - defined(file_of(module))
    assert not missing, f"deepspeed.{module} no longer has {sorted(missing)}"


@pytest.mark.parametrize("module, name", REPLACED)
def test_what_is_replaced_is_called_as_before(module: str, name: str) -> None:
    arguments, caller = REPLACED[module, name]
    nodes = list(ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))))
    found = [n.args for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name]
    assert [" ".join(a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs]) for args in found] == [arguments]
    assert not any(args.vararg or args.kwarg for args in found)
    calls = [n.func for n in ast.walk(ast.parse(file_of(caller).read_text())) if isinstance(n, ast.Call)]
    assert name in {getattr(function, "attr", getattr(function, "id", "")) for function in calls}


def test_every_private_name_that_is_used_is_in_the_table() -> None:
    listed = {name for names in DEEPSPEED.values() for name in names.split()}
    files = sorted((ROOT / "pretrain").rglob("*.py"))
    ours = set().union(*map(defined, files))
    used = {name: path.relative_to(ROOT) for path in files for name in foreign_private_names(path)}
    assert "_hp_mapping" in used, "nothing was found: the test is blind"
    # NamedTuple's own, those of torch's tensors and operators, the memory's, and one that transformers documents.
    others = {"_asdict", "_replace", "_fields", "_version", "_cdata", "_schema", "_written", "_attn_implementation"}
    unlisted = {name: str(path) for name, path in used.items() if name not in listed | ours | others}
    assert not unlisted, f"whose are these? If DeepSpeed's, add them to DEEPSPEED: {unlisted}"


def test_gradients_are_averaged_unless_a_rank_holds_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of which this rank alone has its share are still divided by the number of all ranks' sequences, as they
    are in a pipeline with bf16 (test_pipeline.py::test_bf16_stays_near_fp32_on_eight_ranks)."""
    averaged: list[dict[str, object]] = []
    engine = SimpleNamespace(allreduce_no_retain=lambda bucket, dp_group, **options: averaged.append(options))
    build._average_only_over_others(engine)
    monkeypatch.setattr(build.dist, "get_world_size", int)  # in place of a group stands its size
    for size, options in ((1, {}), (1, {"dp_world_size": 1}), (1, {"dp_world_size": 2}), (2, {})):
        engine.allreduce_no_retain([torch.ones(3)], size, numel_per_bucket=7, **options)
    assert averaged == [{"numel_per_bucket": 7, "dp_world_size": 2}, {"numel_per_bucket": 7}]


def test_muon_is_imported_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every ZeRO optimizer imports it; torch.compile, even of what is never called, imports TorchInductor."""
    import deepspeed.runtime.compiler

    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
        monkeypatch.delitem(sys.modules, name)
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", compiled.append)
    build.import_muon_without_a_compiler()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    assert isinstance(MuonWithAuxAdam, type) and not compiled
    assert deepspeed.runtime.compiler.compile() is torch.compile


def test_a_checkpoint_has_all_that_changes_in_the_search_for_a_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps that overflow and of others; what it left out would begin anew on a resume."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))
    scaler = loss_scaler.DynamicLossScaler(2.0**16, 2, 1.0, delayed_shift=2, consecutive_hysteresis=False)
    before, changed = dict(vars(scaler)), set[str]()
    for overflow in (True, True, False, False, False, True):
        scaler.update_scale(overflow)
        changed |= {key for key, value in vars(scaler).items() if value != before[key]}
    assert changed == set(LOSS_SCALER_FIELDS)
