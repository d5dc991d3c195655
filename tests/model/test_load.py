"""Loading weights is bitwise what `from_pretrained` does, whatever is split or streamed on the way."""

from pathlib import Path

import pytest
import torch
from models import bf16_model, make_config
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import fullft.model.load
from fullft.model.load import load_model
from fullft.storage.tiers import Array, Storage, home_of, host_pieces


def loaded(folder: Path, offload: str = "none", **options: object) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Load, and return the model and copies of all tensors, including the remainders of split ones."""
    config = make_config(offload=offload, activation_checkpointing="full", **options)
    storage = Storage(torch.device("cpu"), folder)
    model = load_model(config, str(folder), storage)
    arrays: dict[str, Array] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        arrays[name] = home_of(parameter)
        if parameter in storage.remainders:
            arrays[f"{name}, remainder"] = storage.remainders[parameter]
    return model, {
        name: torch.cat([piece.flatten().clone() for piece in host_pieces(array)]) for name, array in arrays.items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        values.dtype == other[name].dtype and torch.equal(values, other[name]) for name, values in one.items()
    )


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("qwen2", torch.float16),
        ("gpt2", torch.float32),
        ("gemma2", torch.float16),
        pytest.param("llama", torch.float16, marks=pytest.mark.slow),
        pytest.param("qwen2", torch.float32, marks=pytest.mark.slow),
        pytest.param("gpt2", torch.float16, marks=pytest.mark.slow),
        pytest.param("gemma2", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_weights_split_while_loading_equal_those_split_afterwards(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fullft.model.precision, "_PIECE", 4096)  # so that tensors have several, the last one shorter
    original = bf16_model(family).to(dtype)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) / 1024)  # beyond what bf16 holds
    original.save_pretrained(tmp_path)
    whole, at_once = loaded(tmp_path)
    assert not hasattr(whole, "_weight_conversions")  # from_pretrained has not been asked
    for offload in ("optimizer=host", "optimizer=disk", "parameters=disk,optimizer=disk"):
        assert same(at_once, loaded(tmp_path, offload)[1]), offload
    monkeypatch.setattr(fullft.model.load, "_one_by_one", lambda *_: None)
    theirs, afterwards = loaded(tmp_path)
    assert same(at_once, afterwards)
    assert whole.config.to_dict() == theirs.config.to_dict()
    assert whole.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not same(at_once, loaded(tmp_path, master_weights="none")[1])  # the negative control


@pytest.mark.parametrize("what", ["too many", "converted"])
def test_files_that_need_conversion_go_through_from_pretrained(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bf16_model("llama" if what == "too many" else "mixtral").float().save_pretrained(tmp_path)
    if what == "too many":
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(tensors | {"extra": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tensors = loaded(tmp_path)
    assert hasattr(model, "_weight_conversions")
    assert ("1 tensors that its config.json has no place for, such as extra" in capsys.readouterr().out) == (
        what == "too many"
    )
    assert all(f"{name}, remainder" in tensors for name, _ in model.named_parameters())


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_files_are_cached_only_if_memory_holds_them(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fullft.model.load, "available_host_bytes", lambda: free)
    original = bf16_model("llama")
    original.save_pretrained(tmp_path)
    read: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda file, *more, **named: read.append(file.name) or path_open(file, *more, **named)
    )
    _, tensors = loaded(tmp_path)
    assert read.count("model.safetensors") == (2 if free else 1)  # its header is always read
    assert all(torch.equal(tensors[name], values.detach().flatten()) for name, values in original.named_parameters())
