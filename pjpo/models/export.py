"""A run's model as a folder that `transformers` opens: python -m pjpo.models.export RUN DIR"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from pjpo import checkpoints, experiment, models, outputs, runs
from pjpo.models.save import check_free


def export(
    run: str | Path,
    folder: str | Path,
    *,
    adapter: bool = False,
    base: str | None = None,
    step: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """The weights of a run's checkpoint, in `folder`; see `pjpo.models.save`.

    Args:
        run: the run's folder.
        folder: empty or not there.
        adapter: PEFT's folder with the adapters alone, instead of all weights with the adapters folded in.
        base: where PEFT finds the weights that adapters belong to, a folder or a hub's name; the run's source, if
            left out.
        step: of which checkpoint; the best, where the run kept one, or else the last.
        say: where messages go: about ignored checkpoints, and a base that PEFT cannot read.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint.
        FileExistsError: `folder` is not empty.
        ValueError: adapters alone of a run without them, a step that was not kept, a damaged checkpoint, a `folder`
            that cannot be written.
    """
    folder = Path(folder).expanduser()
    check_free(folder)
    outputs.check_folder(folder, "model", "choose another folder")
    found = runs.read(run)
    if "model" not in found.config:
        raise ValueError(f"{run} is of {found.experiment!r}, which keeps no weights; export the run of an experiment")
    model = experiment.recall(experiment.Model(source=""), found.config["model"])
    if adapter and not model.lora.rank:
        raise ValueError(f"{run} trained all weights (model.lora.rank is 0), so it has no adapters; export without it")
    saved = checkpoints.Checkpoints(found.path / "checkpoints", _keep_best_by(found), say=say)
    known = saved.steps()
    if not known:
        raise FileNotFoundError(f"{saved.folder} holds no checkpoint: the run was stopped before its first one")
    if step is None:
        step = saved.best() if found.config.get("keep_best_by") else None
    elif step not in known:
        raise ValueError(f"{saved.folder} has no checkpoint of step {step}, only of {', '.join(map(str, known))}")
    policy, params, tokenizer = models.load(**model.settings)
    trained, _ = policy.trainable(params)
    restored = saved.restore(trained, step, inside="params")
    assert restored is not None, "there is a checkpoint"
    say(f"step {restored.step} of {found.path}")
    how = "alone" if adapter else "merged"
    if adapter and base is None and not Path(model.source).is_dir():
        say(
            f"these adapters belong to {model.source}, which PEFT cannot read: save it as a folder with "
            f"pjpo.models.save(FOLDER, *pjpo.models.load({model.source!r})), and give that as --base"
        )
    return models.save(folder, policy, params | restored.state, tokenizer, adapters=how, base=base or model.source)


def _keep_best_by(found: runs.Run) -> tuple[str, str] | None:
    keep = found.config.get("keep_best_by")
    return tuple(keep) if keep else None


@dataclasses.dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]  # a run's folder, runs/<experiment>/<id>
    folder: tyro.conf.Positional[Path]  # to write: empty, or not there
    adapter: bool = False  # PEFT's folder with the adapters alone; without it, they are folded into the weights
    base: str | None = None  # where PEFT finds the weights that adapters belong to; the run's source, if left out
    step: int | None = None  # of which checkpoint; the best, where the run kept one, or else the last


def main(arguments: Sequence[str] | None = None) -> None:
    options = tyro.cli(Options, prog="python -m pjpo.models.export", description=__doc__, args=arguments)
    try:
        print(export(**vars(options)))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
