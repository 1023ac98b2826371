"""Stores the mean and the spread of a reward model's scores of your pairs, in its folder, for `pjpo.rewards.learned`.

python -m pjpo.rewards.normalise FOLDER --data.path pairs.jsonl
"""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import numpy as np
import tyro

from pjpo.data import preference
from pjpo.data.batches import in_order
from pjpo.data.buckets import Buckets, check_room
from pjpo.rewards.learned import Normalisation, RewardModel


def normalise(folder: str | Path, data: preference.Config, *, batch_size: int = 8, say=print) -> Normalisation:
    """Scores all completions of the data, held-out ones too, and writes what it finds.

    Args:
        folder: a reward model's.
        data: chosen and rejected completions.
        batch_size: pairs scored together.
        say: where it is told what was read.

    Raises:
        ValueError: no reward model, rows too long for it, scores that are all equal.
    """
    model = RewardModel.load(folder)
    reader = types.SimpleNamespace(tokenizer=model.tokenizer)
    found = dataclasses.replace(data, num_held_out=0).build(reader)
    say(found.about)
    check_room(found.train, model.policy.config.max_positions)
    batches = in_order(found.train, batch_size, Buckets.of(found.train))
    scores = np.concatenate([model.scores(batch, model.tokenizer) for batch in batches])[: len(found.train)]
    normalisation = Normalisation.of(scores)
    normalisation.save(folder)
    return normalisation


@dataclasses.dataclass(frozen=True)
class Options:
    folder: tyro.conf.Positional[Path]  # of the reward model
    data: preference.Config
    batch_size: int = 8  # pairs scored together


if __name__ == "__main__":
    options = tyro.cli(Options, prog="python -m pjpo.rewards.normalise", description=__doc__)
    try:
        print(normalise(options.folder, options.data, batch_size=options.batch_size))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
