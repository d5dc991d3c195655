"""Evaluation: the held-out loss against plain torch, row by row."""

import json
from pathlib import Path

import pytest
import torch
from models import make_config, tiny_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from fullft.data.load import load_data
from fullft.model.loss import LossSum
from fullft.run.evaluation import evaluate


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
