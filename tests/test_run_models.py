"""The start of a run beside its state: kept, found beneath adapters, or given up."""

import jax
import jax.numpy as jnp
import pytest

from pjpo.evals import sentiment
from pjpo.run_models import Reference
from pjpo.step import State
from tests import tiny

POLICY = tiny.make_policy(num_layers=1)
WEIGHTS, ADAPTED = {"params": {"w": 1.0}}, {"params": {"w": 1.0}, "lora": {"a": 2.0}}
LATER = State({"params": {"w": 3.0}, "lora": {"a": 4.0}}, None, jnp.int32(1), jax.random.key(0))


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("online", WEIGHTS, WEIGHTS),
        ("stored", WEIGHTS, WEIGHTS),
        ("adapter", ADAPTED, {"params": LATER.params["params"]}),  # the state's own arrays, which updates donate
        ("none", ADAPTED, {"params": LATER.params["params"]}),
        ("none", WEIGHTS, None),
    ],
)
def test_the_start_beside_a_state(kind, params, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("pjpo.reference.Store", lambda *arguments: None)
    assert Reference(kind, POLICY, params, tmp_path).start(LATER) == expected


def test_what_measures_a_kl_keeps_the_weights_that_nothing_else_reads(tmp_path):
    said = []
    for kind, params in (("none", ADAPTED), ("adapter", ADAPTED), ("online", WEIGHTS)):
        Reference(kind, POLICY, params, tmp_path).keep(said.append)
    assert not said  # they are there already
    reference = Reference("none", POLICY, WEIGHTS, tmp_path)
    assert sentiment.Evaluation.reads_reference  # so a run asks for them
    reference.keep(said.append)
    assert (reference.is_kept, reference.start(LATER)) == (True, WEIGHTS)
    assert len(said) == 1
    assert said[0].startswith("the start's weights are kept")
