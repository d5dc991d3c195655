"""The training process of `mistral_7b.py`: load, take steps as `train.py` does, check every parameter, report."""

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from mistral_7b_model import SEQUENCES, SIZES, initial_pieces, options
from mistral_7b_phases import Phase, measured, report_memory
from transformers import PreTrainedModel
from transformers.utils import logging

from fullft.attention.choice import choose_attention
from fullft.config.placement import Placement
from fullft.cpu.reuse import reuse_memory
from fullft.data.micro_batch import IGNORED, Documents, GlobalBatch, MicroBatch
from fullft.model.checks import check_model
from fullft.model.load import load_model
from fullft.model.loss import LossSum
from fullft.model.parts import decoder_layers
from fullft.model.precision import join
from fullft.model.source import find_model
from fullft.optim.adamw import AdamW
from fullft.optim.build import build_optimizer
from fullft.optim.schedule import build_schedule
from fullft.storage.tiers import CHUNK, Array, Storage, home_of, host_pieces
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.streaming import apply_layer_streaming


def train(size: str, weights: str, folder: Path, steps: int) -> None:
    """Load, train, check and report. It needs a process of its own.

    Args:
        size: a key of `SIZES`.
        weights: a key of `PLACES`.
        folder: of the checkpoint.
        steps: optimizer steps.
    """
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = options(size, weights, folder, steps)
    with measured("loading") as loading:
        storage = Storage(torch.device("cpu"), folder.parent)
        model = load_model(config, find_model(config), storage)
        apply_activation_checkpointing(model, config)
        apply_layer_streaming(model, storage)
    if weights == "streamed":
        shutil.rmtree(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count:,} parameters loaded in {loading.seconds:.0f} s", flush=True)
    batch = global_batch(model.config.vocab_size, SIZES[size].tokens)
    choose_attention(model, config.joins_rows)
    check_model(model, model.config.vocab_size - 1, SIZES[size].tokens, config.joins_rows)
    reuse_memory(model)
    loss_sum = LossSum(model)
    optimizer = build_optimizer(model, config, storage)
    learning_rate_at = build_schedule(config, steps)
    taken, losses = [], []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step)
        phases, loss, norm = take_step(loss_sum, optimizer, batch, config.max_grad_norm)
        taken.append(phases)
        losses.append(loss)
        seconds = ", ".join(f"{name} {phase.seconds:.1f}" for name, phase in phases.items())
        print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.3f}; seconds: {seconds}", flush=True)
    with measured("checking"):
        lines = check_moved(model, optimizer, batch)
    print("\n".join(lines))
    report_memory()
    counted = count_bytes(model, optimizer, config.placement)
    results = [{name: (vars(phase), counted[name]) for name, phase in phases.items()} for phases in taken]
    results_file(folder).write_text(json.dumps(results))
    if steps > 1 and not losses[-1] < losses[0]:
        sys.exit("the loss has not fallen")


