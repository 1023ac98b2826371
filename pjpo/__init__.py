"""Language models trained from preferences and rewards, in JAX: one layout, every method, each claim checked."""
