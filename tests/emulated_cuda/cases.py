"""Which runs are taken: a list in which every two choices that may stand together do so at least once.

Nothing here imports torch.
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

Case = Mapping[str, str]
Pair = frozenset[tuple[str, str]]

# Each choice, under the name that stands in a test's name, with the options that it sets.
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "precision": {
        "fp32": {"precision": "fp32"},
        "mixed": {"precision": "bf16-mixed"},
        "split": {"precision": "bf16-true", "master_weights": "split"},
        "plain": {"precision": "bf16-true", "master_weights": "none"},
        "stochastic": {"precision": "bf16-true", "master_weights": "stochastic"},
    },
    "placement": {
        "resident": {"offload": "none"},
        "optimizer-host": {"offload": "optimizer=host"},
        "gradients-disk": {"offload": "gradients=disk"},
        "both-host": {"offload": "optimizer=host,gradients=host"},
        "all-host": {"offload": "optimizer=host,gradients=host,parameters=host"},
        "all-disk": {"offload": "optimizer=disk,gradients=disk,parameters=disk"},
        "released": {"offload": "gradients=released"},
        "released-streamed": {"offload": "optimizer=host,gradients=released,parameters=disk"},
    },
    "optimizer": {name: {"optim": name} for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")},
    "checkpointing": {mode: {"activation_checkpointing": mode} for mode in ("none", "selective", "full", "every_2")},
    "family": {name: {"model": name} for name in ("llama", "gpt2", "qwen2", "gemma2")},
    "packing": {"rows": {"packing": "false"}, "packed": {"packing": "true"}},
    "start": {"through": {}, "resumed": {}},
}


def is_allowed(case: Case) -> bool:
    """Return whether the options accept these choices together; those not yet made do not matter."""
    offload = CHOICES["placement"][case["placement"]]["offload"] if "placement" in case else ""
    if "parameters=" in offload and case.get("checkpointing", "full") != "full":
        return False  # streamed layers are recomputed
    return not ("optimizer=" in offload and case.get("optimizer") == "paged_adamw_8bit")


def pairs_of(case: Case) -> Iterator[Pair]:
    """Yield every two choices of a case."""
    return map(frozenset, itertools.combinations(case.items(), 2))


def allowed_pairs() -> set[Pair]:
    """Return every two choices that may stand together."""
    singles = [(kind, name) for kind, names in CHOICES.items() for name in names]
    both = itertools.combinations(singles, 2)
    return {frozenset(pair) for pair in both if pair[0][0] != pair[1][0] and is_allowed(dict(pair))}


@cache
def covering_cases() -> tuple[Case, ...]:
    """Return cases that cover all allowed pairs: each is begun with a pair that is missing, and completed greedily."""
    missing, cases = sorted(map(sorted, allowed_pairs())), []
    while missing:
        case = dict(missing[0])
        left = set(map(frozenset, missing))
        for kind in CHOICES:
            if kind not in case:
                options = [case | {kind: name} for name in CHOICES[kind] if is_allowed(case | {kind: name})]
                case = max(options, key=lambda each: len(left.intersection(pairs_of(each))))
        cases.append({kind: case[kind] for kind in CHOICES})
        covered = set(pairs_of(case))
        missing = [pair for pair in missing if frozenset(pair) not in covered]
    return tuple(cases)


def options_of(case: Case) -> dict[str, Any]:
    """Return a case's options; `model` is the family's name.

    Gradients that are released within backward neither accumulate nor have a norm in time.
    """
    chosen = [CHOICES[kind][name] for kind, name in case.items()]
    options = {name: value for each in chosen for name, value in each.items()}
    is_released = "released" in options["offload"]
    return options | {
        "gradient_accumulation_steps": 1 if is_released else 2,
        "max_grad_norm": 0.0 if is_released else 1.0,
    }


def name_of(case: Case) -> str:
    """Return a case's name for a test."""
    return "-".join(case.values())
