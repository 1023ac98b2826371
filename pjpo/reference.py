"""The reference model's log-probs kept on disk, and the check that training starts where algebra says it does.

A store can never be stale, as everything is found by its content. Each reference has a folder, named by a digest of its
weights, its config, the code of the forward pass, and what compiles and runs it; `about.json` in it says these in full.
A row, the log-probs of one completion, is found by a digest of its prompt, its tokens and its masks. Padding is no part
of it: rows are the same in any bucket, batch and order.

Rounding does depend on these (3e-5 a token was seen in float32), so a row keeps the bits of its first computation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pjpo import distributed, sharding
from pjpo.types import Batch

PACKAGE = Path(__file__).parent
# The code that log-probs come from.
FORWARD = ("types.py", "packing.py", "layout.py", "products.py", "logps.py", "models/*.py")
NO_NUMBERS = ("max_positions", "remat", "head_block_numbers")  # config fields that a forward pass's values ignore


class Store:
    """Reference log-probs on disk: rows are computed when they are first asked for. `hits` and `misses` count them.

    Several runs may share a folder; each sees what was there when it began, and what its own processes add.

    Args:
        folder: of all stores, such as "reference"; each reference gets a folder of its own inside.
        policy: the reference.
        params: its parameters, as they are passed to `policy.logps`; without "lora" where adapters are not part of it.
        say: where messages about ignored files go.
    """

    def __init__(self, folder: str | os.PathLike, policy: Any, params: dict, *, say: Callable[[str], None] = print):
        self.policy, self.params = policy, params
        self.hits = self.misses = 0
        self._about = _describe(policy, params)
        self._digest = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).digest()
        self.folder = Path(folder) / self._digest.hex()[:16]
        self._rows: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.rows"), reverse=True):  # the oldest last, whose bits count
            rows = self._unpack(path.read_bytes())
            if rows is None:
                say(f"{path}: a torn or damaged file of reference log-probs, ignored; its rows are computed again")
            self._rows.update(rows or {})

    def attach(self, batch: Batch, share_on: Mesh | None = None) -> Batch:
        """The batch with `ref_logps` [B, N, T], float32, zero where there is no token.

        If any row is missing, log-probs of the whole batch are computed, in its own shape, and the missing rows kept.

        Args:
            batch: NumPy arrays; the same in every process, unless they are
            share_on: this process's share of a batch on this mesh, see `pjpo.sharding.share`.

        Raises:
            OSError: rows cannot be written. Nothing that is on disk already is touched.
        """
        mask = np.asarray(batch.completion_mask, bool)
        places = [(b, n) for b, n in np.argwhere(mask.any(-1)).tolist()]  # of the completions that are not empty
        addresses = dict(zip(places, _addresses(batch, places), strict=True))
        missing = {address: place for place, address in addresses.items() if address not in self._rows}
        if distributed.any_of(bool(missing)):
            self._compute(batch, {at: (*place, _length(mask[place])) for at, place in missing.items()}, share_on)
        self.hits += len(places) - len(missing)
        self.misses += len(missing)
        ref_logps = np.zeros(mask.shape, np.float32)
        for place, address in addresses.items():
            row = self._rows[address]
            ref_logps[place][: len(row)] = row
        return dataclasses.replace(batch, ref_logps=ref_logps)

    def _compute(self, batch: Batch, missing: dict[bytes, tuple[int, int, int]], share_on: Mesh | None) -> None:
        """What any process misses, for all of them: who reads a row in the next epoch is another one.

        Each row is written by the first that misses it.
        """
        whole = batch if share_on is None else sharding.place_share(batch, share_on)
        logps = distributed.fetch(self.policy.logps(self.params, whole))
        own = np.arange(len(logps)) if share_on is None else sharding.own_rows(share_on, len(logps))
        told = distributed.gather({at.hex(): [int(own[b]), n, length] for at, (b, n, length) in missing.items()})
        rows = {at: logps[b, n, :length].copy() for part in told for at, (b, n, length) in part.items()}
        number = jax.process_index()
        before = set().union(*told[:number])
        mine = {bytes.fromhex(at): rows[at] for at in told[number] if at not in before}
        if mine:
            self._write(mine)
        for at, row in rows.items():
            self._rows.setdefault(bytes.fromhex(at), row)

    def _write(self, rows: dict[bytes, np.ndarray]) -> None:
        path = self.folder / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.rows"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").exists():
                _write_whole(self.folder / "about.json", json.dumps(self._about, indent=1).encode())
            _write_whole(path, self._pack(rows))
        except OSError as error:
            reason = f"reference log-probs cannot be written ({error.strerror}); make room or choose another folder"
            raise OSError(error.errno, reason, str(path)) from error

    def _pack(self, rows: dict[bytes, np.ndarray]) -> bytes:
        """A checksum that no other reference's file has, then each row: address, number of tokens, log-probs."""
        payload = b"".join(
            address + len(row).to_bytes(4, "little") + row.astype("<f4").tobytes() for address, row in rows.items()
        )
        return hashlib.sha256(self._digest + payload).digest() + payload

    def _unpack(self, content: bytes) -> dict[bytes, np.ndarray] | None:
        """The inverse; None where the checksum is wrong."""
        checksum, payload = content[:32], content[32:]
        if hashlib.sha256(self._digest + payload).digest() != checksum:
            return None
        rows, at = {}, 0
        while at < len(payload):
            length = int.from_bytes(payload[at + 32 : at + 36], "little")
            rows[payload[at : at + 32]] = np.frombuffer(payload, "<f4", length, at + 36)
            at += 36 + 4 * length
        return rows


