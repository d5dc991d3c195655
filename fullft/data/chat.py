"""Conversations: the tokenizer's chat template writes the text, and the assistant's turns are what is learned."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from fullft.data.rendered import Rendered, RowError
from fullft.data.sources import without_nulls
from fullft.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def to_messages(turns: Any, role_key: str, content_key: str) -> list[dict[str, Any]]:
    """Bring turns to `role` and `content`, and check each; the template reads what else they hold.

    Args:
        turns: a list of mappings.
        role_key: the key of the role in them.
        content_key: the key of the text in them.

    Raises:
        RowError: there are no turns, or one lacks its role or its text.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError("there are no messages")
    messages = []
    for number, turn in enumerate(turns, start=1):
        others = without_nulls(turn) if isinstance(turn, dict) else {}
        role, content = others.pop(role_key, None), others.pop(content_key, None)
        if content is None and "tool_calls" in others:
            content = ""  # a call has no text
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f"message {number} needs {role_key!r} and {content_key!r} as text")
        messages.append({**others, "role": _ROLES.get(role, role), "content": content})
    return messages


def render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, first_target: int = 0) -> Rendered:
    """Render by the tokenizer's chat template; the turns of the assistant are the targets.

    A turn begins where the template's generation prompt ends, and ends with its EOS, or, in templates that close turns
    otherwise, with everything the template writes for it.

    Args:
        messages: from `to_messages`.
        tokenizer: has the template.
        first_target: the first message that may be learned.

    Raises:
        DataError: the tokenizer has no chat template.
        RowError: the template refuses the messages, or rewrites earlier turns, so that no turn has one place.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the rows are conversations and the tokenizer has no chat template: train an instruct model, or put the "
            "template that you want into chat_template.jinja in the model's folder"
        )
    text = _apply_template(messages, tokenizer)
    targets = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_target:
            continue
        before = (
            _apply_template(messages[:index], tokenizer, add_generation_prompt=True)
            if index
            else _before_first_turn(message, tokenizer)
        )
        through = _apply_template(messages[: index + 1], tokenizer)
        if not text.startswith(before) or not text.startswith(through):
            raise RowError(
                f"the chat template writes message {index + 1} differently once others follow: split such rows so "
                "that each ends with the answer to learn"
            )
        targets.append((len(before), _end_of_turn(text, len(before), len(through), tokenizer)))
    eos = str(tokenizer.eos_token)
    return Rendered(text, targets, has_special_tokens=True, ends_turn=text.rstrip().endswith(eos))


def _before_first_turn(message: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a template writes before a conversation's first turn, where that is the assistant's.

    Templates refuse to prompt for a turn after none: the prompt is taken from behind the turn, and looked for in it.
    """
    turn = _apply_template([message], tokenizer)
    prompt = _apply_template([message], tokenizer, add_generation_prompt=True).removeprefix(turn)
    return turn[: turn.index(prompt) + len(prompt)] if prompt in turn else ""


def _end_of_turn(text: str, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Leave out the white space that templates put after EOS: generation has stopped by then."""
    stripped = len(text[start:end].rstrip()) + start
    return stripped if text[start:stripped].endswith(str(tokenizer.eos_token)) else end


def _apply_template(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # templates raise what they like, most often jinja2's TemplateError
        raise RowError(f"the chat template refuses it: {error}") from error
    return str(rendered)
