"""Every tensor of a model: what files call it, and the part of our parameters that holds the same numbers.

One table for both directions: `Tensor.fold` loads a tensor, `Tensor.unfold` saves it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Shaped

from pjpo.models.decoder import Config

# Our name of each tensor -> the file's; "{}" stands for the number of the layer.
_HUGGING_FACE = {
    "embed": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "score": "score.weight",
}
_HUGGING_FACE_POST_NORMS = {  # where the same word stands for another place
    "attention_post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
GGUF = {
    "embed": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "o": "blk.{}.attn_output.weight",
    "attention_post_norm": "blk.{}.post_attention_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "mlp_post_norm": "blk.{}.post_ffw_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}


def hugging_face(post_norms: bool) -> dict[str, str]:
    """Our name of each tensor -> that in a Hugging Face folder of a model with or without `Config.post_norms`."""
    return _HUGGING_FACE | (_HUGGING_FACE_POST_NORMS if post_norms else {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor as files store it (matrices [out, in], heads in one axis), and a part of one of our leaves."""

    path: tuple[str, str]  # our module and leaf; those of a layer lie below `layers_<number>`, or stacked in `layers`
    where: tuple[slice, ...]  # the part's place in the leaf, a slice with both ends for every axis
    stored: tuple[int, ...]  # the file's shape
    matrix: bool = False  # the file holds it transposed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(place.stop - place.start for place in self.where)

    def fold(self, stored: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The file's array -> our part, to be written to `leaf[where]`."""
        return (stored.T if self.matrix else stored).reshape(self.shape)

    def unfold(self, part: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """The inverse: `leaf[where]` -> the file's array."""
        return part.reshape(self.stored[::-1]).T if self.matrix else part.reshape(self.stored)


def tensors(config: Config) -> dict[str, Tensor]:
    """Every tensor of such a model by our name; a layer's once for all layers."""
    model, mlp, vocab = config.model_dim, config.mlp_dim, config.vocab_size
    k, q, h = config.num_kv_heads, config.heads_of_kv, config.head_dim

    def whole(module: str, leaf: str, *shape: int) -> Tensor:
        return Tensor(path=(module, leaf), where=_place(*shape), stored=shape)

    def matrix(module: str, where: tuple[slice, ...], num_in: int) -> Tensor:
        sizes = [place.stop - place.start for place in where]
        stored = (int(np.prod(sizes[num_in:])), int(np.prod(sizes[:num_in])))
        return Tensor(path=(module, "kernel"), where=where, stored=stored, matrix=True)

    def bias(module: str, where: tuple[slice, ...]) -> Tensor:
        stored = (int(np.prod([place.stop - place.start for place in where])),)
        return Tensor(path=(module, "bias"), where=where, stored=stored)

    table = {
        "embed": whole("embed", "table", vocab, model),
        "attention_norm": whole("attention_norm", "scale", model),
        "q": matrix("qkv", _place(model, k, (0, q), h), 1),
        "k": matrix("qkv", _place(model, k, (q, q + 1), h), 1),
        "v": matrix("qkv", _place(model, k, (q + 1, q + 2), h), 1),
        "o": matrix("out", _place(k, q, h, model), 3),
        "mlp_norm": whole("mlp_norm", "scale", model),
        "gate": matrix("gate_up", _place(model, (0, 1), mlp), 1),
        "up": matrix("gate_up", _place(model, (1, 2), mlp), 1),
        "down": matrix("down", _place(mlp, model), 1),
        "final_norm": whole("final_norm", "scale", model),
    }
    if config.qkv_bias:
        table["q_bias"] = bias("qkv", _place(k, (0, q), h))
        table["k_bias"] = bias("qkv", _place(k, (q, q + 1), h))
        table["v_bias"] = bias("qkv", _place(k, (q + 1, q + 2), h))
    if config.qk_norm:
        table |= {name: whole(name, "scale", h) for name in ("q_norm", "k_norm")}
    if config.post_norms:
        table |= {name: whole(name, "scale", model) for name in ("attention_post_norm", "mlp_post_norm")}
    if not config.language_head:  # `...ForSequenceClassification` of one label, in its own collection of parameters
        table["score"] = Tensor(path=("scalar_head", "kernel"), where=_place(model), stored=(1, model))
    elif not config.tied_head:
        table["head"] = whole("head", "table", vocab, model)
    return table


def _place(*axes: int | tuple[int, int]) -> tuple[slice, ...]:
    """A slice for each axis: all of a size, or from one end to the other."""
    return tuple(slice(0, axis) if isinstance(axis, int) else slice(*axis) for axis in axes)
