"""Values of other formats as JSON knows them."""

import datetime
import decimal
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Bytes, dates, times and decimals as text, NumPy values as Python's, tuples as lists.

    TFDS hands out a sequence of chat messages as a dict of sequences; it becomes a list of messages.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | decimal.Decimal):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        value = {name: plain(item) for name, item in value.items()}
        if set(value) == {"role", "content"} and isinstance(value["role"], list):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value
