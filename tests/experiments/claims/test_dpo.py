"""DPO's optimum and gradient."""

from experiments.claims import dpo
from experiments.claims.claim import run


def test_the_claims_hold():
    for claim in dpo.CLAIMS:
        assert run(claim, 2).holds, claim.text
