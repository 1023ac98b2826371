"""Language models trained from preferences and rewards, in JAX: one layout, every method, each claim checked."""

from pjpo import metrics, models, types

__all__ = ["metrics", "models", "types"]
__version__ = "0.1.0"
