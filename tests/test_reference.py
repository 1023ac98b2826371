"""The store of reference log-probs and the check at step 0, on one-layer policies; the disk and the kills are real."""

import dataclasses
import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjpo import distributed, reference, sharding
from pjpo.methods import dpo
from pjpo.metrics import Mean
from pjpo.models import decoder, lora
from pjpo.models import policy as policy_module
from pjpo.models.policy import Policy
from pjpo.packing import pack
from pjpo.reference import Store, check_start
from pjpo.types import Batch

CONFIG = decoder.Config(
    vocab_size=29,
    num_layers=1,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_head=True,
    max_positions=64,
)
POLICY = Policy(CONFIG)
ADAPTED = dataclasses.replace(CONFIG, lora=lora.Config(rank=2, targets=("q", "down")))
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]
COMPLETIONS = [[[11, 12, 13, 14], [15, 16]], [[17], [18, 19, 20]], [[11, 12, 13, 14], [21, 22, 23, 24, 25]]]


@pytest.fixture(scope="module")
def params():
    return POLICY.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapters():
    return Policy(ADAPTED).init(jax.random.key(1))["lora"]


def make_batch(prompts=PROMPTS, completions=COMPLETIONS, *, widths=(6, 5), left=False, loss_masks=None, pad_id=0):
    """Padded to `widths`; `loss_masks` like `completions`, all True where left out."""
    loss_masks = loss_masks or [[[True] * len(c) for c in group] for group in completions]

    def pad(ids, width, fill, left=False):
        rest = [fill] * (width - len(ids))
        return rest + ids if left else ids + rest

    return Batch.of(
        prompt_tokens=np.array([pad(p, widths[0], pad_id, left) for p in prompts], np.int32),
        prompt_mask=np.array([pad([True] * len(p), widths[0], False, left) for p in prompts]),
        completion_tokens=np.array([[pad(c, widths[1], pad_id) for c in group] for group in completions], np.int32),
        completion_mask=np.array([[pad([True] * len(c), widths[1], False) for c in group] for group in completions]),
        loss_mask=np.array([[pad(m, widths[1], False) for m in group] for group in loss_masks]),
    )


class Computed:
    """A reference that costs nothing and counts its calls: the log-prob of a token is -token / scale."""

    config = CONFIG

    def __init__(self, scale=8.0):
        self.scale, self.calls = scale, 0

    def logps(self, params, batch):
        self.calls += 1
        return np.where(batch.completion_mask, -batch.completion_tokens / self.scale, 0).astype(np.float32)


# The store: what it gives


def test_gives_what_the_policy_gives_and_leaves_the_rest(tmp_path, params):
    batch = pack(make_batch(pad_id=28))
    store = Store(tmp_path, POLICY, params)
    attached = store.attach(batch)
    assert attached.ref_logps.dtype == np.float32
    np.testing.assert_array_equal(attached.ref_logps, POLICY.logps(params, batch))
    assert (attached.ref_logps[batch.completion_mask] < 0).all()
    assert not attached.ref_logps[~batch.completion_mask].any()
    for field in dataclasses.fields(Batch):
        assert field.name == "ref_logps" or getattr(attached, field.name) is getattr(batch, field.name)
    assert batch.ref_logps is None
    assert (store.hits, store.misses) == (0, 6)
    np.testing.assert_array_equal(store.attach(batch).ref_logps, attached.ref_logps)
    assert (store.hits, store.misses) == (6, 6)


def test_rows_that_fill_up_a_batch_are_zeros_and_not_looked_up(tmp_path):
    policy = Computed()
    store = Store(tmp_path, policy, {})
    batch = make_batch([*PROMPTS, []], [*COMPLETIONS, [[], []]])
    assert not store.attach(batch).ref_logps[3].any()
    assert (store.hits, store.misses) == (0, 6)
    empty = store.attach(make_batch([[]], [[[], []]]))
    assert not empty.ref_logps.any()
    assert policy.calls == 1


