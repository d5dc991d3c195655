"""The step is torch's fused AdamW, to the bit; every optimizer moves every parameter."""

import weakref
from pathlib import Path

import pytest
import torch
from models import make_config, optimizer_of, tiny_model
from torch import nn

from fullft.config.declare import by_name
from fullft.config.options import Options
from fullft.model.precision import dtype_of
from fullft.optim.adamw import AdamW
from fullft.optim.build import parameter_groups
from fullft.storage.tiers import Storage

OPTIMIZERS = by_name(Options)["optim"].metadata["choices"]


def take_steps(name: str, steps: int = 3, **options: object) -> tuple[nn.Module, AdamW]:
    config = make_config(optim=name, **options)
    model = tiny_model("llama", dtype_of(config.numerics.weights))
    optimizer = optimizer_of(model, config)
    for step in range(steps):
        ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("masters", ["fp32", "split", "stochastic", "none"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(name: str, masters: str) -> None:
    # bf16 next to 1.0 has steps of 1/128: a smaller rate would leave the norms where they are.
    options = {"precision": "fp32", "learning_rate": 1e-3}
    if masters != "fp32":
        options = {"precision": "bf16-true", "master_weights": masters, "learning_rate": 1e-2}
    model, optimizer = take_steps(name, **options)
    before = dict(tiny_model("llama", model.dtype).named_parameters())
    still = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert not still
    assert optimizer.num_steps == 3 and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_adamw_equals_fused_torch_adamw_to_the_bit(precision: str) -> None:
    """With bf16 weights, moments and update are in bf16 too: that is `--master_weights none`."""
    options = {"precision": precision, "master_weights": "none", "learning_rate": 1e-2, "weight_decay": 0.1}
    model, optimizer = take_steps("adamw", **options)
    other = tiny_model("llama", model.dtype)
    torchs = torch.optim.AdamW(parameter_groups(other, 0.1), lr=1e-2, fused=True)
    for step in range(3):
        ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(step))
        other(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torchs.step()
        torchs.zero_grad()
    for our, their in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(our, their)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.states_of(our)[name], torchs.state[their][name].flatten())
    # The negative control: one step less shows.
    undone, _ = take_steps("adamw", steps=2, **options)
    assert not all(torch.equal(our, their) for our, their in zip(undone.parameters(), other.parameters(), strict=True))


def test_parameter_without_a_gradient_does_not_age() -> None:
    """torch's correction of the moments' bias counts each parameter's own steps."""
    trajectories = []
    for build in (
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
        lambda parameters: AdamW(
            [{"params": parameters, "weight_decay": 0.01}],
            lr=1e-2,
            betas=(0.9, 0.999),
            eps=1e-8,
            moments=lambda one: one.dtype,
            storage=Storage(torch.device("cpu"), Path()),
        ),
    ):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5)) for _ in range(2)]
        optimizer = build(parameters)
        for step in range(6):
            for number, parameter in enumerate(parameters):
                if number == 0 or step in (3, 5):
                    parameter.grad = torch.randn(5)
            optimizer.step()
            optimizer.zero_grad()
        trajectories.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, other) for one, other in zip(*trajectories, strict=True))


def test_closed_optimizer_frees_its_states_at_once() -> None:
    model = tiny_model("llama", torch.bfloat16)
    optimizer = optimizer_of(model, make_config(gradient_accumulation_steps=2))
    model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    states = [weakref.ref(array) for each in optimizer.state.values() for array in each.values()]
    assert states and all(state() is not None for state in states)
    optimizer.close()
    assert all(state() is None for state in states)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
