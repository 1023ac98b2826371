"""Reading compiled programs, and what the real update's program must and must not hold, on CPU devices and TPU slices.

TPU programs are compiled where libtpu is installed (`pip install -e '.[tpu]'`, 200 MB) and skipped where it is not.
"""

import dataclasses
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from experiments import registry
from pjpo import online, plan, sharding
from pjpo.data import preference, prompts, unpaired
from pjpo.experiment import Experiment, Model
from pjpo.methods import dpo, grpo, kto, ppo, reward_model, rto, sft, simpo, slic
from pjpo.models import attention, decoder
from pjpo.plan import __main__ as command
from pjpo.plan import chips, shapes
from pjpo.plan.program import Collective, Program
from pjpo.rewards.protocol import Rewards
from tests import tiny_online

METHODS = {"dpo": {"loss": dpo.loss, "reference": "online"}, "sft": {"loss": sft.loss, "method": sft.Config()}}
SIZES = {"num_heads": 16, "num_kv_heads": 8, "rope_theta": 1e4, "norm_eps": 1e-5, "max_positions": 4096}
SMALL = decoder.Config(
    **SIZES,
    **{"vocab_size": 1024, "num_layers": 3, "model_dim": 64, "head_dim": 8, "mlp_dim": 128, "tied_head": True},
    **{"scan_layers": True, "remat": True, "head_block_numbers": 2**14},
)
# Half of Llama-3.2-1B's width, so that a TPU program compiles in seconds; its vocabulary and head stay hard enough.
MIDDLE = decoder.Config(
    **SIZES,
    **{"vocab_size": 32768, "num_layers": 5, "model_dim": 1024, "head_dim": 64, "mlp_dim": 2048, "tied_head": True},
    **{"dtype": "bfloat16", "scan_layers": True, "remat": True, "head_block_numbers": 2**24},
)
MESHES = {
    "fsdp": sharding.Config(data=1, fsdp=8),
    "data, fsdp": sharding.Config(data=2, fsdp=4),
    "fsdp, model": sharding.Config(data=1, fsdp=4, model=2),
    "all": sharding.Config(data=2, fsdp=2, model=2),
}


def read(function, *arguments) -> Program:
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def matrices(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def test_products_in_loops_count_each_time():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

    def outer(x, w, v):
        x, sums = jax.lax.scan(lambda x, _: (inner(x, w), jnp.einsum("ij,kj->ik", x, v).sum()), x, length=3)
        return x, sums

    program = read(outer, *matrices((8, 16), (16, 16), (4, 16)))
    assert program.flops == 3 * (5 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 4)


def test_a_loop_that_may_end_early_counts_to_its_limit():
    def decode(x, w):
        going = lambda carry: (carry[0] < 7) & (carry[1].sum() > 0)  # noqa: E731
        return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ w)), (0, x))

    assert read(decode, *matrices((8, 16), (16, 16))).flops == 7 * 2 * 8 * 16 * 16


def test_a_batch_axis_that_a_tpu_program_writes_as_a_window_counts_once():
    # Attention's scores [2, 8, 2, 4, 512, 512] as the TPU compiler writes them: windows over padding but for one place.
    text = """
ENTRY %main (q: f32[2,8,2,4,512,64], k: f32[2,8,2,512,64,1]) -> f32[2,8,2,4,512,512] {
  %q = f32[2,8,2,4,512,64]{5,4,3,2,1,0} parameter(0)
  %k = f32[2,8,2,512,64,1]{5,4,3,2,1,0} parameter(1)
  ROOT %c = f32[2,8,2,4,512,512]{4,5,3,2,1,0:T(8,128)S(1)} convolution(%q, %k), window={size=2x8x2x1 \
stride=1x7x1x1 lhs_dilate=2x8x2x1}, dim_labels=0123bf_012oi3->0123bf
}
"""
    program = Program(text)
    assert program.flops == 2 * (2 * 8 * 2 * 4) * 512 * 512 * 64
    assert program.bytes == 4 * (2 * 8 * 2 * 4 * 512 * 64 + 2 * 8 * 2 * 512 * 64)  # the result stays on the chip


