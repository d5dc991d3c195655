"""Compiled layers give the same losses and gradients, up to rounding; a run that cannot compile continues."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SHAPE, VOCABULARY, make_config, tiny_model
from small_runs import train_small
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedModel

from fullft.attention.choice import attend_by_document
from fullft.data.micro_batch import MicroBatch
from fullft.errors import OptionsError
from fullft.model.loss import LossSum
from fullft.model.parts import decoder_layers
from fullft.transforms import compilation
from fullft.transforms.activation_checkpointing import apply_activation_checkpointing, recompute
from fullft.transforms.compilation import WORTH_IT, apply_compilation, choose_compilation

CPU = torch.device("cpu")
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)
COMPILED = make_config(compile="true", packing=True, activation_checkpointing="none")
STREAMED = "offload=parameters=host"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(family: str, dropout: float = 0.0) -> PreTrainedModel:
    """Make an fp32 model; cohere's and granite's logits are scaled, gemma2's soft-capped."""
    configs = {
        "granite": GraniteConfig(**SHAPE, logits_scaling=4.0, residual_multiplier=0.5),
        "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    }
    if family not in configs:
        return tiny_model(family, torch.float32, dropout)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[family], dtype=torch.float32).train()


def packed(lengths: tuple[int, ...] = (20, 28)) -> MicroBatch:
    """Make a sequence of documents."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return replace(MicroBatch.of(ids), inputs={"input_ids": ids, "position_ids": positions})


def loss_and_gradients(
    model: PreTrainedModel, micro_batch: MicroBatch, autocast: object = nullcontext()
) -> list[torch.Tensor]:
    torch.manual_seed(2)  # of dropout
    with autocast:  # type: ignore[attr-defined]
        loss = LossSum(model)(micro_batch) / micro_batch.num_target_tokens
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return [loss.detach(), *gradients]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Return the relative error of the loss, and the largest of a parameter's gradient."""
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    return errors[0], max(errors[1:])


@pytest.mark.parametrize(
    ("family", "checkpointing", "dropout"),
    [
        pytest.param("gemma2", "every_2", 0.0, marks=pytest.mark.slow),
        pytest.param("granite", "selective", 0.0, marks=pytest.mark.slow),
        pytest.param("cohere", "full", 0.0, marks=pytest.mark.slow),
        ("gpt2", "full", 0.1),
        pytest.param("gpt2", "none", 0.1, marks=pytest.mark.slow),  # which is selective in a graph
    ],
)
def test_compiled_fp32_layers_differ_by_rounding_alone(family: str, checkpointing: str, dropout: float) -> None:
    model, micro_batch = model_of(family, dropout), packed()
    attend_by_document(model)
    expected = loss_and_gradients(model, micro_batch)
    config = replace(COMPILED, activation_checkpointing=checkpointing)
    apply_activation_checkpointing(model, config)
    apply_compilation(model, config)
    loss, gradients = distance(loss_and_gradients(model, micro_batch), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert loss < 1e-6
    assert gradients < 1e-5
    with torch.no_grad():  # what these bounds notice
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    assert min(distance(loss_and_gradients(model, micro_batch), expected)) > 1e-6


@pytest.mark.slow
def test_compiled_bf16_layers_share_one_graph() -> None:
    model = model_of("llama")
    attend_by_document(model)
    # The first row is as long as the model is wide. That must not make a graph for this length alone.
    batches = [packed((20, 12)), packed(), packed((48,)), packed((7, 30, 11)), packed((20, 5, 8))]
    expected = [loss_and_gradients(model, batch, BF16) for batch in batches]
    exact = [loss_and_gradients(model, batch) for batch in batches]
    apply_activation_checkpointing(model, COMPILED)
    apply_compilation(model, COMPILED)
    graphs, errors = [], []
    for batch, theirs, fp32 in zip(batches, expected, exact, strict=True):
        ours = loss_and_gradients(model, batch, BF16)
        graphs.append(counters["stats"]["unique_graphs"])
        loss, gradients = distance(ours, theirs)
        assert loss < 1e-3
        assert gradients < 0.05
        errors.append((distance(ours, fp32)[1], distance(theirs, fp32)[1]))
        assert errors[-1][0] < 1.5 * errors[-1][1]
    of_compiled, of_eager = map(sum, zip(*errors, strict=True))
    assert of_compiled < 1.2 * of_eager  # no further from the truth, all batches together
    assert graphs == [1] * 5  # for all layers, which are alike, and for all lengths


def test_graphs_keep_what_their_checkpointing_says() -> None:
    kept: Counter[tuple[str, str]] = Counter()
    for config in (make_config(), COMPILED, replace(COMPILED, activation_checkpointing="full")):
        torch._dynamo.reset()
        model, kind = model_of("llama"), (config.compile, config.activation_checkpointing)
        attend_by_document(model)
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)

        def count(tensor: torch.Tensor, kind: tuple[str, str] = kind) -> torch.Tensor:
            kept[kind] += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.get_decoder()(**packed().inputs, use_cache=False)
    eager, selective, full = kept.values()
    assert full < 0.4 * selective and selective < 0.7 * eager