def global_batch(vocabulary: int, tokens: int) -> GlobalBatch:
    """Make the micro-batch of every step: rows of random tokens behind each other, all of them targets."""
    ids = torch.randint(0, vocabulary, (1, SEQUENCES * tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, ::tokens] = IGNORED  # nothing predicts a row's first token
    micro_batch = MicroBatch.of(ids, labels)
    positions = torch.arange(tokens).repeat(1, SEQUENCES)
    joined = {
        "inputs": micro_batch.inputs | {"position_ids": positions},
        "documents": Documents.of([tokens] * SEQUENCES),
    }
    return GlobalBatch.of([replace(micro_batch, **joined)])


def results_file(folder: Path) -> Path:
    """Return the file that a training process writes its measurements to.

    Args:
        folder: of the checkpoint.
    """
    return folder.parent / f"{folder.name}.json"


def take_step(
    loss_sum: LossSum, optimizer: AdamW, batch: GlobalBatch, max_grad_norm: float
) -> tuple[dict[str, Phase], float, float]:
    """Take a step: parts 3 and 4 of `train.py`'s loop.

    Args:
        loss_sum: of the model.
        optimizer: of the model.
        batch: the step's.
        max_grad_norm: of clipping.

    Returns:
        The costs of its phases, the loss, and the gradients' norm.
    """
    phases: dict[str, Phase] = {}
    loss = torch.zeros(())
    with measured("forward and backward") as phases["forward and backward"]:
        for micro_batch in batch:
            micro_loss = loss_sum(micro_batch) / batch.num_target_tokens
            micro_loss.backward()
            loss += micro_loss.detach()
    with measured("clipping") as phases["clipping"]:
        norm = optimizer.clip_gradients(max_norm=max_grad_norm)
    with measured("optimizer step") as phases["optimizer step"]:
        optimizer.step()
        optimizer.zero_grad()
    return phases, float(loss), float(norm)


@torch.no_grad()
def check_moved(model: PreTrainedModel, optimizer: AdamW, batch: GlobalBatch) -> list[str]:
    """Compare every master weight with its value in the checkpoint, which is generated once more.

    Args:
        model: after its steps.
        optimizer: of the model, with the remainders of split masters.
        batch: that it was trained on.

    Returns:
        The findings, as lines.

    Raises:
        SystemExit: too few elements of a parameter have moved.
    """
    # The last token of a row predicts nothing, and no other token sees it.
    rows = torch.cat([micro_batch.inputs["input_ids"].view(SEQUENCES, -1) for micro_batch in batch])
    seen = rows[:, :-1].unique()
    embeddings = model.get_input_embeddings().weight
    shares: dict[str, float] = {}
    farthest = 0.0
    for name, parameter in model.named_parameters():
        pairs = zip(
            initial_pieces(name, parameter),
            _flat_pieces(home_of(parameter)),
            _flat_pieces(optimizer.states_of(parameter)["remainder"]),
            strict=True,
        )
        moved = 0
        for initial, weights, remainder in pairs:
            master = torch.empty(weights.numel())
            join(weights, remainder, master)
            distance = master.sub_(initial).abs_()
            moved += int(distance.count_nonzero())
            farthest = max(farthest, float(distance.max()))
        shares[name] = moved / (len(seen) * parameter.shape[1] if parameter is embeddings else parameter.numel())
    least = min(shares, key=shares.__getitem__)
    if not 0.9 < shares[least] <= 1:
        sys.exit(f"only {shares[least]:.2%} of {least} have moved")
    return [
        f"All {len(shares)} tensors have moved, each in at least {shares[least]:.4%} of its elements ({least}),",
        f"by at most {farthest:.2e}. Of the embeddings, only the {len(seen)} rows of input tokens count.",
    ]


def _flat_pieces(array: Array) -> Iterator[torch.Tensor]:
    for piece in host_pieces(array):
        yield from piece.view(-1).split(CHUNK)


def count_bytes(model: PreTrainedModel, optimizer: AdamW, placement: Placement) -> dict[str, tuple[int, int]]:
    """Count the bytes that each phase of a step must read and write.

    Args:
        model: that was trained.
        optimizer: of the model; its states and the gradients' sums are on disk.
        placement: whether the weights are on disk too.

    Returns:
        Bytes read and written, under the phases' names.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    gradients = 2 * count  # bf16: nothing is summed
    arrays = [array for parameter in model.parameters() for array in optimizer.states_of(parameter).values()]
    states = sum(array.numel() * array.element_size() for array in arrays)
    layers = [sum(2 * each.numel() for each in layer.parameters()) for layer in decoder_layers(model)]
    streamed = sum(layers) if placement.parameters == "disk" else 0
    # Forward and backward each pass through all layers. Memory holds two of them, which need not be read again where
    # the direction turns. Only the step's first pass finds it empty.
    passes = (2 * len(layers) - 2) * streamed // len(layers)
    return {
        "forward and backward": (passes, gradients),
        "clipping": (gradients, 0),
        "optimizer step": (gradients + states + streamed, states + streamed),
    }
