"""Attention within packed documents, as it is on CUDA, gives what an explicit mask gives: with each of its kernels."""

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import flash_attention
import pytest
import torch
from families import model_of, of_experts
from models import VOCABULARY, make_config, summed_loss, tiny_model
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from fullft.attention import blocks, interface, kernels, packed
from fullft.attention.choice import attend_packed
from fullft.attention.positions import documents_of
from fullft.data.micro_batch import Documents
from fullft.model.parts import decoder_layers
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "phi", "gemma2"]  # fewer key heads, windows of 8, biases, a soft cap
LENGTHS = {
    "many": [[7, 3, 1, 7, 3, 3], [17, 7], [9, 10, 5]],
    "one": [[24], [24], [24]],
    "single tokens": [[1] * 24, [23, 1], [1, 23]],
}
HEADS, KEY_HEADS, WIDTH = 6, 2, 16
KERNELS = ["torch", "flash-attn", "blocks", "one block"]
CAPPED = [(kernel, 2.0) for kernel in KERNELS[1:]]  # torch's kernel knows no soft cap


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flash attention, for float64 too."""
    library = flash_attention.register()
    monkeypatch.setattr(kernels, "_HALVES", (torch.bfloat16, torch.float64))
    yield
    library._destroy()


@pytest.fixture
def use(flash: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a kernel by its name the best one there is."""

    def used(name: str) -> None:
        monkeypatch.setattr(kernels, "_torch_has_flash", lambda: name == "torch")
        monkeypatch.setattr(kernels, "_flash_attn_is_installed", lambda: name == "flash-attn")
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attention.FlashAttn)
        size = 5 if name == "blocks" else 72  # within documents and over their bounds; or all tokens
        monkeypatch.setattr(blocks, "_FEWEST", size)
        monkeypatch.setattr(blocks, "_MOST", size)

    return used


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def vectors(lengths: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    positions = positions_of(lengths)
    made = [torch.randn(*positions.shape, heads, WIDTH).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [each.transpose(1, 2).requires_grad_() for each in made], positions


def with_a_mask(
    inputs: list[torch.Tensor], positions: torch.Tensor, window: int | None, softcap: float | None
) -> torch.Tensor:
    """The definition, for [batch, heads, sequence, width]."""
    query, key, value = inputs
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value))
    scores = query @ key.mT * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    places = torch.arange(query.shape[2])
    document = (positions == 0).cumsum(1)
    seen = (places[:, None] >= places) & (document[:, :, None] == document[:, None])
    if window is not None:
        seen &= places[:, None] < places + window
    return torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), -1) @ value


