"""Policies as pure functions of their parameters, and the ways in and out."""

from pjpo.models.load import config, load, shape, tokenizer
from pjpo.models.policy import Policy
from pjpo.models.save import save

__all__ = ["Policy", "config", "load", "save", "shape", "tokenizer"]
