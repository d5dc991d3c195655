"""Estimates, by the formulas in their docstrings: LoRA and QLoRA, and the time of a run."""

from dataclasses import dataclass, replace

from fullft.config.config import Config
from fullft.hardware import PEAK_FLOPS
from fullft.memory.choose import Plans
from fullft.memory.facts import Facts
from fullft.memory.plan import Batch, num_layers

# ---------------------------------------------------------------------------------------------- adapters


def estimate_adapters(config: Config, plans: Plans, batch: Batch) -> tuple[dict[str, int], dict[str, int]]:
    """Estimate what LoRA and QLoRA (rank 8 on queries and values) need for the same batch on one device, per component.

    With N parameters, M of them in the layers' matrices, and A in the adapters:

    - parameters: LoRA 2 N + 4 A (bf16 weights, fp32 adapters); QLoRA 2 (N - M) + (0.5 + 1/64 + 4/16384) M + 4 A: four
      bits per weight, a byte per block of 64 and an fp32 number per 256 blocks ("double quantisation")
    - gradients 4 A, optimizer states 8 A
    - activations and logits: the maxima of the plan with bf16 weights and the same checkpointing; temporaries: what
      else is alive in that plan's forward. QLoRA also holds a dequantised matrix: less than a layer's 2 M / layers

    Args:
        config: nothing is left to the plan.
        plans: of the model.
        batch: the largest micro-batches.

    Returns:
        Bytes per component of LoRA, and of QLoRA.

    Source: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023), section 3.
    """
    facts = plans.facts(batch.length)
    adapters = facts.lora_parameters
    config = replace(config, gpus=1, offload="none")
    planned = plans.of(replace(config, precision="bf16-true"), batch)
    own = planned["components"]
    accumulated = own["gradients"] if config.accumulates else 0
    in_forward = planned["phases"]["forward"] - own["parameters"] - own["optimizer_states"] - accumulated
    lora = own | {
        "parameters": 2 * facts.parameters + 4 * adapters,
        "gradients": 4 * adapters,
        "optimizer_states": 8 * adapters,
        # Without the gradient of the head, which is frozen.
        "temporaries": max(
            0,
            in_forward
            - own["activations"]
            - own["logits"]
            - own["other"]
            - 2 * (facts.matrices - facts.layer_matrices),
        ),
    }
    four_bits = (0.5 + 1 / 64 + 4 / 16384) * facts.layer_matrices
    qlora = lora | {
        "parameters": round(2 * (facts.parameters - facts.layer_matrices) + four_bits + 4 * adapters),
        "temporaries": lora["temporaries"] + 2 * facts.layer_matrices // num_layers(plans.model_config),
    }
    return lora, qlora


# ---------------------------------------------------------------------------------------------- time

MFU = 0.4  # a well-fed GPU's share of its peak
ROWS = 1000  # of the default dataset
GPUS = {name: PEAK_FLOPS[name] for name in ("A100", "H100")}  # a plan shows their hours


@dataclass(frozen=True)
class Work:
    """How much a run computes.

    Attributes:
        rows: sequences, over all epochs.
        tokens: at most, were every row as long as allowed.
        training_flops: of forward and backward.
        flops: of forward, backward and recomputation.
    """

    rows: int
    tokens: int
    training_flops: float
    flops: float

    def hours(self, peak_flops: float) -> float:
        """Return the GPU-hours on a GPU with so many operations per second at its peak."""
        return self.flops / (MFU * peak_flops) / 3600


def estimate_work(config: Config, facts: Facts, batch: Batch) -> Work:
    """Estimate a run's operations: tokens x (those of `flops_per_token` + a third of them for recomputed layers).

    Args:
        config: nothing is left to the plan; the length of the run is read.
        facts: of the model.
        batch: the largest micro-batches.
    """
    rows = config.num_train_epochs * (ROWS - -(-ROWS * config.val_size // 1))
    if config.max_steps > 0:
        rows = config.max_steps * config.global_batch_size
    recomputed = config.recomputation.share
    tokens = round(rows) * batch.length
    flops = tokens * facts.flops_per_token
    return Work(round(rows), tokens, flops, flops * (1 + recomputed / 3))
