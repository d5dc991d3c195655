"""Counts of bundled configs are the published ones, and a few layers count for all."""

import pytest
from families import dense_before_experts
from models import make_config
from worst_steps import deep

from fullft.memory.facts import find_facts
from fullft.model.source import find_config

# As published with the models.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "openai-community/gpt2": 124_439_808,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
    "distilbert/distilgpt2": 81_912_576,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_configs_have_the_published_parameter_counts(name: str) -> None:
    assert find_facts(find_config(make_config(model=name)), 512).parameters == PUBLISHED[name]


def test_counts_from_few_layers_equal_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for model_config in (*(deep(family, 9) for family in ("gpt2", "gemma2", "phi")), dense_before_experts(9)):
        continued = find_facts(model_config, 64)
        with monkeypatch.context() as patch:
            patch.setattr("fullft.memory.facts.layer_pattern", lambda _: (0, 9))  # every layer is built
            assert find_facts(model_config, 64) == continued
