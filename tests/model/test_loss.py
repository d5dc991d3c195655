"""The gradient of a global batch is that of one mean over all its target tokens, however it is cut up."""

from dataclasses import replace

import pytest
import torch
from global_batches import (
    UNEVEN,
    gradients_of,
    largest_difference,
    make_micro_batch,
    our_gradients,
    reference_gradients,
    tolerance,
    whole_loss,
)
from models import SHAPE, VOCABULARY, make_config, tiny_model
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fullft.data.batches import Batches
from fullft.data.micro_batch import MicroBatch
from fullft.model import loss as loss_module
from fullft.model.loss import LossSum
from fullft.transforms.compilation import fused


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
def test_loss_and_gradients_equal_plain_torch(family: str) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, global_batch_size=16, per_device_train_batch_size=4)
    expected_loss, expected = reference_gradients(model, UNEVEN)
    assert loss == pytest.approx(expected_loss, rel=tolerance(family))
    assert largest_difference(gradients, expected) < 100 * tolerance(family)


@pytest.mark.parametrize("batch_size", [2, 4, 16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_do_not_depend_on_micro_batches(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    other_loss, others = our_gradients(model, UNEVEN, per_device_train_batch_size=batch_size, global_batch_size=16)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert largest_difference(others, gradients) < 1e-10


def test_mean_of_micro_batch_means_is_another_gradient() -> None:
    """The negative control: what dividing by each micro-batch's own count would do."""
    model = tiny_model("llama")
    _, gradients = our_gradients(model, UNEVEN, global_batch_size=16)
    model.zero_grad()
    for row in UNEVEN:
        micro_batch = MicroBatch.of(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]))
        loss = LossSum(model)(micro_batch) / row["num_target_tokens"] / len(UNEVEN)
        loss.backward()
    means = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_difference(means, gradients) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
def test_packed_documents_train_as_they_do_alone(family: str) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, packing=True, global_batch_size=16, per_device_train_batch_size=2)
    expected_loss, expected = reference_gradients(model, UNEVEN)
    assert loss == pytest.approx(expected_loss, rel=tolerance(family))
    assert largest_difference(gradients, expected) < 100 * tolerance(family)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_packed_documents_without_positions_see_each_other(family: str) -> None:
    """The negative control: the same packed rows, told to the model as one document each."""
    model = tiny_model(family)
    config = make_config(max_length=64, packing=True, global_batch_size=16)
    packed, joined = 0.0, 0.0
    for micro_batch in Batches(UNEVEN, config, pad_token_id=0).global_batch(1):
        packed += LossSum(model)(micro_batch).item()
        without_positions = replace(micro_batch, inputs={"input_ids": micro_batch.inputs["input_ids"]})
        joined += LossSum(model)(without_positions).item()
    assert abs(packed - joined) / packed > 1e-7  # where packing agrees to 1e-12


# ---------------------------------------------------------------------------------------------- in chunks


# Families whose logits are not the head's product alone, or whose head has a bias or is the embedding.
HEADS = {
    "gemma2": lambda: tiny_model("gemma2"),
    "gpt2": lambda: tiny_model("gpt2"),
    "tied": lambda: tiny_model("qwen2", tied=True),
    "phi": lambda: tiny_model("phi"),
    "granite": lambda: from_config(GraniteConfig(**SHAPE, logits_scaling=7.0)),
    "cohere": lambda: from_config(CohereConfig(**SHAPE, logit_scale=0.3)),
    "mixtral": lambda: from_config(MixtralConfig(**SHAPE, num_local_experts=4, experts_implementation="eager")),
}


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).train()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_chunked_loss_and_gradients_equal_the_whole_ones(
    head: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(loss_module, "_CPU_TILE", 3 * VOCABULARY)
    model, micro_batch = HEADS[head](), make_micro_batch(2, 19)
    loss_sum = LossSum(model)
    expected = whole_loss(model, micro_batch)
    ours = loss_sum(micro_batch)
    assert ours.item() == pytest.approx(expected.item(), rel=tolerance(head))
    with torch.no_grad():
        evaluated = loss_sum(micro_batch)
    assert evaluated.item() == pytest.approx(expected.item(), rel=tolerance(head))
    theirs = gradients_of(model, expected / 5)
    found = gradients_of(model, ours / 5)
    assert found.keys() == theirs.keys()
    assert largest_difference(found, theirs) < 100 * tolerance(head)
    # The head is no longer bypassed.
    assert whole_loss(model, micro_batch).item() == expected.item()


def test_loss_changes_with_the_scale_of_logits() -> None:
    model, micro_batch = HEADS["granite"](), make_micro_batch(2, 19)
    expected = whole_loss(model, micro_batch).item()
    model.config.logits_scaling = model.logits_scaling = 6.0
    assert abs(whole_loss(model, micro_batch).item() / expected - 1) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_chunks_equal_those_of_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 to its rounding; in bf16 no further from the truth than one whole product is."""
    found = {}
    for chunk in (1024, 5):
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
        model, micro_batch = tiny_model("llama", dtype), make_micro_batch(4, 31)
        found[chunk] = gradients_of(model, LossSum(model)(micro_batch) / 80)["lm_head.weight"]
    exact_model = tiny_model("llama", dtype).double()
    exact = gradients_of(exact_model, whole_loss(exact_model, micro_batch) / 80)["lm_head.weight"]
    errors = {chunk: (each.double() - exact).norm() / exact.norm() for chunk, each in found.items()}
    assert errors[5] < (1.2 * errors[1024] if dtype == torch.bfloat16 else 1e-6)


def test_softmax_of_bf16_logits_is_in_fp32() -> None:
    model, micro_batch = tiny_model("llama", torch.bfloat16), make_micro_batch(1, 40)
    logits = model(**micro_batch.inputs, use_cache=False).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, micro_batch.labels[0, 1:], reduction="sum")
    ours = LossSum(model)(micro_batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-3)


def test_compiled_softmax_gives_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 48)  # several chunks of two lengths
    monkeypatch.setattr(loss_module, "fuse", lambda function, device, eager: fused(function, eager))
    model, micro_batch = tiny_model("llama"), MicroBatch.of(torch.randint(1, VOCABULARY, (2, 60)))
    found: list[tuple[float, list[torch.Tensor]]] = []
    frames = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        loss = LossSum(model, compiled=compiled)(micro_batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.item(), list(gradients)))
        frames.append(counters["stats"]["unique_graphs"])
    assert frames == [0, 1]
    (loss_in_tiles, in_tiles), (compiled_loss, compiled_gradients) = found
    assert compiled_loss == pytest.approx(loss_in_tiles, rel=1e-12)
    for tiled, whole in zip(in_tiles, compiled_gradients, strict=True):
        torch.testing.assert_close(whole, tiled, rtol=1e-10, atol=1e-10)
