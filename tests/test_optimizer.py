"""The optimizer table, the parameter groups, the schedule and the norm are those of the libraries that we name."""

import math

import pytest
import torch
from models import make_config, tiny_model
from torch import nn
from transformers import Trainer, get_scheduler

from fullft.config import OptionsError, parse_config
from fullft.optimizer import (
    OPTIMIZERS,
    build_optimizer,
    build_schedule,
    clip_gradients,
    estimate_state_bytes,
    global_norm,
    parameter_groups,
)

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


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "warmup_count"), [(0, 0), (3, 3), (0.25, 5)])
def test_the_schedule_is_transformers_own(name: str, warmup: float, warmup_count: int) -> None:
    config = make_config(lr_scheduler_type=name, warmup_steps=warmup, learning_rate=3e-4)
    learning_rate_at = build_schedule(config, total_steps=20)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3e-4)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_count, num_training_steps=20)
    for step in range(1, 21):
        assert learning_rate_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_the_first_step_of_linear_without_warmup_has_the_full_rate() -> None:
    assert build_schedule(make_config(learning_rate=2e-5), total_steps=10)(1) == 2e-5


def test_constant_takes_a_warmup_too() -> None:
    rates = build_schedule(make_config(lr_scheduler_type="constant", warmup_steps=4, learning_rate=1.0), 10)
    assert [rates(step) for step in (1, 2, 5, 10)] == [0.0, 0.25, 1.0, 1.0]


def random_gradients(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((300, 70), (1,), (5, 3, 2), (1 << 20,))]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def test_the_norm_is_summed_in_fp64() -> None:
    parameters = random_gradients()
    exact = math.sqrt(sum((parameter.grad.double() ** 2).sum().item() for parameter in parameters))
    norm = global_norm([parameter.grad for parameter in parameters])
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact, rel=1e-13)


# Wide for fp32 too: torch sums a million squares in fp32, and is off by 1e-5 itself.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_clipping_scales_as_torch_does(dtype: torch.dtype) -> None:
    ours, theirs = random_gradients(dtype), random_gradients(dtype)
    clip_gradients(ours, max_norm=1.0)
    nn.utils.clip_grad_norm_(theirs, max_norm=1.0)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_below_the_limit_are_not_touched(max_norm: float) -> None:
    ours, before = random_gradients(), random_gradients()
    clip_gradients(ours, max_norm=max_norm)
    assert all(torch.equal(our.grad, old.grad) for our, old in zip(ours, before, strict=True))


def take_steps(name: str, dtype: torch.dtype, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_model("llama", dtype)
    # bf16 next to 1.0 has steps of 1/128: a smaller rate would leave the norms where they are.
    learning_rate = 1e-3 if dtype == torch.float32 else 1e-2
    optimizer = build_optimizer(model, make_config(optim=name, learning_rate=learning_rate))
    for step in range(steps):
        ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimizer_moves_every_parameter(name: str, dtype: torch.dtype) -> None:
    before = dict(tiny_model("llama", dtype).named_parameters())
    model, _ = take_steps(name, dtype)
    still = [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])]
    assert not still


def test_adamw_is_torchs() -> None:
    model, _ = take_steps("adamw", torch.float32)
    other = tiny_model("llama", torch.float32)
    decayed, undecayed = [p for p in other.parameters() if p.ndim > 1], [p for p in other.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": undecayed}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        ids = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(step))
        other(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for our, their in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_states_are_8bit_where_they_are_large_and_no_embedding(name: str) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.matrix, self.norm = nn.Embedding(256, 128), nn.Linear(256, 128), nn.LayerNorm(8192)

    model = Large()
    optimizer = build_optimizer(model, make_config(optim=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    dtypes = {key: optimizer.state[parameter]["state1"].dtype for key, parameter in model.named_parameters()}
    assert dtypes["matrix.weight"] == torch.uint8
    assert {dtypes["embedding.weight"], dtypes["norm.weight"], dtypes["matrix.bias"]} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_adamws_states_is_their_size(dtype: torch.dtype) -> None:
    model, optimizer = take_steps("adamw", dtype, steps=1)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    size = sum(moment.numel() * moment.element_size() for moment in moments)
    assert estimate_state_bytes(make_config(), model) == size


def test_hugging_faces_spellings_name_the_same_optimizers() -> None:
    for spelling, ours in {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
    }.items():
        assert parse_config(["--optim", spelling]).optim == ours
    with pytest.raises(OptionsError, match="adamw, adamw_8bit, paged_adamw_8bit"):
        parse_config(["--optim", "lion"])