def test_one_compilation_for_each_shape(tmp_path, params, compiled):
    policy_module._logps.clear_cache()  # of other tests, some of which have this shape
    store = Store(tmp_path, POLICY, params)
    for first in range(3):
        store.attach(make_batch([[first, 1]], [[[2, 3]]], widths=(7, 3)))
    assert compiled.count("jit(_logps)") == 1
    assert store.misses == 3


def test_only_missing_rows_take_new_bits(tmp_path):
    first = Store(tmp_path, Computed(8), {}).attach(make_batch())
    store = Store(tmp_path, Computed(4), {})
    mixed = store.attach(make_batch([*PROMPTS[:2], [1]], COMPLETIONS))
    np.testing.assert_array_equal(mixed.ref_logps[:2], first.ref_logps[:2])
    np.testing.assert_array_equal(mixed.ref_logps[2], 2 * first.ref_logps[2])
    assert (store.hits, store.misses) == (4, 2)


# The store: what is found again


@pytest.fixture
def filled(tmp_path, params):
    """A folder that holds the rows of `make_batch()`, and these rows by content."""
    batch = Store(tmp_path, POLICY, params).attach(make_batch())
    rows = [[batch.ref_logps[b, n][batch.completion_mask[b, n]] for n in range(2)] for b in range(3)]
    return tmp_path, rows


