"""Falling rewards by reference, identities, search and credit."""

import numpy as np
import pytest

from experiments.claims import token_credit as claims


@pytest.mark.parametrize(
    ("reference", "first", "limit"),
    [
        (claims.CHOSEN, (-0.038309, -0.438309), (-0.188779, -1.101649)),
        (np.full(4, 0.25), (0.150280, -0.249720), (0.202623, -0.710247)),
    ],
)
def test_declines(reference, first, limit):
    np.testing.assert_allclose(claims.decline(reference, 1), first, atol=1e-6)
    np.testing.assert_allclose(claims.decline(reference, 3000), limit, atol=1e-5)


def test_more_beams_find_more():
    found = claims.search(0, num_mdps=10)
    assert found["1 beam"] <= found["2 beams"] <= found["best"]


def test_credit_goes_to_the_decisive_token():
    assert claims.credit(0)["share where the decisive token stands out"] >= 0.9
