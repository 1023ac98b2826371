"""Texts to scores, by rule or by a model; `protocol` puts several together."""