SAME = {
    "wider": lambda: make_batch(widths=(9, 11)),
    "narrower": lambda: make_batch(widths=(4, 5)),
    "padded on the left": lambda: make_batch(left=True),
    "another padding id": lambda: make_batch(pad_id=28),
    "packed": lambda: pack(make_batch()),
    "on a device": lambda: jax.tree.map(jnp.asarray, make_batch()),
    "wide integers": lambda: jax.tree.map(lambda x: x.astype(int) if x.dtype == np.int32 else x, make_batch()),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_content_is_found_in_any_padding(filled, params, monkeypatch, name):
    monkeypatch.setattr(Policy, "logps", lambda *_: pytest.fail("computed again"))
    folder, rows = filled
    batch = Store(folder, POLICY, params).attach(SAME[name]())
    for b, n in np.ndindex(3, 2):
        np.testing.assert_array_equal(batch.ref_logps[b, n][np.asarray(batch.completion_mask)[b, n]], rows[b][n])


def test_the_same_content_is_found_in_any_order_and_company(filled, params, monkeypatch):
    monkeypatch.setattr(Policy, "logps", lambda *_: pytest.fail("computed again"))
    folder, rows = filled
    store = Store(folder, POLICY, params)
    order = store.attach(make_batch(PROMPTS[::-1], [group[::-1] for group in COMPLETIONS[::-1]]))
    for b, n in np.ndindex(3, 2):
        np.testing.assert_array_equal(order.ref_logps[b, n][order.completion_mask[b, n]], rows[2 - b][1 - n])
    alone = store.attach(make_batch(PROMPTS[1:2], [COMPLETIONS[1][1:]]))
    np.testing.assert_array_equal(alone.ref_logps[0, 0, :3], rows[1][1])


def test_what_one_process_computes_the_others_know(tmp_path, monkeypatch):
    """Two processes, here threads: each reads half of a batch, then the other's half; one row is in both."""
    whole, here = make_batch([*PROMPTS, PROMPTS[0]], [*COMPLETIONS, COMPLETIONS[0]]), threading.local()
    told, meet = [None, None], threading.Barrier(2)

    def gather(value):
        told[here.number] = value
        meet.wait(60)
        found = list(told)
        meet.wait(60)
        return found

    monkeypatch.setattr(distributed, "_count", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(jax, "process_index", lambda: here.number)
    monkeypatch.setattr(sharding, "place_share", lambda share, mesh: whole)
    monkeypatch.setattr(sharding, "own_rows", lambda mesh, num_rows: here.rows)

    def process(number):
        here.number, store = number, Store(tmp_path, Computed(), {})
        for half in (number, 1 - number):
            here.rows = np.arange(2) + 2 * half
            share = jax.tree.map(lambda x: x[here.rows], whole)
            found = store.attach(share, sharding.make_mesh()).ref_logps
            np.testing.assert_array_equal(found, Computed().logps({}, share))
        return store.policy.calls, store.misses

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [(1, 4), (1, 4)]
    written = sum(path.stat().st_size - 32 for path in tmp_path.glob("*/*.rows"))  # without the checksums
    assert written == sum(36 + 4 * len(tokens) for pair in COMPLETIONS for tokens in pair)


def test_another_process_finds_it(tmp_path):
    batch = Store(tmp_path, Computed(), {"params": {"a": np.arange(5.0)}}).attach(make_batch())
    code = """
        import sys, numpy as np
        from tests.test_reference import Computed, make_batch
        from pjpo.reference import Store
        store = Store(sys.argv[1], Computed(scale=1), {"params": {"a": np.arange(5.0)}})
        batch = store.attach(make_batch(widths=(8, 9)))
        print(store.hits, store.misses, batch.ref_logps[batch.completion_mask].tobytes().hex())
    """
    found = subprocess.run(**command(code, [tmp_path]), check=True, capture_output=True, timeout=120).stdout
    assert found.split() == ["6", "0", batch.ref_logps[batch.completion_mask].tobytes().hex()]


# The store: what is not found


def replaced(b, n, completion):
    return [[completion if (i, j) == (b, n) else c for j, c in enumerate(g)] for i, g in enumerate(COMPLETIONS)]


MASKED = [[[True] * len(c) for c in group] for group in COMPLETIONS]
MASKED[1][1] = [True, False, True]
OTHER_ROWS = {  # the batch, and which of its rows are new
    "prompt cut at its start": (lambda: make_batch([*PROMPTS[:2], [8, 9, 10]]), [(2, 0), (2, 1)]),
    "prompt cut at its end": (lambda: make_batch([*PROMPTS[:2], [7, 8, 9]]), [(2, 0), (2, 1)]),
    "completion cut at its end": (lambda: make_batch(completions=replaced(2, 1, [21, 22, 23, 24])), [(2, 1)]),
    "completion cut at its start": (lambda: make_batch(completions=replaced(2, 1, [22, 23, 24, 25])), [(2, 1)]),
    "one prompt token": (lambda: make_batch([[3, 4, 6], *PROMPTS[1:]]), [(0, 0), (0, 1)]),
    "one completion token": (lambda: make_batch(completions=replaced(1, 1, [18, 19, 21])), [(1, 1)]),
    "completion mask": (lambda: make_batch(completions=replaced(0, 1, [15, 16, 0])), [(0, 1)]),
    "loss mask": (lambda: make_batch(loss_masks=MASKED), [(1, 1)]),
    "a token moved to the prompt": (
        lambda: make_batch([PROMPTS[0], [6, 18], PROMPTS[2]], replaced(1, 1, [19, 20])),
        [(1, 0), (1, 1)],
    ),
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_content_is_computed(filled, params, name):
    folder, rows = filled
    make, new = OTHER_ROWS[name]
    batch, store = make(), Store(folder, POLICY, params)
    found = store.attach(batch).ref_logps
    assert (store.hits, store.misses) == (6 - len(new), len(new))
    fresh = np.asarray(POLICY.logps(params, batch))
    for b, n in np.ndindex(3, 2):
        used = batch.completion_mask[b, n]
        np.testing.assert_array_equal(found[b, n][used], fresh[b, n][used] if (b, n) in new else rows[b][n])


def test_a_hole_in_a_mask_is_not_the_row_without_it(filled, params):
    batch = make_batch(completions=replaced(2, 1, [21, 22, 23, 24, 25]))
    batch.completion_mask[2, 1, 2] = False
    store = Store(filled[0], POLICY, params)
    store.attach(batch)
    assert store.misses == 1
    store.attach(make_batch(completions=replaced(2, 1, [21, 22, 24, 25])))
    assert store.misses == 2


def changed_weight(params, _):
    kernel = params["params"]["layers_0"]["out"]["kernel"]
    moved = kernel.at[0, 1, 3, 5].set(jnp.nextafter(kernel[0, 1, 3, 5], 9.0))
    return change(params, ("params", "layers_0", "out", "kernel"), moved)


def change(tree, path, value):
    return {**tree, path[0]: change(tree[path[0]], path[1:], value)} if path else value


OTHER_MODELS = {
    "one weight by its last bit": (CONFIG, changed_weight),
    "weights at rest": (
        dataclasses.replace(CONFIG, param_dtype="bfloat16"),
        lambda params, _: jax.tree.map(lambda x: x.astype("bfloat16"), params),
    ),
    "compute dtype": (dataclasses.replace(CONFIG, dtype="bfloat16"), lambda params, _: params),
    "norm_eps": (dataclasses.replace(CONFIG, norm_eps=1e-6), lambda params, _: params),
    "rope_theta": (dataclasses.replace(CONFIG, rope_theta=1e5), lambda params, _: params),
    "adapters": (ADAPTED, lambda params, adapters: {**params, "lora": adapters}),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_finds_nothing(filled, params, adapters, monkeypatch, name):
    monkeypatch.setattr(Policy, "logps", Computed().logps)
    config, make = OTHER_MODELS[name]
    store = Store(filled[0], Policy(config), make(params, adapters))
    store.attach(make_batch())
    assert (store.hits, store.misses) == (0, 6)


@pytest.mark.parametrize(
    "settings",
    [{"remat": True}, {"max_positions": 32}, {"head_block_numbers": 58}, {"lora": lora.Config(rank=2)}],
    ids=lambda settings: next(iter(settings)),
)
def test_what_changes_no_number_finds_everything(filled, params, settings):
    store = Store(filled[0], Policy(dataclasses.replace(CONFIG, **settings)), params)
    found = store.attach(make_batch())
    assert (store.hits, store.misses) == (6, 0)
    fresh = Policy(dataclasses.replace(CONFIG, **settings)).logps(params, make_batch())
    np.testing.assert_allclose(found.ref_logps, fresh, atol=1e-5)


def test_path_dtype_shape_and_bytes_of_every_leaf_count(tmp_path):
    def address(**leaves):
        return Store(tmp_path, Computed(), {"params": leaves}).folder.name

    zeros = np.zeros((2, 6), np.float32)
    last = zeros.copy()
    last[1, 5] = -0.0
    trees = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.astype(np.int32)},
        {"a": zeros.reshape(6, 2)},
        {"a": last},
        {"a": zeros, "b": last},
        {"a": last, "b": zeros},
        {"a": zeros.astype("bfloat16")},
    ]
    assert len({address(**tree) for tree in trees}) == len(trees)
    assert address(a=jnp.asarray(zeros)) == address(a=np.asfortranarray(zeros)) == address(a=zeros)


def imports(path):
    """The project's files that one file imports, by their text."""
    root = reference.PACKAGE.parent
    for module, names in re.findall(r"^from (pjpo[\w.]*) import (.+)$", path.read_text(), re.MULTILINE):
        base = root / module.replace(".", "/")
        inner = [base / f"{name.split()[0]}.py" for name in names.split("#")[0].split(",")]
        yield from [file for file in inner if file.exists()] or [base.with_suffix(".py")]


def forward_files():
    """All that `Policy.logps` is made of; sampling is beside it."""
    found, todo = set(), [reference.PACKAGE / "models/policy.py"]
    while todo:
        path = todo.pop()
        if path not in found and path.name != "sampling.py":
            found.add(path)
            todo += imports(path)
    return sorted(str(path.relative_to(reference.PACKAGE)) for path in found)


def test_forward_files_are_found():
    assert {"logps.py", "packing.py", "products.py", "types.py", "models/attention.py"} < set(forward_files())


@pytest.mark.parametrize("name", forward_files())
def test_other_code_finds_nothing(tmp_path, monkeypatch, name):
    package = tmp_path / "copy"
    shutil.copytree(reference.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(reference, "PACKAGE", package)
    stores = [Store(tmp_path, Computed(), {})]
    for edited in ("methods/dpo.py", name):
        with (package / edited).open("a") as file:
            file.write("\n")
        stores.append(Store(tmp_path, Computed(), {}))
    assert stores[0].folder == stores[1].folder != stores[2].folder


@pytest.mark.parametrize(("module", "name"), [(jax, "__version__"), (jax, "default_backend")])
def test_another_compiler_or_device_finds_nothing(tmp_path, monkeypatch, module, name):
    before = Store(tmp_path, Computed(), {}).folder
    other = "0.0.1" if name == "__version__" else lambda: "abacus"
    monkeypatch.setattr(module, name, other)
    assert Store(tmp_path, Computed(), {}).folder != before


def test_about_says_what_the_folder_stands_for(filled, params):
    store = Store(filled[0], POLICY, params)
    about = json.loads((store.folder / "about.json").read_text())
    assert about["config"]["model_dim"] == 16
    assert about["config"]["dtype"] == "float32"
    assert about["jax"] == jax.__version__
    assert re.fullmatch("[0-9a-f]{64}", about["weights_sha256"])


# The store: what can happen to files


def test_torn_and_damaged_files_are_never_read(tmp_path):
    said = []
    Store(tmp_path, Computed(8), {}).attach(make_batch(PROMPTS[:1], COMPLETIONS[:1]))
    whole = Store(tmp_path, Computed(8), {}).attach(make_batch())
    _, second = sorted(tmp_path.glob("*/*.rows"))
    content = second.read_bytes()
    torn = [content[:length] for length in range(len(content))]
    damaged = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in range(len(content))]
    for broken in [*torn, *damaged, content + b"\0"]:
        second.write_bytes(broken)
        store = Store(tmp_path, Computed(8), {}, say=said.append)
        assert len(store._rows) == 2
        assert said.pop().startswith(f"{second}: a torn or damaged file of reference log-probs, ignored")
        assert not said
    np.testing.assert_array_equal(store.attach(make_batch()).ref_logps, whole.ref_logps)
    assert (store.hits, store.misses) == (2, 4)
    assert second.read_bytes() == broken, "what was there is left as it was"


def test_a_file_of_another_reference_is_never_read(tmp_path):
    one, other = (Store(tmp_path, Computed(), {"params": {"a": np.float32(x)}}) for x in (1, 2))
    one.attach(make_batch())
    other.folder.mkdir()
    for path in one.folder.glob("*.rows"):
        shutil.copy(path, other.folder)
    said = []
    assert not Store(tmp_path, Computed(), other.params, say=said.append)._rows
    assert len(said) == 1


def test_a_full_disk_is_named_and_nothing_older_is_lost(tmp_path):
    """A limit on the size of files stands in for the full disk, so that this runs without privileges."""
    store = Store(tmp_path, Computed(), {})
    store.attach(make_batch())
    long = make_batch([[1]], [[list(range(1, 20)) * 20]], widths=(1, 380))
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"reference log-probs cannot be written .*make room") as caught:
            store.attach(long)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert caught.value.filename.startswith(str(store.folder))
    assert caught.value.errno
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == before
    assert store.misses == 6
    store.attach(long)  # there is room again
    again = Store(tmp_path, Computed(), {}, say=pytest.fail)
    np.testing.assert_array_equal(again.attach(long).ref_logps, Computed().logps({}, long))
    assert again.misses == 0


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "reference").write_text("")
    with pytest.raises(OSError, match="reference log-probs cannot be written"):
        Store(tmp_path / "reference", Computed(), {}).attach(make_batch())


