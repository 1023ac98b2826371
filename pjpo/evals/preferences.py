"""What kind of preferences held-out examples hold, and which implicit rewards a method's runs are read by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pjpo.data.examples import Example

Kind = Literal["pairs", "labelled"]  # (chosen, rejected, ...), or one completion that is desirable or not


def kind_of(examples: Sequence[Example], method: Any) -> Kind | None:
    """None where the examples hold no preferences, or the method reads no log-probs (a reward model does not)."""
    if not examples or "logps" not in getattr(method, "outputs", ("logps",)):
        return None
    first = examples[0]
    if len(first.completions) >= 2:
        return "pairs"
    return "labelled" if first.completions and first.labels is not None else None


def implicit_rewards(method: Any) -> tuple[str, float]:
    """The name under which implicit rewards are logged, and what summed log-ratios are multiplied by for them.

    ("rewards", scale) where these are the method's own rewards: its `reward_scale`, or else its `beta`. A method whose
    rewards are something else has a `reward_scale` of None, or neither. Its log-ratios to the run's start are logged as
    they are, ("implicit", 1.0): two quantities never share a name.
    """
    scale = getattr(method, "reward_scale", getattr(method, "beta", None))
    return ("implicit", 1.0) if scale is None else ("rewards", float(scale))
