"""Weights go straight into their shards: how much of a host's memory loading takes, and what each device gets."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pjpo import sharding
from pjpo.models import load
from tests.models import tiny_gguf, tiny_llama
from tests.test_distributed import free_port

SIZES = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
FEW = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 264}
LOAD = """
import sys
import jax
from pjpo import sharding
from pjpo.models import load

def memory(name):
    [line] = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

small, large, settings, hosts = *sys.argv[1:3], eval(sys.argv[3]), sys.argv[4:]
if hosts:
    jax.distributed.initialize(hosts[0], int(hosts[1]), int(hosts[2]))
mesh = sharding.make_mesh(sharding.Config(fsdp=4, model=2))
load(small, mesh=mesh, **settings)  # whatever is loaded or compiled once
before = memory("VmRSS")
_, params, _ = load(large, mesh=mesh, **settings)
jax.block_until_ready(params)
leaves = jax.tree.leaves(params)
held = sum(part.data.nbytes for x in leaves for part in x.addressable_shards)
print(memory("VmHWM") - before, held, sum(x.nbytes for x in leaves))
"""
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}
needs_proc = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads memory from /proc")


def write_shards(folder, config, num_shards=4):
    """A folder whose weights lie in several files; what they are does not matter."""
    folder.mkdir()
    weights = tiny_llama.tensors(config)
    tiny_llama.write_folder(folder, config, {})
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = {f"model-{i}.safetensors": names[i::num_shards] for i in range(num_shards)}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(value.nbytes for value in weights.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Those with a small and a large model, each in a folder and in a GGUF file; the bytes of its largest tensor."""
    root = tmp_path_factory.mktemp("models")
    largest = write_shards(root / "large", tiny_llama.CONFIG | SIZES)
    write_shards(root / "small", tiny_llama.CONFIG | SIZES | FEW)
    for name in ("small", "large"):
        tiny_gguf.write(root / f"{name}.gguf", root / name, tiny_llama.vocabulary(), ["h e"])
    return root, largest


@needs_proc
@pytest.mark.parametrize("suffix", ["", ".gguf"])
@pytest.mark.parametrize("settings", [{}, {"scan_layers": True}])
def test_a_host_holds_its_part_and_one_tensor(folders, settings, suffix):
    root, largest = folders
    small, large = root / f"small{suffix}", root / f"large{suffix}"
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", LOAD, small, large, repr(settings)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    grown, held, _ = map(int, out.split())
    # 235 MB of parameters, all of this host, as it has every device. The tensor counts twice: as bytes of its file,
    # and as the array made of them. 16 MB are for what Python and JAX take along the way.
    assert held > 230e6
    assert grown < held + 2 * largest + 16e6


@pytest.mark.slow
@needs_proc
def test_each_of_two_hosts_holds_its_part_and_one_tensor(tmp_path):
    """Two processes of four devices each; the part that a host reads of a tensor is all of it, what it keeps is not."""
    small, large = tmp_path / "small", tmp_path / "large"
    largest = write_shards(large, tiny_llama.CONFIG | SIZES | {"num_hidden_layers": 22})
    write_shards(small, tiny_llama.CONFIG | SIZES | FEW)
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", LOAD, small, large, "{}", f"localhost:{free_port()}", "2"]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    hosts = [subprocess.Popen([*command, str(number)], env=environment, **pipes) for number in range(2)]
    for host in hosts:
        grown, held, whole = map(int, host.communicate(timeout=300)[0].split())
        print(
            f"of {whole / 1e6:.0f} MB in tensors of {largest / 1e6:.0f} MB at most, a host of two keeps "
            f"{held / 1e6:.0f} MB; while loading its memory grew by {grown / 1e6:.0f} MB at most"
        )
        assert whole > 400e6
        assert held < 0.51 * whole
        assert grown < held + 2 * largest + 16e6


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("mesh", [{"fsdp": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}, {"data": 8, "fsdp": 1}])
def test_every_device_gets_its_part(tmp_path, scan_layers, mesh):
    config = tiny_llama.CONFIG | {"hidden_size": 16, "intermediate_size": 24}
    folder = tiny_llama.write_folder(tmp_path, config)
    mesh = sharding.make_mesh(sharding.Config(**mesh))
    _, whole, _ = load(folder, scan_layers=scan_layers)
    _, spread, _ = load(folder, scan_layers=scan_layers, mesh=mesh)
    expected = sharding.place(whole, mesh)

    def same(x, y):
        assert x.sharding == y.sharding
        for mine, other in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert (mine.device, mine.index) == (other.device, other.index)
            np.testing.assert_array_equal(mine.data, other.data)

    jax.tree.map(same, spread, expected)
