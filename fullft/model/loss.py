"""The loss: the model's head and cross entropy, summed over target tokens, in chunks.

Owns the shift by one token, the mask, the dtype of the softmax and the head's gradients. Logits are made for target
tokens alone, and never for all of them: a chunk's are turned into their own gradient where they lie, and used up before
the next chunk's are made. Dividing by the number of target tokens of the global batch is the loop's business: a mean
taken here would weigh micro-batches of unlike length alike.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.model.head import Head, Product, find_linear
from fullft.model.parts import decoder_of
from fullft.optim.gradients import add_

# Target tokens whose logits are there at a time. Each chunk's gradient of the head's matrix is one more to add up.
CHUNK_TOKENS = 1024
# Logits whose softmax a CPU works on at a time: few enough for its cache. An accelerator takes so many tokens'.
_CPU_TILE = 1 << 19
_TILE_TOKENS = 256


class SummedCrossEntropy:
    """The cross entropy of a model's target tokens, summed in fp32 (in fp64 if its logits are).

    Attributes:
        decoder: what comes before the head: called with a micro-batch's inputs, its outputs are to be passed here.

    Source: the gradient in forward, Hsu et al., "Liger Kernel" (2024), section 3.2.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the head's parameters.

        Args:
            model: a causal language model.
        """
        self.decoder = decoder_of(model)
        self._model = model
        head = model.get_output_embeddings()
        own = {id(parameter) for parameter in self.decoder.parameters()}
        if head is not None:
            own -= {id(parameter) for parameter in head.parameters()}  # tied to the embeddings
        self._linear = find_linear(model)
        matrix = None if self._linear is None else self._linear.weight
        found = [each for each in model.parameters() if id(each) not in own and each.requires_grad]
        self._parameters = sorted(found, key=lambda each: each is not matrix)  # the head's matrix comes first

    def __call__(self, outputs: ModelOutput, micro_batch: MicroBatch) -> torch.Tensor:
        """Sum the cross entropy of every target token.

        Args:
            outputs: of the decoder, for the micro-batch's inputs.
            micro_batch: its labels count, and how many of them are targets.

        Returns:
            A scalar, in nats. Where gradients are recorded, those of the head are there already.
        """
        # The labels are shifted, not the hidden states: position t predicts token t + 1.
        labels = pad(micro_batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
        # Their number is known, so that nobody has to wait for the device to count them.
        places = torch.nonzero_static(labels != IGNORED, size=micro_batch.num_target_tokens)[:, 0]
        hidden = outputs.last_hidden_state.flatten(0, 1)[places]
        head = Head(self._model, self.decoder, type(outputs))
        if torch.is_grad_enabled():
            loss: torch.Tensor = _Fused.apply(head, self._linear, hidden, labels[places], *self._parameters)  # type: ignore[no-untyped-call]
            return loss
        total = torch.zeros((), device=hidden.device)
        for start, end in _chunks(len(places)):
            total = total + _cross_entropy(head(hidden[None, start:end])[0], labels[places[start:end]])
        return total


class _Fused(torch.autograd.Function):
    """Loss and gradients of the head in one pass over the chunks: nothing is recomputed, no logits are kept."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        head: Head,
        linear: nn.Linear | None,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        ctx.hidden = torch.empty_like(hidden)
        chunks = _chunks(len(targets))
        product = None if linear is None else Product(linear, len(chunks))
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        for start, end in chunks:
            with torch.enable_grad():
                chunk = hidden[None, start:end].detach().requires_grad_()
                logits = head(chunk, product)
            # Taken before they are overwritten: of a view autograd would record that, at the cost of a copy.
            origin = get_gradient_edge(logits)
            gradient = logits.detach()
            total = total + _cross_entropy(gradient[0], targets[start:end], becomes_gradient=True)
            ctx.hidden[None, start:end], *found = torch.autograd.grad(
                origin, [chunk, *parameters], gradient, allow_unused=True
            )
            del logits, gradient, origin
            sums = [_sum(*each, is_only=len(chunks) == 1) for each in zip(sums, found, strict=True)]
            del found
        if product is not None and product.gradient is not None:  # else the family multiplies by itself
            sums[0] = product.gradient if sums[0] is None else product.gradient.add_(sums[0])
        # Rounded here, and once more when backward has scaled them: until then wide ones would take twice the memory.
        ctx.gradients = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, parameters, strict=True)
        ]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        found = [ctx.hidden, *ctx.gradients]
        del ctx.hidden, ctx.gradients  # whoever takes them need not copy them
        hidden, *gradients = [each if each is None else each.mul_(factor) for each in found]
        return None, None, hidden, None, *gradients


def _sum(total: torch.Tensor | None, values: torch.Tensor | None, *, is_only: bool) -> torch.Tensor | None:
    """Add chunks' gradients up in fp32, as one large matrix product would."""
    if values is None or is_only:
        return values
    if total is None:
        return values.to(torch.promote_types(values.dtype, torch.float32))
    add_(total.view(-1), values.view(-1))
    return total


def _chunks(count: int) -> list[tuple[int, int]]:
    """Give the bounds of stretches of at most `CHUNK_TOKENS`."""
    return [(start, min(start + CHUNK_TOKENS, count)) for start in range(0, count, CHUNK_TOKENS)]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, becomes_gradient: bool = False) -> torch.Tensor:
    """Sum the cross entropy of a chunk, tile by tile.

    Args:
        logits: [tokens, vocabulary], any floating dtype.
        targets: [tokens] int64.
        becomes_gradient: overwrite the logits with the sum's gradient.
    """
    vocabulary = logits.shape[1]
    tile = max(1, _CPU_TILE // vocabulary) if logits.device.type == "cpu" else _TILE_TOKENS
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide, logarithms = torch.empty(2, min(tile, len(targets)), vocabulary, dtype=dtype, device=logits.device)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for start in _tiles(len(targets), tile):
        ours, places = logits[start : start + tile], targets[start : start + tile, None]
        each = torch.log_softmax(wide[: len(ours)].copy_(ours), -1, out=logarithms[: len(ours)])
        total -= each.gather(1, places).sum()
        if becomes_gradient:
            ours.copy_(each.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=dtype)))
    return total


def _tiles(count: int, size: int) -> range:
    return range(0, count, size)
