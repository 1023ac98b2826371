"""A policy and the critic beside it, with weights of their own, in the place of one policy.

Where one set of weights does for both, no pair is needed: a policy with a scalar head is its own critic.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float

from pjpo.models.load import load
from pjpo.models.policy import Policy
from pjpo.sampling import Completions, Prompts, Sampling
from pjpo.types import Batch


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """Parameters are {"actor": the actor's, "critic": the critic's}; all but `values` is the actor's."""

    actor: Policy
    critic: Policy  # with a scalar head

    @property
    def config(self):
        return self.actor.config

    def logps(self, params: dict, batch: Batch) -> Float[Array, "B N T"]:
        return self.actor.logps(params["actor"], batch)

    def generate(self, params: dict, prompts: Prompts | tuple, key: Array, sampling: Sampling) -> Completions:
        return self.actor.generate(params["actor"], prompts, key, sampling)

    def values(self, params: dict, batch: Batch) -> Float[Array, "B N T"]:
        return self.critic.values(params["critic"], batch)

    def at(self, temperature: float) -> ActorCritic:
        return dataclasses.replace(self, actor=self.actor.at(temperature))

    def trainable(self, params: dict) -> tuple[dict, dict]:
        """(what the optimizer changes, what stays), of both; without a critic, as of a reference, of the actor."""
        both = {name: getattr(self, name).trainable(tree) for name, tree in params.items()}
        return {name: trained for name, (trained, _) in both.items()}, {
            n: kept for n, (_, kept) in both.items() if kept
        }

    def without_adapters(self, params: dict) -> dict:
        """The reference's parameters: of the actor alone."""
        return {"actor": self.actor.without_adapters(params["actor"])}


def beside(
    actor: Policy, params: dict, tokenizer: Any, source: str | Path, *, mesh: Any, key: Array, **settings: Any
) -> tuple[ActorCritic, dict]:
    """The actor with a critic from `source`: a reward model, whose head it keeps, or a language model, with a new head.

    Args:
        actor, params, tokenizer: of the policy.
        source, mesh, key, settings: as `pjpo.models.load` has them.

    Raises:
        ValueError: the critic would read another tokenizer's ids, or has too few positions; or as `load` has it.
    """
    critic, critic_params, other = load(source, mesh=mesh, key=key, **settings | {"scalar_head": True})
    if other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"critic: the tokenizer of {source} differs from the policy's ({other.vocab_size} and "
            f"{tokenizer.vocab_size} ids), so it would read the policy's tokens as another text; take a critic that "
            "was trained from the same model"
        )
    if critic.config.max_positions < actor.config.max_positions:
        raise ValueError(
            f"critic: {source} has {critic.config.max_positions} positions, the policy {actor.config.max_positions}; "
            "take a critic that was trained from the same model"
        )
    return ActorCritic(actor, critic), {"actor": params, "critic": critic_params}
