"""The loss: cross entropy summed over target tokens, with the head's gradients, in chunks.

How it works: logits are made for target tokens alone, one chunk of them at a time. A chunk's logits are overwritten
with their own gradient, which is used up before the next chunk's logits are made. So neither logits nor recomputation
are left for backward, and no step ever holds all logits.

It replaces the loss of transformers' models, which makes several fp32 copies of all logits. The price is one more sum
of the head's gradient per chunk.

Dividing by the number of target tokens is left to the loop: a mean taken here would give micro-batches of unlike length
the same weight.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad
from transformers import PreTrainedModel

from fullft.attention.positions import knowing_documents
from fullft.cpu.sums import add_
from fullft.data.micro_batch import IGNORED, MicroBatch
from fullft.model.head import Head, Product, find_linear
from fullft.model.parts import decoder_of
from fullft.tracing import device_type, standing_for_all
from fullft.transforms.compilation import Function, fuse
from fullft.transforms.sharding import sharding_of

# Target tokens whose logits exist at a time. Each chunk adds one more gradient of the head's matrix.
CHUNK_TOKENS = 1024
# Logits whose softmax a CPU computes at a time: few enough for its cache. An accelerator takes so many tokens' at a
# time.
_CPU_TILE = 1 << 19
_TILE_TOKENS = 256


class LossSum:
    """The cross entropy of a micro-batch, summed over its target tokens in fp32 (in fp64 if its logits are).

    Args:
        model: a causal language model.
        most_chunks: compute these first chunks alone, which stand for all: the first one's gradients become the sums
            that all others are added to. For plans.
        compiled: let a GPU's compiler fuse a chunk's softmax: 3 passes over the logits in place of 10. The loss differs
            by rounding, as in compiled layers.

    Source: the gradient in forward, Hsu et al., "Liger Kernel" (2024), section 3.2.
    """

    def __init__(self, model: PreTrainedModel, most_chunks: int | None = None, *, compiled: bool = False) -> None:
        self._model, self._decoder, self._most_chunks = model, decoder_of(model), most_chunks
        self._sharding = sharding_of(model)
        self._run = self._sharding.decoder
        head = model.get_output_embeddings()
        own = {id(parameter) for parameter in self._decoder.parameters()}
        if head is not None:
            own -= {id(parameter) for parameter in head.parameters()}  # tied to the embeddings
        self._linear = find_linear(model)
        self._to_gradient = (
            fuse(_to_gradient, model.device, _to_gradient_by_tiles) if compiled else _to_gradient_by_tiles
        )
        matrix = None if self._linear is None else self._linear.weight
        # Places, not parameters: of a sharded model other tensors are there while it computes.
        places = {
            parameter: (module, name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in own and parameter.requires_grad
        }
        # The head's matrix comes first.
        self._places = [place for _, place in sorted(places.items(), key=lambda each: each[0] is not matrix)]

    def __call__(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Run the model, and sum the cross entropy of every target token.

        Args:
            micro_batch: on the model's device.

        Returns:
            A scalar, in nats. Where gradients are recorded, those of the head exist already.
        """
        # Without a cache: it serves generation, and in training it would hide the boundaries of packed documents.
        with knowing_documents(micro_batch):
            outputs = self._run(**micro_batch.inputs, use_cache=False)
        # The labels are shifted, not the hidden states: position t predicts token t + 1.
        labels = pad(micro_batch.labels[:, 1:], (0, 1), value=IGNORED).flatten()
        # The number of targets is known, so that nothing has to wait for the device to count them.
        places = torch.nonzero_static(labels != IGNORED, size=micro_batch.num_target_tokens)[:, 0]
        hidden = outputs.last_hidden_state.flatten(0, 1)[places]
        head = Head(self._model, self._decoder, type(outputs))
        chunks = _chunks(len(places))[: self._most_chunks]
        if torch.is_grad_enabled():
            self._sharding.before_backward(micro_batch.is_last)
            parameters = [getattr(module, name) for module, name in self._places]
            loss: torch.Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
                head, self._linear, self._to_gradient, chunks, hidden, labels[places], *parameters
            )
            return loss
        total = torch.zeros((), device=hidden.device)
        for start, end in chunks:
            total = total + _cross_entropy(head(hidden[None, start:end])[0], labels[places[start:end]])
        return total


