"""Attention within documents gives what torch's attention gives with a mask, up to rounding."""

import pytest
import torch
from models import VOCABULARY, make_config, summed_loss, tiny_model
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fullft.attention import documents as attention
from fullft.attention.choice import attend_by_document
from fullft.attention.documents import NAME
from fullft.attention.interface import mask_of
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing

FAMILIES = ["gpt2", "llama", "mistral", "qwen2", "phi"]  # fewer key heads, a sliding window of 8, biases
DOCUMENTS = [[7, 3, 1, 7, 3, 3], [17, 7], [9, 10, 5]]  # of the sequences; 9 is padded to 10, and computed with it


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_BLOCK_QUERIES", 5)
    monkeypatch.setattr(attention, "_GROUP_TOKENS", 14)


def packed() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in DOCUMENTS]
    return {"input_ids": torch.randint(1, VOCABULARY, (3, 24)), "position_ids": torch.stack(positions)}


def results(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits, and the gradients of some function of them."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.sin().sum().backward()
    return [logits.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("group_tokens", [14, 48])  # two documents of 7 together, or all of a length
@pytest.mark.parametrize("inputs", ["packed", "one document each"])
@pytest.mark.parametrize("family", FAMILIES)
def test_document_attention_equals_torch_with_a_mask(
    family: str, inputs: str, group_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_GROUP_TOKENS", group_tokens)
    model, batch = tiny_model(family), packed()
    if inputs != "packed":
        del batch["position_ids"]
    theirs = results(model, batch)
    attend_by_document(model)
    assert model.config._attn_implementation == NAME
    assert_close(results(model, batch), theirs, 1e-11)


def vectors(documents: list[list[int]], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries of 6 heads, keys and values of 2, and positions, of so many documents in each sequence."""
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in documents])
    shape = (*positions.shape, 16)
    made = [torch.randn(*shape[:2], heads, shape[2]).to(dtype).transpose(1, 2) for heads in (6, 2, 2)]
    return [each.requires_grad_() for each in made], positions


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_blocks_of_full_size_are_exact(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with torch's in float64, on the same inputs. The negative control: documents that begin elsewhere."""
    monkeypatch.undo()

    def errors(positions: torch.Tensor) -> list[float]:
        exact = [each.detach().double().requires_grad_() for each in inputs]
        mask = mask_of(positions, exact[0])
        expected = scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
        expected.backward(above.double())
        pairs = zip([attended.detach(), *gradients], [expected.detach(), *(each.grad for each in exact)], strict=True)
        return [float((mine - other).norm() / other.norm()) for mine, other in pairs]

    inputs, positions = vectors([[410, 40, 7, 40, 253], [250, 40, 1, 459]], dtype)
    attended = attention.document_attention(*inputs, 0.3, positions)
    above = torch.randn_like(attended)
    attended.backward(above)
    gradients = [each.grad for each in inputs]
    assert max(errors(positions)) < tolerance
    elsewhere = torch.cat([torch.arange(409), torch.arange(341)]).expand(2, -1)
    assert min(errors(elsewhere)) > 3 * tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_pass_the_opcheck_of_torch(dtype: torch.dtype) -> None:
    """In a graph they have the shapes, strides and gradients that they have outside."""
    inputs, positions = vectors(DOCUMENTS, dtype)
    opcheck(attention.document_attention, (*inputs, 0.3, positions))
    outside = [each.detach() for each in (inputs[0], *inputs)]
    opcheck(attention._backward_operator, (*outside, positions, 0.3))


def test_joined_documents_give_other_results() -> None:
    model, batch = tiny_model("llama"), packed()
    attend_by_document(model)
    apart = results(model, batch)
    batch["position_ids"] = torch.arange(24).expand(3, -1)
    together = results(model, batch)
    assert (apart[0] - together[0]).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        assert_close(apart, together, 1e-11)


def test_sliding_window_is_kept_in_long_documents() -> None:
    """The negative control: a window of another size."""
    model, batch = tiny_model("mistral"), packed()
    attend_by_document(model)
    ours = results(model, batch)
    model.config.sliding_window = 9
    with pytest.raises(AssertionError):
        assert_close(results(model, batch), ours, 1e-11)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_errors_are_those_of_eager_attention(autocast: bool) -> None:
    batch, found = packed(), {}
    exact = results(tiny_model("llama", torch.bfloat16).double(), batch)
    for kind in ("eager", NAME):
        model = tiny_model("llama", torch.bfloat16)
        model = model.float() if autocast else model
        model.set_attn_implementation(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found[kind] = [(mine - other).norm() for mine, other in zip(results(model, batch), exact, strict=True)]
    assert sum(found[NAME]) < 1.1 * sum(found["eager"])


def test_documents_stay_apart_with_dropout() -> None:
    model, batch = tiny_model("gpt2", dropout=0.5), packed()
    model.eval()
    theirs = model(**batch, use_cache=False).logits
    attend_by_document(model)
    assert torch.allclose(model(**batch, use_cache=False).logits, theirs)
    # In training some probabilities are dropped; another document's tokens still change nothing here.
    model.train()
    torch.manual_seed(3)
    logits = model(**batch, use_cache=False).logits
    batch["input_ids"][0, :7] += 1
    torch.manual_seed(3)
    changed = model(**batch, use_cache=False).logits
    assert torch.equal(logits[0, 7:], changed[0, 7:]) and not torch.equal(logits[0, :7], changed[0, :7])
    assert not torch.allclose(logits, theirs)


def test_values_of_another_width_use_torch_attention() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "first_k_dense_replace": 2}
    config = AutoConfig.for_model("deepseek_v3", vocab_size=VOCABULARY, **shape, **heads, **widths)
    model, batch = AutoModelForCausalLM.from_config(config).double(), packed()
    theirs = results(model, batch)
    attend_by_document(model)
    assert model.config._attn_implementation == NAME
    assert_close(results(model, batch), theirs, 1e-11)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_attention_keeps_gradients_bitwise(mode: str) -> None:
    model = tiny_model("qwen2")
    attend_by_document(model)
    ids = packed()["input_ids"]
    plain = summed_loss(model, ids)
    plain.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
    summed_loss(model, ids).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
