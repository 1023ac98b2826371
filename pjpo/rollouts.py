"""Completions of many prompts, a fixed number of prompts at a time, so that decoding compiles once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from pjpo import distributed, progress
from pjpo.sampling import Prompts, Sampling, sequence_keys
from pjpo.types import Batch


def rollouts(
    policy,
    params,
    prompts: Sequence,
    key,
    sampling: Sampling,
    *,
    batch_size: int,
    width: int | None = None,
    title: str = "",
) -> Batch:
    """Samples `sampling.num_completions` completions of each prompt.

    The samples depend on `key` and the prompt's place in `prompts`, not on `batch_size`.

    Args:
        policy: whose `generate` is called with `params`.
        prompts: token ids, one array for each prompt.
        key: a `jax.random.key`.
        batch_size: prompts decoded together; the last group is filled up with copies that are thrown away.
        width: to pad prompts to, where calls with other prompts are to share a compilation; else that of the longest.
        title: of the progress that is shown; without one none is.

    Returns:
        NumPy arrays for all prompts, `old_logps` included.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("there are no prompts to complete; got an empty list")
    batch_size = min(batch_size, len(prompts)) if width is None else batch_size
    filled = [*prompts, *[prompts[-1]] * (-len(prompts) % batch_size)]
    tokens, mask = pad(filled, width)
    keys = sequence_keys(key, len(filled), sampling.num_completions)
    parts = []
    with progress.bar(title, len(prompts), "prompt") as bar:
        for start in range(0, len(filled), batch_size):
            rows = slice(start, start + batch_size)
            completions = policy.generate(params, Prompts(tokens[rows], mask[rows]), keys[rows], sampling)
            parts.append(distributed.fetch(completions))
            bar.update(min(batch_size, len(prompts) - start))
    tokens, mask = tokens[: len(prompts)], mask[: len(prompts)]
    completion_tokens, completion_mask, logps = (
        np.concatenate(arrays)[: len(prompts)] for arrays in zip(*parts, strict=True)
    )
    return Batch.of(
        prompt_tokens=tokens,
        prompt_mask=mask,
        completion_tokens=completion_tokens,
        completion_mask=completion_mask,
        old_logps=logps,
    )


def stop_tokens(stop: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The ids after which completions end: the tokenizer's own, and those of some texts.

    Raises:
        ValueError: a text that is not one token, or that the tokenizer knows no token for.
    """
    found = list(tokenizer.stop_ids)
    for text in stop:
        ids = tokenizer.encode(text, special=True)
        if len(ids) != 1:
            raise ValueError(f"stop {text!r} must be one token of the tokenizer, got {len(ids)}; choose another text")
        if (meant := tokenizer.decode(ids, skip_special=False)) != text:  # such as that of all unknown characters
            raise ValueError(
                f"stop {text!r} has no token of its own: the tokenizer takes it for {meant!r}, id {ids[0]}; choose "
                "another text"
            )
        found += ids
    return tuple(sorted(set(found)))


def pad(rows: Sequence, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of several lengths as [B, P], right-padded, with their mask; P is `width`, or else the longest's.

    Raises:
        ValueError: a row is longer than `width`.
    """
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    if width is not None and longest > width:
        raise ValueError(
            f"row {int(lengths.argmax())} has {longest} tokens, more than the width {width}; shorten it, or give a "
            "larger width"
        )
    mask = np.arange(longest if width is None else width)[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


def truncated(batch: Batch, stop_tokens: Sequence[int]) -> Bool[np.ndarray, "B N"]:
    """Which completions were cut off: those whose last token is none that ends one."""
    last = np.take_along_axis(batch.completion_tokens, batch.completion_mask.sum(-1, keepdims=True) - 1, -1)[..., 0]
    return ~np.isin(last, stop_tokens)


def texts(batch: Batch, tokenizer) -> list[list[str]]:
    """Prompt and completion of each sequence [B][N] as one text, special tokens left out."""
    return [
        [
            tokenizer.decode([*prompt[seen], *completion[kept]])
            for completion, kept in zip(completions, masks, strict=True)
        ]
        for prompt, seen, completions, masks in zip(
            batch.prompt_tokens, batch.prompt_mask, batch.completion_tokens, batch.completion_mask, strict=True
        )
    ]


def completions(batch: Batch, tokenizer) -> list[list[str]]:
    """The completions alone [B][N], special tokens left out."""
    return [
        [tokenizer.decode(tokens[kept]) for tokens, kept in zip(group, masks, strict=True)]
        for group, masks in zip(batch.completion_tokens, batch.completion_mask, strict=True)
    ]
