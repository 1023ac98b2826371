"""Looking up tokens: as indexing does, value and gradient, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from pjpo import layout
from pjpo.models.embedding import lookup
from tests.test_sharding import MESHES, make_mesh


def pull_back(find, table, tokens, cotangent):
    rows, pull = jax.vjp(lambda table: find(table, tokens), table)
    return rows, *pull(cotangent)


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("num_rows", [8, 6])  # 6 are dealt out evenly on no mesh but the last two
def test_rows_and_their_gradient_are_those_of_indexing(name, num_rows):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(32, 16)).astype(np.float32)
    tokens = rng.integers(0, 32, (num_rows, 5)).astype(np.int32)
    tokens[0] = 31  # a row that several tokens share
    cotangent = rng.normal(size=(num_rows, 5, 16)).astype(np.float32)
    mesh = make_mesh(name)

    def on_mesh(*arguments):
        with layout.on(mesh):
            return pull_back(lookup, *arguments)

    placed = jax.device_put(table, NamedSharding(mesh, layout.TABLE))
    rows, gradient = jax.jit(on_mesh)(placed, tokens, cotangent)
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, cotangent)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)
    assert jnp.all(gradient[31] != 0)
