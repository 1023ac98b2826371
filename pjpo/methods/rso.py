"""The losses of Statistical Rejection Sampling Optimization (RSO). Liu et al. 2023, arXiv:2309.06657, Eq. 8 to 10.

Departures: none. The pairs they are for come from `pjpo.rejection`; gamma is set apart from the sampler's beta.
"""

import dataclasses
from typing import Literal

import jax
from jaxtyping import Array, Float

from pjpo import checks, pairs
from pjpo.logps import sum_completion
from pjpo.metrics import Mean
from pjpo.types import Batch

FORMS = ("sigmoid_norm", "hinge", "hinge_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    gamma: float = 0.05  # scale of the margin, 1 / margin where a hinge ends; dimensionless, > 0
    form: Literal["sigmoid_norm", "hinge", "hinge_norm"] = "sigmoid_norm"  # "norm": relative to the reference

    def __post_init__(self):
        checks.positive(self, "gamma")
        checks.one_of(self, "form", FORMS)

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the reference are read."""
        return self.form != "hinge"

    @property
    def reward_scale(self) -> float | None:
        """What log-ratios are multiplied by for its rewards, which those of "hinge" are not; see `pjpo.evals`."""
        return None if self.form == "hinge" else self.gamma


def loss(
    config: Config, batch: Batch, logps: Float[Array, "B 2 T"], ref_logps: Float[Array, "B 2 T"] | None
) -> tuple[Mean, dict[str, Mean]]:
    """Logistic (Eq. 8, DPO's) or hinge loss on the margin, which only "hinge" (Eq. 9) takes without the reference.

    Args:
        config: hyperparameters, static under jit.
        batch: pairs; axis 1 is (chosen, rejected). A pair with nothing to score (padding of a batch) is not counted.
        logps: policy log-probability of each completion token; nats, float32.
        ref_logps: the same under the reference model; a constant to the gradient. Not read by "hinge", may be
            None for it.

    Returns:
        Loss in nats per pair, and metrics; each a `Mean` of sum and count over pairs.
    """
    rows = pairs.counted(config, batch)  # [B]
    if config.form == "hinge":
        rewards = config.gamma * sum_completion(logps, batch.loss_mask)  # [B, 2]
    else:
        rewards = pairs.implicit_rewards(config.gamma, batch, logps, ref_logps)
    margins = pairs.margins(rewards)  # [B]
    losses = -jax.nn.log_sigmoid(margins) if config.form == "sigmoid_norm" else jax.nn.relu(1 - margins)
    return Mean.of(losses, rows), pairs.metrics(batch, logps, rewards)
