"""Fully fine-tune a causal language model: every parameter, in one loop that reads top to bottom.

    python train.py                                     # the built-in demo
    python train.py --model mistralai/Mistral-7B-v0.1   # the real thing
    python train.py --help

`main` first builds everything by name, then runs the loop. Whatever is optional (activation checkpointing, precision,
another optimizer, packing) is decided while building; the loop does not know of it.
"""

if __name__ == "__main__":
    from fullft.start import start

    CONFIG = start()  # before the slow imports: --help, --plan and mistakes are answered here

import torch

from fullft.attention.choice import choose_attention
from fullft.config.config import Config
from fullft.config.steps import Steps
from fullft.cpu.reuse import reuse_memory
from fullft.data.load import load_data
from fullft.errors import out_of_memory_advice
from fullft.memory.run import measure_run, plan_run, record_memory
from fullft.model.checks import check_model
from fullft.model.load import load_model
from fullft.model.loss import LossSum
from fullft.model.parts import describe_model, num_embeddings
from fullft.model.precision import autocast_of
from fullft.model.source import find_config, find_model, load_tokenizer
from fullft.optim.build import build_optimizer, describe_optimizer
from fullft.optim.schedule import build_schedule
from fullft.ranks import describe_ranks
from fullft.run.evaluation import Samples, evaluate
from fullft.run.joining import begin_steps, end_steps, join_ranks
from fullft.run.log import Log, describe_results
from fullft.run.signals import StopRequest
from fullft.saving.best import BestCheckpoint
from fullft.saving.checkpoint import save_checkpoint
from fullft.saving.export import check_export, export_model
from fullft.saving.output_dir import prepare_output_dir
from fullft.saving.resuming import open_checkpoint, restore
from fullft.storage.tiers import Storage
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing
from fullft.transforms.compilation import apply_compilation
from fullft.transforms.sharding import apply_sharding
from fullft.transforms.streaming import apply_layer_streaming


def main(config: Config) -> None:
    """Train one model as the options say.

    Args:
        config: checked and resolved options.

    Raises:
        FullftError: with a message and an exit code for the user.
    """
    # --- The data, the plan, the model, the optimizer. Cheap checks come first.
    device = join_ranks(config)  # those that --gpus, torchrun or Slurm has started; alone, there is nobody to join
    source, model_config = find_model(config), find_config(config)
    checkpoint = open_checkpoint(config)
    best = BestCheckpoint(config, checkpoint)  # for --load_best_model_at_end
    tokenizer = load_tokenizer(config, source)
    data = load_data(config, tokenizer, num_embeddings(model_config))
    print(data.description)
    plan = plan_run(config, model_config, data, device, checkpoint)
    config = plan.config  # the plan has decided what was left open
    print(plan.description, *describe_ranks(config), sep="\n")
    with out_of_memory_advice(plan.advice):
        storage = Storage(device, config.output_dir)  # for what --offload keeps elsewhere
        model = load_model(config, source if checkpoint is None else str(checkpoint.folder), storage)
        begin_steps(
            config
        )  # nothing is tokenised or downloaded any more: a rank that keeps others waiting ends the run
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)
        apply_sharding(model, config, storage)
        apply_layer_streaming(model, storage)
        choose_attention(model, config.packing)
        check_model(model, data.largest_token_id, data.longest, config.packing)
        reuse_memory(model)
        loss_sum = LossSum(model, compiled=config.compiles)
        optimizer = build_optimizer(model, config, storage)
        steps = Steps(config, data.train.steps_per_epoch)
        learning_rate_at = build_schedule(config, steps.total)
        autocast = autocast_of(config.numerics, device, keeps_copies=config.gpus == 1)
        print(f"{describe_model(config, model)}\nOptimizer: {describe_optimizer(config)}\n{steps.describe()}")
        worst_step = measure_run(plan, model, loss_sum, optimizer, data, autocast)  # no weight moves

        # --- Evaluate before training; a resumed run already has.
        samples = Samples(data, tokenizer, model)
        last_step = restore(checkpoint, config, steps, model, optimizer, data.fingerprint)
        log = Log(config, steps, model, data.train.mean_length, first_step=last_step + 1)
        # --overwrite_output_dir only sets an earlier run aside: a run that fails before it has saved puts it back.
        with prepare_output_dir(config, steps, model), log, StopRequest() as stop:
            record_memory(plan, worst_step, device)
            if last_step == 0:
                samples.complete(model, autocast, after=False)
                log.evaluation(0, evaluate(model, loss_sum, data.evaluation, autocast))

            for step in range(last_step + 1, steps.total + 1):
                # 1. Set the learning rate, before backward: an optimizer may step while gradients arrive.
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step)

                # 2. Fetch one global batch. One divisor for all its micro-batches: its number of target tokens.
                batch = data.train.global_batch(step)

                # 3. Forward and backward. Gradients add up over the micro-batches.
                loss = torch.zeros((), device=device)
                for micro_batch in batch:
                    micro_batch = micro_batch.to(device)
                    with autocast:
                        micro_loss = loss_sum(micro_batch) / batch.num_target_tokens
                    micro_loss.backward()
                    loss += micro_loss.detach()  # stays on the device: reading it would wait for the device

                # 4. Clip the global gradient norm, step, and free the gradients.
                grad_norm = optimizer.clip_gradients(max_norm=config.max_grad_norm)
                log.require_finite(step, loss, grad_norm)
                optimizer.step()
                optimizer.zero_grad()

                # 5. Log, evaluate, save, stop: whatever is due.
                log.step(step, learning_rate_at(step), batch.num_tokens, batch.num_target_tokens)
                if steps.evaluation_due(step):
                    log.evaluation(step, evaluate(model, loss_sum, data.evaluation, autocast))
                if steps.checkpoint_due(step) or stop.was_asked():
                    noted = best.including(step, log.eval_losses)
                    saved = save_checkpoint(config, steps, step, model, tokenizer, optimizer, data.fingerprint, noted)
                    log.checkpoint(saved)
                    stop.end_run_if_asked(step)

        # --- The final model goes to the root of output_dir before anything else can fail. It is reloaded for a check.
        end_steps()  # the first rank exports, and the others wait
        optimizer.close()  # its states make room for the reloaded copy
        exported = best.load(model, steps.total, log.eval_losses)  # without --load_best_model_at_end the last weights
        results = log.results(exported)
        export_model(config, model, tokenizer, results)
        print(check_export(config, model, data.train.rows[0]["input_ids"]))
        print(record_memory(plan, worst_step, device))
        samples.complete(model, autocast, after=True)
        log.samples(results, samples)
        print(f"{samples.describe()}\n{describe_results(results)}")


if __name__ == "__main__":
    main(CONFIG)
