"""The table of tensors: each leaf is covered exactly once, and folding is undone by unfolding."""

import jax
import numpy as np
import pytest

from pjpo.models import names
from tests import tiny

MODELS = {
    "llama": {},
    "one key per query, own head": {"num_kv_heads": 4, "tied_head": False},
    "biases": {"qkv_bias": True},
    "norms everywhere": {"qk_norm": True, "post_norms": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_every_number_of_every_leaf_has_one_tensor(model):
    policy = tiny.make_policy(**MODELS[model])
    abstract = jax.eval_shape(policy.init, jax.random.key(0))["params"]
    leaves = {}
    for scope in ("layers_0", None):
        for module, tree in (abstract if scope is None else abstract[scope]).items():
            if not module.startswith("layers_"):
                leaves |= {(module, kind): np.zeros(leaf.shape, int) for kind, leaf in tree.items()}
    table = names.tensors(policy.config)
    for tensor in table.values():
        leaves[tensor.path][tensor.where] += 1
    for theirs in (names.hugging_face(policy.config.post_norms), names.GGUF):
        assert len({theirs[name] for name in table}) == len(table)
        for name, tensor in table.items():
            assert ("{}" in theirs[name]) == (tensor.path[0] in abstract["layers_0"])
    for path, count in leaves.items():
        np.testing.assert_array_equal(count, 1, err_msg=path)


@pytest.mark.parametrize("model", MODELS)
def test_folding_a_matrix_keeps_what_it_computes(model):
    policy, rng = tiny.make_policy(**MODELS[model]), np.random.default_rng(0)
    for name, tensor in names.tensors(policy.config).items():
        stored = rng.normal(size=tensor.stored)
        part = tensor.fold(stored)
        assert part.shape == tensor.shape
        np.testing.assert_array_equal(tensor.unfold(part), stored)
        if tensor.matrix:  # torch: x @ stored.T
            num_in = 3 if name == "o" else 1
            x = rng.normal(size=part.shape[:num_in])
            expected = x.reshape(-1) @ stored.T
            np.testing.assert_allclose(np.tensordot(x, part, num_in).reshape(-1), expected, atol=1e-12)
