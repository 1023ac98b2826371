"""Models that are made first: made once, found again, and a first run that was stopped goes on."""

import json

import jax
import numpy as np
import pytest

from experiments import dpo_scratch
from pjpo import experiment, runs, scratch, train
from pjpo.models import load

TINY = scratch.Random(source="", vocab_size=400, num_layers=1, model_dim=8, num_heads=2, mlp_dim=8)


@pytest.fixture
def said():
    return []


def test_random_weights_are_made_once(tmp_path, said):
    made = TINY.made(tmp_path, said.append)
    assert type(made) is experiment.Model
    policy, params, tokenizer = load(made.source)
    assert (policy.config.vocab_size, tokenizer.vocab_size, tokenizer.eos_id) == (400, 400, 1)
    assert tokenizer.decode(tokenizer.encode("A fine film,\nfïne 🙂")) == "A fine film,\nfïne 🙂"
    assert len(tokenizer.encode("the film was good")) < 12
    expected = policy.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert TINY.made(tmp_path, said.append) == made
    assert len(said) == 1
    assert "learning 400 SentencePiece pieces" in said[0]
    other = scratch.Random(**vars(TINY) | {"weights_seed": 1}).made(tmp_path, said.append)
    assert other.source != made.source


class FirstRun:
    """In the place of `experiment.run` and `export`: what they were asked, and a folder like theirs."""

    def __init__(self, monkeypatch):
        self.asked, self.stops = [], False
        monkeypatch.setattr(scratch.experiment, "run", self.run)
        monkeypatch.setattr(scratch, "export", lambda run, folder, say: folder.mkdir())

    def run(self, name, value, *, root, resume, say):
        folder = runs.RunFolder(resume) if resume else runs.create(root, name, experiment.describe(value))
        self.asked.append((folder.path, resume))
        if self.stops:
            raise train.Stopped("stopped at step 3\nGo on with: python -m experiments.first --resume ...")
        folder.summary({"finished": True})
        return folder.path


def test_a_first_run_is_found_again_or_goes_on(tmp_path, said, monkeypatch):
    first = FirstRun(monkeypatch)
    model = scratch.Trained(
        source="", name="first", by=dpo_scratch.SFT.__class__(**vars(dpo_scratch.SFT) | {"model": TINY})
    )
    first.stops = True
    with pytest.raises(train.Stopped, match=r"^stopped at step 3\nGo on by starting the experiment again: it finds"):
        model.made(tmp_path, said.append)
    first.stops = False
    made = model.made(tmp_path, said.append)
    (begun, fresh), (ended, resumed) = first.asked
    assert (fresh, resumed, ended) == (None, begun, begun)
    assert made == experiment.Model(source=str(begun / "model"))
    assert model.made(tmp_path, said.append) == made
    assert len(first.asked) == 2
    config = json.loads((begun / "config.json").read_text())["config"]
    assert config["model"]["source"] == TINY.made(tmp_path, said.append).source
    longer = experiment.Experiment(**vars(model.by) | {"batch_size": 7})
    assert scratch.Trained(source="", name="first", by=longer).made(tmp_path, said.append) != made


def test_a_run_remembers_the_folder_and_makes_nothing(tmp_path, said, monkeypatch):
    first = FirstRun(monkeypatch)
    value = dpo_scratch.EXPERIMENT
    plain = experiment.Model(source=str(tmp_path), lora=value.model.lora)
    recalled = experiment.recall(value.model, json.loads(json.dumps(experiment.describe(plain))))
    assert recalled.made(tmp_path, said.append) == plain
    assert not first.asked


@pytest.mark.parametrize("name", ["", ".", "..", "../first", "/first", "first/"])
def test_a_first_run_lies_among_the_runs(name):
    with pytest.raises(ValueError, match=f"scratch: name must be a folder's name alone, got {name!r}"):
        scratch.Trained(source="", name=name, by=dpo_scratch.SFT)
