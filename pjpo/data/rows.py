"""Rows in TRL's formats, as a prompt and its completions. Text and chat messages both stay as they are.

- preference: `prompt`, `chosen`, `rejected`; without `prompt`, what the other two share at their start is the prompt.
- preference with a target: `target` too, the completion of the prompt that SLiC-HF's likelihood term is of.
- two whole dialogues of the HH data set: the prompt goes up to the last "\n\nAssistant:", which must be shared.
- unpaired: `prompt`, `completion`, `label`: true where the completion is desirable.
- supervised: `prompt`, `completion`; or `messages`, a chat; or a plain `text`, learned from its second token on.
- prompt-only: `prompt`.

Every other column passes through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

TURN = "\n\nAssistant:"  # what the last answer of an HH dialogue follows
ASSISTANT = "assistant"  # the role
Turns = Literal["last", "all"]


class Skip(Exception):
    """The row cannot be used; the message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt with its completions: all text, or all lists of chat messages. Plain text has the prompt ''."""

    prompt: str | list
    completions: tuple
    columns: dict[str, Any]
    labels: tuple[bool, ...] | None = None  # of each completion, whether it is desirable


def preference(row: dict[str, Any], *, with_target: bool = False) -> Row:
    """Completions are (chosen, rejected), or (chosen, rejected, target).

    Args:
        row: the columns.
        with_target: whether there is a third completion, `target`, that a method imitates; then `prompt` is needed.

    Raises:
        ValueError: columns are missing or hold something else than text or messages.
        Skip: the pair says nothing, or not what its prompt is.
    """
    if with_target:
        fields = _take(row, ("prompt", "chosen", "rejected", "target"))
    else:
        fields = _take(row, ("prompt", "chosen", "rejected"), ("chosen", "rejected"))
    prompt, chosen, rejected = fields.get("prompt"), fields["chosen"], fields["rejected"]
    if chosen == rejected:
        raise Skip("identical completions")
    if with_target:
        return _checked(row, fields, prompt, chosen, rejected, fields["target"])
    # A text beside two chats is a copy of what they share.
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
    return _checked(row, fields, prompt, chosen, rejected)


def unpaired(row: dict[str, Any]) -> Row:
    """One completion and its label. Raises as `preference` does, and for a label that is neither true nor false."""
    fields = _take(row, ("prompt", "completion", "label"))
    label = fields["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise ValueError(
            f"column 'label' must be true (a desirable completion) or false, or 1 or 0; got {label!r:.200}"
        )
    read = _checked(row, fields, fields["prompt"], fields["completion"])
    return dataclasses.replace(read, labels=(bool(label),))


def supervised(row: dict[str, Any], *, turns: Turns = "last") -> Row:
    """One completion. Raises as `preference` does.

    Args:
        row: the columns.
        turns: of `messages`, whether the last turn of the assistant is the completion, or all that follows the first.
    """
    fields = _take(row, ("prompt", "completion"), ("messages",), ("text",))
    if "completion" in fields:
        return _checked(row, fields, fields["prompt"], fields["completion"])
    if "messages" in fields:
        messages = fields["messages"]
        if isinstance(messages, str):
            raise ValueError("column 'messages' must hold chat messages; text goes into 'text'")
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != ASSISTANT:
            raise Skip("chat that does not end with the assistant")
        first = len(roles) - 1 if turns == "last" else roles.index(ASSISTANT)
        return _checked(row, fields, messages[:first], messages[first:])
    if not isinstance(fields["text"], str):
        raise ValueError("column 'text' must hold text; chat messages go into 'messages'")
    if _is_empty(fields["text"]):
        raise Skip("empty text")
    return Row("", (fields["text"],), _others(row, fields))


def prompt_only(row: dict[str, Any]) -> Row:
    """No completions. Raises as `preference` does."""
    fields = _take(row, ("prompt",))
    return _checked(row, fields, fields["prompt"])


def _take(row: dict[str, Any], *allowed: tuple[str, ...]) -> dict[str, Any]:
    """The first set of allowed columns that the row has; null is as good as missing."""
    found = {name: value for name, value in row.items() if value is not None}
    for names in allowed:
        if found.keys() >= set(names):
            fields = {name: found[name] for name in names}
            break
    else:
        choices = "; or ".join(", ".join(names) for names in allowed)
        raise ValueError(f"columns found: {', '.join(found) or 'none'}; needed: {choices}. Rename or add columns")
    for name, value in fields.items():
        if name != "label" and not isinstance(value, str) and not _is_chat(value):
            raise ValueError(
                f"column {name!r} must hold text, or chat messages with role and content; got {value!r:.200}"
            )
    return fields


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in value
    )


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """HH's dialogues at their last answer; other texts and chats where TRL's `extract_prompt` splits them."""
    if all(isinstance(text, str) and TURN in text for text in (chosen, rejected)):
        ends = [text.rindex(TURN) + len(TURN) for text in (chosen, rejected)]
        if chosen[: ends[0]] != rejected[: ends[1]]:
            raise Skip("dialogues whose prompts differ")
        return chosen[: ends[0]], chosen[ends[0] :], rejected[ends[1] :]
    shared = shared_length(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):  # one begins with the other: its end is left to be a completion
        shared = max(shared - 1, 0)
    elif isinstance(chosen, str) and chosen[:shared].endswith(" "):  # a space belongs to the word after it
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def shared_length(a: Sequence, b: Sequence) -> int:
    """How many first characters, or messages, are the same in both."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    return [*same, False].index(False)


def _checked(row: dict[str, Any], fields: dict[str, Any], prompt: Any, *completions: Any) -> Row:
    if len({type(text) for text in (prompt, *completions)}) > 1:
        texts = {name: value for name, value in fields.items() if name != "label"}
        kinds = ", ".join(f"{name} {'text' if isinstance(value, str) else 'messages'}" for name, value in texts.items())
        raise ValueError(f"text and chat messages are mixed ({kinds}); give all as text, or all as messages")
    if _is_empty(prompt):
        raise Skip("empty prompt")
    if any(_is_empty(completion) for completion in completions):
        raise Skip("empty completion")
    if any(isinstance(chat, list) and {chat[0]["role"], chat[-1]["role"]} != {ASSISTANT} for chat in completions):
        raise Skip("completion that does not begin and end with the assistant")
    return Row(prompt, completions, _others(row, fields))


def _is_empty(text: str | list) -> bool:
    return not text.strip() if isinstance(text, str) else all(not message["content"].strip() for message in text)


def _others(row: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in fields}
