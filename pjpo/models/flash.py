"""The attention of `pjpo.models.attention` through JAX's fused kernels, which write no scores to memory.

A prompt and its completions are one sequence: prompt, then completion after completion. Who sees whom is then fixed by
the shapes, padding aside, and every query has its one softmax in one kernel. On TPU that is splash attention, which
skips blocks where nothing is seen; on GPU cuDNN, which is given the mask. Elsewhere it is the plain attention.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pjpo import layout
from pjpo.layout import HEADS, ROWS
from pjpo.models import attention
from pjpo.models.attention import Scoring
from pjpo.models.decoder_config import Config
from pjpo.models.streams import Streams

LANES = 128  # numbers in a row of a TPU's registers, of which its kernels take whole ones
BLOCK = 512  # queries, and keys, that a kernel works on at once, at most


def check(config: Config) -> None:
    """
    Raises:
        ValueError: flash attention on a GPU, with a dtype or a head_dim that cuDNN has no kernel for.
    """
    if config.attention != "flash" or jax.default_backend() != "gpu":
        return
    if config.dtype != "bfloat16":
        raise ValueError(
            f"model: dtype must be bfloat16 for flash attention on a GPU, got {config.dtype!r}; set "
            "model.dtype=bfloat16, or model.attention=plain"
        )
    most = 256 if float(jax.local_devices()[0].compute_capability) >= 9 else 128  # 9: Hopper
    if config.head_dim % 8 or config.head_dim > most:
        raise ValueError(
            f"model: head_dim must be a multiple of 8 and at most {most} for flash attention on this GPU, got "
            f"{config.head_dim}; set model.attention=plain"
        )


def shared_prefix(
    streams: Streams, qkv: Float[Array, "G M K R H"], cache: None, scoring: Scoring
) -> tuple[Float[Array, "G M K Q H"], None]:
    """As `attention.shared_prefix`, in value and gradient."""
    width = streams.prompt_keys.shape[1]

    def fused(kernel, qkv):
        slots = streams.to_slots(qkv)  # [B, S, K, R, H]
        own = jnp.ones((len(slots), slots.shape[1] - width), bool)
        keys = jnp.concatenate([streams.prompt_keys, own], axis=1)  # [B, S], what anyone may look at
        shape = width, streams.num_completions, own.shape[1] // streams.num_completions
        return streams.to_places(kernel(shape, slots, keys, scoring.scale))

    kernels = {"tpu": functools.partial(fused, on_tpu)}
    if jax.default_backend() == "gpu":  # JAX asks this machine's cuDNN for its version as soon as it is traced
        kernels["cuda"] = functools.partial(fused, on_gpu)
    plain = lambda qkv: attention.shared_prefix(streams, qkv, None, scoring)[0]  # noqa: E731
    return lax.platform_dependent(qkv, default=plain, **kernels), None


def visible(shape: tuple[int, int, int]) -> Bool[np.ndarray, "S S"]:
    """Which keys each query sees, for (P, N, T); padding aside."""
    width, num_completions, length = shape
    owner = np.concatenate([np.zeros(width, int), 1 + np.repeat(np.arange(num_completions), length)])
    place = np.arange(len(owner))
    return (place[:, None] >= place[None]) & ((owner[:, None] == owner[None]) | (owner[None] == 0))


def on_tpu(
    shape: tuple[int, int, int],
    slots: Float[Array, "B S K R H"],
    keys: Bool[Array, "B S"],
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B S K Q H"]:
    """Splash attention: one kernel for each prompt and key/value head. Its products are in bfloat16 on a TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here, so that importing pjpo stays fast

    @layout.on_devices(ins=(HEADS, ROWS), outs=HEADS, num_rows=len(slots))
    def each(slots, keys):
        length, _, heads, _ = slots.shape[1:]
        size = min(BLOCK, _round_up(length, LANES))
        slots, keys, seen = _padded(shape, slots, keys, size)
        q, k, v = jnp.split(slots.transpose(0, 2, 3, 1, 4), [heads - 2, heads - 1], axis=2)
        mask = splash.MultiHeadMask([splash.NumpyMask(seen | np.eye(len(seen), dtype=bool))] * (heads - 2))
        sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), size)
        kernel = splash.make_splash_mqa_single_device(mask, block_sizes=splash.BlockSizes(**sizes), interpret=interpret)
        keys = keys.astype(jnp.int32)
        segments = splash.SegmentIds(jnp.ones_like(keys), keys)  # a query sees the keys of its own number alone
        of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out = jax.vmap(of_heads)(q * scale, k[:, :, 0], v[:, :, 0], segments)  # [B, K, Q, S, H]
        assert isinstance(out, jax.Array), "residuals, which were not asked for"
        return out[..., :length, :].transpose(0, 3, 1, 2, 4)

    return each(slots, keys)


def on_gpu(
    shape: tuple[int, int, int], slots: Float[Array, "B S K R H"], keys: Bool[Array, "B S"], scale: float
) -> Float[Array, "B S K Q H"]:
    """cuDNN's fused attention; see `check` for what it takes."""
    length = slots.shape[1]
    slots, keys, seen = _padded(shape, slots, keys, 2)  # cuDNN has no gradient for an odd length
    q, k, v = jnp.split(slots, [slots.shape[3] - 2, slots.shape[3] - 1], axis=3)
    own = np.eye(len(seen), dtype=bool)[None]  # padding sees itself, so that no softmax is over masked scores alone
    mask = seen[None] & keys[:, None] | own  # [B, S, S]
    out = jax.nn.dot_product_attention(
        q.reshape(*q.shape[:2], -1, q.shape[-1]),
        k[:, :, :, 0],
        v[:, :, :, 0],
        mask=mask[:, None],
        scale=scale,
        implementation="cudnn",
    )
    return out.reshape(q.shape)[:, :length]


def _padded(
    shape: tuple[int, int, int], slots: Float[Array, "B S K R H"], keys: Bool[Array, "B S"], size: int
) -> tuple[Float[Array, "B W K R H"], Bool[Array, "B W"], Bool[np.ndarray, "W W"]]:
    """Slots and keys up to a multiple of `size`, and who sees whom: what is added is seen by nobody."""
    more = -slots.shape[1] % size
    slots = jnp.pad(slots, ((0, 0), (0, more), (0, 0), (0, 0), (0, 0)))
    return slots, jnp.pad(keys, ((0, 0), (0, more))), np.pad(visible(shape), (0, more))


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step