def with_gradients(attended: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    above = torch.randn(attended.shape, dtype=torch.float64)
    return [attended.detach(), *torch.autograd.grad(attended, inputs, above.to(attended.dtype))]


def largest_error(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((mine - other).norm() / other.norm()) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("kernel", "softcap"), [(kernel, None) for kernel in KERNELS] + CAPPED)
def test_operator_equals_an_explicit_mask(
    kernel: str,
    lengths: list[list[int]],
    window: int | None,
    softcap: float | None,
    use: Callable[[str], None],
) -> None:
    """The negative controls: other bounds, another window, no soft cap."""
    use(kernel)
    inputs, positions = vectors(lengths)
    expected = with_gradients(with_a_mask(inputs, positions, window, softcap), inputs)

    def error(positions: torch.Tensor, window: int | None, softcap: float | None) -> float:
        attended = packed.packed_attention(*inputs, 0.3, positions, window, softcap)[0]
        return largest_error(with_gradients(attended, inputs), expected)

    assert error(positions, window, softcap) < 1e-13
    elsewhere = positions_of([[6, 18], [6, 18], [6, 18]])
    assert error(elsewhere, window, softcap) > 1e-3
    assert lengths == LENGTHS["single tokens"] or error(positions, 3 if window else 5, softcap) > 1e-3
    assert softcap is None or error(positions, window, 0.5) > 1e-4


@pytest.mark.parametrize("kernel", ["torch", "flash-attn", "blocks"])
def test_bf16_error_is_that_of_rounding(kernel: str, use: Callable[[str], None]) -> None:
    use(kernel)
    inputs, positions = vectors(LENGTHS["many"], torch.bfloat16)
    exact = [each.detach().double().requires_grad_() for each in inputs]
    expected = with_gradients(with_a_mask(exact, positions, 4, None), exact)
    attended = packed.packed_attention(*inputs, 0.3, positions, 4, None)[0]
    assert largest_error(with_gradients(attended, inputs), expected) < 2e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_operators_pass_the_opcheck_of_torch(kernel: str, use: Callable[[str], None]) -> None:
    """In a graph they have the shapes, strides and gradients that they have outside."""
    use(kernel)
    inputs, positions = vectors(LENGTHS["many"])
    arguments = (0.3, positions, 4, None)
    opcheck(packed.packed_attention, (*inputs, *arguments))
    result, logsumexp = (each.detach() for each in packed.packed_attention(*inputs, *arguments))
    outside = [each.detach() for each in (inputs[0], *inputs)]
    opcheck(packed._backward_operator, (*outside, result, logsumexp, positions, 0.3, 4, None))


@pytest.mark.parametrize("heads_first", [False, True])
def test_result_lies_in_memory_by_token(heads_first: bool, use: Callable[[str], None]) -> None:
    """However the inputs lie: the next layer's product takes it without a copy."""
    use("torch")
    inputs, positions = vectors(LENGTHS["many"])
    laid = [each.contiguous() if heads_first else each for each in inputs]
    attended = packed.packed_attention(*laid, 0.3, positions, None, None)[0]
    assert attended.transpose(1, 2).is_contiguous()
    assert torch.equal(attended, packed.packed_attention(*inputs, 0.3, positions, None, None)[0])


# ---------------------------------------------------------------------------------------------- within models


def packed_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"input_ids": torch.randint(1, VOCABULARY, (3, 24)), "position_ids": positions_of(LENGTHS["many"])}


