"""Models that are missing, incomplete or no causal language models are refused before anything is built."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from models import make_config
from worst_steps import deep

from fullft.config.options import DEMO_FOLDER
from fullft.config.parse import parse_config
from fullft.errors import ModelError
from fullft.model import source
from fullft.model.source import find_config, find_model
from train import main

MISTRAL = "mistralai/Mistral-7B-v0.1"


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": -5}, "vocab_size is -5, not a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": 32.5}, "hidden_size is 32.5"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"hidden_size": 33}, "the width 33 is not divisible by 4 attention heads"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"num_hidden_layers": 10**9, "hidden_size": 8192}, "parameters, more than any model has"),
        ({"text_config": {"vocab_size": 0}}, "vocab_size is 0"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "not a causal language model"),
    ],
)
def test_untrainable_configs_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(ModelError) as refusal:
        find_config(make_config(model=str(tmp_path)))
    assert message in str(refusal.value) and refusal.value.exit_code == 4
    assert len(str(refusal.value).splitlines()) <= 2


def test_local_folder_wins_over_a_bundled_name(in_empty_folder: Path) -> None:
    deep("llama").save_pretrained("gpt2")
    assert find_config(make_config(model="gpt2")).model_type == "llama"


def test_model_that_is_nowhere_is_refused(in_empty_folder: Path) -> None:
    Path("empty").mkdir()
    for name, message in (
        ("empty", "has no config.json"),
        ("./nothing", "there is no model folder"),
        ("owner/nothing", "found neither as a folder"),
    ):
        with pytest.raises(ModelError, match=message):
            find_config(make_config(model=name))


# ---------------------------------------------------------------------------------------------- weights on the hub


@pytest.fixture
def cached_model() -> Iterator[Path]:
    """The snapshot of `owner/tiny` in the hub's cache, with its config alone."""
    snapshot = Path(HF_HUB_CACHE) / "models--owner--tiny" / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    yield snapshot
    shutil.rmtree(snapshot.parent.parent)


def test_weights_missing_from_the_hub_cache_are_reported(cached_model: Path) -> None:
    config = make_config(model="owner/tiny")
    assert find_config(config).vocab_size == 100
    with pytest.raises(ModelError, match="owner/tiny in the hub's cache.* has no weights"):
        find_model(config)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (cached_model / "model.safetensors.index.json").write_text(json.dumps(index))
    (cached_model / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelError, match="lacks 1 of 2 weights files, such as model-00002-of-00002"):
        find_model(config)
    (cached_model / "model-00002-of-00002.safetensors").touch()
    assert find_model(config) == "owner/tiny"
    for name in ("owner/nothing", MISTRAL):  # a bundled config is not a model
        with pytest.raises(ModelError, match="found neither as a folder"):
            find_model(make_config(model=name))


def test_weights_on_the_hub_need_no_cache(cached_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "is_offline_mode", lambda: False)
    for there in ("model.safetensors", "pytorch_model.bin.index.json", "nothing"):
        monkeypatch.setattr(source, "has_file", lambda name, file, there=there: file == there)
        if there != "nothing":
            assert find_model(make_config(model="owner/tiny")) == "owner/tiny"
    with pytest.raises(ModelError, match="owner/tiny has no weights .* on the hub"):
        find_model(make_config(model="owner/tiny"))


def test_missing_weights_are_reported_before_the_plan(cached_model: Path, in_empty_folder: Path) -> None:
    words = ["--model", "owner/tiny", "--dataset", str(DEMO_FOLDER / "instructions.jsonl")]
    with pytest.raises(ModelError, match="has no weights"):
        main(parse_config([*words, "--device_memory", "512.5MiB"]))