def test_the_first_of_two_writers_counts(tmp_path):
    first, second = Store(tmp_path, Computed(8), {}), Store(tmp_path, Computed(4), {})
    wanted = first.attach(make_batch()).ref_logps
    second.attach(make_batch())
    assert (second.hits, second.misses) == (0, 6)
    third = Store(tmp_path, Computed(2), {}).attach(make_batch())
    np.testing.assert_array_equal(third.ref_logps, wanted)


WRITER = """
    import sys
    from tests.test_reference import Computed, make_batch
    from pjpo.reference import Store
    store, first = Store(sys.argv[1], Computed(), {}), int(sys.argv[2])
    print("begun", flush=True)
    for i in range(first, 10**9):
        store.attach(make_batch([[i, 1]], [[[2, 3, 4], [5]]]))
"""


def test_readers_beside_writers_and_killed_writers(tmp_path):
    writers = [subprocess.Popen(**command(WRITER, [tmp_path, first]), stdout=subprocess.PIPE) for first in (0, 10**8)]
    for writer in writers:
        assert writer.stdout.readline() == "begun\n"
    seen = 0
    while seen < 300:
        store = Store(tmp_path, Computed(), {}, say=pytest.fail)
        assert len(store._rows) >= seen
        seen = len(store._rows)
    for writer in writers:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    rows = Store(tmp_path, Computed(), {}, say=pytest.fail)._rows
    assert len(rows) % 2 == 0
    for row in rows.values():
        np.testing.assert_array_equal(row, -np.array([[2, 3, 4], [5]][len(row) == 1], np.float32) / 8)


