"""Estimates of KL(policy || reference) from one token each. Schulman 2020, "Approximating KL divergence".

On samples of the policy k1 and k3 are unbiased, k2 is not. As losses they do something else than their values say: k1
has no expected gradient, k2 has that of KL(policy || reference), and k3 that of KL(reference || policy).
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Estimator = Literal["k1", "k2", "k3"]


def k1(logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The log-ratio; nats, of either sign."""
    return jnp.subtract(logps, ref_logps)


def k2(logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Half the squared log-ratio; nats, not negative."""
    return 0.5 * jnp.square(k1(logps, ref_logps))


def k3(logps: Float[Array, "*shape"], ref_logps: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """reference / policy - 1 - log(reference / policy); nats, not negative.

    A token that the reference holds for more than e^20 times likelier counts as e^20 times, to stay finite.
    """
    logratios = jnp.maximum(k1(logps, ref_logps), -20)
    return jnp.expm1(-logratios) + logratios


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