def test_a_loop_that_takes_several_steps_at_once_is_counted_by_its_counter():
    text = """
%body (carry: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %carry = (u32[], f32[4,4]) parameter(0)
  %two = u32[] constant(2)
  %i = u32[] get-tuple-element(%carry), index=0
  %x = f32[4,4] get-tuple-element(%carry), index=1
  %next = u32[] add(%i, %two)
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (u32[], f32[4,4]) tuple(%next, %y)
}

%condition (carry.1: (u32[], f32[4,4])) -> pred[] {
  %carry.1 = (u32[], f32[4,4]) parameter(0)
  %limit = u32[] constant(8)
  %j = u32[] get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (start: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %start = (u32[], f32[4,4]) parameter(0)
  ROOT %loop = (u32[], f32[4,4]) while(%start), condition=%condition, body=%body
}
"""
    assert Program(text).flops == 4 * 2 * 4**3


def test_collectives_in_loops_with_kind_group_and_size():
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=4))

    def sums(x):
        def body(total, _):
            whole = jax.lax.all_gather(x * total.sum(), "fsdp", axis=1, tiled=True)
            return total + jax.lax.psum(whole[:, :4].sum(1), "fsdp"), None

        return jax.lax.scan(body, jnp.ones(16), length=6)[0]

    specs = {"in_specs": PartitionSpec(None, "fsdp"), "out_specs": PartitionSpec()}
    sums = jax.shard_map(sums, mesh=mesh, **specs, check_vma=False)
    found = read(sums, *matrices((16, 32))).collectives
    assert Collective("all-gather", 16 * 32 * 4, 4, 6) in found
    assert Collective("all-reduce", 16 * 4, 4, 6) in found
    assert found[0].sent == 6 * 16 * 32 * 4 * 3 / 4


GROUPED = """
ENTRY %main (x: f32[10]) -> f32[10] {{
  %x = f32[10] parameter(0)
  ROOT %sum = f32[10] all-reduce(%x), channel_id=1, {}, to_apply=%add
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[8]", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=16,'axis_2'=4], device_ids=([4,16]T(1,0)) {'axis_1'}", 16),
    ],
)
def test_groups_in_every_notation(groups, size):
    assert Program(GROUPED.format(groups)).collectives == [Collective("all-reduce", 40, size, 1)]


def test_a_channel_may_be_shared_and_a_kernel_may_hold_a_copy():
    """Two tables are gathered on channel 1; the kernel beside the second gather repeats that one."""
    gather = "%whole = f32[80] all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}, {}"
    gather += 'frontend_attributes={{async_collective_name="gather.{}"}}, metadata={{op_name="jit(f)/all_gather"}}'
    kernel = "%beside{} (x: f32[10]) -> f32[80] {{\n  %x = f32[10] parameter(0)\n  ROOT {}\n}}\n"
    text = "".join(kernel.format(i, gather.format("", 2)) for i in range(2))
    text += "ENTRY %main (x: f32[10]) -> f32[80] {\n  %x = f32[10] parameter(0)\n  " + gather.format("", 1)
    text += "".join(f"\n  %k{i} = f32[80] fusion(%x), kind=kCustom, calls=%beside{i}" for i in range(2)) + "\n}\n"
    assert Program(text).collectives == [Collective("all-gather", 320, 8, 2)]
    apart = text.replace("jit(f)/all_gather", "jit(f)/other", 1)
    assert Program(apart).collectives == [Collective("all-gather", 320, 8, 3)]


def test_a_group_of_all_is_as_large_as_the_program():
    text = GROUPED.format("replica_groups={}")
    assert Program(text).collectives == []  # of one device
    for header in ("HloModule f, num_partitions=8", "HloModule f, replica_count=2, num_partitions=4, x={num=3}"):
        assert Program(header + text).collectives == [Collective("all-reduce", 40, 8, 1)]


@pytest.mark.parametrize("groups", ["replica_groups=torus<4x2>", "replica_groups=[2,2,2]<=[8]", "dimensions={0}"])
def test_groups_in_another_notation_are_refused_by_name(groups):
    shown = re.escape(groups) if "replica" in groups else "it has no replica_groups"
    with pytest.raises(ValueError, match=rf"all-reduce sum: the notation of its groups .* not known: {shown}.*; known"):
        _ = Program(GROUPED.format(groups)).collectives


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="it has no ENTRY"):
        Program("HloModule nothing")


# ---------------------------------------------------------------------------------------------- the real update


def make_work(model, method, mesh, tokens) -> plan.Work:
    settings = METHODS[method]
    return plan.Work(
        model=model,
        batch_size=2 * sharding.num_batch_parts(mesh),
        prompt_tokens=tokens,
        completion_tokens=tokens,
        **{"reference": "none", **settings},
    )


def layer_weights(c: decoder.Config) -> int:
    heads = c.model_dim * c.head_dim * (c.num_kv_heads * (c.heads_of_kv + 2) + c.num_heads)
    return heads + 3 * c.model_dim * c.mlp_dim


def prompt_scores(work: plan.Work) -> int:
    """Of prompts with themselves: a query meets the keys up to the end of its own block."""
    length = work.prompt_tokens
    block = max(attention.MIN_BLOCK, math.ceil(length / attention.NUM_BLOCKS))
    return work.batch_size * sum(min(length, (t // block + 1) * block) for t in range(length))


def update_flops(work: plan.Work) -> int:
    """By hand: 2 for each weight and position that meet, and for each query and key, seen or masked, twice."""
    c = work.model
    completions = work.batch_size * work.num_completions * work.completion_tokens
    positions = work.batch_size * work.prompt_tokens + completions
    scores = prompt_scores(work) + completions * (work.prompt_tokens + work.completion_tokens)
    layers = c.num_layers * (2 * positions * layer_weights(c) + 4 * scores * c.num_heads * c.head_dim)
    forward = layers + 2 * completions * c.model_dim * c.vocab_size
    # The backward pass repeats the forward one, but for each layer's last product, and has two products for each.
    again = forward - c.num_layers * 2 * positions * c.mlp_dim * c.model_dim
    return forward + again + 2 * forward + (work.reference == "online") * forward


def norm_flops(work: plan.Work, mesh) -> int:
    """Of one device, on CPUs alone: products with eight rows of ones, for the gradients of norms' scales."""
    c = work.model
    completions = work.batch_size * work.num_completions * work.completion_tokens
    positions = work.batch_size * work.prompt_tokens + completions
    return 2 * 8 * c.model_dim * (2 * c.num_layers * positions + completions) // sharding.num_batch_parts(mesh)


