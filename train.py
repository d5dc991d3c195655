"""Fully fine-tune a causal language model: every parameter, in one loop that reads top to bottom.

    python train.py                                     # the built-in demo
    python train.py --model mistralai/Mistral-7B-v0.1   # the real thing
    python train.py --help

`main` first builds everything by name, then runs the loop. Whatever is optional (activation checkpointing, precision,
another optimizer, packing) is decided while building; the loop does not know of it.
"""

import gc
import sys

from fullft.config.config import Config, parse_config
from fullft.cpu.kernel_caches import prepare_environment
from fullft.errors import report_uncaught_errors

if __name__ == "__main__":
    # Before the imports (some 5 s): --help and mistakes answer soon, and libraries read the environment then.
    report_uncaught_errors(debug=False)
    CONFIG = parse_config()
    report_uncaught_errors(debug=CONFIG.debug)
    prepare_environment(CONFIG)
    gc.disable()  # a quarter of the imports' time would be collections that find nothing
    if CONFIG.plan:
        from fullft.memory.screen import show_plan

        show_plan(CONFIG)
        sys.exit()

# ruff: noqa: E402
import torch

from fullft.config.steps import Calendar
from fullft.data.batches import load_data
from fullft.memory.run import measure_run, plan_run, record_memory
from fullft.model.checks import require_fit
from fullft.model.load import load_model
from fullft.model.loss import SummedCrossEntropy
from fullft.model.parts import PRECISIONS, describe_model, pick_device
from fullft.model.source import find_config, find_model, load_tokenizer
from fullft.optim.build import build_optimizer, build_schedule, describe_optimizer
from fullft.run.evaluation import Samples, evaluate
from fullft.run.log import Metrics, describe_results
from fullft.run.signals import StopRequest
from fullft.saving.checkpoint import open_checkpoint, restore, save_checkpoint
from fullft.saving.export import check_export, export_model
from fullft.saving.output_dir import prepare_output_dir
from fullft.storage.tiers import Storage
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.compilation import apply_compilation
from fullft.transforms.streaming import apply_layer_streaming


def main(config: Config) -> None:
    """Train one model as the options say.

    Args:
        config: checked and resolved options.

    Raises:
        FullftError: with a message and an exit code for the user.
    """
    # --- The model, the data, the optimizer. Mistakes show here, in the order of how fast they can be found.
    device = pick_device()
    source, model_config = find_model(config), find_config(config)
    checkpoint = open_checkpoint(config)
    tokenizer = load_tokenizer(config, source)
    data = load_data(config, tokenizer)
    print(data.description)
    plan = plan_run(config, model_config, data, device, checkpoint)
    config = plan.config  # without any auto: the plan has chosen
    print(plan.description)
    storage = Storage(device, str(config.output_dir))  # of what --offload keeps elsewhere
    model = load_model(config, source if checkpoint is None else str(checkpoint.folder), storage)
    apply_activation_checkpointing(model, config)
    apply_compilation(model, config)
    apply_layer_streaming(model)
    require_fit(model, data.largest_token_id, data.longest, config.packing)
    optimizer = build_optimizer(model, config, storage)
    summed_cross_entropy = SummedCrossEntropy(model)  # which has the head in it
    decoder = summed_cross_entropy.decoder
    calendar = Calendar(config, data.train.steps_per_epoch)
    learning_rate_at = build_schedule(config, calendar.total_steps)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=PRECISIONS[config.precision].autocast)
    print(f"{describe_model(config, model)}\nOptimizer: {describe_optimizer(config)}\n{calendar.describe()}")
    worst_step = measure_run(plan, model, optimizer, data, autocast)  # without consequences: no weight moves

    # --- How good is it before? A resumed run has been asked already.
    samples = Samples(data, tokenizer, model)
    torch.manual_seed(config.seed)  # dropout draws from here on
    last_step = restore(checkpoint, config, model, optimizer, data.fingerprint)
    metrics = Metrics(config, calendar, model, data.train.mean_length, first_step=last_step + 1)
    # What --overwrite_output_dir replaces is only set aside: a run that fails before it has saved anything restores it.
    with prepare_output_dir(config, calendar, model), metrics, StopRequest() as stop:
        record_memory(plan, worst_step, device)
        if last_step == 0:
            samples.complete(model, autocast, after=False)
            metrics.evaluation(0, evaluate(model, data.evaluation, autocast))

        for step in range(last_step + 1, calendar.total_steps + 1):
            # 1. Set the learning rate: before backward, so that an optimizer may step while gradients arrive.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step)

            # 2. Fetch one global batch. Its number of target tokens divides every micro-batch's loss: all weigh alike.
            micro_batches = data.train.global_batch(step)
            num_tokens = sum(micro_batch.num_tokens for micro_batch in micro_batches)
            num_target_tokens = sum(micro_batch.num_target_tokens for micro_batch in micro_batches)

            # 3. Forward and backward. Gradients add up over the micro-batches.
            loss = torch.zeros((), device=device)
            for micro_batch in micro_batches:
                micro_batch = micro_batch.to(device)
                with autocast:
                    # use_cache: a key-value cache serves generation; in training it would hide packing's boundaries.
                    outputs = decoder(**micro_batch.inputs, use_cache=False)
                    micro_loss = summed_cross_entropy(outputs, micro_batch) / num_target_tokens
                del outputs  # backward frees them as it goes; by this name they would live on
                micro_loss.backward()
                loss += micro_loss.detach()  # stays on the device: reading it would wait for the device

            # 4. Clip the global gradient norm, step, and free the gradients.
            grad_norm = optimizer.clip_gradients(max_norm=config.max_grad_norm)
            metrics.require_finite(step, loss, grad_norm)
            optimizer.step()
            optimizer.zero_grad()

            # 5. Log, evaluate, save, stop: whatever is due.
            metrics.step(step, learning_rate_at(step), num_tokens, num_target_tokens)
            if calendar.evaluation_due(step):
                metrics.evaluation(step, evaluate(model, data.evaluation, autocast))
            if calendar.checkpoint_due(step) or stop.received:
                saved = save_checkpoint(config, calendar, step, model, tokenizer, optimizer, data.fingerprint)
                metrics.checkpoint(saved)
                stop.end_run_if_asked(step)

    # --- How good is it after? The final model goes to the root of output_dir, and is reloaded as a user would.
    samples.complete(model, autocast, after=True)
    print(samples.describe())
    optimizer.close()  # its states make room for the reloaded copy
    results = metrics.results(samples)
    export_model(config, model, tokenizer, results)
    print(check_export(config, model, data.train.rows[0]["input_ids"]))
    print(f"{record_memory(plan, worst_step, device)}\n{describe_results(results)}")


if __name__ == "__main__":
    gc.enable()
    main(CONFIG)
