"""A row's text to the tokens of an `Example`: prompt and completion apart, one end token, nothing lost unseen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from pjpo import checks
from pjpo.data.examples import Example, Tally
from pjpo.data.rows import Row, Skip, shared_length

BOUNDARY = "joint and separate encoding differ"  # of prompt and completion, at the place where they meet
CutPrompt = Literal["never", "start", "end"]
CutCompletion = Literal["never", "end"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How long prompts and completions may be, in tokens, and what happens to a row that is longer."""

    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None  # the end token counts
    cut_prompt: str = "never"  # the side that is cut off; "never" skips the row
    cut_completion: str = "never"  # a completion that is cut has no end token

    def __post_init__(self):
        checks.kinds(self)
        for name, limit in (("prompt", self.max_prompt_tokens), ("completion", self.max_completion_tokens)):
            if limit is not None and limit < 1:
                raise ValueError(f"data: max_{name}_tokens must be >= 1 or None, got {limit}")
        for name, cut, allowed in (
            ("cut_prompt", self.cut_prompt, get_args(CutPrompt)),
            ("cut_completion", self.cut_completion, get_args(CutCompletion)),
        ):
            if cut not in allowed:
                raise ValueError(f"data: {name} must be one of {', '.join(allowed)}, got {cut!r}")


def encode(row: Row, place: str, tokenizer: Any, limits: Limits, tally: Tally) -> Example:
    """The row as token ids.

    Prompt and completion are encoded apart, so that the prompt of training is the prompt of sampling. Where encoding
    them joined gives other tokens, the row is kept and counted. Completions of several turns are encoded with their
    prompt, and only what the assistant wrote counts in the loss.

    Args:
        row: text, or chat messages, which the tokenizer's template renders.
        place: names the row.
        tokenizer: a `pjpo.tokenizer.Tokenizer`, or what has its `encode`, `eos_id`, `render_chat`, `encode_chat`.
        limits: lengths.
        tally: counts what was noticed about rows that can be used.

    Raises:
        Skip: the row cannot be used.
        ValueError: the chat template refuses the messages, or there is none.
    """
    notes: list[str] = []
    if any(isinstance(completion, list) and len(completion) > 1 for completion in row.completions):
        prompt, completions, masks = _encode_turns(row, tokenizer, notes)
    else:
        prompt, completions = _encode_apart(row, tokenizer, notes)
        masks = None
    prompt = _fit(prompt, "prompt", limits.max_prompt_tokens, limits.cut_prompt, notes)
    completions = [
        _fit(completion, "completion", limits.max_completion_tokens, limits.cut_completion, notes)
        for completion in completions
    ]
    if masks is not None:
        masks = [mask[: len(completion)] for mask, completion in zip(masks, completions, strict=True)]
    if not all(completions) or not all(map(any, masks or ())):
        raise Skip("empty completion")
    if len(completions) > 1 and completions[0] == completions[1]:  # a cut can make them so
        raise Skip("identical completions")
    if row.labels is not None:
        notes += ["desirable" if label else "undesirable" for label in row.labels]
    for note in dict.fromkeys(notes):  # a row counts once, however many of its completions are cut
        tally.add(note, place)
    return Example(
        prompt=np.array(prompt, np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in completions),
        columns=row.columns,
        id=place,
        loss_masks=None if masks is None else tuple(np.array(mask, bool) for mask in masks),
        labels=row.labels,
    )


def _encode_apart(row: Row, tokenizer: Any, notes: list[str]) -> tuple[list[int], list[list[int]]]:
    prompt_text, texts, chat = row.prompt, row.completions, False
    if isinstance(prompt_text, list):
        prompt_text, texts, chat = *_render(row, tokenizer, notes), True

    def ids_of(text):
        return tokenizer.encode(text, special=True) if chat else tokenizer.encode(text)

    prompt = ids_of(prompt_text)
    completions = [ids_of(text) for text in texts]
    if prompt_text and any(
        prompt + c != ids_of(prompt_text + text) for c, text in zip(completions, texts, strict=True)
    ):
        notes.append(BOUNDARY)
    completions = [_end_once(completion, tokenizer.eos_id, chat) for completion in completions]
    if not prompt_text:  # plain text: nothing predicts its first token, which starts the rest
        prompt, completions = completions[0][:1], [completions[0][1:]]
    return prompt, completions


def _encode_turns(row: Row, tokenizer: Any, notes: list[str]) -> tuple[list[int], list, list]:
    """Completions of several turns, of which what the assistant wrote counts: chats encoded whole, then cut."""
    prompt = tokenizer.encode(_render(row, tokenizer, notes)[0], special=True)
    completions, masks = [], []
    for turns in row.completions:
        try:
            ids, mask = tokenizer.encode_chat([*row.prompt, *turns])
        except ValueError as error:
            raise Skip(f"several turns, but {error}") from error
        if ids[: len(prompt)] != prompt:
            raise Skip("several turns whose tokens do not begin with those of the prompt")
        ids, mask = ids[len(prompt) :], mask[len(prompt) :]
        if tokenizer.eos_id is not None:  # what the template writes after the end of a turn, no model has to say
            end = len(ids) - 1 - ids[::-1].index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            ids, mask = [*ids[:end], tokenizer.eos_id], [*mask[:end], True]
            if ids.count(tokenizer.eos_id) > len(turns):
                raise Skip("end token inside a completion")
        completions.append(ids)
        masks.append(mask)
    return prompt, completions, masks


def _render(row: Row, tokenizer: Any, notes: list[str]) -> tuple[str, list[str]]:
    prompt = tokenizer.render_chat(row.prompt, add_generation_prompt=True)
    wholes = [tokenizer.render_chat([*row.prompt, *turn], add_generation_prompt=False) for turn in row.completions]
    shared = prompt[: min((shared_length(prompt, whole) for whole in wholes), default=len(prompt))]
    if shared != prompt:  # a template may open a turn in a way that the finished turn does not show, such as <think>
        notes.append("chat template ends the prompt otherwise when a completion follows")
    return shared, [whole[len(shared) :] for whole in wholes]


def _end_once(ids: list[int], eos_id: int | None, chat: bool) -> list[int]:
    if eos_id is None:
        return ids
    if chat and eos_id in ids:  # what the template writes after the end of a turn, no model has to say
        ids = ids[: len(ids) - 1 - ids[::-1].index(eos_id)]
    if eos_id in ids:
        raise Skip("end token inside a completion")
    return [*ids, eos_id]


def _fit(ids: Sequence[int], what: str, limit: int | None, cut: str, notes: list[str]) -> Sequence[int]:
    if limit is None or len(ids) <= limit:
        return ids
    if cut == "never":
        raise Skip(f"{what} over {limit} tokens")
    notes.append(f"{what} cut to {limit} tokens at its {cut}")
    return ids[:limit] if cut == "end" else ids[-limit:]
