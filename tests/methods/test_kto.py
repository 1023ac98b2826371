"""KTO against golden values: the reference point over the whole batch, clamped, and the weights of both labels."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pjpo.data.examples import Data, Example
from pjpo.experiment import notice
from pjpo.methods import dpo, kto
from pjpo.types import Batch
from tests.methods import golden
from tests.methods.contract import Contract

CONTRACT = Contract(configs=(kto.Config(beta=0.5, weight_chosen=1.3, weight_rejected=0.7),))


def case(config, desirable, undesirable, mismatched, dtype="float64", **options):
    """Rows of (own, mismatched) log-ratios, which are put on top of any reference."""
    logratios = np.stack([[*desirable, *undesirable], mismatched], axis=1)
    lengths = np.random.default_rng(0).integers(1, 9, logratios.shape)
    reference = np.random.default_rng(1).normal(size=logratios.shape) - 20
    labels = np.repeat((np.arange(len(logratios)) < len(desirable))[:, None], 2, axis=1)
    inputs = {"policy": reference + logratios, "reference": reference, "lengths": lengths, "labels": labels}
    return (
        golden.Case(kto, config, **inputs, dtype=dtype)
        if not options
        else golden.check(kto, config, **options, **inputs, dtype=dtype)
    )


@golden.in_both_dtypes
def test_golden_values(dtype, bound):
    gradient = [-0.00499622, -0.00496191, -0.00490665, 0.00499098, 0.00495277]
    found = case(
        kto.Config(beta=0.1),
        [0.8, -1.5, 3.0],
        [-0.6, 2.2],
        [0.5, -0.25, 1.0, 0.1, -0.1],
        dtype,
        bound=bound,
        mean=0.49778621,
        gradient=np.array(gradient)[:, None] * [1, 0],  # none through the reference point
    )
    np.testing.assert_allclose(found.metrics["kl"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(found.metrics["rewards/chosen"], 0.1 * np.mean([0.8, -1.5, 3.0]), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["rewards/rejected"], 0.1 * np.mean([-0.6, 2.2]), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["rewards/margins"], 0.1 * (2.3 / 3 - 0.8), rtol=1e-3)


@golden.in_both_dtypes
def test_golden_values_with_a_clamped_reference_point(dtype, bound):
    gradient = [-0.03003259, -0.02723687, 0.03972448, 0.03044761]
    found = case(
        kto.Config(beta=0.5, weight_rejected=1.3),
        [0.8, -1.5],
        [-0.6, 2.2],
        [-2.0, -1.0, 0.5, 0.25],
        dtype,
        bound=bound,
        mean=0.65226348,
        gradient=np.array(gradient)[:, None] * [1, 0],
    )
    assert found.metrics["kl"] == 0


def test_one_label_alone_keeps_the_reference_point_and_has_no_margin():
    found = case(kto.Config(beta=0.1), [0.8, -1.5, 3.0], [], [0.5, -0.25, 1.0])
    point = 1.25 / 3
    expected = 1 - 1 / (1 + np.exp(-0.1 * (np.array([0.8, -1.5, 3.0]) - point)))
    np.testing.assert_allclose(found.mean, expected.mean(), rtol=1e-10)
    np.testing.assert_allclose(found.metrics["kl"], point, rtol=1e-10)
    assert found.metrics["rewards/margins"] == 0


def test_what_a_batch_lacks_is_counted_as_nothing():
    """A mean of nothing has a count of 0, by which whoever logs leaves it out: it is no measurement of 0."""
    tokens, labels = np.ones((3, 2, 1), np.int32), np.ones((3, 2), bool)
    logps = np.random.default_rng(0).normal(size=tokens.shape).astype(np.float32)
    batch = Batch.of(completion_tokens=tokens, labels=labels)
    _, metrics = kto.loss(kto.Config(), batch, jnp.asarray(logps), jnp.zeros(tokens.shape))
    counts = {name: float(mean.count) for name, mean in metrics.items()}
    assert counts == {
        "rewards/chosen": 3,
        "rewards/rejected": 0,
        "logps/chosen": 3,
        "logps/rejected": 0,
        "rewards/margins": 0,
        "kl": 1,
    }


@pytest.mark.parametrize(("mismatched", "count"), [((True, True), 1), ((True, False), 1), ((False, False), 0)])
def test_the_reference_point_is_logged_where_any_row_has_a_completion_of_another_prompt(mismatched, count):
    mask = np.ones((2, 2, 1), bool)
    mask[:, 1, 0] = mismatched
    batch = Batch.of(completion_tokens=mask.astype(np.int32), completion_mask=mask, labels=np.ones((2, 2), bool))
    _, metrics = kto.loss(kto.Config(), batch, jnp.zeros(mask.shape), jnp.zeros(mask.shape))
    assert metrics["kl"].count == count


@pytest.mark.parametrize(
    ("labels", "weight", "said"),
    [
        ((True, True, True, False), 1.0, r"3 desirable and 1 undesirable completions, 3 to 1 by weight \(the paper"),
        ((True, True, True, False), 2.0, "3 desirable and 1 undesirable completions, 1.5 to 1 by weight"),
        ((True, True), 1.0, "2 desirable and 0 undesirable completions, one kind alone. The reference point does not"),
        ((True, False), 0.0, "1 desirable and 1 undesirable completions, one kind alone"),
        ((False,), 1.0, "0 desirable and 1 undesirable completions, 0 to 1 by weight"),
    ],
)
def test_a_run_says_what_labels_it_has_and_what_becomes_of_the_reference_point(labels, weight, said):
    empty = np.zeros(1, np.int32)
    rows = [Example(empty, (empty,), {}, "", labels=(label,)) for label in labels]
    found = notice(kto.Config(weight_rejected=weight), Data(rows, [], {}, ""))
    assert re.match(f"kto: {said}", found)
    assert "a batch of one kind has it too, and logs nothing of the other" in found
    assert notice(dpo.Config(), Data(rows, [], {}, "")) is None


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="the batch has no labels; give each completion one"):
        golden.Case(kto, kto.Config(), dtype="float32")


@pytest.mark.parametrize(
    ("num_completions", "labels", "message"),
    [
        (1, [[True]], r"axis 1 must be \(a prompt's own completion, a mismatched one\), got 1 completions"),
        (2, [[1, 1], [-1, -1]], r"labels must be true \(desirable\) or false, got -1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_batches_of_another_layout_are_refused(num_completions, labels, message):
    shape = (len(labels), num_completions, 3)
    batch = Batch.of(completion_tokens=np.ones(shape, np.int32), labels=labels)
    with pytest.raises(ValueError, match=f"^kto: {message}"):
        kto.loss(kto.Config(), batch, np.zeros(shape, np.float32), np.zeros(shape, np.float32))
