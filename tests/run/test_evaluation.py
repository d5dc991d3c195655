"""Evaluation: the held-out loss against plain torch, row by row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_config, tiny_model
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fullft.data.load import load_data
from fullft.model.loss import LossSum
from fullft.run.evaluation import Samples, evaluate


@pytest.mark.parametrize("options", [{}, {"per_device_train_batch_size": 4}, {"packing": True, "max_length": 64}])
def test_evaluation_is_the_mean_over_all_targets(
    options: dict[str, int], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": f"Count to {n}: ", "completion": " ".join(map(str, range(n)))} for n in range(1, 25)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_data(make_config(dataset=str(tmp_path / "rows.jsonl"), val_size=0.5, **options), tokenizer)
    model = tiny_model("llama", dropout=0.5)
    assert data.evaluation is not None
    loss = evaluate(model, LossSum(model), data.evaluation, torch.autocast("cpu", enabled=False))
    assert loss is not None and model.training  # as it was found

    model.eval()
    sums, counts = [], []
    for row in data.evaluation.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            sums.append(float(cross_entropy(model(ids).logits[0, :-1], labels[1:], reduction="sum")))
        counts.append(row["num_target_tokens"])
    assert float(loss) == pytest.approx(sum(sums) / sum(counts), rel=1e-6)  # norms compute in fp32
    average_of_averages = sum(each / count for each, count in zip(sums, counts, strict=True)) / len(sums)
    assert float(loss) != pytest.approx(average_of_averages, rel=1e-6)


# What a checkpoint may ask of generation: each alone would end the run, or change what is written.
SETTINGS: list[dict[str, Any]] = [
    {"stop_strings": ["a"]},
    {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": -5.0},
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 50.0, "top_k": 0},
    {"bad_words_ids": [[number] for number in range(1, 900)], "suppress_tokens": list(range(900, 1000))},
    {"min_new_tokens": 48, "forced_eos_token_id": 5, "max_time": 0.0},
    {"cache_implementation": "static", "prompt_lookup_num_tokens": 2, "unheard_of": 1},
    {"max_length": 3, "use_cache": False, "guidance_scale": 9.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_samples_are_greedy_whatever_the_checkpoint_says(
    settings: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Count to three: ", "completion": "1 2 3"}))
    data = load_data(make_config(dataset=str(tmp_path / "rows.jsonl"), val_size=0), tokenizer)
    model = tiny_model("llama", torch.float32)
    own = model.generation_config = GenerationConfig(**settings)
    before = own.to_dict()
    samples = Samples(data, tokenizer, model)
    samples.complete(model, torch.autocast("cpu", enabled=False), after=True)
    assert samples.samples[0].after == tokenizer.decode(
        greedy(model, samples.prompts[0], tokenizer.eos_token_id), skip_special_tokens=True
    )
    assert model.generation_config is own and own.to_dict() == before  # it is exported


def greedy(model: PreTrainedModel, ids: list[int], eos: int) -> list[int]:
    """Continue a prompt by the likeliest token, one at a time."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < 48 and written[-1:] != [eos]:
            logits = model(torch.tensor([ids + written]), use_cache=False).logits[0, -1]
            written.append(int(logits.argmax()))
    return written
