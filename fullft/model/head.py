"""The head: hidden states become logits, by the family's own code except for one matrix product.

The decoder is bypassed, so that scaling, soft-capping and biases of every family come with its own code. The product is
ours: its logits, the matrix's copy for autocast and the matrix's gradient are a step's largest tensors, and reuse the
memory of earlier ones.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from fullft.cpu import reuse
from fullft.cpu.sums import add_
from fullft.tracing import standing_for_all

_ROWS = 8192  # rows of the matrix whose gradient exists in the narrow dtype at a time


class Head:
    """The model without its decoder: the family's own code, scaled and soft-capped logits included.

    Args:
        model: the whole model.
        decoder: its part that is bypassed.
        output_type: of the decoder's outputs.
    """

    def __init__(self, model: PreTrainedModel, decoder: nn.Module, output_type: type[ModelOutput]) -> None:
        self._model, self._decoder, self._output_type = model, decoder, output_type

    def __call__(self, hidden: torch.Tensor, product: "Product | None" = None) -> torch.Tensor:
        """Turn hidden states into logits.

        Args:
            hidden: [1, tokens, width].
            product: replaces the matrix product that the model would take.

        Returns:
            [1, tokens, vocabulary].
        """
        outputs = self._output_type(last_hidden_state=hidden)
        with ExitStack() as bypasses:
            bypasses.enter_context(_bypassed(self._decoder, lambda *_, **__: outputs))
            if product is not None:
                bypasses.enter_context(_bypassed(product.linear, product))
            logits: torch.Tensor = self._model(use_cache=False).logits
        return logits


@contextmanager
def _bypassed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    former = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if former is None:
            del module.forward
        else:
            module.forward = former


def find_linear(model: PreTrainedModel) -> nn.Linear | None:
    """Return the head's matrix product, if it is a plain and trained one without a bias.

    Args:
        model: a causal language model.
    """
    linear = model.get_output_embeddings()
    is_plain = type(linear) is nn.Linear and "forward" not in linear.__dict__ and linear.bias is None
    return linear if is_plain and linear.weight.requires_grad else None


class Product:
    """The product of hidden states with the head's matrix, chunk by chunk. It sums the matrix's gradient itself.

    Args:
        linear: from `find_linear`.
        num_chunks: how many will come.

    Attributes:
        linear: the module that it replaces.
        gradient: [vocabulary, width] of the chunks so far, in fp32 where there are several; None before the first.
    """

    def __init__(self, linear: nn.Linear, num_chunks: int) -> None:
        self.linear = linear
        self.gradient: torch.Tensor | None = None
        weight = self._matrix = linear.weight.detach()
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
            self._matrix = reuse.empty(weight.shape, dtype, weight.device).copy_(weight)
        self._sums = torch.promote_types(weight.dtype, torch.float32) if num_chunks > 1 else weight.dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply hidden states [..., width] into logits [..., vocabulary], in autocast's dtype if it is on."""
        logits: torch.Tensor = _Product.apply(hidden, self)  # type: ignore[no-untyped-call]
        return logits

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Multiply [..., width] into [..., vocabulary]."""
        # Not a view: autograd copies the gradient of a view that is overwritten.
        logits = reuse.empty((*hidden.shape[:-1], len(self._matrix)), self._matrix.dtype, hidden.device)
        torch.mm(hidden.flatten(0, -2).to(logits.dtype), self._matrix.t(), out=logits.flatten(0, -2))
        return logits

    def multiply_back(self, gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Add to the matrix's gradient, and return that of the hidden states.

        Args:
            gradient: [..., vocabulary].
            hidden: [..., width].
        """
        gradient = gradient.flatten(0, -2).to(self._matrix.dtype)
        narrow = hidden.flatten(0, -2).to(self._matrix.dtype)
        is_first = self.gradient is None
        if self.gradient is None:
            self.gradient = reuse.empty(self._matrix.shape, self._sums, hidden.device)
        if is_first and self._sums == narrow.dtype:
            torch.mm(gradient.t(), narrow, out=self.gradient)
        else:
            self._add(self.gradient, gradient, narrow, is_first)
        return torch.mm(gradient, self._matrix).to(hidden.dtype).view(hidden.shape)

    @staticmethod
    def _add(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor, is_first: bool) -> None:
        """Add a chunk's gradient to a wider total, some rows of the matrix at a time."""
        buffer = hidden.new_empty(min(_ROWS, len(total)), hidden.shape[1])
        for start in standing_for_all(range(0, len(total), _ROWS)):
            sums = total[start : start + _ROWS]
            ours = torch.mm(gradient[:, start : start + _ROWS].t(), hidden, out=buffer[: len(sums)])
            sums.copy_(ours) if is_first else add_(sums.view(-1), ours.view(-1))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, product: Product) -> torch.Tensor:  # noqa: D102
        ctx.save_for_backward(hidden)
        ctx.product = product
        return product.multiply(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: D102
        (hidden,) = ctx.saved_tensors
        return ctx.product.multiply_back(gradient, hidden), None
