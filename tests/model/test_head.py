"""The head's product: no gradient is lost whatever the family does with it, and logits become gradients in place."""

from collections.abc import Callable

import pytest
import torch
from models import summed_loss, tiny_model
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fullft.model.head import Product


@pytest.mark.parametrize("uses_product", [False, True])
def test_head_that_reads_its_matrix_loses_no_gradient(uses_product: bool) -> None:
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
    """Return torch's and our gradient of the matrix of a given head."""
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
