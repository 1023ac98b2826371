"""Several processes, one run: started by a flag, they agree on what they run, and the first one writes and speaks.

Each process drives its own devices, on one machine or many, and runs the same program; arrays on the mesh span all of
them. What is computed with such arrays, and every function here but `is_first` and `quiet`, is a step that all
processes take together: one that leaves is missed by the others. With one process everything here does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjpo import checks

CLUSTERS = "SLURM, Open MPI, Cloud TPU and Kubernetes are, from inside a job"
PATIENCE = 10  # seconds that a process that failed waits for the others to leave with it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Where the processes of a run meet. What is None, the cluster says; any of them given means --distributed."""

    coordinator: str | None = None  # host:port at which process 0 listens; any free port
    num_processes: int | None = None
    process_id: int | None = None  # of this process, from 0
    heartbeat_timeout_seconds: int = 60  # a process is dead after so long a silence, and the others stop
    start_timeout_seconds: int = 300  # for all processes to meet

    def __post_init__(self):
        checks.kinds(self)
        for name in ("num_processes", "heartbeat_timeout_seconds", "start_timeout_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"distributed: {name} must be at least 1, got {value}")
        if self.process_id is not None and not 0 <= self.process_id < (self.num_processes or np.inf):
            least = f"0 to {self.num_processes - 1}" if self.num_processes else "0 or more"
            raise ValueError(f"distributed: process_id must be {least}, got {self.process_id}")
        host, _, port = (self.coordinator or "localhost:1").rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(
                f"distributed: coordinator must be host:port, with a port of 1 to 65535, got {self.coordinator!r}"
            )


def start(config: Config) -> None:
    """Meet the other processes; before anything asks JAX for a device.

    Where one of them does not come, JAX aborts the program after `start_timeout_seconds`.

    Raises:
        ValueError: no cluster was detected, and not everything is given.
        OSError: nobody listens at the coordinator's address, or in process 0 another program does.
    """
    if config.coordinator is not None and config.process_id is not None:
        _check_port(config)
    limit = config.start_timeout_seconds
    print(f"distributed: waiting for all processes to come, for {limit} s at most", file=sys.stderr)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, on which `train` saves
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=limit,
            heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
        )
    except ValueError as error:
        raise ValueError(
            f"distributed: no cluster was detected ({CLUSTERS}); give --distributed.coordinator=host:port, "
            f"--distributed.num-processes and --distributed.process-id. JAX says: {error}"
        ) from error


def _check_port(config: Config) -> None:
    """What JAX answers with a crash."""
    assert config.coordinator is not None, "called without an address"
    host, _, port = config.coordinator.rpartition(":")
    if config.process_id == 0:
        with socket.socket() as ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that just ended is no other program
            try:
                ours.bind(("", int(port)))
            except OSError as error:
                reason = f"process 0 cannot listen at port {port} ({error.strerror}); choose another one"
                raise OSError(f"distributed: {reason} in --distributed.coordinator") from error
        return
    end = time.monotonic() + config.start_timeout_seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(
                    f"distributed: nobody answers at {config.coordinator} after {config.start_timeout_seconds} s "
                    f"({error}); is process 0 started there, and the port open?"
                ) from error
            time.sleep(0.2)


@contextlib.contextmanager
def started(config: Config | None) -> Iterator[None]:
    """Within it, this is one process among several; with None it is alone.

    Processes leave together. One that an exception ends waits for the others, but only for a moment: they may never
    come, as they wait for it, and learn from its end that they must stop too.

    Raises:
        Lost: another process ended.
    """
    if config is None:
        yield
        return
    try:
        start(config)
        yield
    except BaseException as error:
        hurry = threading.Timer(PATIENCE, os._exit, [1])
        hurry.daemon = True
        hurry.start()
        if is_loss(error):
            raise Lost(about_loss(error)) from None
        raise


class Lost(Exception):
    """Another process ended, and this one cannot go on without it."""


def is_loss(error: BaseException) -> bool:
    """Whether an error is how JAX in one process sees the end of another."""
    signs = ("gloo", "nccl", "closed by peer", "connection reset", "heartbeat", "unavailable")
    said = str(error)
    # Where a value is read that another program failed to make, JAX raises a ValueError with the code of a status.
    by_xla = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and re.match("[A-Z_]+: ", said) is not None
    )
    return _count() > 1 and by_xla and any(sign in said.lower() for sign in signs)


def about_loss(error: BaseException) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        f"process {jax.process_index()} of {_count()} cannot go on, as another one ended, whose output says "
        f"more ({reason}); updates after the last checkpoint will be repeated, by as many processes as you like"
    )


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return _count() == 1 or jax.process_index() == 0


def quiet() -> bool | None:
    """What to pass to tqdm as `disable`: one bar, and only on a terminal."""
    return None if is_first() else True


def _count() -> int:
    """Of processes; asks no device where there is one, so that reading a file does not take hold of a TPU."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """What each process gives here, JSON-able, in their order."""
    if _count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    width = 1 << int(sizes.max() - 1).bit_length()  # few sizes, as each is a compilation
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - len(text))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, the only one that calls it; JSON-able.

    Raises:
        Exception: what `make` raised; in the other processes a ValueError that says the same.
    """
    if _count() == 1:
        return make()
    value, failure = None, None
    if is_first():
        try:
            value = make()
        except Exception as error:
            failure = error
    told, wrong = gather([value, failure and (str(failure) or type(failure).__name__)])[0]
    if failure is not None:
        raise failure
    if wrong is not None:
        raise ValueError(f"process 0 says: {wrong}")
    return told


def any_of(flag: bool) -> bool:
    """Whether the flag is up in any process."""
    return flag if _count() == 1 else any(gather(bool(flag)))


def largest(values: list[int]) -> list[int]:
    """The largest of what any process gives, place by place."""
    return values if _count() == 1 else np.max(gather(values), axis=0).tolist()


def agree(what: str, value: Mapping[str, Any]) -> None:
    """All processes must give the same.

    Args:
        what: named in the error.
        value: flat, JSON-able.

    Raises:
        ValueError: in every process, naming what differs and where.
    """
    first, *others = gather(dict(value))
    for number, other in enumerate(others, 1):
        names = [name for name in first | other if first.get(name, "absent") != other.get(name, "absent")]
        if names:
            listed = "; ".join(
                f"{name} is {first.get(name, 'absent')!r} in process 0 and {other.get(name, 'absent')!r} in {number}"
                for name in names[:5]
            )
            more = f", and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"the processes disagree on the {what}: {listed}{more}. Start all of them with the same command, code, "
                "packages and files"
            )


def fetch(tree: Any) -> Any:
    """NumPy arrays of the whole, in every process."""

    def whole(leaf: Any) -> Any:
        lies_elsewhere = isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
        return multihost_utils.process_allgather(leaf, tiled=True) if lies_elsewhere else leaf

    return jax.device_get(jax.tree.map(whole, tree))


class Call:
    """Whether any process has called, which all learn at the same step.

    They learn it one step late: by then it is known, and nobody waits for the devices.
    """

    def __init__(self):
        mesh = Mesh(np.array(jax.devices()), "device")
        self._spread = NamedSharding(mesh, PartitionSpec("device"))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._sent: jax.Array | None = None

    def __call__(self, called: bool) -> bool:
        if _count() == 1:
            return called
        flags = jax.make_array_from_process_local_data(self._spread, np.full(jax.local_device_count(), called))
        before, self._sent = self._sent, self._any(flags)
        return before is not None and bool(before)
