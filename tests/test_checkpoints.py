import math
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pjpo.checkpoints import Checkpoints, SaveError


def make_state(seed=0, rows=8):
    """What training holds: parameters of two dtypes, an optimizer's named tuples, keys, numbers."""
    values = np.random.default_rng(seed).standard_normal((rows, 16))
    params = {"table": jnp.asarray(values, jnp.float32), "kernel": jnp.asarray(values / 3, jnp.bfloat16)}
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "key": jax.random.fold_in(jax.random.key(seed), 7),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "step": jnp.int32(seed),
        "seen": seed,
        "host": np.arange(3) + seed,
    }


def make_like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, state
    )


def bits(tree):
    def of(leaf):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
        return str(getattr(leaf, "dtype", type(leaf))), np.asarray(leaf).tobytes()

    return jax.tree.map(of, tree)


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    with Checkpoints(tmp_path / "checkpoints", say=said.append) as made:
        yield made


def save_all(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {"position": [step, {"epoch": 1}]})
    checkpoints.wait()


def test_restores_the_saved_bits(checkpoints, said):
    save_all(checkpoints, 3)
    special = make_state(4)
    special["params"]["table"] = jnp.asarray([[math.nan, -0.0, math.inf, 1e-45] * 4] * 8, jnp.float32)
    checkpoints.save(4, special, {"position": [4, {"epoch": 1}]})
    step, state, extra = checkpoints.restore(make_like(make_state()))
    assert (step, extra, said) == (4, {"position": [4, {"epoch": 1}]}, [])
    assert jax.tree.structure(state) == jax.tree.structure(special)
    assert bits(state) == bits(special)
    assert type(state["seen"]) is int


def test_nothing_saved_is_none(checkpoints, said):
    assert checkpoints.restore(make_state()) is None
    assert (said, checkpoints.steps(), checkpoints.best()) == ([], [], None)


def test_training_may_donate_the_state_at_once(checkpoints):
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"table": jnp.zeros((1000, 1000))}
    checkpoints.save(0, state)
    for _ in range(10):
        state = update(state)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(checkpoints.restore(make_like(state)).state["table"], 0.0)


def test_restores_onto_the_shardings_of_like(checkpoints):
    num_devices = jax.device_count()
    if num_devices < 8:
        pytest.skip("needs 8 devices")
    one, two = jax.make_mesh((8, 1), ("data", "model")), jax.make_mesh((2, 4), ("data", "model"))
    saved = {"table": jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(one, P("data")))}
    saved["key"] = jax.device_put(jax.random.key(3), NamedSharding(one, P()))
    checkpoints.save(1, saved)
    like = {
        "table": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(two, P("model", "data"))),
        "key": jax.ShapeDtypeStruct((), saved["key"].dtype, sharding=NamedSharding(two, P())),
    }
    state = checkpoints.restore(like).state
    assert state["table"].sharding == like["table"].sharding
    assert state["key"].sharding.device_set == set(two.devices.flat)
    assert bits(state) == bits(saved)


def test_keeps_the_best_and_the_last(tmp_path):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: math.nan, 5: None, 6: 0.2}
    for mode, best in {"max": 2, "min": 3}.items():
        checkpoints = Checkpoints(tmp_path / mode, ("eval/kl", mode))
        for step, score in scores.items():
            if step == 5:  # a run that goes on remembers the best of its past
                checkpoints.close()
                checkpoints = Checkpoints(tmp_path / mode, ("eval/kl", mode))
            checkpoints.save(
                step, make_state(step), metrics={"loss": 1.0} | ({} if score is None else {"eval/kl": score})
            )
        checkpoints.close()
        assert checkpoints.steps() == sorted({best, 5, 6})
        assert checkpoints.best() == best
        assert checkpoints.restore(make_state(), step=best).state["seen"] == best


def test_a_saved_step_is_left_alone(checkpoints):
    save_all(checkpoints, 1)
    checkpoints.save(1, make_state(99))
    assert checkpoints.restore(make_state()).state["seen"] == 1


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "changed"])
def test_a_damaged_checkpoint_is_passed_over(checkpoints, said, how):
    save_all(checkpoints, 10, 20)
    folder = checkpoints.folder / "20"
    victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = victim.read_bytes()
    if how == "missing":
        victim.unlink()
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        victim.write_bytes({"truncated": data[:half], "empty": b"", "changed": flipped}[how])
    step, state, _ = checkpoints.restore(make_like(make_state()))
    assert step == 10
    assert bits(state) == bits(make_state(10))
    assert str(folder) in said[0]
    assert "damaged" in said[0]
    assert str(victim.relative_to(folder)) in said[0]
    assert said[1:] == ["the checkpoint of step 10 is used instead"]

    save_all(checkpoints, 20)  # the run goes on, and comes to the damaged step again
    assert checkpoints.restore(make_state()).step == 20
    assert folder.with_suffix(".damaged").is_dir()


def test_any_one_file_lost_is_noticed_or_does_not_matter(checkpoints, said):
    save_all(checkpoints, 1, 2)
    expected = bits(make_state(2))
    files = [path for path in (checkpoints.folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        path.unlink()
        step, state, _ = checkpoints.restore(make_like(make_state()))
        assert step == 1 or bits(state) == expected
        path.write_bytes(data)
    assert len(said) > 10


def test_without_a_good_checkpoint_it_stops(checkpoints):
    save_all(checkpoints, 1, 2)
    for step in ("1", "2"):
        (checkpoints.folder / step / "files.json").unlink()
    with pytest.raises(
        ValueError, match=r"no good checkpoint in .*step 2: files.json .*step 1: files.json .*start anew"
    ):
        checkpoints.restore(make_state())


def test_a_list_without_state_is_no_good_checkpoint(checkpoints, said):
    save_all(checkpoints, 1, 2)
    (checkpoints.folder / "2" / "files.json").write_text("{}")
    assert checkpoints.restore(make_like(make_state())).step == 1
    assert any("names nothing of about, state" in line for line in said)


def test_the_best_is_a_good_one(tmp_path):
    with Checkpoints(tmp_path, ("score", "max")) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.7)):
            checkpoints.save(step, make_state(), metrics={"score": score})
        checkpoints.wait()
        assert checkpoints.best() == 2
        (tmp_path / "2" / "metrics" / "metrics").write_text("{")
        assert checkpoints.best() == 1


