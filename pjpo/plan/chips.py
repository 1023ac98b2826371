"""What a chip can do at most, as its maker says, and the devices of a slice of them, which need not be here."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Per chip. A collective is taken to run around one axis of the torus, both ways at once."""

    flops: float  # a second, bfloat16, dense
    hbm: int  # bytes that programs can have: the maker's figure, or what the compiler leaves of it, if that is less
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second over all links, both directions added
    torus_axes: int
    source: str

    @property
    def axis_bandwidth(self) -> float:
        """Bytes a second that a chip sends along one axis of the torus, to both neighbours together."""
        return self.ici_bandwidth / 2 / self.torus_axes


DOCS = "https://docs.cloud.google.com/tpu/docs"  # read in November 2026
CHIPS = {
    "v5e": Chip(197e12, int(15.75 * GIB), 819 * GB, 400 * GB, 2, f"{DOCS}/v5e"),
    "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 1200 * GB, 3, f"{DOCS}/v5p"),
    "v6e": Chip(918e12, int(31.25 * GIB), 1638 * GB, 800 * GB, 2, f"{DOCS}/v6e"),
}
# The compiler asks a TPU that it runs on what it is; here there is none to ask, or to take from another process.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def has_compiler() -> bool:
    """Whether TPU programs can be compiled here."""
    return importlib.util.find_spec("libtpu") is not None


def devices(topology: str) -> tuple[Chip | None, list]:
    """The chip, None for a CPU, and all devices of a topology: "v5p:4x4x4", chips along each axis, or "cpu:8".

    Raises:
        ValueError: another form, an unknown chip, a shape that its slices do not have, more CPU devices than there are.
        ModuleNotFoundError: the TPU compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    form = r"[1-9]\d*" if name == "cpu" else r"\d+(x\d+)+"
    if not (re.fullmatch(form, shape) and name in ("cpu", *CHIPS)):
        raise ValueError(
            f"topology must be cpu:<devices> or one of {', '.join(CHIPS)} as in v5p:4x4x4, got {topology!r}"
        )
    if name == "cpu":
        found = jax.devices("cpu")
        if int(shape) > len(found):
            raise ValueError(f"topology {topology}: there are {len(found)} CPU devices; ask for 1 to {len(found)}")
        return None, found[: int(shape)]
    if not has_compiler():
        raise ModuleNotFoundError("compiling for a TPU needs its compiler: pip install 'pjpo[tpu]'")
    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies  # here, as a plan for CPUs does not need it

    try:
        return CHIPS[name], list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: {str(error).splitlines()[0]}") from error
