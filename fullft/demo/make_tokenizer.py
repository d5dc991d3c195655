"""Make the demo's tiny model folder: a byte-level BPE tokenizer and a GPT-2 config.

This module owns every file in ``fullft/demo/model/``. The tokenizer is trained on the demo's own rows and essay, so
that the demo needs no download. Nearly every word of the rows is one token, which keeps them short. The same input
always gives the same files. The folder holds no weights: the demo starts from random ones.

Run it from the repository root after a change to ``instructions.jsonl`` (see ``make_rows.py``) or ``essay.txt``::

    python -m fullft.demo.make_tokenizer
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

DEMO_DIR = Path(__file__).resolve().parent
MODEL_DIR = DEMO_DIR / "model"

VOCAB_SIZE = 1024
MAX_LENGTH = 512
EOS_TOKEN = "<|endoftext|>"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = r"""
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
""".lstrip()


def render_row(row: dict[str, str]) -> str:
    """Render one row with the Alpaca prompt.

    Args:
        row: A row with the keys ``instruction``, ``input`` and ``output``.

    Returns:
        The prompt and the response as one text. The input block is left out where it is empty.
    """
    blocks = [f"### Instruction:\n{row['instruction']}"]
    if row["input"]:
        blocks.append(f"### Input:\n{row['input']}")
    blocks.append(f"### Response:\n{row['output']}")
    return "\n\n".join(blocks)


def read_corpus() -> list[str]:
    """Read the texts to train the tokenizer on.

    Returns:
        One text for each rendered row, then the essay.
    """
    lines = (DEMO_DIR / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [render_row(json.loads(line)) for line in lines]
    texts.append((DEMO_DIR / "essay.txt").read_text(encoding="utf-8"))
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of ``VOCAB_SIZE`` tokens.

    All 256 bytes are in the vocabulary, so any text can be encoded and decoded without loss.

    Args:
        texts: The texts to learn the merges from.

    Returns:
        The trained tokenizer.

    Raises:
        ValueError: If the texts are too short to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Offsets keep leading spaces, so that the tokens of a text cover it without gaps.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS_TOKEN, *CHAT_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the vocabulary has {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def model_config(eos_id: int) -> dict[str, Any]:
    """Describe the demo's GPT-2 of about 0.8 million parameters.

    Args:
        eos_id: The id of the token that serves as BOS, EOS and padding.

    Returns:
        The content of ``config.json``.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_positions": MAX_LENGTH,
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 4,
        # The same function as GPT-2's "gelu_new", as one fused operation.
        "activation_function": "gelu_pytorch_tanh",
        # GPT-2's 0.1 makes so small a model learn more slowly.
        "embd_pdrop": 0.05,
        "attn_pdrop": 0.05,
        "resid_pdrop": 0.05,
        # GPT-2's 0.02 suits wider layers. At a width of 128 it makes the loss fall much more slowly.
        "initializer_range": 0.06,
        "layer_norm_epsilon": 1e-05,
        "tie_word_embeddings": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
    }


def tokenizer_config() -> dict[str, Any]:
    """Describe the tokenizer to transformers.

    Returns:
        The content of ``tokenizer_config.json``.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "additional_special_tokens": list(CHAT_TOKENS),
        "clean_up_tokenization_spaces": False,
    }


def write_text(name: str, text: str) -> None:
    """Write one file of the model folder with Unix line ends.

    Args:
        name: The file's name.
        text: The file's content.
    """
    (MODEL_DIR / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Train the tokenizer and write the model folder."""
    tokenizer = train_tokenizer(read_corpus())
    MODEL_DIR.mkdir(exist_ok=True)
    write_text("tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text("tokenizer_config.json", json.dumps(tokenizer_config(), indent=2) + "\n")
    write_text("config.json", json.dumps(model_config(tokenizer.get_vocab()[EOS_TOKEN]), indent=2) + "\n")
    write_text("chat_template.jinja", CHAT_TEMPLATE)
    print(f"wrote {MODEL_DIR}")


if __name__ == "__main__":
    main()