def test_an_unknown_step_is_refused(checkpoints):
    save_all(checkpoints, 1, 2)
    with pytest.raises(ValueError, match=r"no good checkpoint of step 3: .*; others are: 1, 2$"):
        checkpoints.restore(make_state(), step=3)


def test_another_state_is_refused_by_name(checkpoints, said):
    state = make_state()
    checkpoints.save(1, state)
    state["params"]["table"] = jnp.zeros((9, 16))
    del state["seen"]
    with pytest.raises(ValueError, match=r"checkpoints/1 holds another state") as error:
        checkpoints.restore(state)
    assert "params.table is float32[8, 16] there and float32[9, 16] here" in str(error.value)
    assert "seen is int there and missing here" in str(error.value)
    assert said == []  # it is not damaged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_best_by": ("eval/kl", "low")}, "keep_best_by must be"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **arguments)


def test_what_cannot_be_saved_is_refused_by_name(checkpoints):
    with pytest.raises(ValueError, match=r"state.run.name is 'dpo'"):
        checkpoints.save(1, {"run": {"name": "dpo"}})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, make_state(), {"position": object()})


SCRIPT_START = """
    import resource, sys, time
    import jax.numpy as jnp, numpy as np
    from pjpo.checkpoints import Checkpoints, SaveError
    checkpoints = Checkpoints(sys.argv[1])
    def state(step, size=100):
        return {"table": jnp.asarray(np.random.default_rng(step).standard_normal(size), jnp.float32)}
"""


def start(script, folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-u", "-c", textwrap.dedent(SCRIPT_START) + textwrap.dedent(script), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def values(step, size=100):
    return np.random.default_rng(step).standard_normal(size).astype(np.float32)


def test_killed_while_saving(checkpoints, said):
    script = """
    checkpoints.save(1, state(1))
    checkpoints.wait()
    checkpoints._list_files = lambda: (print("writing"), time.sleep(600))  # every array is written, nothing is final
    checkpoints._manager = checkpoints._make_manager()
    checkpoints.save(2, state(2))
    checkpoints.wait()
    """
    process = start(script, checkpoints.folder)
    assert process.stdout.readline() == "writing\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (half,) = checkpoints.folder.glob("2.*")
    step, state, _ = checkpoints.restore({"table": jnp.zeros(100)})
    assert step == 1
    np.testing.assert_array_equal(state["table"], values(1))
    assert len(said) == 1
    assert str(half) in said[0]
    assert "half-written" in said[0]

    checkpoints.save(3, {"table": jnp.asarray(values(3))})  # the run goes on and tidies up
    checkpoints.wait()
    assert not half.exists()
    np.testing.assert_array_equal(checkpoints.restore({"table": jnp.zeros(100)}).state["table"], values(3))


def test_killed_at_any_moment(checkpoints):
    """A run that saves as fast as it can is killed at different moments: what it leaves can always be restored."""
    script = """
    for step in range(1, 10_000):
        checkpoints.save(step, state(step, 100_000))
        print(step)
    """
    like = {"table": jnp.zeros(100_000)}
    for lines in (2, 3, 5):
        process = start(script, checkpoints.folder)
        for _ in range(lines):
            last = process.stdout.readline()
            assert last, process.stderr.read()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = checkpoints.restore(like)
        assert found.step >= int(last) - 1
        np.testing.assert_array_equal(found.state["table"], values(found.step, 100_000))
        for path in checkpoints.folder.iterdir():
            subprocess.run(["rm", "-r", path], check=True)


def test_a_failed_write_is_told_and_older_ones_stay(checkpoints):
    """A limit on the size of files stands in for the full disk, so that this runs without privileges."""
    script = """
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(3, state(3, 1_000_000))
        checkpoints.save(4, state(4))
    except SaveError as error:
        print(error)
    print(checkpoints.steps(), checkpoints.restore(state(0)).step, list(checkpoints.folder.glob("3*")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(5, state(5))
    checkpoints.wait()
    print(checkpoints.steps())
    """
    out, err = start(script, checkpoints.folder).communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 3, err
    assert "step 3 could not be saved" in lines[0]
    assert "the disk may be full" in lines[0]
    assert f"Last good checkpoint: {checkpoints.folder / '2'}." in lines[0]
    assert lines[1] == "[1, 2] 2 []"
    assert lines[2].endswith("2, 5]")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes that TensorStore gave up
def test_a_full_disk(tmp_path, said):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        checkpoints = Checkpoints(disk / "checkpoints", say=said.append)
        save_all(checkpoints, 1)
        big = {"table": jnp.asarray(values(0, 2_000_000))}
        checkpoints.save(2, big)
        with pytest.raises(
            SaveError, match=r"step 2 could not be saved.*disk may be full.*Last good checkpoint: .*/1\."
        ):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert bits(checkpoints.restore(make_state()).state) == bits(make_state(1))
        (disk / "filler").write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        with pytest.raises(SaveError, match="step 3"):  # not a byte is left: it fails before the background begins
            save_all(checkpoints, 3)
        (disk / "filler").unlink()
        save_all(checkpoints, 4)
        assert checkpoints.restore(make_state()).step == 4
        checkpoints.close()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
