"""Folders as `transformers` saves them: config.json, safetensors (one file or several), tokenizer files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pjpo.models import families, names
from pjpo.models.weights import Checkpoint
from pjpo.tokenizer import Tokenizer, read_json


def read(folder: Path) -> Checkpoint:
    """Checks and describes the folder; weights stay on disk until they are asked for.

    Raises:
        FileNotFoundError: a file of the folder that is missing.
        ValueError: a damaged file, another architecture, or a setting that the decoder lacks.
    """
    stored = _config_json(folder)
    config = families.from_config_json(stored, folder / "config.json")
    files: dict[str, Path] = {}
    for path in _files(folder):
        for name in _tensor_names(path):
            if name in files:
                raise ValueError(f"{folder}: tensor {name!r} is in {files[name].name} and in {path.name}; remove one")
            files[name] = path
    shown = _text_part(files) if stored["model_type"] == "gemma3" else {name: name for name in files}

    def load(name: str) -> np.ndarray:
        with _open(files[shown[name]]) as file:  # for this tensor alone, so that no more of the file stays in memory
            return file.get_tensor(shown[name])

    file_names = names.hugging_face(config.get("post_norms", False))
    # Old files also store RoPE's frequencies, which follow from the config, and tied ones the embedding a second time.
    derived = {name for name in shown if name.endswith("rotary_emb.inv_freq")}
    derived |= {file_names["head"]} if config["tied_head"] else set()
    return Checkpoint(
        path=folder,
        config=config,
        names=file_names,
        stored=shown.keys() - derived,
        read=load,
        out_in=True,
        adjacent_pairs=False,
        tokenizer=Tokenizer.from_folder(folder),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `decoder.Config` by the folder's config.json, which is all that need be there. Raises as `read`."""
    return families.from_config_json(_config_json(folder), folder / "config.json")


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; a model's folder holds config.json, model.safetensors and tokenizer.json"
        )
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no JSON object; fetch it again")
    return stored


def _text_part(names: Iterable[str]) -> dict[str, str]:
    """Of a model that sees images too: the name that each tensor has in a model of text alone -> its name here."""
    text = {re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name): name for name in names}
    text = {name.removeprefix("language_model."): stored for name, stored in text.items()}
    images = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
    return {name: stored for name, stored in text.items() if not images.match(name)}


def _files(folder: Path) -> list[Path]:
    """The folder's weights: one file, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    wanted = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json(index)
        weight_map = weight_map.get("weight_map") if isinstance(weight_map, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no 'weight_map' from tensors to files; fetch it again")
        wanted = sorted(set(map(str, weight_map.values())))
    for name in wanted:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise ValueError(
                f"{index} names {name!r:.100}; allowed: files of its own folder, without a path, NAME.safetensors"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing{_pickled(folder)}")
    if "model.safetensors" not in wanted and (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} holds model.safetensors, and an index of other files; remove one of the two")
    return [folder / name for name in wanted]


def _pickled(folder: Path) -> str:
    """What to say about weights that are there, in a form that is not read."""
    found = [path.name for kind in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(kind))]
    if not found:
        return "; weights are read from safetensors files alone, fetch the rest of the model"
    return (
        f"; {found[0]} is a pickle, which can run any code and is not read. Where you trust it, convert it: "
        "`transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`"
    )


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open  # here, so that importing pjpo stays fast

    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size:,} bytes) is damaged or cut short, fetch it again: {error}") from error


def _tensor_names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())
