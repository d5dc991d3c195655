"""Private APIs of libraries: each exists in the installed version, and stands in one file, for one reason.

Names that begin with an underscore are found by themselves. Of undocumented names without one, the table lists those
known; see `PUBLIC_LOOKING`.
"""

import argparse
import ast
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
import torch
import torch.distributed.fsdp
import transformers
import transformers.core_model_loading
import transformers.masking_utils
import transformers.modeling_utils
import transformers.utils.hub

ROOT = Path(__file__).parent.parent
SOURCES = {str(file.relative_to(ROOT)): file for file in (ROOT / "train.py", *sorted((ROOT / "fullft").rglob("*.py")))}


class Private(NamedTuple):
    """A private API: of which library, in which file, why, and how to find it."""

    library: str
    file: str
    reason: str
    find: Callable[[], Any]


def module(name: str) -> Any:
    return __import__(name, fromlist=["_"])


FAKE, MODES, TREES = "torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch.utils._pytree"
LOAD, CHOICE = "fullft/model/load.py", "fullft/attention/choice.py"
TRACING, TRACKER = "fullft/tracing.py", "fullft/memory/tracker.py"
COMPILATION, CHECKPOINTING = "fullft/transforms/compilation.py", "fullft/transforms/activation_checkpointing.py"
FILES = "fullft/model/weight_files.py"
KERNELS, POSITIONS = "fullft/attention/kernels.py", "fullft/attention/positions.py"
FLASH = "flash_attn.flash_attn_interface"
SNAPSHOT = "fullft/memory/snapshot.py"
COLLECTIVES, RANKS = "fullft/memory/collectives.py", "fullft/memory/planned_ranks.py"
JOINING, GROUPS = "fullft/run/joining.py", "torch.distributed.distributed_c10d"
LOAD_ROWS, SHARDING = "fullft/model/load_rows.py", "fullft/transforms/sharding.py"
FSDP = "torch.distributed.fsdp._fully_shard._fsdp_state"


def lines_of_reduction() -> str:
    """Find what rounds sums over ranks: the dtype that `sharding.py` sets is read there."""
    source = inspect.getsource(module("torch.distributed.fsdp._fully_shard._fsdp_param_group").FSDPParamGroup)
    assert "self._orig_dtype," in source
    return source


