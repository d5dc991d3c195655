"""Parameter groups, the formats of states and their sizes are those that the options name."""

import pytest
import torch
from models import make_config, optimizer_of, tiny_model
from torch import nn
from transformers import Trainer

from fullft.config.declare import by_name
from fullft.config.options import Options
from fullft.config.parse import parse_config
from fullft.errors import OptionsError
from fullft.model.precision import dtype_of
from fullft.optim.build import estimate_state_bytes, parameter_groups

OPTIMIZERS = by_name(Options)["optim"].metadata["choices"]
FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_skips_what_hugging_face_skips(family: str) -> None:
    model = tiny_model(family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model, weight_decay=0.1)
    expected = set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())  # type: ignore[arg-type]
    assert {names[id(parameter)] for parameter in decayed["params"]} == expected
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_group(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_only_large_matrices_have_8_bit_states(name: str) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.matrix, self.norm = nn.Embedding(256, 128), nn.Linear(256, 128), nn.LayerNorm(8192)

    model = Large()
    optimizer = optimizer_of(model, make_config(optim=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for moment in ("exp_avg", "exp_avg_sq"):
        dtypes = {key: optimizer.state[parameter][moment].dtype for key, parameter in model.named_parameters()}
        assert dtypes["matrix.weight"] == torch.uint8
        assert {dtypes["embedding.weight"], dtypes["norm.weight"], dtypes["matrix.bias"]} == {torch.float32}
    assert optimizer.state[model.matrix.weight]["exp_avg_absmax"].shape == (256 * 128 // 256,)


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {}, {"master_weights": "none"}], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_estimated_state_bytes_are_their_size(name: str, options: dict[str, object]) -> None:
    config = make_config(optim=name, **options)
    model = tiny_model("llama", dtype_of(config.numerics.weights))
    optimizer = optimizer_of(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for states in optimizer.state.values() for state in states.values()]
    size = sum(state.numel() * state.element_size() for state in states)
    assert estimate_state_bytes(model, config.numerics) == size


def test_hugging_face_spellings_name_our_optimizers() -> None:
    for spelling, ours in {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
    }.items():
        assert parse_config(["--optim", spelling]).optim == ours
    with pytest.raises(OptionsError, match="adamw, adamw_8bit, paged_adamw_8bit"):
        parse_config(["--optim", "lion"])
