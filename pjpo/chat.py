"""Chat templates: messages to text, and which of it the assistant wrote, as `transformers` 5 renders them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from pjpo import sandbox

REASONING = ("reasoning_content", "thinking", "reasoning")  # a message's thoughts; templates read the first


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The messages as one text.

    Args:
        template: jinja2 source, trusted with nothing: see `pjpo.sandbox`.
        messages: dicts of `role`, `content` and whatever else the template reads; None counts as left out.
        variables: what else the template reads: `add_generation_prompt`, `bos_token`, `tools`, `enable_thinking`, ...

    Raises:
        ValueError: no messages, or a template that refuses them or fails; with its words and the messages' roles.
    """
    return _render(template, messages, variables, mark="")


def render_with_spans(
    template: str, messages: Sequence[Mapping[str, Any]], **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and what of it the template's `{% generation %}` blocks wrote: (first character, one past the last).

    Raises:
        ValueError: as `render`, or a template without such blocks.
    """
    if not _compile(template).marks_generation:
        raise ValueError(
            "the chat template has no {% generation %} block, so it does not say what the assistant wrote; put "
            "{% generation %} and {% endgeneration %} around what the assistant says and the end of its turn"
        )
    mark = uuid.uuid4().hex  # what no message can hold
    pieces = re.split(f"{mark}([()])", _render(template, messages, variables, mark))
    text, starts, spans = pieces[0], [], []
    for bracket, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if bracket == "(":
            starts.append(len(text))
        else:
            spans.append((starts.pop(), len(text)))
        text += piece
    return text, spans


def _render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], mark: str) -> str:
    if not messages:
        raise ValueError("a chat needs at least one message, got none")
    given = [_with_reasoning({name: v for name, v in message.items() if v is not None}) for message in messages]
    variables = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    compiled = _compile(template)
    try:
        text = compiled.run(mark, messages=given, **variables)
        text.encode()  # a lone surrogate is no text that a tokenizer could read
        return text
    except Exception as error:  # the template's expressions may raise anything
        roles = ", ".join(str(message.get("role")) for message in messages)
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise ValueError(f"the chat template refuses messages with the roles {roles}: {kind}{error!s:.2000}") from error


def _compile(template: str) -> sandbox.Template:
    try:
        return sandbox.compile(template)
    except Exception as error:  # jinja2's and Python's own, where it is nested too deeply
        raise ValueError(f"the chat template cannot be read: {error!s:.2000}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Thoughts under the name that most templates read, and under gpt-oss's."""
    thoughts = next((message[name] for name in REASONING if name in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}
