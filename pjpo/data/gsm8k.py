"""Word problems in GSM8K's columns, as prompts. Cobbe et al. 2021, arXiv:2110.14168.

`question` becomes the prompt; `answer`, a solution that ends in `#### number`, stays for `pjpo.rewards.gsm8k`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from pjpo.data import files, rows

ASK = "{question}\nThink step by step. End with a line of #### and the number."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(files.Prompts):
    form: Literal["chat", "plain"] = "chat"  # a message in the model's template, or plain text
    template: str = ASK  # with {question}

    num_completions = 0

    def __post_init__(self):
        super().__post_init__()
        if "{question}" not in self.template:
            raise ValueError(f"data: template must hold {{question}}, got {self.template!r}")

    def read_row(self, row: dict[str, Any]) -> rows.Row:
        """
        Raises:
            ValueError: columns are missing.
            rows.Skip: an empty question.
        """
        missing = [name for name in ("question", "answer") if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(
                f"columns with text are needed: question, answer; {', '.join(missing)} is not, among {', '.join(row)}"
            )
        if not row["question"].strip():
            raise rows.Skip("empty question")
        text = self.template.replace("{question}", row["question"])
        prompt = text if self.form == "plain" else [{"role": "user", "content": text}]
        return rows.prompt_only(row | {"prompt": prompt})