PRIVATE = {
    "FakeTensor": Private("torch", TRACING, "tells fake tensors from real ones", lambda: module(FAKE).FakeTensor),
    "FakeTensorMode": Private("torch", TRACING, "plans run without bytes", lambda: module(FAKE).FakeTensorMode),
    "_grouped_mm": Private(
        "torch", TRACING, "experts are multiplied in any dtype", lambda: torch.ops.aten._grouped_mm.default
    ),
    "TorchDispatchMode": Private("torch", TRACKER, "sees every operator", lambda: module(MODES).TorchDispatchMode),
    "_disable_current_modes": Private(
        "torch",
        "fullft/optim/adamw_8bit.py",
        "tables and graphs are real while a plan is traced",
        lambda: module(MODES)._disable_current_modes,
    ),
    "is_in_torch_dispatch_mode": Private(
        "torch", COMPILATION, "what is tracked runs uncompiled", lambda: module(MODES).is_in_torch_dispatch_mode
    ),
    "tree_leaves": Private(
        "torch", CHECKPOINTING, "finds the tensors in any operator's outputs", lambda: module(TREES).tree_leaves
    ),
    "FailOnRecompileLimitHit": Private(
        "torch", COMPILATION, "a failing compiler", lambda: module("torch._dynamo.exc").FailOnRecompileLimitHit
    ),
    "TorchDynamoException": Private(
        "torch", COMPILATION, "a failing compiler", lambda: module("torch._dynamo.exc").TorchDynamoException
    ),
    "_config": Private(
        "torch",
        COMPILATION,
        "one graph for all lengths: equal sizes are not taken for one",
        lambda: module("torch.fx.experimental._config").use_duck_shape,
    ),
    "InductorError": Private(
        "torch", COMPILATION, "a failing compiler", lambda: module("torch._inductor.exc").InductorError
    ),
    "_softmax_backward_data": Private(
        "torch",
        "fullft/attention/documents.py",
        "softmax's backward in place, in one pass",
        lambda: torch._softmax_backward_data,
    ),
    "_flash_attention_forward": Private(
        "torch", KERNELS, "packed attention", lambda: torch.ops.aten._flash_attention_forward.default
    ),
    "_flash_attention_backward": Private(
        "torch", KERNELS, "its gradients", lambda: torch.ops.aten._flash_attention_backward.default
    ),
    "_flash_attn_varlen_forward": Private(
        "flash_attn", KERNELS, "packed attention with a soft cap", lambda: module(FLASH)._flash_attn_varlen_forward
    ),
    "_flash_attn_varlen_backward": Private(
        "flash_attn", KERNELS, "its gradients", lambda: module(FLASH)._flash_attn_varlen_backward
    ),
    "_to_copy": Private("torch", TRACKER, "autocast's copies", lambda: torch.ops.aten._to_copy.default),
    "_unsafe_view": Private("torch", TRACKER, "a slow operator of plans", lambda: torch.ops.aten._unsafe_view.default),
    "_schema": Private(
        "torch", CHECKPOINTING, "which arguments an operator overwrites", lambda: torch.ops.aten.mm.default._schema
    ),
    "_cdata": Private("torch", CHECKPOINTING, "names a storage", lambda: torch.empty(0).untyped_storage()._cdata),
    "_allgather_base_": Private(
        "torch", COLLECTIVES, "what ranks gather is counted", lambda: torch.ops.c10d._allgather_base_.default
    ),
    "_reduce_scatter_base_": Private(
        "torch", COLLECTIVES, "so is what they sum", lambda: torch.ops.c10d._reduce_scatter_base_.default
    ),
    "FakeStore": Private(
        "torch",
        RANKS,
        "ranks of a plan are not there",
        lambda: module("torch.testing._internal.distributed.fake_pg").FakeStore,
    ),
    "_fsdp_param": Private(
        "torch",
        RANKS,
        "a plan cuts each weight once, whatever the number of ranks",
        lambda: module("torch.distributed.fsdp._fully_shard._fsdp_param")._chunk_with_empty,
    ),
    "_record_memory_history": Private(
        "torch",
        SNAPSHOT,
        "documented at docs.pytorch.org/docs/stable/torch_cuda_memory.html",
        lambda: torch.cuda.memory._record_memory_history,
    ),
    "_dump_snapshot": Private("torch", SNAPSHOT, "documented there too", lambda: torch.cuda.memory._dump_snapshot),
    "_set_pg_timeout": Private(
        "torch", JOINING, "steps wait less long for other ranks", lambda: module(GROUPS)._set_pg_timeout
    ),
    "_world": Private("torch", JOINING, "all groups that a rank is in", lambda: module(GROUPS)._world.pg_map),
    "_device_types": Private(
        "torch", JOINING, "whether a group has NCCL", lambda: torch.distributed.ProcessGroup._device_types
    ),
    "_get_backend": Private(
        "torch", JOINING, "NCCL's part of a group", lambda: torch.distributed.ProcessGroup._get_backend
    ),
    "_attn_implementation": Private(
        "transformers",
        CHOICE,
        "how a model attends",
        lambda: inspect.getattr_static(transformers.PreTrainedConfig, "_attn_implementation"),
    ),
    "_supports_attention_backend": Private(
        "transformers",
        CHOICE,
        "whether another attention may be registered",
        lambda: transformers.LlamaForCausalLM._supports_attention_backend,
    ),
    "_supports_sdpa": Private(
        "transformers",
        CHOICE,
        "whether its attention takes no memory by the square of a row's tokens",
        lambda: transformers.LlamaForCausalLM._supports_sdpa,
    ),
    "_is_stateful": Private(
        "transformers",
        CHOICE,
        "whether tokens leave a state behind that no position resets",
        lambda: transformers.JambaForCausalLM._is_stateful,
    ),
    "_model_mapping": Private(
        "transformers",
        "fullft/model/source.py",
        "which configs are those of causal language models",
        lambda: transformers.AutoModelForCausalLM._model_mapping,
    ),
    "_keys_to_ignore_on_load_unexpected": Private(
        "transformers",
        LOAD_ROWS,
        "tensors of files that from_pretrained leaves out",
        lambda: transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected,
    ),
    "_get_fsdp_state": Private(
        "torch",
        SHARDING,
        "FSDP settles its parameters before the optimizer takes them",
        lambda: module("torch.distributed.fsdp").FSDPModule._get_fsdp_state,
    ),
    "_orig_dtype": Private("torch", SHARDING, "the same", lines_of_reduction),
    "_local_tensor": Private(
        "torch",
        "fullft/storage/tiers.py",
        "a rank's rows as they are, without a step of autograd",
        lambda: "_local_tensor" in module("torch.distributed.tensor").DTensor.__slots__ or None,
    ),
    "_lazy_init": Private("torch", SHARDING, "so does this", lambda: module(FSDP).FSDPState._lazy_init),
    "_fsdp_param_groups": Private(
        "torch", SHARDING, "sums over ranks are rounded unless their dtype is set there", lines_of_reduction
    ),
    "_keep_in_fp32_modules_strict": Private(
        "transformers",
        LOAD_ROWS,
        "modules that stay in fp32",
        lambda: transformers.PreTrainedModel._keep_in_fp32_modules_strict,
    ),
    "_keys_to_ignore_on_save": Private(
        "transformers",
        LOAD,
        "tensors that save_pretrained leaves out",
        lambda: transformers.PreTrainedModel._keys_to_ignore_on_save,
    ),
    "_raise_exceptions_for_missing_entries": Private(
        "transformers", FILES, "a missing file is None", lambda: hub_argument("_raise_exceptions_for_missing_entries")
    ),
    "_raise_exceptions_for_connection_errors": Private(
        "transformers", FILES, "so it is offline", lambda: hub_argument("_raise_exceptions_for_connection_errors")
    ),
    "_fingerprint": Private(
        "datasets",
        "fullft/data/rows.py",
        "the key of cached rows",
        lambda: datasets.Dataset.from_dict({"a": [1]})._fingerprint,
    ),
    "_compile_jinja_template": Private(
        "transformers",
        "fullft/data/template.py",
        "the environment that knows the tags of chat templates",
        lambda: module("transformers.utils.chat_template_utils")._compile_jinja_template,
    ),
    "_format_action_invocation": Private(
        "argparse",
        "fullft/config/parse.py",
        "the help names a value once per option",
        lambda: argparse.HelpFormatter._format_action_invocation,
    ),
}
# Undocumented, although no underscore says so.
PUBLIC_LOOKING = {
    "revert_weight_conversion": Private(
        "transformers",
        LOAD,
        "files hold weights as they came",
        lambda: transformers.core_model_loading.revert_weight_conversion,
    ),
    "remove_tied_weights_from_state_dict": Private(
        "transformers",
        LOAD,
        "tied weights are saved once",
        lambda: transformers.modeling_utils.remove_tied_weights_from_state_dict,
    ),
    "allreduce_": Private("torch", COLLECTIVES, "what ranks sum is counted", lambda: torch.ops.c10d.allreduce_.default),
    "chunk_cat": Private("torch", COLLECTIVES, "gradients on their way", lambda: torch.ops.fsdp.chunk_cat.default),
    "unbox": Private(
        "torch", COLLECTIVES, "the ranks that an operator concerns", lambda: torch.distributed.ProcessGroup.unbox
    ),
    "find_packed_sequence_indices": Private(
        "transformers",
        POSITIONS,
        "reads positions from the device, and of a plan's there are no values",
        lambda: transformers.masking_utils.find_packed_sequence_indices,
    ),
    "get_error": Private(
        "torch",
        JOINING,
        "a collective of NCCL that has failed or timed out; CPU builds have only the kinds",
        lambda: [getattr(module("torch._C._distributed_c10d").ErrorType, kind) for kind in ("SUCCESS", "TIMEOUT")],
    ),
}
ALL = PRIVATE | PUBLIC_LOOKING
PUBLIC = {"_fields", "_replace", "_exit", "_current_frames"}  # of named tuples, os and sys: documented