def layer_kernels(work: plan.Work, mesh) -> list[tuple[int, ...]]:
    """Shapes of one layer's kernels, as they are gathered for use."""
    c = work.model
    heads = c.num_kv_heads // mesh.shape["model"], c.heads_of_kv + 2, c.head_dim
    mlp = c.mlp_dim // mesh.shape["model"]
    out = heads[0], c.heads_of_kv, c.head_dim, c.model_dim
    return [(c.model_dim, *heads), out, (c.model_dim, 2, mlp), (mlp, c.model_dim)]


def assert_no_stack_is_gathered(work: plan.Work, mesh, program: Program) -> None:
    """No array, flat, turned round or in another dtype, has as many numbers as all layers' kernels of one kind.

    Kernels are powers of 2 in size. Tests choose 3 layers and lengths with a factor of 5, or 5 and 3, so that neither
    one kernel nor an activation has as many.
    """
    stacks = {work.model.num_layers * math.prod(kernel) for kernel in layer_kernels(work, mesh)}
    vocabulary = {work.model.vocab_size, work.model.vocab_size // mesh.shape["model"]}
    params = jax.tree.leaves(plan.abstract_params(plan.Policy(work.model), mesh))
    at_rest = {x.sharding.shard_shape(x.shape) for x in params}  # a part of one may be as large as all of another
    for array in program.arrays():
        if not vocabulary & set(array.shape) and array.shape not in at_rest:
            assert math.prod(array.shape) not in stacks, f"the whole stack: {array}"


def assert_weights_are_gathered_for_use(work: plan.Work, mesh, program: Program) -> None:
    """A layer's kernels for that layer, the table for the head, and neither more often than they are used."""
    c = work.model
    size = jnp.dtype(c.dtype).itemsize  # cast before they travel
    kernels = [size * math.prod(kernel) for kernel in layer_kernels(work, mesh)]
    table = size * c.vocab_size * c.model_dim // mesh.shape["model"]
    gathers = [x for x in program.collectives if x.kind == "all-gather"]
    large = [x for x in gathers if x.bytes > max(kernels)]
    assert all(x.bytes == table for x in large), large
    online = work.reference == "online"
    assert sum(x.count for x in large) <= 1 + online, large  # the policy's, which the gradient reads too
    # Layers: to go forward, to repeat that before going backward, to go backward, and for the reference. Rings of
    # permutations are gathers as well, in pieces that products overlap.
    most = (3 + online) * c.num_layers * sum(kernels) + (1 + online) * table
    assert sum(x.sent for x in program.collectives if x.kind in ("all-gather", "collective-permute")) <= most


def assert_is_well_made(work: plan.Work, mesh, cost: plan.Cost, also: float = 0, rounding: float = 1e-12) -> None:
    """No tokens x vocabulary, weights gathered layer by layer, nothing computed twice over."""
    c, program = work.model, cost.program
    vocabulary = {c.vocab_size, c.vocab_size // mesh.shape["model"]}
    widths = {c.model_dim, c.model_dim // mesh.shape["fsdp"]}
    rows = work.batch_size // sharding.num_batch_parts(mesh) * work.num_completions * work.completion_tokens
    for array in program.arrays():
        if vocabulary & set(array.shape) and not widths & set(array.shape):
            assert math.prod(array.shape) <= c.head_block_numbers < rows * min(vocabulary), array
    assert_no_stack_is_gathered(work, mesh, program)
    assert_weights_are_gathered_for_use(work, mesh, program)
    if mesh.shape["data"] == 1:  # gradients are summed straight into the parts that devices keep
        smallest = 4 * min(map(math.prod, layer_kernels(work, mesh)))
        sums = [x for x in program.collectives if x.kind == "all-reduce" and x.devices == mesh.shape["fsdp"]]
        assert all(x.bytes < smallest for x in sums), sums
    assert program.flops == pytest.approx(update_flops(work) / mesh.size + also, rel=rounding)


@pytest.mark.parametrize(("method", "name"), [*(("dpo", name) for name in MESHES), ("sft", "all")])
def test_updates_on_cpu_devices(method, name, capfd):
    mesh = sharding.make_mesh(MESHES[name])
    work = make_work(SMALL, method, mesh, tokens=200)  # prompts of two blocks, the second shorter
    cost = plan.of_update(work, mesh, None)
    assert_is_well_made(work, mesh, cost, also=norm_flops(work, mesh))
    assert "rematerialization" not in capfd.readouterr().err  # the partitioner's way to say that it gave up
    assert cost.fits is None
    params = jax.tree.leaves(plan.abstract_params(plan.Policy(work.model), mesh))
    sizes = sum(math.prod(x.sharding.shard_shape(x.shape)) * 4 for x in params)
    assert cost.held["parameters"] == sizes
    assert cost.held["optimizer"] == pytest.approx(2 * sizes, rel=1e-3)


def test_memory_is_that_of_the_state_that_runs():
    """Against a state that really lies on the devices."""
    mesh = sharding.make_mesh(MESHES["all"])
    work = make_work(SMALL, "sft", mesh, tokens=16)
    policy = plan.Policy(work.model)
    placed = sharding.place(policy.init(jax.random.key(0)), mesh)
    on_first = [s.data.nbytes for x in jax.tree.leaves(placed) for s in x.addressable_shards if s.device.id == 0]
    assert plan.of_update(work, mesh, None).held["parameters"] == sum(on_first)


@pytest.fixture
def quickly():
    """The compiler tries less hard: a fourth of the time, the same products. JAX 0.12 has no such way."""
    names = [n for n in ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort") if hasattr(jax.config, n)]
    before = [getattr(jax.config, name) for name in names]
    for name in names:
        jax.config.update(name, -1.0)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("topology", "mesh"), [("v5e:2x4", "fsdp"), ("v5p:2x2x2", "fsdp, model")])
def test_updates_on_tpu_slices(topology, mesh, method, capfd):
    if not chips.has_compiler():
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    chip, devices = chips.devices(topology)
    mesh = sharding.make_mesh(MESHES[mesh], devices)
    work = make_work(MIDDLE, method, mesh, tokens=384)
    cost = plan.of_update(work, mesh, chip)
    assert cost.fits
    assert_is_well_made(work, mesh, cost, rounding=0.02)
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("topology", "mesh"), [("v5e:2x4", "fsdp"), ("v5p:2x2x2", "fsdp, model")])
def test_updates_of_a_billion_weights_fit_tpu_slices(topology, mesh, method):
    """Weights and moments alone take an eighth of 15 GB (with a reference 20), gradients and activations the rest."""
    if not chips.has_compiler():
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    chip, devices = chips.devices(topology)
    mesh = sharding.make_mesh(MESHES[mesh], devices)
    model = decoder.Config(**shapes.SHAPES["Llama-3.2-1B"], dtype="bfloat16", scan_layers=True, remat=True)
    work = make_work(model, method, mesh, tokens=512)
    cost = plan.of_update(work, mesh, chip)
    print(f"{topology} {method}: {(sum(cost.held.values()) + cost.temporary) / chips.GIB:.2f} GiB")
    assert cost.fits
    assert sum(cost.held.values()) + cost.temporary <= chip.hbm
    assert_weights_are_gathered_for_use(work, mesh, cost.program)


def generation_flops(work: plan.Work) -> int:
    """By hand: prompts once, without the head, then a token of each completion after the other."""
    c = work.model
    prompts, sequences = work.batch_size * work.prompt_tokens, work.batch_size * work.num_completions
    heads = c.num_heads * c.head_dim
    prefill = c.num_layers * (2 * prompts * layer_weights(c) + 4 * prompt_scores(work) * heads)
    keys = work.prompt_tokens + work.completion_tokens
    token = c.num_layers * (2 * layer_weights(c) + 4 * keys * heads) + 2 * c.model_dim * c.vocab_size
    return prefill + work.completion_tokens * sequences * token


def test_a_generation_step():
    mesh = sharding.make_mesh(MESHES["all"])
    work = make_work(SMALL, "dpo", mesh, tokens=16)
    assert plan.of_generation(work, mesh, None).flops == generation_flops(work) / mesh.size


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(("topology", "mesh"), [("v5e:2x4", "fsdp"), ("v5p:2x2x2", "fsdp, model")])
def test_generation_on_tpu_slices(topology, mesh):
    if not chips.has_compiler():
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    chip, devices = chips.devices(topology)
    mesh = sharding.make_mesh(MESHES[mesh], devices)
    work = make_work(MIDDLE, "dpo", mesh, tokens=384)
    cost = plan.of_generation(work, mesh, chip)
    assert cost.fits
    assert cost.flops == pytest.approx(generation_flops(work) / mesh.size, rel=0.02)
    assert_no_stack_is_gathered(work, mesh, cost.program)


@pytest.mark.usefixtures("quickly")
def test_generation_on_tpus_makes_no_second_copy_of_the_weights():
    """Kernels turned round, which a CPU decodes from, are as large as themselves; a TPU reads them as they lie."""
    if not chips.has_compiler():
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    chip, devices = chips.devices("v5e:2x4")
    mesh = sharding.make_mesh(sharding.Config(data=8, fsdp=1), devices)  # the weights whole on every chip
    model = dataclasses.replace(MIDDLE, param_dtype="bfloat16")
    work = make_work(model, "dpo", mesh, tokens=384)
    prompts, completions = work.batch_size // mesh.size, work.batch_size // mesh.size * work.num_completions
    places = prompts * work.prompt_tokens + completions * work.completion_tokens
    caches = model.num_layers * places * 2 * model.num_kv_heads * model.head_dim * 2  # bytes of keys and values
    temporary = plan.of_generation(work, mesh, chip).temporary
    assert temporary - caches < model.num_layers * layer_weights(model) * 2


# ---------------------------------------------------------------------------------------------------- experiments

TINY = SIZES | {"vocab_size": 64, "num_layers": 1, "model_dim": 16, "head_dim": 4, "mlp_dim": 24, "tied_head": True}
# By hand from their files: prompts, completions and their tokens in an update, then the same of a generation step.
EXPERIMENTS = {
    "dpo_glass": ((8, 2, 8, 32), (8, 2, 8, 32)),
    "dpo_hh": ((8, 2, 256, 128), (8, 2, 256, 128)),
    "dpo_scratch": ((8, 2, 8, 32), (8, 2, 8, 32)),
    "dpo_sentiment": ((8, 2, 8, 32), (8, 2, 8, 32)),
    "grpo_arithmetic": ((8, 8, 512, 4), (16, 8, 512, 4)),  # whose prompts are as long as they come
    "online_dpo_sentiment": ((8, 2, 8, 32), (16, 4, 8, 32)),
    "sft_reviews": ((8, 1, 8, 56), (8, 1, 8, 56)),
}


@pytest.fixture
def lowered(monkeypatch):
    """Programs that would be compiled: (lowered, bytes that it takes and that lie beside it, by name)."""
    found = []

    def record(program, held, beside, chip):
        size = {name: plan._bytes(tree) for name, tree in (held | beside).items() if tree is not None}
        found.append((program, size))
        return plan.Cost(held=size, temporary=0, fits=None, flops=0, traffic=0, program=None)

    monkeypatch.setattr(plan, "_cost", record)
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    return found


def planned(name, *arguments):
    options = command.parse(["tiny", "--topology", "cpu:8", "--experiment", name, *arguments])
    mesh = sharding.make_mesh(options.mesh)
    return command.work_of(options, mesh), mesh


def sizes(lowered, work, mesh):
    """What the programs are of, read off their arguments."""
    plan.of_update(work, mesh, None)
    plan.of_generation(work, mesh, None)
    ((_, _, batch), _), ((_, tokens, keys), _) = (program.args_info for program, _ in lowered)
    num_prompts, prompt_tokens = batch.prompt_tokens.shape
    updated = num_prompts, batch.completion_tokens.shape[1], prompt_tokens, batch.completion_tokens.shape[2]
    length = lowered[1][0].out_info.tokens.shape[2]
    return updated, (*keys.shape, tokens.tokens.shape[1], length)


@pytest.mark.parametrize("name", [name for name in registry.names() if isinstance(registry.get(name), Experiment)])
def test_every_experiment_can_be_planned(lowered, name):
    found = sizes(lowered, *planned(name))
    assert found == EXPERIMENTS.get(name, found)


def test_what_is_asked_for_comes_before_what_an_experiment_says(lowered):
    asked = ["--batch-size=32", "--num-completions=6", "--prompt-tokens=11", "--completion-tokens=7"]
    assert sizes(lowered, *planned("online_dpo_sentiment", *asked)) == ((32, 2, 11, 7), (32, 6, 11, 7))


def test_the_models_are_those_of_the_experiment(lowered, monkeypatch):
    critic = Model(source="", param_dtype="bfloat16", remat=True)
    changes = {"loss": ppo.loss, "method": ppo.Config(), "critic": critic, "model": Model(source="", scalar_head=True)}
    found = dataclasses.replace(tiny_online.EXPERIMENT, **changes)
    monkeypatch.setattr(registry, "get", lambda name: found)
    work, _ = planned("made_up")
    assert work.critic == dataclasses.replace(HEAD, param_dtype="bfloat16", remat=True)
    assert work.policy.config == dataclasses.replace(HEAD, temperature=0.8)


def test_an_experiment_that_packs_and_stores_its_reference_is_planned_so(lowered):
    plan.of_update(*planned("dpo_hh"), None)
    ((program, size),) = lowered
    (_, _, batch), _ = program.args_info
    assert size["reference"] == size["parameters"]  # whose log-probs new batches still ask for
    assert batch.packing.slots.shape == (8, 256 + 2 * 128)


def rollouts(**settings):
    return online.Config(
        rewards=Rewards(functions=(tiny_online.early_letters,), weights=(1.0,)), prompts_per_rollout=8, **settings
    )


HEAD = dataclasses.replace(decoder.Config(**TINY), scalar_head=True)
KINDS = {
    "kto": {"loss": kto.loss, "method": kto.Config(), "num_completions": 1},
    "reward_model": {"loss": reward_model.loss, "method": reward_model.Config(), "reference": "none", "model": HEAD},
    "slic": {"loss": slic.loss, "method": slic.Config(), "reference": "none", "num_completions": 3},
    "ppo, critic": {"loss": ppo.loss, "method": ppo.Config(), "critic": HEAD, "rollouts": rollouts()},
    "ppo, one model": {"loss": ppo.loss, "method": ppo.Config(), "model": HEAD, "rollouts": rollouts()},
    "rto": {"loss": rto.loss, "method": rto.Config(), "critic": HEAD, "rollouts": rollouts()},
    "dapo": {"loss": grpo.loss, "method": grpo.DAPO, "reference": "none", "rollouts": rollouts()},
    "simpo, online": {
        **{"loss": simpo.loss, "method": simpo.Config(), "reference": "none", "num_completions": 4},
        "rollouts": rollouts(pairs=True, truncated="keep"),
    },
}


def kind_of_work(name):
    given = {"model": decoder.Config(**TINY), "batch_size": 8, "prompt_tokens": 5, "completion_tokens": 3}
    return plan.Work(**given | KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_finds_what_it_reads(lowered, name):
    plan.of_update(kind_of_work(name), sharding.make_mesh(MESHES["fsdp"]), None)


@pytest.mark.parametrize(("name", "copies"), [("ppo, critic", (1, 2, 3)), ("rto", (1, 2, 4)), ("dapo", (1, 1, 1))])
def test_weights_that_lie_beside_a_program_are_counted(lowered, name, copies):
    """Of the tiny model: those that are sampled from, those that are trained, and all of a run with its moments."""
    work, mesh = kind_of_work(name), sharding.make_mesh(MESHES["fsdp"])
    one = sum(plan._bytes(x) for x in jax.tree.leaves(plan.abstract_params(plan.Policy(work.model), mesh)))
    plan.of_update(work, mesh, None)
    plan.of_generation(work, mesh, None)
    (_, updated), (_, sampled) = lowered
    kept = [updated.get(part, 0) for part in ("reference", "DPO policy")]
    near = {"rel": 0.05}  # scalar heads, counts
    assert sampled["parameters"] == one * copies[0]
    assert updated["parameters"] == pytest.approx(one * copies[1], **near)
    assert updated["optimizer"] == pytest.approx(2 * one * copies[1], **near)
    assert sum(kept) + one * copies[0] == pytest.approx(one * copies[2], **near)
    assert sum(sampled.values()) == pytest.approx(sum(updated.values()))


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"data": object()}, "", "plan: made_up does not say how many completions a row of its data holds; give --num"),
        ({"data": preference.Config(path=""), "method": grpo.Config()}, "", "plan: pjpo.methods.grpo learns from roll"),
        ({"data": preference.Config(path=""), "loss": kto.loss, "method": kto.Config()}, "", "kto: rows must hold one"),
        ({"data": unpaired.Config(path="")}, "", "dpo: rows must be pairs, .* got 1 completions"),
        ({"rollouts": rollouts()}, "", "rollouts: pjpo.methods.dpo makes no advantages of rewards; set rollouts.pairs"),
        (
            {"rollouts": rollouts(pairs=True)},
            "--sampling-batch-size 12",
            "sampling_batch_size 12 is not divisible by 8",
        ),
        ({"rollouts": rollouts(pairs=True)}, "--prompt-tokens 4000", "prompt width 4000 .* exceeds the model's 4096"),
    ],
)
@pytest.mark.usefixtures("lowered", "unchecked")
def test_experiments_that_cannot_be_planned_are_refused(changes, arguments, message, monkeypatch):
    found = dataclasses.replace(
        tiny_online.EXPERIMENT,
        **{"loss": dpo.loss, "method": dpo.Config(), "rollouts": None, "data": prompts.Config(path="")} | changes,
        **{"model": Model(source=""), "batch_size": 8, "mesh": sharding.Config()},
    )
    monkeypatch.setattr(registry, "get", lambda name: found)
    with pytest.raises(ValueError, match=f"^{message}"):
        command.run(command.parse(["tiny", "--topology", "cpu:8", "--experiment", "made_up", *arguments.split()]))


