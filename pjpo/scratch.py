"""Models that an experiment makes for itself: random weights with their own vocabulary, or what a first run gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from pjpo import checks, experiment, models, runs, spm, train
from pjpo.data import reviews
from pjpo.models.decoder import Config
from pjpo.models.export import export
from pjpo.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(experiment.Model):
    """A Llama with random weights, and a SentencePiece vocabulary learned from the film reviews for training.

    With an empty `source` it is made; otherwise it lies there already.
    """

    vocab_size: int = 2048  # pieces, 260 of them bytes and special tokens
    num_layers: int = 4
    model_dim: int = 128
    num_heads: int = 4
    mlp_dim: int = 344
    max_positions: int = 128
    weights_seed: int = 0

    def made(self, root: Path, say: Callable[[str], None]) -> experiment.Model:
        if self.source:
            return _plain(self, self.source)
        _check_processes()
        about = experiment.describe(self)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        folder = (root / "scratch" / digest / "model").absolute()
        if not folder.exists():
            texts = [review.text for review in reviews.read() if review.use == "train"]
            say(f"learning {self.vocab_size} SentencePiece pieces from {len(texts)} reviews: {folder}")
            with tempfile.TemporaryDirectory() as beside:
                spm.train(texts, Path(beside) / "tokenizer.model", vocab_size=self.vocab_size)
                tokenizer = Tokenizer.from_sentencepiece(Path(beside) / "tokenizer.model")
            policy = models.Policy(
                Config(
                    vocab_size=self.vocab_size,
                    num_layers=self.num_layers,
                    model_dim=self.model_dim,
                    num_heads=self.num_heads,
                    num_kv_heads=self.num_heads,
                    head_dim=self.model_dim // self.num_heads,
                    mlp_dim=self.mlp_dim,
                    rope_theta=10000.0,
                    norm_eps=1e-5,
                    tied_head=True,
                    max_positions=self.max_positions,
                )
            )
            models.save(folder, policy, policy.init(jax.random.key(self.weights_seed)), tokenizer)
        return _plain(self, str(folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(experiment.Model):
    """The model that another experiment trains: its run comes first, and is found again by later ones.

    With an empty `source` it is made; otherwise it lies there already.
    """

    name: str  # of the first run's folder, below that of all runs
    by: experiment.Experiment

    def __post_init__(self):
        checks.kinds(self)
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"scratch: name must be a folder's name alone, got {self.name!r}")

    def made(self, root: Path, say: Callable[[str], None]) -> experiment.Model:
        if self.source:
            return _plain(self, self.source)
        _check_processes()
        first = dataclasses.replace(self.by, model=self.by.model.made(root, say))
        config = json.loads(json.dumps(experiment.describe(first)))  # as a run's folder gives it back
        same = [path.parent for path in sorted((root / self.name).glob("*/config.json"))]
        same = [path for path in same if runs.read(path).config == config]
        finished = [path for path in same if runs.read(path).summary.get("finished")]
        if finished:
            run = finished[-1]
        else:
            try:
                run = experiment.run(self.name, first, root=root, resume=same[-1] if same else None, say=say)
            except train.Stopped as stopped:
                about = str(stopped).partition("\n")[0]
                raise train.Stopped(
                    f"{about}\nGo on by starting the experiment again: it finds this first run"
                ) from None
        folder = (run / "model").absolute()
        if not folder.exists():
            export(run, folder, say=say)
        return _plain(self, str(folder))


def _check_processes() -> None:
    if jax.process_count() > 1:
        raise ValueError(
            "a model that is made first is made by one process; run the experiment with one, which can be stopped when "
            "its main run begins, then give the others the folder that this run's config.json names: --model.source"
        )


def _plain(model: experiment.Model, source: str) -> experiment.Model:
    return experiment.Model(**model.settings | {"source": source})