def hub_argument(name: str) -> inspect.Parameter:
    return inspect.signature(transformers.utils.hub.cached_files).parameters[name]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_in(source: str) -> Iterator[tuple[str, bool]]:
    """Yield the names that code takes from elsewhere, and whether each is, or lies in, something private."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            parts = [each.name.split(".") for each in node.names]
            yield from ((path[-1], any(map(is_private, path))) for path in parts)
        elif isinstance(node, ast.ImportFrom):
            is_own = (node.module or "").startswith("fullft")
            lies_in_private = not is_own and any(map(is_private, (node.module or "").split(".")))
            yield from ((each.name, lies_in_private or is_private(each.name)) for each in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr, is_private(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg, is_private(node.arg)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            yield name, is_private(name)
        elif isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Attribute) for base in node.bases):
            # A method may replace a private one of a library's class.
            yield from ((each.name, each.name in ALL) for each in node.body if isinstance(each, ast.FunctionDef))


@pytest.fixture(scope="module")
def used() -> dict[str, dict[str, bool]]:
    """The names that each file takes from elsewhere, and whether each is private."""
    used: dict[str, dict[str, bool]] = {}
    for file, path in SOURCES.items():
        names = used[file] = {}
        for name, is_private in names_in(path.read_text()):
            names[name] = names.get(name, False) or is_private
    return used


@pytest.mark.parametrize("name", ALL)
def test_private_api_exists_in_the_installed_version(name: str) -> None:
    private = ALL[name]
    if private.library == "flash_attn" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed: torch's kernel or blocks are used without")
    installed = "Python's own" if private.library == "argparse" else version(private.library)
    try:
        private.find()
    except Exception as error:
        pytest.fail(f"{private.library} {installed} has no {name} ({error}); {private.file} needs it: {private.reason}")


@pytest.mark.parametrize("name", ALL)
def test_private_api_is_used_in_one_file(name: str, used: dict[str, dict[str, bool]]) -> None:
    assert [file for file, names in used.items() if name in names] == [ALL[name].file]


def test_no_other_private_api_is_used(used: dict[str, dict[str, bool]]) -> None:
    known = ALL.keys() | PUBLIC
    unknown = {(file, name) for file, names in used.items() for name in names if names[name] and name not in known}
    assert not unknown


@pytest.mark.parametrize(
    "source",
    [
        "from torch._inductor import config",
        "import torch._dynamo",
        "from torch.optim.adamw import _fused_adamw_",
        "model._parameters",
        "getattr(model, '_buffers')",
        "call(_unknown=1)",
    ],
)
def test_scan_finds_private_names(source: str) -> None:
    """The negative control."""
    assert any(is_private for _, is_private in names_in(source))
