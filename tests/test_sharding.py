"""Where every parameter lies on a mesh, by a table written out here, and what a mesh or a batch must divide."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pjpo import optim, sharding
from pjpo.models import load, lora
from pjpo.step import init_state
from tests import tiny

MESHES = {"8x1x1": (8, 1, 1), "4x2x1": (4, 2, 1), "2x4x1": (2, 4, 1), "1x8x1": (1, 8, 1)}
MESHES |= {"1x1x8": (1, 1, 8), "2x2x2": (2, 2, 2)}
WHOLE, FSDP, MODEL = None, "fsdp", "model"
# The model of `tiny.DIVISIBLE` with adapters: vocabulary 64, width 16, 8 key/value heads of 2 queries, head 4, mlp 24.
EXPECTED = {
    "params/embed/table": [(64, MODEL), (16, FSDP)],
    "params/head/table": [(64, MODEL), (16, FSDP)],
    "params/final_norm/scale": [(16, WHOLE)],
    "params/layer/attention_norm/scale": [(16, WHOLE)],
    "params/layer/mlp_norm/scale": [(16, WHOLE)],
    "params/layer/qkv/kernel": [(16, FSDP), (8, MODEL), (4, WHOLE), (4, WHOLE)],
    "params/layer/out/kernel": [(8, MODEL), (2, WHOLE), (4, WHOLE), (16, FSDP)],
    "params/layer/gate_up/kernel": [(16, FSDP), (2, WHOLE), (24, MODEL)],
    "params/layer/down/kernel": [(24, MODEL), (16, FSDP)],
    "lora/layer/q_adapter/a": [(16, FSDP), (2, WHOLE)],
    "lora/layer/k_adapter/a": [(16, FSDP), (2, WHOLE)],
    "lora/layer/v_adapter/a": [(16, FSDP), (2, WHOLE)],
    "lora/layer/o_adapter/a": [(64, WHOLE), (2, WHOLE)],
    "lora/layer/gate_adapter/a": [(16, FSDP), (2, WHOLE)],
    "lora/layer/up_adapter/a": [(16, FSDP), (2, WHOLE)],
    "lora/layer/down_adapter/a": [(24, MODEL), (2, WHOLE)],
    "lora/layer/q_adapter/b": [(2, WHOLE), (8, MODEL), (2, WHOLE), (4, WHOLE)],
    "lora/layer/k_adapter/b": [(2, WHOLE), (8, MODEL), (1, WHOLE), (4, WHOLE)],
    "lora/layer/v_adapter/b": [(2, WHOLE), (8, MODEL), (1, WHOLE), (4, WHOLE)],
    "lora/layer/o_adapter/b": [(2, WHOLE), (16, FSDP)],
    "lora/layer/gate_adapter/b": [(2, WHOLE), (1, WHOLE), (24, MODEL)],
    "lora/layer/up_adapter/b": [(2, WHOLE), (1, WHOLE), (24, MODEL)],
    "lora/layer/down_adapter/b": [(2, WHOLE), (16, FSDP)],
}


def make_mesh(name, devices=None):
    sizes = sharding.Config(**dict(zip(("data", "fsdp", "model"), MESHES[name], strict=True)))
    return sharding.make_mesh(sizes, devices)


def divisible_params(**settings):
    settings = {"tied_head": False, "lora": lora.Config(rank=2)} | settings
    policy = tiny.make_policy(**tiny.DIVISIBLE, **settings)
    return policy, tiny.make_params(policy)


def assert_lies_as_expected(path, leaf, mesh):
    """One leaf of parameters, or of moments that mirror them."""
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    scanned = "layers" in names
    names = ["layer" if name.startswith("layers") else name for name in names]
    axes = [(tiny.SIZES["num_layers"], WHOLE)] * scanned + EXPECTED["/".join(names)]
    assert leaf.shape == tuple(size for size, _ in axes)
    expected = NamedSharding(mesh, PartitionSpec(*(axis for _, axis in axes)))
    assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (path, leaf.sharding)
    part = tuple(size // mesh.shape[axis] if axis else size for size, axis in axes)
    assert {shard.data.shape for shard in leaf.addressable_shards} == {part}
    return "/".join(names)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_every_parameter_lies_where_the_table_says(name, scan_layers):
    mesh = make_mesh(name)
    _, params = divisible_params(scan_layers=scan_layers)
    placed = sharding.place(params, mesh)
    seen = {assert_lies_as_expected(*leaf, mesh) for leaf in jax.tree_util.tree_leaves_with_path(placed)}
    assert seen == EXPECTED.keys()
    jax.tree.map(np.testing.assert_array_equal, placed, params)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
@pytest.mark.parametrize("adapters", [False, True])
def test_moments_lie_with_their_parameters(name, adapters):
    mesh = make_mesh("2x2x2")
    policy, params = divisible_params(**({} if adapters else {"lora": None}))
    optimizer = optim.make_optimizer(optim.Config(learning_rate=1.0, name=name), lambda _: 1.0)
    state = init_state(policy, params, optimizer, jax.random.key(0), mesh)
    copies = 2 if name == "adamw" else 1
    trained, _ = policy.trainable(params)
    leaves = [x for x in jax.tree_util.tree_leaves_with_path(state.opt_state) if x[1].ndim]
    assert len(leaves) == copies * len(jax.tree.leaves(trained))
    for path, leaf in leaves:
        assert_lies_as_expected(path, leaf, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        assert_lies_as_expected(path, leaf, mesh)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_moments_of_another_shape_are_whole_everywhere(scan_layers):
    # Adafactor keeps a row's and a column's mean of a large kernel, on the same path as the kernel but of fewer axes.
    policy = tiny.make_policy(
        vocab_size=136, model_dim=128, num_heads=8, num_kv_heads=8, mlp_dim=128, scan_layers=scan_layers
    )
    params = jax.eval_shape(policy.init, jax.random.key(0))
    optimizer = optim.make_optimizer(optim.Config(learning_rate=1.0, name="adafactor"), lambda _: 1.0)
    state = jax.eval_shape(optimizer.init, params)
    factored = {
        jax.tree_util.keystr(path): found.spec
        for path, found in jax.tree_util.tree_leaves_with_path(sharding.shardings(state, make_mesh("2x2x2")))
        if ".v_row" in jax.tree_util.keystr(path) or ".v_col" in jax.tree_util.keystr(path)
    }
    assert len(factored) == 2 * len(jax.tree.leaves(params))
    for path, spec in factored.items():
        assert not any(spec), path


def test_a_batch_is_cut_over_data_and_fsdp():
    batch = tiny.ragged(np.random.default_rng(0), num_prompts=8)
    placed = sharding.place_batch(batch, make_mesh("2x2x2"))
    for leaf in jax.tree.leaves(placed):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, *leaf.shape[1:])}
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_in_one_process_its_share_of_a_batch_is_the_batch():
    batch, mesh = tiny.ragged(np.random.default_rng(0), num_prompts=8), make_mesh("2x2x2")
    whole, share = sharding.place_batch(batch, mesh), sharding.place_share(batch, mesh)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(share), strict=True):
        assert one.sharding == other.sharding
        np.testing.assert_array_equal(one, other)
    assert sharding.share(mesh) == (0, 1)
    np.testing.assert_array_equal(sharding.own_rows(mesh, 8), np.arange(8))


def mesh_of(processes):
    """As much of a mesh as `share` looks at, its devices in these processes: [data, fsdp, model]."""
    sizes = dict(zip(sharding.MESH_AXES, np.shape(processes), strict=True))
    devices = [types.SimpleNamespace(process_index=number) for number in np.ravel(processes)]
    return types.SimpleNamespace(devices=np.array(devices).reshape(np.shape(processes)), shape=sizes)


@pytest.mark.usefixtures("unchecked")  # it only looks like a mesh
@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([[[0]], [[0]], [[1]], [[1]]], [(0, 2), (1, 2)]),
        ([[[0]], [[1]], [[0]], [[1]]], [(0, 2), (1, 2)]),  # every other part
        ([[[1], [1]], [[0], [0]]], [(1, 2), (0, 2)]),  # fsdp cuts a batch too
        ([[[0, 1]], [[2, 3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes to a part read the same rows
        ([[[0, 1]], [[0, 1]]], [(0, 1), (0, 1)]),
    ],
)
def test_shares_of_processes(processes, expected):
    mesh = mesh_of(processes)
    assert [sharding.share(mesh, process) for process in range(len(expected))] == expected


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("processes", [[[[0]], [[0]], [[0]], [[1]]], [[[0, 0]], [[0, 1]], [[1, 1]]]])
def test_shares_that_differ_in_size_or_overlap_are_refused(processes):
    with pytest.raises(ValueError, match=r"mesh data=\d, fsdp=1, model=\d cuts a batch across processes"):
        sharding.share(mesh_of(processes), 0)


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert dict(sharding.make_mesh(sharding.Config(data=2, fsdp=-1, model=2)).shape) == {
        "data": 2,
        "fsdp": 2,
        "model": 2,
    }
    backwards = jax.devices()[::-1]
    assert sharding.make_mesh(devices=backwards).devices.ravel().tolist() == backwards
    assert sharding.make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh data=3, fsdp=1, model=1 does not fill the 8 devices; choose sizes whose product is 8"),
        ({"fsdp": 3}, "mesh data=-1, fsdp=3, model=1 does not fill the 8 devices"),
        ({"data": 16}, "mesh data=16, fsdp=1, model=1 does not fill the 8 devices"),
        ({"fsdp": -1}, "mesh: sizes must be at least 1, or -1 for one of them; got data=-1, fsdp=-1, model=1"),
        ({"model": 0}, "mesh: sizes must be at least 1.*model=0"),
        ({"data": -2}, "mesh: sizes must be at least 1.*data=-2"),
    ],
)
def test_meshes_that_do_not_divide_the_devices_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.Config(**sizes))


@pytest.mark.parametrize(
    ("name", "batch_size", "num_microbatches", "message"),
    [
        ("8x1x1", 12, 1, r"batch_size 12 is not divisible by 8 .*data=8, fsdp=1, model=1.*; use 8 or 16"),
        ("8x1x1", 4, 1, "batch_size 4 is not divisible by 8 .*; use 8$"),
        ("2x2x2", 12, 2, r"batch_size 12 is not divisible by 8 \(mesh .*model=2 x 2 microbatches\); use 8 or 16"),
        ("1x1x8", 3, 2, "batch_size 3 is not divisible by 2 .*; use 2 or 4"),
        ("8x1x1", 0, 1, "batch_size 0 is not divisible by 8 .*; use 8$"),
        ("8x1x1", -8, 1, "batch_size -8 is not divisible by 8 .*; use 8$"),
        ("8x1x1", 8, 0, "num_microbatches must be >= 1, got 0; 1 is the batch in one piece"),
        ("8x1x1", 8, -1, "num_microbatches must be >= 1, got -1"),
    ],
)
def test_batches_that_do_not_divide_are_refused(name, batch_size, num_microbatches, message):
    with pytest.raises(ValueError, match=message):
        sharding.check_batch(make_mesh(name), batch_size, num_microbatches)


def test_batches_that_divide_are_accepted():
    sharding.check_batch(make_mesh("2x2x2"), 8, 2)
    sharding.check_batch(make_mesh("1x1x8"), 1)


def test_a_parameter_that_its_mesh_axis_does_not_divide_is_refused():
    params = tiny.make_params(tiny.make_policy())
    message = (
        r"'embed'\]\['table'\] has an axis of 37, which mesh axis 'model' of 8 does not divide; choose a divisor of 37"
    )
    with pytest.raises(ValueError, match=message):
        sharding.place(params, make_mesh("1x1x8"))
    with pytest.raises(ValueError, match="has an axis of 12, which mesh axis 'fsdp' of 8 does not divide"):
        sharding.shardings({"params": {"embed": {"table": jnp.zeros((37, 12))}}}, make_mesh("1x8x1"))


def test_a_mesh_of_other_axes_is_refused():
    policy = tiny.make_policy(**tiny.DIVISIBLE)
    message = r"mesh axes must be data, fsdp, model, got x, y; see pjpo\.sharding\.make_mesh"
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for place in (lambda: load("glassllm-en", mesh=mesh), lambda: sharding.place(tiny.make_params(policy), mesh)):
        with pytest.raises(ValueError, match=f"^{message}"):
            place()
    with pytest.raises(ValueError, match=message):
        sharding.place_batch(tiny.ragged(np.random.default_rng(0)), mesh)
