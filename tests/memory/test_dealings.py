"""Steps that are dealt by tokens: what a plan may choose among, and that it knows their memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from global_batches import UNEVEN
from models import make_config, tiny_model
from transformers import BloomConfig, Gemma2Config, GPT2Config, JambaConfig, LlamaConfig, PreTrainedConfig
from worst_steps import deep, model_of, optimizer_of

from fullft.data.batches import Batches
from fullft.data.dealing import Dealing
from fullft.errors import OptionsError
from fullft.memory.choose import Plans, choices, choose, fits
from fullft.memory.dealings import dealings_of_plan, dealings_of_run
from fullft.memory.machine import Device, margin_bytes
from fullft.memory.plan import Batch, plan_step
from fullft.memory.speeds import ASSUMED
from fullft.memory.worst_step import take_worst_step
from fullft.model.loss import LossSum
from fullft.model.precision import autocast_of

WHOLE = sum(UNEVEN["num_tokens"][:])
HUGE = Device("a huge device", 2**50)


@pytest.mark.parametrize("most_tokens", [31, 40, 57, 64, 96, 110, 128, 160, 200, WHOLE, 2 * WHOLE])
def test_plan_equals_the_tracked_step(most_tokens: int) -> None:
    config = make_config(max_length=64, micro_batch_tokens=most_tokens, precision="bf16-true", val_size=0.2)
    batches = Batches(UNEVEN, config, pad_token_id=0)
    config = dealings_of_run(config, tiny_model("llama").config, batches, {}).config
    model_config = deep("llama", 4)
    planned = plan_step(
        config, model_config, Batch(1, 31, 31, all_tokens=WHOLE, all_evaluation_tokens=WHOLE).under(config)
    )
    model = model_of("llama", config)
    largest = batches.largest()
    profile = take_worst_step(
        model,
        LossSum(model),
        optimizer_of(model, config),
        [largest] * min(2, config.gradient_accumulation_steps),
        largest,
        autocast_of(config.numerics, torch.device("cpu")),
        config.max_grad_norm,
    )
    assert planned["peak_bytes"] == profile.to_dict()["peak_bytes"]


@pytest.mark.parametrize("sequences", [1, 3, 4, 16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # Llama's sequences share a row, Gemma-2's are padded
def test_plan_equals_the_tracked_step_of_given_sizes(family: str, sequences: int) -> None:
    config = make_config(max_length=64, per_device_train_batch_size=sequences, global_batch_size=48, val_size=0.2)
    rows = Batches(UNEVEN, config, pad_token_id=0)
    held_out = Batches(UNEVEN.select(range(5)), config, pad_token_id=0)
    dealings = dealings_of_run(config, deep(family, 4), rows, {})
    config = dealings.config
    assert bool(dealings.note) == (family == "gemma2" and sequences > 1) and dealings.ways == ()
    batch = Batch.of([rows.largest()], held_out.largest())
    model = model_of(family, config)
    largest = rows.dealt(config).largest()
    assert largest.labels.shape[0] == (sequences if family == "gemma2" else 1)
    profile = take_worst_step(
        model,
        LossSum(model),
        optimizer_of(model, config),
        [largest] * 2,
        held_out.dealt(config).largest(),
        autocast_of(config.numerics, torch.device("cpu")),
        config.max_grad_norm,
    )
    assert plan_step(config, deep(family, 4), batch.under(config))["peak_bytes"] == profile.to_dict()["peak_bytes"]


def ways_of(config: PreTrainedConfig) -> tuple[tuple[Dealing, ...], str]:
    options = make_config(max_length=64)
    dealings = dealings_of_run(options, config, Batches(UNEVEN, options, pad_token_id=0), {})
    return dealings.ways, dealings.note


def test_families_that_tell_documents_apart_share_rows() -> None:
    ways, note = ways_of(LlamaConfig())
    assert note == "" and ways[0] == Dealing(WHOLE, 1) and len(ways) > 2
    for config, reason in (
        (BloomConfig(), "does not tell documents apart"),
        (JambaConfig(), "does not tell documents apart"),
        (Gemma2Config(), "by the square"),
        (GPT2Config(), "attention with dropout"),
    ):
        ways, note = ways_of(config)
        assert ways == () and reason in note
    assert ways_of(GPT2Config(attn_pdrop=0.0))[1] == ""


def test_choice_takes_the_fewest_micro_batches_that_fit() -> None:
    config, plans, batch = make_config(max_length=64, precision="fp32"), Plans(deep("llama")), Batch(1, 64, 64)
    dealings = dealings_of_plan(config, plans.model_config)
    chosen, line = choose(config, plans, batch, HUGE, lambda: ASSUMED, dealings.ways)
    assert (chosen.micro_batch_tokens, chosen.gradient_accumulation_steps) == (1024, 1)
    assert "micro-batches of at most 1,024 tokens" in line
    whole = plans.peak_bytes(chosen, batch)
    tight = Device("a tight device", whole + margin_bytes(whole) - 1)
    chosen, line = choose(config, plans, batch, tight, lambda: ASSUMED, dealings.ways)
    assert chosen.micro_batch_tokens in (1024, 512, 256, 128, 64)
    assert plans.peak_bytes(chosen, batch) < whole
    assert chosen != config and "too large" in line


def test_nothing_fits_only_where_one_row_alone_does_not() -> None:
    config, plans, batch = make_config(max_length=64, precision="fp32"), Plans(deep("llama")), Batch(1, 64, 64)
    dealings = dealings_of_plan(config, plans.model_config)
    ranked = choices(config, plans, batch, HUGE, ASSUMED, dealings.ways)
    peaks = {choice: plans.peak_bytes(choice.apply(config), batch) for choice in ranked}
    least = min(peaks.values())
    alone = [choice for choice in ranked if choice.dealing is not None and choice.dealing.tokens == 64]
    assert least == min(peaks[choice] for choice in alone)
    enough = Device("just enough", least + margin_bytes(least))
    chosen, _ = choose(config, plans, batch, enough, lambda: ASSUMED, dealings.ways)
    assert plans.peak_bytes(chosen, batch) == least and fits(plans.of(chosen, batch), enough)
    too_small = replace(enough, memory_bytes=enough.memory_bytes - 1)
    chosen, line = choose(config, plans, batch, too_small, lambda: ASSUMED, dealings.ways)
    assert not fits(plans.of(chosen, batch), too_small) and "even that does not fit" in line


def test_resumed_run_deals_as_before_and_given_tokens_are_kept(tmp_path: Path) -> None:
    options = make_config(max_length=64)
    batches, model_config = Batches(UNEVEN, options, pad_token_id=0), LlamaConfig()
    resumed = dealings_of_run(options, model_config, batches, {"micro_batch_tokens": 70})
    assert resumed.ways == () and resumed.config.micro_batch_tokens == 70
    given = make_config(max_length=64, micro_batch_tokens=70)
    assert resumed.config.gradient_accumulation_steps == batches.dealt(given).most_micro_batches(options) > 1
    assert dealings_of_run(given, model_config, batches, {}).config == resumed.config
    with pytest.raises(OptionsError, match="less than the longest sequence has, 31 tokens"):
        dealings_of_run(make_config(max_length=64, micro_batch_tokens=30), model_config, batches, {})
