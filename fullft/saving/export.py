"""The final model: written to the root of `output_dir` as `save_pretrained` lays it out, with a card, and reloaded.

This is what a user takes away from a run.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fullft.attention.choice import attention_of
from fullft.config.config import Config
from fullft.hardware import available_host_bytes
from fullft.model.load_rows import holds_rows
from fullft.model.probing import probing
from fullft.ranks import by_each_rank, by_first_rank
from fullft.saving.files import staged_folder, sync, sync_folder
from fullft.saving.output_dir import WEIGHT_FILES, discard_earlier_run
from fullft.saving.weights import save_weights

_PROBE_TOKENS = 64
_CONFIG = Path("config.json")


def export_model(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]
) -> None:
    """Write weights, configs, tokenizer and card; each file appears whole or not at all.

    Every rank calls it, and returns when the model is complete.

    Args:
        config: `output_dir`, and what the card says.
        model: saved in the dtype that it was trained in.
        tokenizer: saved with its chat template.
        results: what the run achieved, for the card.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    output_dir = config.output_dir
    with staged_folder(output_dir / "export") as staging:
        save_weights(model, staging, is_hashed=False)

        def complete() -> None:
            tokenizer.save_pretrained(staging)
            (staging / "README.md").write_text(_card(config, results), encoding="utf-8")
            sync_folder(staging)
            _install(staging, output_dir)
            discard_earlier_run(output_dir)

        by_first_rank(complete)


def _install(staging: Path, output_dir: Path) -> None:
    """Move files to the root, in place of those of the same names and of an earlier export's weights."""
    files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    # The folder is a model when its config is there, last: a crash in between leaves no mixture that loads.
    (output_dir / _CONFIG).unlink(missing_ok=True)
    for stale in {file for pattern in WEIGHT_FILES for file in output_dir.glob(pattern)}:
        if stale.relative_to(output_dir) not in files:
            stale.unlink()  # of an earlier, differently split export
    for file in sorted(files, key=lambda file: (file == _CONFIG, file)):
        (output_dir / file).parent.mkdir(exist_ok=True)
        os.replace(staging / file, output_dir / file)
    for folder in {(output_dir / file).parent for file in files}:
        sync(folder)


def _card(config: Config, results: dict[str, Any]) -> str:
    base = config.model or "a tiny GPT-2 with random weights (the built-in demo)"
    before, after = results.get("eval_loss_before"), results.get("eval_loss_after")
    evaluation = "no rows were held out"
    if after is not None:
        evaluation = f"held-out loss {after:.4f}" + (f" (before: {before:.4f})" if before is not None else "")
    exported = results.get("exported_step", results["steps"])
    if exported != results["steps"]:
        evaluation += f", the lowest of its checkpoints: these are the weights of step {exported}"
    # A base_model of the front matter must be a hub id; a folder's name would be a dead link.
    is_hub_id = config.model is not None and not Path(config.model).exists()
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [full-fine-tuning, fullft]"]
    front += [f"base_model: {config.model}"] if is_hub_id else []
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {config.output_dir.name}",
            "",
            f"{base}, fully fine-tuned: all {results['num_parameters']:,} parameters.",
            "",
            f"- data: `{config.dataset}` (`{config.dataset_split}`)",
            f"- {results['steps']} steps of {config.global_batch_size} sequences of up to {config.max_length} tokens",
            f"- {config.optim}, {config.lr_scheduler_type} learning rate {config.learning_rate:g}, {config.precision}",
            f"- {evaluation}",
            "",
            "All options are in `config.yaml`, the course of the training in `log.jsonl`.",
            "",
        ]
    )


def check_export(config: Config, model: PreTrainedModel, token_ids: list[int]) -> str:
    """Reload the written model as a user would, and compare its logits with the trained one's.

    All ranks take part in the trained model's logits; the first one alone reloads. Where it has no room for that, each
    of several ranks compares its rows with the files.

    Args:
        config: `output_dir` and `trust_remote_code` are read.
        model: the trained model; the optimizer's states should be gone by now, to make room.
        token_ids: any text.

    Returns:
        A line for the user.
    """
    needed = 1.1 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    difference = None
    if by_first_rank(lambda: _has_room(needed, model.device)):
        probe = torch.tensor([token_ids[:_PROBE_TOKENS]], device=model.device)
        with probing(model):
            trained = model(input_ids=probe, use_cache=False).logits
        difference = by_first_rank(lambda: _difference(config, model, probe, trained))
    if difference is None and config.gpus > 1:
        found = by_each_rank(lambda: holds_rows(model, config.output_dir))
        if None not in found:
            verdict = "its files hold" if all(found) else "warning: its files do not hold"
            return f"Saved {config.output_dir}; {verdict} the trained weights, compared bit by bit"
    if difference is None:
        return f"Saved {config.output_dir}; not reloaded for a check, since there is no memory for a second copy"
    verdict = "the same logits" if difference == 0 else f"warning: its logits differ by up to {difference:.2e}"
    return f"Saved {config.output_dir}; reloaded, it gives {verdict}"


def _has_room(num_bytes: float, device: torch.device) -> bool:
    """Return whether a second model has room on the host, which it is loaded by way of, and on the device."""
    # Linux ends a process that outgrows the memory, rather than raising.
    is_on_device = device.type == "cuda"
    return available_host_bytes() >= num_bytes and not (is_on_device and torch.cuda.mem_get_info(device)[0] < num_bytes)


def _difference(config: Config, model: PreTrainedModel, probe: torch.Tensor, trained: torch.Tensor) -> float | None:
    """Return by how much the written model's logits differ from the trained one's; None without memory for it."""
    try:
        reloaded = AutoModelForCausalLM.from_pretrained(
            config.output_dir,
            dtype=model.dtype,
            attn_implementation=attention_of(model),
            trust_remote_code=config.trust_remote_code,
        ).to(model.device)
        with torch.no_grad():
            difference: float = (reloaded.eval()(input_ids=probe, use_cache=False).logits - trained).abs().max().item()
    except (torch.OutOfMemoryError, MemoryError):
        return None
    return difference