def command(code, arguments):
    args = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return {"args": args, "cwd": pathlib.Path(__file__).parents[1], "text": True}


# The check at step 0


def start_of(policy, params, ref_params, batch=None, **settings):
    batch = batch or make_batch()
    logps, ref_logps = policy.logps(params, batch), policy.logps(ref_params, batch)
    return check_start(dpo.loss, dpo.Config(), batch, logps, ref_logps, **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_pass(params, dtype):
    policy = Policy(dataclasses.replace(CONFIG, dtype=dtype))
    assert start_of(policy, params, jax.tree.map(jnp.copy, params)) == pytest.approx(np.log(2), abs=1e-6)


def test_adapters_pass_until_they_are_trained(params, adapters):
    policy = Policy(ADAPTED)
    assert start_of(policy, {**params, "lora": adapters}, params) == pytest.approx(np.log(2), abs=1e-6)
    trained = jax.tree.map(lambda x: x + 0.1, adapters)
    with pytest.raises(ValueError, match="adapters that do not start at zero"):
        start_of(policy, {**params, "lora": trained}, params)


def test_a_stored_reference_of_another_batch_shape_passes(filled, params):
    batch = make_batch(widths=(9, 7))
    ref_logps = Store(filled[0], POLICY, params).attach(batch).ref_logps
    loss = check_start(dpo.loss, dpo.Config(), batch, POLICY.logps(params, batch), ref_logps)
    assert loss == pytest.approx(np.log(2), abs=1e-6)


def test_one_changed_weight_is_refused(params):
    path = ("params", "layers_0", "down", "kernel")
    kernel = params["params"]["layers_0"]["down"]["kernel"]
    with pytest.raises(ValueError, match="step 0: policy and reference should be equal"):
        start_of(POLICY, params, change(params, path, kernel.at[3, 4].add(1.0)))


def test_another_dtype_is_refused(params):
    batch, narrow = make_batch(), Policy(dataclasses.replace(CONFIG, dtype="bfloat16"))
    with pytest.raises(ValueError, match="another compute dtype"):
        check_start(dpo.loss, dpo.Config(), batch, POLICY.logps(params, batch), narrow.logps(params, batch))


def test_another_truncation_is_refused(params):
    batch, cut = make_batch(), make_batch([*PROMPTS[:2], PROMPTS[2][1:]])
    with pytest.raises(ValueError, match=r"of completion [01] of prompt 2.*another truncation"):
        check_start(dpo.loss, dpo.Config(), batch, POLICY.logps(params, batch), POLICY.logps(params, cut))


def test_shifted_log_probs_are_refused(params):
    batch = make_batch()
    logps = np.asarray(POLICY.logps(params, batch))
    with pytest.raises(ValueError, match="step 0"):
        check_start(dpo.loss, dpo.Config(), batch, logps, np.roll(logps, 1, axis=2))


ONES = Batch.of(completion_tokens=np.ones((2, 2, 4), np.int32), prompt_tokens=np.ones((2, 1), np.int32))


def check(logps, ref_logps, *, beta=0.1, batch=ONES, **settings):
    return check_start(dpo.loss, dpo.Config(beta=beta), batch, logps, ref_logps, **settings)


def test_the_message_says_both_numbers_and_where():
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)
    logps = ref_logps.copy()
    logps[1, 0, 2] = -1.0
    logps[0, 1, 3] = -1.75
    # Margins beta * 0.25 and beta * 0.5 at beta = 1: the mean of log(1 + exp(-margin)).
    loss = np.log1p(np.exp([-0.25, -0.5])).mean()
    with pytest.raises(
        ValueError,
        match=rf"loss is {loss:.6g} where equal ones give 0\.693147 \(allowed difference 0\.0001\); "
        r"2 of 16 tokens differ by more than 0\.001 nats, most of all token 2 of completion 0 of prompt 1: "
        r"-1 under the policy, -1\.5 under the reference\.",
    ):
        check(logps, ref_logps, beta=1.0)


