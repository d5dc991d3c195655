"""The optimizer, the parameter groups, the schedule and the norm are those of the libraries that we name."""

import math
import weakref
from pathlib import Path

import pytest
import torch
from models import make_config, optimizer_of, tiny_model
from torch import nn
from transformers import Trainer, get_scheduler

from fullft.config.config import Config
from fullft.config.declare import by_name
from fullft.config.parse import parse_config
from fullft.errors import OptionsError
from fullft.model.parts import PRECISIONS
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_schedule, estimate_state_bytes, parameter_groups
from fullft.optim.gradients import NORM_ROW, NORM_TILE, _sum_in_order
from fullft.storage.tiers import Storage

OPTIMIZERS = by_name(Config)["optim"].metadata["choices"]
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
    # Of the norm: tiles and rows, whole ones and what is left of them.
    shapes = ((300, 70), (1,), (5, 3, 2), (1 << 20,), (0,), (NORM_ROW,), (NORM_TILE + 2 * NORM_ROW + 5,))
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def adamw(parameters: list[nn.Parameter]) -> AdamW:
    """AdamW whose moments have the weights' dtype; `exp_avg` after its first step is linear in the gradients."""
    groups = [{"params": parameters, "weight_decay": 0.1}]
    storage = Storage(torch.device("cpu"), Path())
    return AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, moments=lambda each: each.dtype, storage=storage)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_summed_in_fp64(dtype: torch.dtype) -> None:
    parameters = random_gradients(dtype)
    exact = math.sqrt(sum((parameter.grad.double() ** 2).sum().item() for parameter in parameters))
    norm = adamw(parameters).clip_gradients(max_norm=0)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    optimizer, norms = adamw(random_gradients(dtype)), set()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        norms.add(optimizer.clip_gradients(max_norm=0).item())
    assert len(norms) == 1


def test_nor_does_it_with_tens_of_thousands_of_parameters() -> None:
    """Such as experts with matrices of their own; torch has threads share so long a sum."""
    scalars = list(torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ours, torchs = set(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        ours.add(_sum_in_order(scalars).item())
        torchs.add(torch.stack(scalars).sum().item())
    assert len(ours) == 1 < len(torchs)
    assert ours.pop() == pytest.approx(math.fsum(scalars), rel=1e-13)


def test_a_rehearsed_norm_looks_at_a_tile_only() -> None:
    parameter, other = nn.Parameter(torch.zeros(5 * NORM_TILE)), nn.Parameter(torch.zeros(3))
    for each in (parameter, other):
        each.grad = torch.ones_like(each)
    optimizer = adamw([parameter, other])
    assert optimizer.gradients.norm().item() ** 2 == pytest.approx(5 * NORM_TILE + 3)
    assert optimizer.gradients.norm(only=[parameter]).item() ** 2 == pytest.approx(NORM_TILE)


def test_a_norm_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        adamw([nn.Parameter(torch.zeros(3))]).clip_gradients(max_norm=1.0)


# Wide for fp32 too: torch sums a million squares in fp32, and is off by 1e-5 itself.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_clipping_scales_as_torch_does(dtype: torch.dtype) -> None:
    ours, theirs = random_gradients(dtype), random_gradients(dtype)
    optimizer, torchs = adamw(ours), torch.optim.AdamW(theirs, fused=True)
    norm = optimizer.clip_gradients(max_norm=1.0)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, max_norm=1.0).item(), rel=TOLERANCE[dtype])
    optimizer.step()
    torchs.step()
    for our, their in zip(ours, theirs, strict=True):
        found, expected = optimizer.states_of(our)["exp_avg"], torchs.state[their]["exp_avg"].flatten()
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=0)


def moments_after(parameters: list[nn.Parameter], max_norm: float) -> list[torch.Tensor]:
    optimizer = adamw(parameters)
    optimizer.clip_gradients(max_norm=max_norm)
    optimizer.step()
    return [optimizer.states_of(parameter)["exp_avg"] for parameter in parameters]


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_below_the_limit_are_not_touched(max_norm: float) -> None:
    gradients = [parameter.grad for parameter in random_gradients()]
    for moment, gradient in zip(moments_after(random_gradients(), max_norm), gradients, strict=True):
        assert torch.equal(moment, torch.zeros_like(moment).lerp(gradient.flatten(), 1 - 0.9))
    assert not torch.equal(moment, moments_after(random_gradients(), 1.0)[-1])  # the negative control


def test_one_steps_clipping_does_not_reach_the_next() -> None:
    """A step without `clip_gradients` before it takes the gradients as they are."""
    parameters = random_gradients()
    optimizer = adamw(parameters)
    optimizer.clip_gradients(max_norm=1e-3)
    optimizer.step()
    before = [optimizer.states_of(parameter)["exp_avg"].clone() for parameter in parameters]
    optimizer.step()
    for parameter, moment in zip(parameters, before, strict=True):
        expected = moment.lerp(parameter.grad.flatten(), 1 - 0.9)
        torch.testing.assert_close(optimizer.states_of(parameter)["exp_avg"], expected, rtol=1e-5, atol=1e-8)


def take_steps(name: str, steps: int = 3, **options: object) -> tuple[nn.Module, AdamW]:
    config = make_config(optim=name, **options)
    model = tiny_model("llama", PRECISIONS[config.precision].weights)
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
def test_adamw_is_torchs_fused_one_to_the_bit(precision: str) -> None:
    """With bf16 weights, moments and update in bf16 too: that is `--master_weights none`."""
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
    # The negative control: one more step would be noticed.
    undone, _ = take_steps("adamw", steps=2, **options)
    assert not all(torch.equal(our, their) for our, their in zip(undone.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_states_are_8bit_where_they_are_large_and_no_embedding(name: str) -> None:
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
def test_the_estimate_of_the_states_is_their_size(name: str, options: dict[str, object]) -> None:
    model, optimizer = take_steps(name, steps=1, **options)
    states = [state for states in optimizer.state.values() for state in states.values()]
    size = sum(state.numel() * state.element_size() for state in states)
    assert estimate_state_bytes(make_config(optim=name, **options), model) == size


def test_hugging_faces_spellings_name_the_same_optimizers() -> None:
    for spelling, ours in {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
    }.items():
        assert parse_config(["--optim", spelling]).optim == ours
    with pytest.raises(OptionsError, match="adamw, adamw_8bit, paged_adamw_8bit"):
        parse_config(["--optim", "lion"])


def test_a_parameter_without_a_gradient_does_not_age() -> None:
    """As in torch, whose correction of the moments' bias counts each parameter's own steps."""
    courses = []
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
        courses.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(one, other) for one, other in zip(*courses, strict=True))


def test_a_closed_optimizer_frees_its_states_at_once() -> None:
    model = tiny_model("llama", torch.bfloat16)
    optimizer = optimizer_of(model, make_config(gradient_accumulation_steps=2))
    model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    states = [weakref.ref(array) for each in optimizer.state.values() for array in each.values()]
    assert states and all(state() is not None for state in states)
    optimizer.close()
    assert all(state() is None for state in states)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