def check_start(
    loss: Callable,
    method: Any,
    batch: Batch,
    logps: Any,
    ref_logps: Any,
    *,
    tolerance: float = 1e-4,
    token_tolerance: float = 1e-3,
) -> float:
    """Before the first update of a policy that starts as its reference: is it, on the first batch?

    The loss must be what it is with the reference in the policy's place (ln 2 for DPO). Differences can cancel in that
    mean, so each counted token is looked at too. With SmolLM2 in float32, rounding between two batch shapes comes to
    3e-5 a token at most; another dtype, the least visible of the usual mistakes, to 0.15.

    Args:
        loss: `loss(method, batch, logps, ref_logps)`, as in `pjpo.methods`.
        method: its config.
        batch: the first batch.
        logps: log-probs [B, N, T] under the policy.
        ref_logps: the same under the reference.
        tolerance: how far the loss may be off; in its own unit.
        token_tolerance: how far a token may be off; nats.

    Returns:
        The measured loss.

    Raises:
        ValueError: they differ, or no token counts; says how much, where, and what usually causes it.
    """
    batch, logps, ref_logps = jax.tree.map(jnp.asarray, (batch, logps, ref_logps))
    counted = np.asarray(batch.loss_mask)
    if not counted.any():
        raise ValueError("step 0: no token of the first batch counts in the loss, so there is nothing to start from")
    measured, expected = (float(loss(method, batch, x, ref_logps)[0].value()) for x in (logps, ref_logps))
    differences = np.nan_to_num(np.abs(np.asarray(logps - ref_logps)), nan=np.inf)
    differences[~counted] = 0
    wrong = int((differences > token_tolerance).sum())
    if abs(measured - expected) <= tolerance and not wrong:
        return measured
    b, n, t = np.unravel_index(differences.argmax(), differences.shape)
    raise ValueError(
        f"step 0: policy and reference should be equal, but the loss is {measured:.6g} where equal ones give "
        f"{expected:.6g} (allowed difference {tolerance:g}); {wrong} of {counted.sum()} tokens differ by more than "
        f"{token_tolerance:g} nats, most of all token {t} of completion {n} of prompt {b}: {logps[b, n, t]:.6g} under "
        f"the policy, {ref_logps[b, n, t]:.6g} under the reference. Usual causes: the two have different weights, or "
        "adapters that do not start at zero; log-probs made elsewhere, with another truncation, chat template or end "
        "token; another compute dtype; dropout; a policy that was trained already; an empty prompt, which gives nan. "
        "If it is rounding alone, as between bfloat16 batches of different shapes, allow more"
    )


def _describe(policy: Any, params: dict) -> dict[str, Any]:
    """All that decides a reference's numbers."""
    config = {name: value for name, value in dataclasses.asdict(policy.config).items() if name not in NO_NUMBERS}
    if "lora" not in params:
        config.pop("lora", None)
    weights = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        weights.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape};".encode())
        weights.update(np.ascontiguousarray(distributed.fetch(leaf)).reshape(-1).view(np.uint8))
    code = hashlib.sha256()
    for path in (path for pattern in FORWARD for path in sorted(PACKAGE.glob(pattern))):
        code.update(f"{path.relative_to(PACKAGE)} {path.stat().st_size};".encode() + path.read_bytes())
    about = {"weights_sha256": weights.hexdigest(), "code_sha256": code.hexdigest(), "config": config}
    return about | {"jax": jax.__version__, "backend": jax.default_backend()}


def _addresses(batch: Batch, places: list[tuple[int, int]]) -> list[bytes]:
    """Of completion n of prompt b, for each (b, n)."""
    prompt_tokens, tokens = np.asarray(batch.prompt_tokens, "<i4"), np.asarray(batch.completion_tokens, "<i4")
    masks = batch.prompt_mask, batch.completion_mask, batch.loss_mask
    prompt_mask, mask, loss_mask = (np.asarray(x, bool) for x in masks)
    addresses = []
    for b, n in places:
        end, digest = _length(mask[b, n]), hashlib.sha256()
        for part in (prompt_tokens[b][prompt_mask[b]], tokens[b, n, :end], mask[b, n, :end], loss_mask[b, n, :end]):
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
        addresses.append(digest.digest())
    return addresses


def _length(mask: np.ndarray) -> int:
    """Up to the last token."""
    return int(mask.nonzero()[0][-1]) + 1


def _write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
