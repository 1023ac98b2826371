"""Whether a completion has the form that was asked for: tags, or a regular expression."""

from __future__ import annotations

import dataclasses
import re

from pjpo import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """1 where the whole completion has the form, else 0. One of the two settings is given."""

    tags: tuple[str, ...] = ()  # ("think", "answer"): each once, in this order, and between them only space
    pattern: str = ""  # a regular expression, in which . is any character, new lines included

    def __post_init__(self):
        checks.kinds(self)
        if bool(self.tags) == bool(self.pattern):
            raise ValueError(f"format: give tags or a pattern, got tags {self.tags} and pattern {self.pattern!r}")
        for tag in self.tags:
            if not re.fullmatch(r"[\w-]+", tag):
                raise ValueError(f"format: a tag is a word without brackets, got {tag!r}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"format: pattern {self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: list[str], **columns) -> list[float]:
        return [float(self._has_form(text)) for text in completions]

    def _has_form(self, text: str) -> bool:
        if self.pattern:
            return re.fullmatch(self.pattern, text, re.DOTALL) is not None
        once = all(text.count(mark) == 1 for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>"))
        form = r"\s*".join(rf"<{tag}>.*</{tag}>" for tag in self.tags)
        return once and re.fullmatch(rf"\s*{form}\s*", text, re.DOTALL) is not None
