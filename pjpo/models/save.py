"""One way out for models: a folder that `transformers` opens, or PEFT where it holds adapters alone."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pjpo.models import decoder, lora, names
from pjpo.models.config_json import to_config_json
from pjpo.models.policy import Policy
from pjpo.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
METADATA = {"format": "pt"}  # what `transformers` asks of a safetensors file


def save(
    path: str | Path,
    policy: Policy,
    params: dict,
    tokenizer: Tokenizer,
    *,
    adapters: Literal["merged", "alone"] = "merged",
    base: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes a model's folder: all of it or nothing, and never over anything.

    config.json, safetensors files (with an index where there are several), tokenizer files with the chat template, and
    generation_config.json with the tokens that end a turn. Weights keep the dtype that they are stored in.

    Parameters with a scalar head are saved as a reward model: `...ForSequenceClassification` of one label, whose
    score.weight is in the place of the language head. Where padding is a token that ends a turn, config.json names no
    padding: `transformers` would read the score before the end token, and without one it takes single rows alone.

    Args:
        path: a folder that is empty or not there.
        policy: the model.
        params: its parameters; where they hold adapters, weights are saved with these folded in, W + alpha/rank A B
            computed in float32.
        tokenizer: its tokenizer.
        adapters: "alone" writes PEFT's folder, which holds nothing but the adapters.
        base: with "alone", where PEFT finds the model that they belong to: a folder, or a name on a hub.
        max_shard_bytes: no file is larger, unless one tensor is.

    Returns:
        The folder.

    Raises:
        FileExistsError: something is there.
        ValueError: adapters alone where there are none or beside a scalar head, a model that no family of
            `transformers` is, parameters that are spread over several processes.
    """
    path = Path(path).expanduser()
    check_free(path)
    if adapters == "alone" and "lora" not in params:
        raise ValueError("there are no adapters to save alone: the parameters hold weights only; save them merged")
    if "lora" in params and policy.config.lora is None:
        raise ValueError("the parameters hold adapters, but the policy has none; give the policy that they belong to")
    is_reward = "scalar_head" in params
    if adapters == "alone" and is_reward:
        raise ValueError("a folder of adapters alone has no place for the scalar head; save them merged")
    if not (is_reward or policy.config.language_head):
        raise ValueError("the parameters of a reward model lack their 'scalar_head', and there is no language head")
    policy = Policy(dataclasses.replace(policy.config, scalar_head=is_reward, language_head=not is_reward))
    if any(not leaf.is_fully_addressable for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)):
        raise ValueError(
            "the parameters are spread over several processes; save a checkpoint and export it with one process: "
            "python -m pjpo.models.export RUN DIR"
        )
    config = to_config_json(policy.config) | _special_ids(tokenizer)
    if is_reward and config["pad_token_id"] in tokenizer.stop_ids:
        config["pad_token_id"] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    beside.mkdir()
    try:
        if adapters == "alone":
            _write_adapters(beside, policy, params["lora"], base)
        else:
            _write_json(beside / "config.json", config)
            _write_json(beside / "generation_config.json", _special_ids(tokenizer))
            _write_shards(beside, policy, params, max_shard_bytes)
        tokenizer.save(beside, max_tokens=policy.config.max_positions)
        check_free(path)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return path


def check_free(path: Path) -> None:
    """
    Raises:
        FileExistsError: there is something at `path` other than an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is not empty, and nothing is written over; choose another folder, or remove it")


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Every token that ends a turn, the one that ends training's completions first."""
    ends = sorted(tokenizer.stop_ids, key=lambda i: i != tokenizer.eos_id)
    ids = {name: tokenizer.special_id(f"{name}_token") for name in ("bos", "pad")}
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["pad"],
    }


def _write_shards(folder: Path, policy: Policy, params: dict, max_bytes: int) -> None:
    """Weights by the file's names; of the model only one shard is in the host's memory at a time."""
    from safetensors.numpy import save_file  # here, so that importing pjpo stays fast

    config, file_names = policy.config, names.hugging_face(policy.config.post_norms)
    shards: list[list[tuple[str, int]]] = [[]]
    sizes = [0]
    for name, tensor in names.tensors(config).items():
        size = math.prod(tensor.stored) * jnp.dtype(config.param_dtype).itemsize
        for layer in range(config.num_layers if "{}" in file_names[name] else 1):
            if shards[-1] and sizes[-1] + size > max_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, layer))
            sizes[-1] += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {file_names[name].format(layer): _tensor(config, params, name, layer) for name, layer in shard}
        save_file(tensors, folder / file, METADATA)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensor(config: decoder.Config, params: dict, name: str, layer: int) -> np.ndarray:
    """One tensor as the file holds it, its adapter folded in."""
    tensor = names.tensors(config)[name]
    part = _leaf(params["params"] | params, *tensor.path, layer)[tensor.where]
    if "lora" in params and name in (settings := _lora(config)).targets:
        a, b = _adapter(params["lora"], name, layer)
        update = np.float32(settings.alpha / settings.rank) * (a.astype(np.float32) @ b.astype(np.float32))
        part = (part.astype(np.float32) + update.reshape(part.shape)).astype(part.dtype)
    return np.ascontiguousarray(tensor.unfold(part))


def _write_adapters(folder: Path, policy: Policy, adapters: dict, base: str | None) -> None:
    from safetensors.numpy import save_file

    settings, file_names = _lora(policy.config), names.hugging_face(policy.config.post_norms)
    tensors = {}
    for name in settings.targets:
        for layer in range(policy.config.num_layers):
            a, b = _adapter(adapters, name, layer)
            module = "base_model.model." + file_names[name].format(layer).removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.T)
    save_file(tensors, folder / "adapter_model.safetensors", METADATA)
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "target_modules": [file_names[name].split(".")[-2] for name in settings.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", about)


def _lora(config: decoder.Config) -> lora.Config:
    assert config.lora is not None, "parameters hold adapters, of which the policy's config says nothing"
    return config.lora


def _adapter(adapters: dict, name: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A [in, rank] and B [rank, out]."""
    a, b = (_leaf(adapters, f"{name}_adapter", leaf, layer) for leaf in "ab")
    return a, b.reshape(len(b), -1)


def _leaf(tree: dict, module: str, leaf: str, layer: int) -> np.ndarray:
    """Of the whole model, of an unrolled layer, or of one among scanned layers, which alone comes to the host."""
    if module in tree:
        return np.asarray(tree[module][leaf])
    if "layers" in tree:
        return np.asarray(jax.lax.dynamic_index_in_dim(tree["layers"][module][leaf], layer, keepdims=False))
    return np.asarray(tree[f"layers_{layer}"][module][leaf])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