def results(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits, and the gradients of some function of them."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.sin().sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("kernel", ["torch", "blocks"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_attend_as_with_a_mask(family: str, kernel: str, use: Callable[[str], None]) -> None:
    """Gemma-2's own attention takes its softmax in fp32. The negative control: one document per row."""
    use(kernel)
    model, batch = tiny_model(family), packed_inputs()
    theirs = results(model, batch)
    assert attend_packed(model, "cuda")
    assert largest_error(results(model, batch), theirs) < (1e-5 if family == "gemma2" else 1e-12)
    batch["position_ids"] = torch.arange(24).expand(3, -1)
    assert largest_error(results(model, batch), theirs) > 1e-3


def test_values_narrower_than_keys_need_no_mask(use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's."""
    use("torch")
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "first_k_dense_replace": 4}
    model, batch = model_of(of_experts("deepseek_v3", **widths), torch.float64), packed_inputs()
    theirs = results(model, batch)
    assert attend_packed(model, "cuda")
    monkeypatch.setattr(interface, "mask_of", None)
    assert largest_error(results(model, batch), theirs) < 1e-12


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_generation_stays_the_same(family: str) -> None:
    model = tiny_model(family, torch.float32).eval()
    prompts = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(prompts, **options)
    assert attend_packed(model, "cuda")
    assert torch.equal(model.generate(prompts, **options), theirs)


def test_documents_stay_apart_with_dropout() -> None:
    """Here no kernel is used, but a mask, with the window."""
    model, batch = tiny_model("mistral"), packed_inputs()
    for layer in decoder_layers(model):
        layer.self_attn.attention_dropout = 0.5
    attend_packed(model, "cuda")
    torch.manual_seed(3)
    logits = model(**batch, use_cache=False).logits
    batch["input_ids"][1, :8] += 1
    torch.manual_seed(3)
    changed = model(**batch, use_cache=False).logits
    # Four layers with windows of 8 see 29 tokens: all of the first document, and none of the next.
    assert torch.equal(logits[1, 17:], changed[1, 17:]) and not torch.equal(logits[1, :17], changed[1, :17])
    assert not torch.allclose(logits, model.eval()(**batch, use_cache=False).logits)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_attention_keeps_gradients_bitwise(mode: str, use: Callable[[str], None]) -> None:
    use("torch")
    model = tiny_model("qwen2")
    attend_packed(model, "cuda")
    ids = packed_inputs()["input_ids"]
    plain = summed_loss(model, ids)
    plain.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
    summed_loss(model, ids).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# ---------------------------------------------------------------------------------------------- which kernel, how large


@pytest.mark.parametrize(
    ("dtype", "width", "softcap", "card", "installed", "expected"),
    [
        (torch.bfloat16, 64, None, (9, 0), False, kernels.TORCH_FLASH),
        (torch.float16, 256, None, (8, 0), True, kernels.TORCH_FLASH),
        (torch.bfloat16, 128, None, None, False, kernels.TORCH_FLASH),  # a plan's card, which is not here
        (torch.bfloat16, 128, 50.0, (9, 0), True, kernels.FLASH_ATTN),
        (torch.bfloat16, 128, 50.0, (9, 0), False, kernels.BLOCKS),
        (torch.float32, 64, None, (9, 0), True, kernels.BLOCKS),
        (torch.bfloat16, 264, None, (9, 0), True, kernels.BLOCKS),
        (torch.bfloat16, 60, None, (9, 0), True, kernels.BLOCKS),
        (torch.bfloat16, 64, None, (7, 5), False, kernels.BLOCKS),
    ],
)
def test_kernel_is_the_best_that_can(
    dtype: torch.dtype,
    width: int,
    softcap: float | None,
    card: tuple[int, int] | None,
    installed: bool,
    expected: kernels.Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(kernels, "_flash_attn_is_installed", lambda: installed)
    assert kernels.kernel_for(dtype, width, softcap) is expected


@pytest.mark.parametrize(("version", "serves"), [("2.8.3", True), ("2.7.0.post2", True), ("2.6.3", False), ("", False)])
def test_flash_attn_serves_from_its_version_on(version: str, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def version_of(name: str) -> str:
        if not version:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", flash_attention.FlashAttn)
    assert kernels._flash_attn_is_installed.__wrapped__() == serves


class Largest(TorchDispatchMode):
    """The most elements that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_of(tokens: int, document: int) -> int:
    lengths = [document] * (tokens // document)
    query, key, value = (torch.randn(tokens, heads, 8) for heads in (4, 2, 2))
    documents, scores = Documents.of(lengths), blocks.Scores(0.3)
    with Largest() as largest:
        result, logsumexp = blocks.forward(query, key, value, documents, scores)
        blocks.backward(result, query, key, value, result, logsumexp, documents, scores)
    return largest.elements


def test_memory_of_blocks_grows_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short documents make no scores but a block's. The negative control is one long document."""
    monkeypatch.setattr(blocks, "_MOST", 32)
    assert largest_of(4096, 64) == 4096 * 4 * 8  # the vectors themselves
    assert largest_of(8192, 64) == 8192 * 4 * 8
    assert largest_of(4096, 4096) == 32 * 4 * 4096
    monkeypatch.setattr(blocks, "_SCORES", 1 << 15)
    assert largest_of(4096, 4096) == blocks._FEWEST * 4 * 4096


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_documents_are_read_from_positions(lengths: list[list[int]]) -> None:
    found = documents_of(positions_of(lengths), 3, 24, torch.device("cpu"))
    expected = Documents.of(sum(lengths, []))
    assert found.lengths == expected.lengths and torch.equal(found.bounds, expected.bounds)