def test_differences_that_cancel_are_refused():
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)
    with pytest.raises(ValueError, match="16 of 16 tokens"):
        check(ref_logps + 0.5, ref_logps)
    assert check(ref_logps + 0.5, ref_logps, token_tolerance=0.6) == pytest.approx(np.log(2))


def test_small_differences_that_add_up_are_refused():
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)
    logps = ref_logps + np.array([[[5e-4]], [[-5e-4]]], np.float32).swapaxes(0, 1)
    with pytest.raises(ValueError, match="; 0 of 16 tokens"):
        check(logps, ref_logps)  # a margin of 4e-4 moves the loss by 2e-4
    check(logps, ref_logps, tolerance=3e-4)


@pytest.mark.parametrize("both", [True, False])
def test_nan_is_refused(both):
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)
    logps = ref_logps.copy()
    logps[1, 1, 1] = np.nan
    with pytest.raises(ValueError, match="token 1 of completion 1 of prompt 1: nan under"):
        check(logps, logps if both else ref_logps)


def test_tokens_that_do_not_count_may_differ():
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)
    batch = dataclasses.replace(ONES, loss_mask=np.arange(4) < np.full((2, 2, 1), 3))
    logps = ref_logps.copy()
    logps[:, :, 3] = [[-9, np.nan], [-np.inf, 0]]
    assert check(logps, ref_logps, batch=batch) == pytest.approx(np.log(2))


def test_a_batch_where_nothing_counts_is_refused():
    batch = dataclasses.replace(ONES, loss_mask=np.zeros((2, 2, 4), bool))
    with pytest.raises(ValueError, match="no token of the first batch counts"):
        check(np.zeros((2, 2, 4), np.float32), np.zeros((2, 2, 4), np.float32), batch=batch)


def test_any_method_is_measured_against_itself():
    """A loss that is not ln 2 at the start, and whose config matters."""
    ref_logps = np.full((2, 2, 4), -1.5, np.float32)

    def loss(method, batch, logps, ref_logps):
        return Mean.of(method.scale * (logps + batch.rewards[..., None])), {}

    batch = dataclasses.replace(ONES, rewards=np.full((2, 2), 0.25, np.float32))
    method = types.SimpleNamespace(scale=2.0)
    assert check_start(loss, method, batch, ref_logps, ref_logps) == pytest.approx(-2.5)
    with pytest.raises(ValueError, match=r"loss is -1\.5 where equal ones give -2\.5"):
        check_start(loss, method, batch, ref_logps + 0.5, ref_logps, token_tolerance=1.0)