@pytest.mark.parametrize(("name", "gib"), [("v5e", 15.75), ("v5p", 95), ("v6e", 31.25)])
def test_a_program_fits_up_to_what_the_compiler_leaves_it(name, gib):
    """Arguments, temporaries and what lies beside them, to the byte."""
    sharded = jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    sizes = {"argument_size_in_bytes": 2**30, "temp_size_in_bytes": int(gib * 2**30) - 2**30 - 4000}
    sizes |= dict.fromkeys(("output_size_in_bytes", "alias_size_in_bytes", "generated_code_size_in_bytes"), 0)

    def fits(more):
        memory = types.SimpleNamespace(**sizes | {"temp_size_in_bytes": sizes["temp_size_in_bytes"] + more})
        compiled = types.SimpleNamespace(
            memory_analysis=lambda: memory, as_text=lambda: GROUPED.format("dimensions={0}")
        )
        program = types.SimpleNamespace(compile=lambda: compiled)
        return plan._cost(program, {}, {"reference": sharded}, chips.CHIPS[name]).fits

    assert [fits(0), fits(1)] == [True, False]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_no_more_memory_is_counted_on_than_the_compiler_has(topology):
    if not chips.has_compiler():
        pytest.skip("libtpu is not installed: pip install -e '.[tpu]'")
    chip, (device, *_) = chips.devices(topology)
    where = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**35,), jnp.float32, sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: x + 1).lower(large).compile()
    available = float(re.search(r"available HBM \(([\d.]+)G\)", str(refused.value))[1])
    assert chip.hbm / chips.GIB == min(available, {"v5e": 16, "v5p": 95, "v6e": 32}[topology[:3]])


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_prints_a_plan(capsys):
    pytest.importorskip("glassllm")
    chosen = "--experiment dpo_glass --mesh.data 4 --mesh.fsdp 2 --prompt-tokens 16 --completion-tokens 8"
    chosen += " --program update --scan-layers"
    command.run(command.parse(["glassllm-en", "--topology", "cpu:8", *chosen.split()]))
    printed = capsys.readouterr().out
    update = "update, 8 prompts of 16 tokens with 2 completions of 8 each: memory"
    for words in ("cpu:8, 8 devices: data=4, fsdp=2, model=1", update, "optimizer", "all-gather"):
        assert words in printed


