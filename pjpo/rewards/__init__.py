"""Texts to scores, by rule or by a model."""
