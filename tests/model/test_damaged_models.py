"""Damaged models: each is named with its cause, and nothing is begun."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import OUT, train_small
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from fullft.config.options import DEMO_FOLDER
from fullft.errors import (
    report_errors,
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _rewrite_config(model: Path, **values: object) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def _make_t5(model: Path) -> None:
    config = T5Config(vocab_size=1024, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(model)


def _make_bert(model: Path) -> None:
    config = BertConfig(vocab_size=1024, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(model)


def _truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


OWN_CODE = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no model folder"),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no weights"),
    "no config": (lambda model: (model / "config.json").unlink(), "no config.json"),
    "broken config": (lambda model: (model / "config.json").write_text('{"a": '), "config.json"),
    "unknown type": (lambda model: _rewrite_config(model, model_type="fancy9"), "fancy9"),
    "own code": (lambda model: _rewrite_config(model, model_type="own", auto_map=OWN_CODE), "--trust_remote_code"),
    "more layers": (lambda model: _rewrite_config(model, num_hidden_layers=6), "lack 18 tensors"),
    "other width": (lambda model: _rewrite_config(model, hidden_size=64), ""),
    "truncated": (_truncate, ""),
    "no tokenizer": (lambda model: [file.unlink() for file in model.glob("*token*")], "tokenizer"),
    "t5": (_make_t5, "not a causal language model"),
    "bert": (_make_bert, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_exit_4_and_named(
    damage: str, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    do_damage, part = DAMAGES[damage]
    do_damage(model)
    capfd.readouterr()
    with pytest.raises(SystemExit) as end, report_errors(debug=False):
        train_small(model=model, dataset=DEMO_FOLDER / "instructions.jsonl")
    assert end.value.code == 4
    # Progress bars come and go; what stays on the screen is the message.
    shown = capfd.readouterr().err.splitlines()
    lines = [line for line in shown if line and "%|" not in line and " examples" not in line]
    assert lines[0].startswith("error: ") and len(lines) <= 2
    assert str(model) in lines[0] and part in lines[0]
    assert not OUT.exists()