LLAMA_70B = {  # its config.json, but for how its rotations are scaled, which costs nothing
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_a_folder_needs_no_more_than_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    mesh = sharding.make_mesh(sharding.Config(data=1, fsdp=8))
    of_folder, of_name = (
        command.work_of(command.parse([model, "--topology", "cpu:8"]), mesh)
        for model in (str(tmp_path), "Llama-3.1-70B")
    )
    assert of_folder == of_name


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "has no config.json"),
        ("[]", "config.json holds no JSON object"),
        (json.dumps(LLAMA_70B | {"model_type": "mamba"}), "model_type 'mamba' is not supported, allowed: llama"),
        (json.dumps(LLAMA_70B | {"num_hidden_layers": -1}), "num_hidden_layers"),
    ],
)
def test_a_folder_that_says_nothing_to_plan_for_is_refused(tmp_path, stored, message):
    if stored is not None:
        (tmp_path / "config.json").write_text(stored)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}.*{re.escape(message)}"):
        command.run(command.parse([str(tmp_path), "--topology", "cpu:8"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt-tokens 0", "plan: prompt_tokens must be >= 1, got 0"),
        ("--batch-size=-2", "plan: batch_size must be >= 1, got -2"),
        ("--num-microbatches=0", "plan: num_microbatches must be >= 1, got 0"),
        ("--experiment=rdpo_glass", "plan: rdpo_glass is a study of many trainings; name an experiment"),
        ("--experiment=registry", "unknown experiment 'registry'"),
        ("--reference adapter", "plan: reference 'adapter' is the model without adapters; set lora.rank"),
    ],
)
def test_work_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        command.run(command.parse(["Llama-3.2-1B", "--topology", "cpu:8", *arguments.split()]))


def test_a_model_that_is_not_known_is_compared_with_shapes_too():
    options = command.parse(["llama-3.1-8b", "--topology", "cpu:8"])
    with pytest.raises(
        ValueError, match=r"^unknown model 'llama-3.1-8b'; did you mean 'Llama-3.1-8B'\? Allowed: Llama"
    ):
        command.shape_of(options.model, options)


def test_the_command_refuses_in_one_line():
    with pytest.raises(SystemExit, match=r"^unknown experiment 'dpo_glas'; did you mean 'dpo_glass'"):
        command.main(["Llama-3.2-1B", "--topology", "cpu:8", "--experiment", "dpo_glas"])


def test_public_shapes_have_the_sizes_of_their_names():
    for name, billions in (("Llama-3.2-1B", 1.24), ("Llama-3.1-8B", 8.03), ("Llama-3.1-70B", 70.6)):
        params = jax.eval_shape(plan.Policy(decoder.Config(**shapes.SHAPES[name])).init, jax.random.key(0))
        assert sum(x.size for x in jax.tree.leaves(params)) / 1e9 == pytest.approx(billions, rel=5e-3)


def test_a_collective_takes_the_time_of_its_slowest_link():
    # v5p: 1200 GB/s over six links, both directions added, are 200 GB/s along an axis.
    assert chips.CHIPS["v5p"].axis_bandwidth == 200e9
    assert Collective("all-reduce", 8_000, 8, 10).sent == 2 * 7 / 8 * 8_000 * 10


@pytest.mark.parametrize(
    ("message", "temporary"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 12 * 2**30 + 2**29),
        ("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.5G) exceeds available", 31 * 2**29),
        ("RESOURCE_EXHAUSTED: no space left on the disk", None),
        ("INTERNAL: Used 20.50G of 15.75G hbm.", None),
    ],
)
def test_what_does_not_fit_is_read_off_the_compilers_words(message, temporary):
    assert plan.overflow(message, held=8 * 2**30) == temporary


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v4:2x2", "topology must be cpu:<devices> or one of v5e, v5p, v6e as in v5p:4x4x4, got 'v4:2x2'"),
        ("v5p", "got 'v5p'"),
        ("cpu:2x2", "got 'cpu:2x2'"),
        ("cpu:0", "topology must be cpu:<devices> .* got 'cpu:0'"),
        ("cpu:9", "topology cpu:9: there are 8 CPU devices; ask for 1 to 8"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(topology, message):
    with pytest.raises(ValueError, match=message):
        chips.devices(topology)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    mesh = sharding.make_mesh(MESHES["fsdp"])
    with pytest.raises(ValueError, match="batch_size 3 is not divisible by 8"):
        plan.of_update(plan.Work(model=SMALL, batch_size=3), mesh, None)


def test_no_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chips, "has_compiler", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pjpo\[tpu\]'"):
        chips.devices("v5e:2x4")
