"""The worst step does what the training loop does, in its order: both files are parsed and compared."""

import ast
from pathlib import Path

import pytest
from fork_server import ROOT

TRAIN, WORST_STEP = ROOT / "train.py", ROOT / "fullft" / "memory" / "worst_step.py"
# What uses memory or frees it. The calls of the tracker and the log, evaluations and checkpoints do not count.
COPY, LOSS_SUM = "copy", "loss_sum"
AUTOCAST, AUTOCAST_ENDS, DIVISION = "with autocast", "end of with autocast", "/ num_target_tokens"
OF_THE_STEP = ("backward", "clip_gradients", "step", "zero_grad")
OPTIMIZERS = ("optimizer", "rehearsal")


def call_of(node: ast.AST) -> str | None:
    """Name a call as both files do, or return None where it does not count."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return {"_copy": COPY, LOSS_SUM: LOSS_SUM}.get(node.func.id)
    if not isinstance(node.func, ast.Attribute):
        return None
    owner = ast.unparse(node.func.value)
    if node.func.attr == "to" and owner == "micro_batch":
        return COPY
    if node.func.attr == "backward" and owner != "tracker":
        return "backward"
    return node.func.attr if node.func.attr in OF_THE_STEP and owner in OPTIMIZERS else None


def is_division(node: ast.AST) -> bool:
    """Whether it divides by a number of target tokens: of the global batch, or of the one micro-batch."""
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and isinstance(node.right, ast.Attribute)
        and node.right.attr == "num_target_tokens"
    )


def actions_in(nodes: list[ast.stmt]) -> list[str]:
    """List contexts, the calls that count, and divisions in the order in which they are evaluated."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        contexts = [f"with {ast.unparse(item)}" for item in node.items] if isinstance(node, ast.With) else []
        found.extend(contexts)
        for child in ast.iter_child_nodes(node):
            visit(child)
        found.extend(f"end of {context}" for context in reversed(contexts))
        if (call := call_of(node)) is not None:  # after its arguments
            found.append(call)
        if is_division(node):
            found.append(DIVISION)

    for node in nodes:
        visit(node)
    return found


def is_evaluation(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "evaluation" in ast.unparse(node.test)


def step_of(source: str) -> tuple[list[str], list[str]]:
    """Return what is done within the loop over micro-batches, and after it in the same block."""
    for node in ast.walk(ast.parse(source)):
        for block in (getattr(node, "body", None), getattr(node, "orelse", None)):
            for place, statement in enumerate(block if isinstance(block, list) else []):
                if isinstance(statement, ast.For) and ast.unparse(statement.target) == "micro_batch":
                    after = [each for each in block[place + 1 :] if not is_evaluation(each)]
                    return actions_in(statement.body), actions_in(after)
    raise AssertionError("there is no loop over micro-batches")


def test_the_worst_step_does_what_the_loop_does() -> None:
    within, after = step_of(TRAIN.read_text())
    assert within == [COPY, AUTOCAST, LOSS_SUM, DIVISION, AUTOCAST_ENDS, "backward"]
    assert after == ["clip_gradients", "step", "zero_grad"]
    assert step_of(WORST_STEP.read_text()) == (within, after)


@pytest.mark.parametrize("file", [TRAIN, WORST_STEP], ids=lambda file: file.name)
@pytest.mark.parametrize(
    ("one", "other"),
    [(".step()", ".zero_grad()"), (".clip_gradients(", ".step("), ("loss_sum(", "_copy(")],
)
def test_two_swapped_calls_are_another_step(file: Path, one: str, other: str) -> None:
    """The negative control."""
    source = file.read_text()
    if file == TRAIN:  # which copies in another way
        source = source.replace("micro_batch.to(device)", "_copy(micro_batch)")
    assert step_of(source) == step_of(WORST_STEP.read_text())
    swapped = source.replace(one, "\0").replace(other, one).replace("\0", other)
    assert step_of(swapped) != step_of(source)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("rehearsal.zero_grad()", "pass"),
        ("micro_loss.backward()", "pass"),
        ("with autocast:", "if True:"),
        ("with autocast:", "with torch.no_grad():"),
        ("with autocast:", "with autocast, torch.no_grad():"),
        (" / micro_batch.num_target_tokens", ""),
        (" / micro_batch.num_target_tokens", " * micro_batch.num_target_tokens"),
        (" / micro_batch.num_target_tokens", " / micro_batch.num_tokens"),
    ],
)
def test_a_missing_or_changed_action_is_another_step(text: str, other: str) -> None:
    """The negative control."""
    source = WORST_STEP.read_text()
    assert source.count(text) == 1
    assert step_of(source.replace(text, other)) != step_of(source) == step_of(TRAIN.read_text())


@pytest.mark.parametrize("text", ["with autocast:", " / batch.num_target_tokens"])
def test_the_loop_without_autocast_or_division_differs(text: str) -> None:
    """The negative control."""
    source = TRAIN.read_text()
    assert source.count(text) == 1
    without = source.replace(text, "if True:" if text.startswith("with") else "")
    assert step_of(without) != step_of(WORST_STEP.read_text())


def test_evaluation_comes_last_in_both_without_gradients() -> None:
    """The loop evaluates after its step, if at all; so does the worst step, with the same call."""
    for file in (TRAIN, WORST_STEP):
        source = file.read_text()
        evaluations = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.If) and is_evaluation(node)]
        zero_grads = [node for node in ast.walk(ast.parse(source)) if call_of(node) == "zero_grad"]
        assert len(evaluations) == len(zero_grads) == 1
        assert evaluations[0].lineno > zero_grads[0].lineno
        assert any("loss_sum" in ast.unparse(statement) for statement in evaluations[0].body)
    # The worst step writes its evaluation out, in the contexts of fullft/run/evaluation.py.
    contexts = ["with probing(model)", AUTOCAST]
    ends = [f"end of {context}" for context in reversed(contexts)]
    assert actions_in(evaluations[0].body) == [COPY, *contexts, LOSS_SUM, *ends]