def test_layer_with_a_graph_break_runs_uncompiled(capsys: pytest.CaptureFixture[str]) -> None:
    """Cut in two within what backward recomputes, it would compute something else there."""
    results = []
    for config in (make_config(activation_checkpointing="selective"), COMPILED):
        model = model_of("llama")
        for layer in decoder_layers(model):
            layer.mlp.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
        apply_activation_checkpointing(model, config)
        apply_compilation(model, config)
        results.append(loss_and_gradients(model, packed()))
    assert all(map(torch.equal, *results))
    assert capsys.readouterr().out.count("warning: the compiler failed") == 1


def test_nothing_is_compiled_without_gradients() -> None:
    model = model_of("llama")
    apply_compilation(model, COMPILED)
    with torch.no_grad():
        model(**packed().inputs)
    assert counters["stats"]["unique_graphs"] == 0


def test_failing_compiler_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    model, micro_batch = model_of("llama"), packed()
    expected = loss_and_gradients(model, micro_batch)
    apply_compilation(model, COMPILED)
    with fresh_cache(), inductor.patch("cpp.cxx", ("no-such-compiler",)):
        found = loss_and_gradients(model, micro_batch)
    assert all(map(torch.equal, found, expected))
    said = capsys.readouterr()
    assert (said.out + said.err).count("the compiler failed") == 1


def test_compiled_layers_stay_when_a_later_one_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, micro_batch = model_of("llama"), packed()
    expected = loss_and_gradients(model, micro_batch)
    calls = []

    def compile_two(forward: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def graph(*args: Any, **kwargs: Any) -> Any:
            calls.append(forward)
            if len(calls) == 3:
                raise TorchDynamoException("no room")
            return forward(*args, **kwargs)

        return graph

    monkeypatch.setattr(torch, "compile", compile_two)
    apply_compilation(model, COMPILED)
    for layer in decoder_layers(model):  # as streamed ones do
        layer.forward = recompute(layer.forward)
    assert all(map(torch.equal, loss_and_gradients(model, micro_batch), expected))
    # Three layers ran twice, by their graphs; the third one asked for its graph once.
    assert (len(calls), len(set(map(id, calls)))) == (7, 4)
    assert capsys.readouterr().out.count("no room") == 1


@pytest.mark.parametrize(
    ("options", "flops", "compiles"),
    [
        ({}, 1.1, "true"),
        ({"packing": True}, 1.1, "true"),
        ({}, 0.9, "false"),  # too short
        ({"compile": "false"}, 1.1, "false"),
        ({"compile": "true"}, 0.9, "true"),
        ({"fit": "off"}, 1.1, "false"),
    ],
)
def test_auto_compiles_long_runs(options: dict[str, object], flops: float, compiles: str) -> None:
    chosen, line = choose_compilation(make_config(**options), flops * WORTH_IT["cpu"], CPU)
    assert chosen.compile == compiles
    assert bool(line) == (compiles == "true" and "compile" not in options)


def test_compile_true_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda _: None)
    config = make_config(packing=True)
    chosen, line = choose_compilation(config, 2 * WORTH_IT["cpu"], CPU)
    assert chosen.compile == "false"
    assert "g++" in line
    with pytest.raises(OptionsError, match="g\\+\\+"):
        choose_compilation(replace(config, compile="true"), 0, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["activation_checkpointing=none", "activation_checkpointing=full", STREAMED])
def test_resumed_compiled_run_equals_the_uninterrupted_one(option: str, tmp_path: Path) -> None:
    def run(folder: Path, *words: str) -> list[float]:
        torch._dynamo.reset()  # as another process begins
        words = (*words, "--compile", "--packing", f"--{option}")
        train_small(words, output_dir=folder, max_steps=4, gradient_accumulation_steps=2, val_size=0.05)
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        return [record["loss"] for record in log if "loss" in record]

    whole = run(tmp_path / "whole")
    assert counters["stats"]["unique_graphs"] > 0
    (tmp_path / "resumed").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    (tmp_path / "whole" / "log.jsonl").rename(tmp_path / "resumed" / "log.jsonl")
    assert run(tmp_path / "resumed", "--resume_from_checkpoint") == whole
