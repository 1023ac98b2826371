"""Numbers of each source, against the loss of its rows alone."""

import dataclasses
import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from pjpo.metrics import Mean
from pjpo.per_source import per_source
from tests.methods.contract import NAMES, Method


def on_device(example):
    return jax.tree.map(jnp.asarray, (example.batch, example.logps, example.ref_logps, example.others))


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("dpo", "sft")])
def test_each_source_has_the_numbers_of_its_rows_alone(name):
    method = Method(name)
    example = method.example()
    batch, logps, ref_logps, others = on_device(example)
    sources = np.arange(len(logps)) % 3 % 2
    mixed = dataclasses.replace(batch, sources=sources.astype(np.int32))
    config = method.Config()
    mean, metrics = jax.jit(per_source(method.loss, ("x", "y", "absent")), static_argnums=0)(
        config, mixed, logps, ref_logps, **others
    )
    plain, plain_metrics = method.loss(config, batch, logps, ref_logps, **others)
    np.testing.assert_allclose(mean.value(), plain.value(), rtol=1e-6)
    for metric, value in plain_metrics.items():
        np.testing.assert_allclose(metrics[metric].value(), value.value(), rtol=1e-5, atol=1e-6)
    for number, source in enumerate(("x", "y")):
        rows = jax.tree.map(lambda x, n=number: x[sources == n], (batch, logps, ref_logps, others))
        own, own_metrics = method.loss(config, rows[0], rows[1], rows[2], **rows[3])
        for metric, value in {"loss": own, **own_metrics}.items():
            found = metrics[f"source/{source}/{metric}"]
            np.testing.assert_allclose(found.sum, value.sum, rtol=1e-5, atol=1e-6)
            assert found.count == value.count > 0
    assert all(value.count == 0 for metric, value in metrics.items() if metric.startswith("source/absent/"))
    total = metrics["source/x/loss"] + metrics["source/y/loss"]
    assert isinstance(total, Mean)
    np.testing.assert_allclose(total.sum, mean.sum, rtol=1e-6)


@functools.cache
def of_sources():
    """(sources of 8 pairs, log-probs) -> metrics of DPO, in one program for whatever the numbers are."""
    method = Method("dpo")
    batch, _, ref_logps, _ = on_device(method.example())
    loss = per_source(method.loss, ("x", "y", "z"))

    @jax.jit
    def metrics(sources, logps):
        return loss(method.Config(), dataclasses.replace(batch, sources=sources), logps, ref_logps)[1]

    return metrics


SOURCES = strategies.lists(strategies.integers(0, 2), min_size=8, max_size=8).map(lambda rows: np.array(rows, np.int32))


@hypothesis.given(sources=SOURCES)
def test_sources_add_up_to_the_whole_however_rows_are_dealt(sources):
    logps = Method("dpo").example().logps
    metrics = of_sources()(sources, logps)
    for name in ("rewards/chosen", "rewards/margins", "rewards/accuracies"):
        total = functools.reduce(Mean.__add__, (metrics[f"source/{source}/{name}"] for source in "xyz"))
        np.testing.assert_allclose(total.sum, metrics[name].sum, rtol=1e-5, atol=1e-6)
        assert total.count == metrics[name].count


@hypothesis.given(sources=SOURCES, seed=strategies.integers(0, 2**32 - 1))
def test_a_source_does_not_hear_of_the_rows_of_others(sources, seed):
    logps = Method("dpo").example().logps
    noise = np.random.default_rng(seed).normal(size=logps.shape).astype(np.float32) * 100
    changed = np.where((sources == 0)[:, None, None], logps, noise)
    before, after = of_sources()(sources, logps), of_sources()(sources, changed)
    for name in before:
        if name.startswith("source/x/"):
            assert (before[name].sum, before[name].count) == (after[name].sum, after[name].count), name


def test_logging_by_source_changes_no_gradient():
    method = Method("dpo")
    example = method.example()
    batch, logps, ref_logps, _ = on_device(example)
    batch = dataclasses.replace(batch, sources=np.zeros(len(logps), np.int32))

    def gradient(loss):
        def total(logps):
            mean, metrics = loss(method.Config(), batch, logps, ref_logps)
            return mean.sum + sum(value.sum for name, value in metrics.items() if name.startswith("source/"))

        return jax.grad(total)(logps)

    np.testing.assert_array_equal(gradient(per_source(method.loss, ("all",))), gradient(method.loss))


def test_the_signature_stays_the_methods():
    loss = Method("dpo").loss
    assert inspect.signature(per_source(loss, ("x",))) == inspect.signature(loss)