class _Fused(torch.autograd.Function):
    """Loss and gradients of the head in one pass over the chunks: nothing is recomputed, no logits are kept."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        head: Head,
        linear: nn.Linear | None,
        to_gradient: Function,
        chunks: list[tuple[int, int]],
        hidden: torch.Tensor,
        targets: torch.Tensor,
        *parameters: nn.Parameter,
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        ctx.hidden = torch.empty_like(hidden)
        product = None if linear is None else Product(linear, len(chunks))
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        for start, end in chunks:
            with torch.enable_grad():
                chunk = hidden[None, start:end].detach().requires_grad_()
                logits = head(chunk, product)
            # Taken before the logits are overwritten. Autograd records that for a view, such as the logits of a head
            # with a bias: zeros of the whole and a copy, 4% of a step of SmolLM2-135M.
            origin = get_gradient_edge(logits)
            gradient = logits.detach()
            total = total + to_gradient(gradient[0], targets[start:end])
            ctx.hidden[None, start:end], *found = torch.autograd.grad(
                origin, [chunk, *parameters], gradient, allow_unused=True
            )
            del logits, gradient, origin  # a chunk's memory must not live into the next one
            sums = [_sum(*each, is_only=len(chunks) == 1) for each in zip(sums, found, strict=True)]
            del found
        if product is not None and product.gradient is not None:  # else the family multiplies by other means
            sums[0] = product.gradient if sums[0] is None else product.gradient.add_(sums[0])
        # Rounded here, and once more when backward has scaled them: until then fp32 would take twice the memory.
        ctx.gradients = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, parameters, strict=True)
        ]
        if not chunks:  # a rank without targets: the others expect as many gradients from it
            ctx.gradients = [torch.zeros_like(parameter) for parameter in parameters]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        found = [ctx.hidden, *ctx.gradients]
        del ctx.hidden, ctx.gradients  # autograd need not copy what has no other owner
        hidden, *gradients = [each if each is None else each.mul_(factor) for each in found]
        return None, None, None, None, hidden, None, *gradients


def _sum(total: torch.Tensor | None, values: torch.Tensor | None, *, is_only: bool) -> torch.Tensor | None:
    """Add a chunk's gradient to the sum in fp32, as one large matrix product would."""
    if values is None or is_only:
        return values
    if total is None:
        return values.to(torch.promote_types(values.dtype, torch.float32))
    add_(total.view(-1), values.view(-1))
    return total


def _chunks(count: int) -> list[tuple[int, int]]:
    """Return the bounds of chunks of at most `CHUNK_TOKENS`."""
    return [(start, min(start + CHUNK_TOKENS, count)) for start in range(0, count, CHUNK_TOKENS)]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, becomes_gradient: bool = False) -> torch.Tensor:
    """Sum the cross entropy of a chunk, tile by tile.

    Args:
        logits: [tokens, vocabulary], any floating dtype.
        targets: [tokens] int64.
        becomes_gradient: overwrite the logits with the sum's gradient.
    """
    vocabulary = logits.shape[1]
    tile = max(1, _CPU_TILE // vocabulary) if device_type(logits.device) == "cpu" else _TILE_TOKENS
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide, logarithms = torch.empty(2, min(tile, len(targets)), vocabulary, dtype=dtype, device=logits.device)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for start in standing_for_all(range(0, len(targets), tile)):
        ours, places = logits[start : start + tile], targets[start : start + tile, None]
        each = torch.log_softmax(wide[: len(ours)].copy_(ours), -1, out=logarithms[: len(ours)])
        total -= each.gather(1, places).sum()
        if becomes_gradient:
            ours.copy_(each.exp_().scatter_add_(1, places, torch.full_like(places, -1, dtype=dtype)))
    return total


def _to_gradient_by_tiles(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Do what `_to_gradient` does, in little memory without a compiler."""
    return _cross_entropy(logits, targets, becomes_gradient=True)


def _to_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum the cross entropy of a chunk, and overwrite its logits with the sum's gradient; to be compiled.

    Args:
        logits: [tokens, vocabulary], any floating dtype.
        targets: [tokens] int64.
    """
    places = targets[:, None]
    logarithms = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == places
    loss = -logarithms.gather(1, places).sum()
    logits.copy_(logarithms.exp() - is_target.to(logarithms.dtype))
    return loss
