"""Progress of long work: a bar on a terminal, elsewhere a line where the work begins; of the first process alone."""

import functools
import sys
from typing import Any

import tqdm

from pjpo import distributed

say = functools.partial(print, flush=True)  # at once, also into a pipe


def bar(title: str, total: int, unit: str, **settings: Any) -> tqdm.tqdm:
    """A bar, to be entered and updated.

    Args:
        title: what is done; without one nothing is shown.
        total: how much of it.
        unit: of what, singular.
        settings: further ones of tqdm.
    """
    shown = bool(title) and distributed.is_first()
    found = tqdm.tqdm(total=total, desc=title, unit=unit, disable=None if shown else True, **settings)
    if shown and found.disable:
        print(f"{title}: {total} {unit}s", file=sys.stderr, flush=True)
    return found
