"""Where in a completion the answer is."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, Literal

Extract = Literal["all", "first number", "last number", "first line", "tag", "####"]
# A minus behind a digit subtracts; commas part thousands, or else numbers.
NUMBER = r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))(?:\.\d+)?"


def extract(text: str, how: Extract) -> str | None:
    """The answer, or None where there is none.

    Args:
        text: a completion.
        how: "all" of it, without surrounding space; a number, its dollar sign and commas left out; the first line that
            is not empty; what the last `<answer>...</answer>` holds; the number behind the last `####`, as in GSM8K.
    """
    if how == "all":
        return text.strip()
    if how == "first line":
        return text.strip().partition("\n")[0].strip() or None
    if how == "tag":
        found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        return found[-1].strip() if found else None
    found = re.findall(rf"####\s*({NUMBER})" if how == "####" else NUMBER, text)
    if not found:
        return None
    return found[0 if how == "first number" else -1].replace("$", "").replace(",", "")


def written(answer: Any) -> str:
    """A row's answer as text; a number in digits, which `str` does not keep to.

    Raises:
        ValueError: there is none.
    """
    if answer is None:
        raise ValueError("the row has no answer; leave it out of the data")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    return format(Decimal(str(answer)), "f") if is_number else str(answer)
