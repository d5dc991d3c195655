"""The gradient of a global batch is that of one mean over all its target tokens, however it is cut up."""

import operator
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import SHAPE, VOCABULARY, make_config, summed_loss, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GraniteConfig,
    MixtralConfig,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from fullft.attention.documents import apply_document_attention
from fullft.data.batches import Batches
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.errors import ModelError
from fullft.model import loss as loss_module
from fullft.model.head import Product
from fullft.model.loss import SummedCrossEntropy
from fullft.model.parts import PRECISIONS, decoder_layers, decoder_of
from fullft.transforms.activation_checkpointing import _Products, apply_activation_checkpointing

Gradients = dict[str, torch.Tensor]


def make_rows(lengths: list[int], seed: int = 0) -> Dataset:
    """Rows of random tokens whose first third is a prompt."""
    random = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        ids = random.integers(1, VOCABULARY, length).tolist()
        labels = [IGNORED if position < max(1, length // 3) else token for position, token in enumerate(ids)]
        targets = sum(label != IGNORED for label in labels)
        rows.append({"input_ids": ids, "labels": labels, "num_tokens": length, "num_target_tokens": targets})
    return Dataset.from_list(rows)


UNEVEN = make_rows([3, 31, 8, 17, 5, 29, 11, 4, 23, 9, 14, 2, 26, 7, 19, 12])


def our_gradients(
    model: PreTrainedModel, rows: Dataset, *, autocast: bool = False, **options: object
) -> tuple[float, Gradients]:
    """One global batch as train.py's loop does it."""
    config = make_config(max_length=64, **options)
    micro_batches = Batches(rows, config, pad_token_id=0).global_batch(1)
    num_target_tokens = sum(micro_batch.num_target_tokens for micro_batch in micro_batches)
    model.zero_grad()
    loss = 0.0
    for micro_batch in micro_batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = decoder_of(model)(**micro_batch.inputs, use_cache=False)
            micro_loss = SummedCrossEntropy(model)(outputs, micro_batch) / num_target_tokens
        micro_loss.backward()
        loss += micro_loss.item()
    return loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def reference_gradients(model: PreTrainedModel, rows: Dataset) -> tuple[float, Gradients]:
    """Plain torch: every row alone, without padding; then one mean over all target tokens."""
    model.zero_grad()
    losses = []
    for row in rows:
        log_probabilities = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        for position in range(1, len(row["input_ids"])):
            if row["labels"][position] != IGNORED:
                losses.append(-log_probabilities[position - 1, row["labels"][position]])
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def tolerance(family: str) -> float:
    """Gemma-2 attends eagerly, with a softmax in fp32 whatever the dtype of the weights."""
    return 1e-7 if family == "gemma2" else 1e-12


def largest_difference(ours: Gradients, theirs: Gradients) -> float:
    """Relative to the largest gradient of each parameter."""
    return max(((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)).item() for n, g in theirs.items())


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
def test_loss_and_gradients_equal_a_plain_torch_reference(family: str) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, global_batch_size=16, per_device_train_batch_size=4)
    expected_loss, expected = reference_gradients(model, UNEVEN)
    assert loss == pytest.approx(expected_loss, rel=tolerance(family))
    assert largest_difference(gradients, expected) < 100 * tolerance(family)


@pytest.mark.parametrize("batch_size", [2, 4, 16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_1_x_16_equals_2_x_8_equals_4_x_4_equals_16_x_1(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    other_loss, others = our_gradients(model, UNEVEN, per_device_train_batch_size=batch_size, global_batch_size=16)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert largest_difference(others, gradients) < 1e-10


def test_a_mean_of_micro_batch_means_is_another_gradient() -> None:
    """The negative control: what dividing by each micro-batch's own count would do."""
    model = tiny_model("llama")
    _, gradients = our_gradients(model, UNEVEN, global_batch_size=16)
    model.zero_grad()
    for row in UNEVEN:
        micro_batch = MicroBatch.of(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]]))
        outputs = decoder_of(model)(**micro_batch.inputs, use_cache=False)
        loss = SummedCrossEntropy(model)(outputs, micro_batch) / row["num_target_tokens"] / len(UNEVEN)
        loss.backward()
    means = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert largest_difference(means, gradients) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
def test_packed_documents_have_the_losses_and_gradients_that_they_have_alone(family: str) -> None:
    model = tiny_model(family)
    loss, gradients = our_gradients(model, UNEVEN, packing=True, global_batch_size=16, per_device_train_batch_size=2)
    expected_loss, expected = reference_gradients(model, UNEVEN)
    assert loss == pytest.approx(expected_loss, rel=tolerance(family))
    assert largest_difference(gradients, expected) < 100 * tolerance(family)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_packed_documents_without_their_positions_see_each_other(family: str) -> None:
    """The negative control: the same packed rows, told to the model as one document each."""
    model = tiny_model(family)
    config = make_config(max_length=64, packing=True, global_batch_size=16)
    micro_batches = Batches(UNEVEN, config, pad_token_id=0).global_batch(1)
    packed, joined = 0.0, 0.0
    for micro_batch in micro_batches:
        decoder, summed_cross_entropy = decoder_of(model), SummedCrossEntropy(model)
        packed += summed_cross_entropy(decoder(**micro_batch.inputs, use_cache=False), micro_batch).item()
        ids = micro_batch.inputs["input_ids"]
        joined += summed_cross_entropy(decoder(input_ids=ids, use_cache=False), micro_batch).item()
    assert abs(packed - joined) / packed > 1e-7  # where packing agrees to 1e-12


@pytest.mark.parametrize("mode", ["selective", "full", "every_1", "every_2", "every_3"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "gemma2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_checkpointing_leaves_gradients_bitwise_the_same_with_dropout(precision: str, family: str, mode: str) -> None:
    gradients = []
    for checkpointing in ("none", mode):
        model = tiny_model(family, PRECISIONS[precision].weights, dropout=0.1)
        apply_document_attention(model)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        torch.manual_seed(7)
        autocast = PRECISIONS[precision].autocast
        gradients.append(our_gradients(model, UNEVEN, autocast=autocast, global_batch_size=8)[1])
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_layers_that_share_weights_add_their_gradients_up_as_without_checkpointing(mode: str) -> None:
    """Autocast copies such a weight once, and their gradients meet there, in bf16; Zamba-2 shares whole blocks."""
    gradients = []
    for checkpointing in ("none", mode):
        model = tiny_model("llama", torch.float32)
        layers = decoder_layers(model)
        layers[2].mlp = layers[1].mlp = layers[0].mlp
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        gradients.append(our_gradients(model, UNEVEN, autocast=True, global_batch_size=8)[1])
    plain, recomputed = gradients
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_a_model_that_overwrites_what_is_kept_is_refused() -> None:
    """Backward would go on from what was written there: OLMo's queries, keys and values are clipped in place."""
    config = OlmoConfig(**SHAPE, clip_qkv=0.05)
    for mode in ("full", "selective"):
        model = from_config(config)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
        with nullcontext() if mode == "full" else pytest.raises(ModelError, match=r"overwrites .* full, or none"):
            summed_loss(model, torch.ones(1, 8, dtype=torch.int64)).backward()


def test_checkpointing_without_the_random_state_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the loss stays the same, so only gradients can tell."""
    import functools

    from torch.utils.checkpoint import checkpoint

    from fullft.transforms import activation_checkpointing

    def forgetful(*args: object, **kwargs: object) -> object:
        return checkpoint(*args, **{**kwargs, "preserve_rng_state": False})

    monkeypatch.setattr(activation_checkpointing, "checkpoint", functools.wraps(checkpoint)(forgetful))
    results = []
    for checkpointing in ("none", "full"):
        model = tiny_model("gpt2", torch.float32, dropout=0.1)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        torch.manual_seed(7)
        # One micro-batch: with more, the random stream of the next forward would differ too.
        results.append(our_gradients(model, UNEVEN, global_batch_size=8, per_device_train_batch_size=8))
    (loss, plain), (same_loss, recomputed) = results
    assert loss == same_loss
    assert not all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("mode", ["selective", "full", "every_2"])
def test_checkpointing_keeps_fewer_activations(mode: str) -> None:
    saved = {}
    for checkpointing in ("none", mode):
        model = tiny_model("llama", torch.float32)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=checkpointing))
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(input_ids=torch.ones(1, 32, dtype=torch.int64), use_cache=False)
        saved[checkpointing] = total
    assert saved[mode] < 0.8 * saved["none"]


class Counted(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[called.name()] += 1
        return called(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("gpt2", "fullft::attention"),
        ("llama", "fullft::attention"),
        ("llama", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_selective_checkpointing_takes_no_product_and_no_attention_twice(family: str, attention: str) -> None:
    products, cheap = {}, {}
    for mode in ("none", "selective", "full"):
        model = tiny_model(family, torch.float32)
        if "fullft" in attention:
            apply_document_attention(model)
        apply_activation_checkpointing(model, make_config(activation_checkpointing=mode))
        with Counted() as counted:
            summed_loss(model, torch.ones(1, 32, dtype=torch.int64)).backward()
        products[mode] = [counted.calls[name] for name in ("aten::mm", "aten::addmm", attention)]
        cheap[mode] = counted.calls["aten::mul.Tensor"]
    assert products["selective"] == products["none"] and products["none"][2] == 4 and cheap["selective"] > cheap["none"]
    assert all(map(operator.ge, products["full"], products["none"])) and products["full"] != products["none"]


@pytest.mark.parametrize(("dropout", "kept"), [(0.0, True), (0.1, False)])
def test_attention_that_drops_out_is_recomputed_and_draws_again(dropout: float, kept: bool) -> None:
    """Were it left out, what draws after it would draw its numbers. On a CPU no kernel drops out, so none here."""
    vectors = [torch.zeros(1, 1, 1, 1)] * 3
    policy, context = _Products().policy, SimpleNamespace(op_output=vectors)
    flash = policy(context, torch.ops.aten._scaled_dot_product_flash_attention.default, *vectors, dropout)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
    assert (flash is CheckpointPolicy.MUST_SAVE) is kept
    assert (policy(context, efficient, *vectors, None, True, dropout_p=dropout) is CheckpointPolicy.MUST_SAVE) is kept


def test_checkpointed_models_still_generate_with_a_cache() -> None:
    model = tiny_model("llama", torch.float32).eval()
    prompt = torch.tensor([[5, 6, 7]])
    plain = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    apply_activation_checkpointing(model, make_config(activation_checkpointing="full"))
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0))


# ---------------------------------------------------------------------------------------------- the loss

HEADS = {  # families whose logits are not the head's product alone, or whose head has a bias or is the embedding
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


def make_micro_batch(sequences: int, length: int) -> MicroBatch:
    """Random tokens of which two in three are targets."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (sequences, length))
    labels = ids.clone()
    labels[:, ::3] = IGNORED
    return MicroBatch.of(ids, labels)


def whole_loss(model: PreTrainedModel, micro_batch: MicroBatch) -> torch.Tensor:
    """Plain torch, on all logits."""
    logits = model(**micro_batch.inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = micro_batch.labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def gradients_of(model: PreTrainedModel, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_the_chunked_loss_and_its_gradients_equal_the_whole_ones(
    head: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
    monkeypatch.setattr(loss_module, "_CPU_TILE", 3 * VOCABULARY)
    model, micro_batch = HEADS[head](), make_micro_batch(2, 19)
    decoder, summed_cross_entropy = decoder_of(model), SummedCrossEntropy(model)
    expected = whole_loss(model, micro_batch)
    ours = summed_cross_entropy(decoder(**micro_batch.inputs, use_cache=False), micro_batch)
    assert ours.item() == pytest.approx(expected.item(), rel=tolerance(head))
    with torch.no_grad():
        evaluated = summed_cross_entropy(decoder(**micro_batch.inputs, use_cache=False), micro_batch)
    assert evaluated.item() == pytest.approx(expected.item(), rel=tolerance(head))
    theirs = gradients_of(model, expected / 5)
    found = gradients_of(model, ours / 5)
    assert found.keys() == theirs.keys()
    assert largest_difference(found, theirs) < 100 * tolerance(head)
    # The model is whole again.
    assert whole_loss(model, micro_batch).item() == expected.item()


@pytest.mark.parametrize("uses_product", [False, True])
def test_a_head_that_reads_its_matrix_loses_no_gradient(uses_product: bool) -> None:
    model = tiny_model("llama")

    def head(hidden: torch.Tensor) -> torch.Tensor:
        matrix = model.lm_head.weight
        return (model.lm_head(hidden) if uses_product else hidden @ matrix.t()) + matrix.square().mean(1)

    expected, found = gradients_of_head(model, head)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


ENDINGS = {
    "product": lambda logits: logits,
    "slice": lambda logits: logits[..., :-5],
    "in place": lambda logits: logits.mul_(0.5),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_logits_become_their_own_gradient_without_a_copy(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = tiny_model("llama"), []

    def multiply(self: Product, hidden: torch.Tensor, original: Callable = Product.multiply) -> torch.Tensor:
        places.append((logits := original(self, hidden)).data_ptr())
        return logits

    def multiply_back(
        self: Product, gradient: torch.Tensor, hidden: torch.Tensor, original: Callable = Product.multiply_back
    ) -> torch.Tensor:
        places.append(gradient.data_ptr())
        return original(self, gradient, hidden)

    monkeypatch.setattr(Product, "multiply", multiply)
    monkeypatch.setattr(Product, "multiply_back", multiply_back)
    expected, found = gradients_of_head(model, lambda hidden: ENDINGS[ending](model.lm_head(hidden)))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    logits, gradient = places
    assert (logits == gradient) == (ending == "product")  # what comes after the product costs a copy


def gradients_of_head(
    model: PreTrainedModel, head: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the gradients of the matrix of a head of one's own: torch's, and ours."""
    ids = torch.arange(1, 20)[None]

    class Owner(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor | None = None, **options: object) -> CausalLMOutputWithPast:
            return CausalLMOutputWithPast(logits=head(self.model(input_ids=input_ids, **options).last_hidden_state))

    model.__class__ = Owner
    logits = model(ids, use_cache=False).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    expected = model.lm_head.weight.grad
    model.zero_grad()
    summed_loss(model, ids).backward()
    return expected, model.lm_head.weight.grad


def test_the_negative_control_a_head_without_its_scale_would_be_noticed() -> None:
    model, micro_batch = HEADS["granite"](), make_micro_batch(2, 19)
    expected = whole_loss(model, micro_batch).item()
    model.config.logits_scaling = model.logits_scaling = 6.0
    assert abs(whole_loss(model, micro_batch).item() / expected - 1) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_chunks_are_those_of_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 to its rounding; in bf16 no further from the truth than one whole product is."""
    found = {}
    for chunk in (1024, 5):
        monkeypatch.setattr(loss_module, "CHUNK_TOKENS", chunk)
        model, micro_batch = tiny_model("llama", dtype), make_micro_batch(4, 31)
        outputs = decoder_of(model)(**micro_batch.inputs, use_cache=False)
        found[chunk] = gradients_of(model, SummedCrossEntropy(model)(outputs, micro_batch) / 80)["lm_head.weight"]
    exact_model = tiny_model("llama", dtype).double()
    exact = gradients_of(exact_model, whole_loss(exact_model, micro_batch) / 80)["lm_head.weight"]
    errors = {chunk: (each.double() - exact).norm() / exact.norm() for chunk, each in found.items()}
    assert errors[5] < (1.2 * errors[1024] if dtype == torch.bfloat16 else 1e-6)


def test_bf16_logits_get_an_fp32_softmax() -> None:
    model, micro_batch = tiny_model("llama", torch.bfloat16), make_micro_batch(1, 40)
    logits = model(**micro_batch.inputs, use_cache=False).logits[0, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits, micro_batch.labels[0, 1:], reduction="sum")
    ours = SummedCrossEntropy(model)(decoder_of(model)(**micro_batch.inputs, use_cache=False), micro_batch)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-3)
