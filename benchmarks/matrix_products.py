"""Measure how fast this processor could train: the time of a model's own matrix products, and of nothing else.

The throughput benchmark compares every system with this limit. It needs a quiet machine, since its long products cannot
avoid another program.
"""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from task import MAX_LENGTH, Task
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

PACKED, ROW, FP32 = "packed", "row", "packed, fp32"


def kinds_of_limit(task: Task) -> dict[str, tuple[int, torch.dtype]]:
    """Return the tokens of a product and its dtype, for each kind of limit.

    A packed product has all of a step's tokens, in however many micro-batches they are trained. Larger ones are not
    possible, and smaller ones were slower.

    Args:
        task: what is trained on.
    """
    step = task.packed_sequences * MAX_LENGTH
    return {
        PACKED: (step, torch.bfloat16),
        ROW: (task.mean_length, torch.bfloat16),
        FP32: (step, torch.float32),
    }


def measure_limit(task: Task) -> dict[str, dict[str, float]]:
    """Measure how fast the model's matrix products alone could train: packed, row by row, and packed in fp32.

    Logits are counted for target tokens alone, since no others are needed.

    Args:
        task: what is trained on.

    Returns:
        For each kind, tokens per second, and the average and best speed in 10^9 operations per second.
    """
    config = AutoConfig.from_pretrained(task.source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    # (inputs, outputs, whether it is the head) -> how many such layers there are
    shapes = Counter(
        (module.in_features, module.out_features, module is head)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )
    # Scores and weighted values: once in forward, twice in backward. A causal token sees half of its document, on
    # average.
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 12 * config.num_hidden_layers * width * task.mean_context / 2
    return {
        kind: _limit_of(shapes, attention, tokens, round(tokens * task.targets / task.tokens), dtype)
        for kind, (tokens, dtype) in kinds_of_limit(task).items()
    }


def _limit_of(
    shapes: Counter[tuple[int, int, bool]], attention: float, tokens: int, targets: int, dtype: torch.dtype
) -> dict[str, float]:
    """Add up the times of a model's products on a number of tokens.

    Args:
        shapes: how many layers have so many inputs and outputs; the head is marked.
        attention: the attention's operations per token.
        tokens: rows of a product.
        targets: tokens among them that the head works on.
        dtype: of the products.
    """
    seconds = operations = best = 0.0
    for (inputs, outputs, is_head), count in shapes.items():
        length = targets if is_head else tokens
        x, weight, gradient = (
            torch.randn(shape, dtype=dtype) for shape in ((length, inputs), (outputs, inputs), (length, outputs))
        )
        products: tuple[Callable[[], torch.Tensor], ...] = (
            partial(linear, x, weight),  # forward
            partial(torch.mm, gradient, weight),  # of the input
            partial(torch.mm, gradient.t(), x),  # of the weight
        )
        for product in products:
            elapsed, own = _seconds(product), 2 * length * inputs * outputs
            seconds, operations, best = seconds + count * elapsed, operations + count * own, max(best, own / elapsed)
    seconds, operations = seconds + attention * tokens / best, operations + attention * tokens
    return {"tokens_per_second": tokens / seconds, "gflops": operations / seconds / 1e9, "best_gflops": best / 1e9}


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """Time a product: the fastest of some, since a limit is a speed that nothing disturbs."""
    product()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1.0:
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)
