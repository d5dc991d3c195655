"""The configs of well-known models, so that a plan needs neither network nor licence.

Each file holds the facts of the `config.json` that the hub has under that name; a test compares the parameters that
follow from them with the published counts.
"""

import json
from pathlib import Path
from typing import Any

# Other names of the same architecture: older ones, and instruction-tuned versions.
_ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "meta-llama/Meta-Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Meta-Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Meta-Llama-3.1-405B": "meta-llama/Llama-3.1-405B",
    "meta-llama/Meta-Llama-3.1-405B-Instruct": "meta-llama/Llama-3.1-405B",
    "meta-llama/Llama-3.1-405B-Instruct": "meta-llama/Llama-3.1-405B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-0.5B-Instruct": "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-7B-Instruct": "Qwen/Qwen2.5-7B",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M",
}


def bundled_config(name: str) -> dict[str, Any] | None:
    """Return the facts of a model's `config.json`, if they are here.

    Args:
        name: hub id; upper and lower case are alike, as on the hub.
    """
    aliases = {alias.lower(): original for alias, original in _ALIASES.items()}
    original = aliases.get(name.lower(), name).replace("/", "--").lower()
    for file in (Path(__file__).parent / "configs").glob("*.json"):
        if file.stem.lower() == original:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return values
    return None
