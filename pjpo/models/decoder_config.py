"""The decoder's config: the sizes of a model, what sets its family apart, and how it computes.

At its defaults it is Llama's; the other families are settings of it, see `pjpo.models.families`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax.numpy as jnp

from pjpo.models import lora
from pjpo.models.rope import Scaling

Dtype = Literal["float32", "bfloat16", "float64"]
Activation = Literal["silu", "gelu_tanh"]
Attention = Literal["plain", "flash"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    tied_head: bool
    max_positions: int  # prompt and completion together
    rope_scaling: Scaling | None = None
    rope_theta_local: float | None = None  # of layers with a window, without scaling; as the others unless given
    sliding_window: int | None = None  # positions that a query sees, its own and those before it
    global_layers: tuple[int, ...] = ()  # numbers of layers that the window does not hold for
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query's and key's head, before its rotation
    query_scale: float | None = None  # of attention scores; head_dim ** -0.5 unless given
    attention_softcap: float | None = None  # see `pjpo.logps.soft_cap`
    logit_softcap: float | None = None
    temperature: float = 1.0  # logits are divided by it, where tokens are sampled and where they are scored
    post_norms: bool = False  # RMSNorm of what attention and feed-forward give, before it is added
    norm_plus_one: bool = False  # norms multiply by 1 + scale
    activation: Activation = "silu"
    embed_scale: float = 1.0  # of embeddings as they enter the first layer
    dtype: Dtype = "float32"  # of products and activations
    param_dtype: Dtype = "float32"  # of the weights at rest; adapters keep float32
    scan_layers: bool = False  # compiles faster; unrolled runs faster on a CPU
    remat: bool = False  # recompute each layer in the backward pass
    attention: Attention = "plain"  # flash: fused kernels on TPU, and in bfloat16 on GPU, see `pjpo.models.flash`
    head_block_numbers: int = 2**25  # logits that exist at once, see `pjpo.logps.token_logps`
    lora: lora.Config | None = None
    scalar_head: bool = False  # a number beside the logits: a reward, or a critic's estimate
    language_head: bool = True  # False: a reward model as folders hold it, with the scalar head in the logits' place

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) >= 2**31:  # indices are int32
                raise ValueError(f"model: {name} must be below 2**31, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"model: rotary embedding needs an even head_dim, got {self.head_dim}")
        choices = {"dtype": Dtype, "param_dtype": Dtype, "activation": Activation, "attention": Attention}
        for name, choice in choices.items():
            if getattr(self, name) not in (allowed := get_args(choice)):
                raise ValueError(f"model: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        scales = "query_scale", "attention_softcap", "logit_softcap", "temperature", "embed_scale"
        for name in ("rope_theta", "rope_theta_local", "norm_eps", *scales):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"model: {name} must be > 0, got {value}")
        if self.temperature < 1e-6:  # float32 then rounds by nats, and soon to what is not finite
            raise ValueError(
                f"model: temperature must be at least 1e-06, got {self.temperature}; greedy is a setting of Sampling"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"model: sliding_window must be at least 1, got {self.sliding_window}")
        if self.sliding_window is None and (self.global_layers or self.rope_theta_local):
            raise ValueError("model: global_layers and rope_theta_local mean something only with a sliding_window")
        if any(not 0 <= layer < self.num_layers for layer in self.global_layers):
            raise ValueError(f"model: global_layers {self.global_layers} are not all among {self.num_layers} layers")
        if self.attention == "flash" and (self.sliding_window or self.attention_softcap):
            raise ValueError("model: flash attention knows no sliding_window and no attention_softcap; use plain")
        if self.head_block_numbers < self.vocab_size:
            raise ValueError(
                f"model: head_block_numbers {self.head_block_numbers} holds no position's {self.vocab_size} logits"
            )
        if not self.language_head and not self.scalar_head:
            raise ValueError(
                "model: without a language head there must be a scalar_head; set it, or load another model"
            )
        if self.lora is not None and not self.lora.rank:
            object.__setattr__(self, "lora", None)  # one spelling of no adapters: configs that are equal compare equal
        if self.lora is not None and self.lora.rank > self.model_dim:
            raise ValueError(f"model: lora.rank must be at most model_dim {self.model_dim}, got {self.lora.rank}")

    @property
    def heads_of_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def decoding_dtype(self) -> str:
        """Of weights as decoding reads them: the compute dtype, or the one at rest where it takes fewer bytes."""
        return min(self.param_dtype, self.dtype, key=lambda name: jnp.dtype(name).itemsize)

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Of each layer, whether the window holds for it."""
        return tuple(self.sliding_window is not None and i not in self.global_layers for i in range(self.num_layers))
