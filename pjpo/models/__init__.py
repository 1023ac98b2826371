"""Policies as pure functions of their parameters, and the ways in."""

from pjpo.models.load import load
from pjpo.models.policy import Policy

__all__ = ["Policy", "load"]
