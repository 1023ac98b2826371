"""The command line, up to the point where a run would begin."""

import dataclasses
import importlib
import operator
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from experiments import registry
from experiments.study import study
from pjpo import checks, distributed, experiment, plan, runs
from pjpo.data import gsm8k, mixture
from pjpo.models import decoder, lora
from pjpo.plan.shapes import SHAPES
from pjpo.rewards import cosine_length, format, learned, overlong
from pjpo.rewards.protocol import Rewards

ROOT = Path(__file__).parents[2]
STUDIES = [name for name in registry.names() if isinstance(registry.get(name), study.Study)]
EXPERIMENTS = [name for name in registry.names() if name not in STUDIES]


def python_m(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def begun(monkeypatch):
    """The runs that would begin, as (name, experiment, other arguments)."""
    found = []
    for module in (experiment, study):
        monkeypatch.setattr(module, "run", lambda name, value, **others: found.append((name, value, others)))
    return found


@pytest.fixture
def command(monkeypatch, capsys, unchecked):
    """`python -m experiments.<name> ...` without a new process; (exit code or message, what was printed)."""

    def run(name, *argv):
        module = importlib.import_module(f"experiments.{name}")
        monkeypatch.setitem(sys.modules, "__main__", module)
        code = None
        try:
            (study if name in STUDIES else registry).launch(module.EXPERIMENT, list(map(str, argv)))
        except SystemExit as done:
            code = done.code
        printed = capsys.readouterr()
        return code, " ".join(re.sub(r"[│╭╮╰╯─]|-{9,}", " ", printed.out + printed.err).split())

    return run


def test_lists_all_with_a_line_each():
    done = python_m("experiments")
    assert done.returncode == 0
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == registry.commands() == [*registry.names(), "claims"]
    assert {"dpo_glass", "dpo_hh", "dpo_sentiment", "sft_reviews"} <= set(registry.names())
    for name, about in lines:
        assert about == registry.about(name)
        assert 20 < len(about) <= 110
        assert about.endswith(".")


@pytest.mark.parametrize("arguments", [["experiments", "dpo_glas"], ["experiments.dpo_glas", "--smoke"]])
def test_an_unknown_experiment_is_refused_with_a_suggestion(arguments):
    done = python_m(*arguments)
    assert done.returncode == 1
    known = ", ".join(registry.names())
    assert done.stderr == f"unknown experiment 'dpo_glas'; did you mean 'dpo_glass'? Known: {known}\n"


def test_a_name_far_from_all_is_refused_without_one():
    with pytest.raises(ValueError, match=r"^unknown experiment 'grpo'\. Known: dpo_glass, "):
        registry.get("grpo")


def test_a_known_name_after_the_package_says_how():
    done = python_m("experiments", "dpo_glass", "--smoke")
    assert done.returncode == 1
    assert done.stderr == "run it with: python -m experiments.dpo_glass --smoke\n"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_shows_every_override_with_its_comment(command, begun, name):
    code, text = command(name, "--help")
    assert code == 0
    assert registry.about(name)[:60] in text
    for line in (
        "--batch-size INT"
        if name in ("sft_reviews", "reward_pairs")
        else "--method.beta FLOAT pull towards the reference",
        "--batch-size INT prompts in an update, over all devices (default: 8)",
        "--resume {None}|PATH folder of a run to go on with",
        "--smoke, --no-smoke a minute's worth",
        "--model.source STR a packaged name, a Hugging Face folder",
        "--optimizer.warmup-steps INT linear; the first update takes",
        "--loop.evaluate-every-steps INT beside the first and the last",
        "--data.num-held-out INT",
        "--reference {none,online,stored,adapter} none, online",
        "--mesh.fsdp INT parts that the weights are cut into",
    ):
        assert line in text
    assert begun == []


def test_overrides_reach_the_run(command, begun):
    command(
        "dpo_glass", "--method.beta=0.3", "--loop.num-steps", 7, "--model.lora.targets", "q", "v", "--runs", "there"
    )
    ((name, value, others),) = begun
    expected = registry.override(
        registry.get("dpo_glass"), {"method.beta": 0.3, "loop.num_steps": 7, "model.lora.targets": ("q", "v")}
    )
    assert (name, value, others) == ("dpo_glass", expected, {"root": Path("there"), "resume": None})


def test_adapters_can_be_asked_for_where_there_are_none_and_left_out_where_there_are(command, begun):
    command("dpo_hh", "--model.lora.rank=8", "--reference=adapter")
    command("dpo_glass", "--model.lora.rank=0", "--reference=online")
    (_, with_adapters, _), (_, without, _) = begun
    assert with_adapters.model.lora == lora.Config(rank=8)
    assert without.model.lora.rank == 0
    _, text = command("dpo_hh", "--help")
    assert "--model.lora.rank INT 0 for no adapters: all weights are trained (default: 0)" in text


def test_a_file_is_run_under_its_own_name(monkeypatch, begun):
    """python experiments/dpo_glass.py"""
    file = registry.FOLDER / "dpo_glass.py"
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=None, __file__=str(file), __doc__=""))
    registry.launch(registry.get("dpo_glass"), [])
    assert begun[0][0] == "dpo_glass"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_is_smaller_and_can_be_overridden(command, begun, name):
    command(name, "--smoke", "--seed", 5)
    ((_, value, _),) = begun
    original = registry.get(name)
    assert value.loop.num_steps < original.loop.num_steps
    assert value.model.source == ("" if name == "dpo_scratch" else "glassllm-en")  # or one that it makes itself
    assert (value.seed, original.seed) == (5, 0)


@pytest.mark.parametrize(("name", "data"), [("dpo_hh", "data"), ("reward_hh", "start.data")])
def test_smoke_brings_pairs_unless_a_path_is_given(command, begun, name, data):
    command(name, "--smoke")
    command(name, "--smoke", "--data.path", "mine.jsonl")
    paths = [operator.attrgetter(f"{data}.path")(value) for _, value, _ in begun]
    assert paths == [registry.SMOKE_PAIRS, "mine.jsonl"]
    assert Path(registry.SMOKE_PAIRS).is_file()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_a_command_line_too(command, begun, name):
    command(name, "--smoke", "--num-seeds", 3, "--runs", "there")
    ((_, value, others),) = begun
    original = registry.get(name)
    assert value == registry.override(original, original.smoke | {"num_seeds": 3})
    assert value.training.num_steps < original.training.num_steps
    assert original.num_seeds >= 5
    assert others == {"root": Path("there"), "resume": None}
    code, text = command(name, "--help")
    assert code == 0
    assert registry.about(name)[:60] in text
    for line in (
        "--num-seeds INT at least two",
        "--training.num-steps INT",
        "model.source STR a packaged name",
    ):
        assert line in text
    assert command(name, "--num-seeds=1")[0] == "study: num_seeds must be >= 2 for an interval, got 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.bet=0.2"], "Unrecognized options: --method.bet=0.2 Perhaps you meant: --method.beta FLOAT"),
        (["--bacth-size", 7], "Perhaps you meant: --batch-size INT prompts in an update"),
        (["--smoek"], "Perhaps you meant: --smoke"),
        (["--method.beta=high"], "Error parsing --method.beta: could not convert string to float: 'high'"),
        (["--batch-size", 2.5], "Error parsing --batch-size: invalid literal for int() with base 10: '2.5'"),
        (
            ["--keep-best-by", "eval/loss", "most"],
            "Error parsing --keep-best-by: no type matching",
        ),
        (["--model.lora.rank=-1"], "lora: rank must be at least 1, or 0 for no adapters, got -1"),
        (["--reference", "stroed"], "invalid choice 'stroed' for argument '--reference'"),
        (["--method.beta=-1"], "dpo: beta must be > 0"),
        (["--loop.num-steps=0"], "num_steps must be at least 1, got 0"),
        (["--optimizer.learning-rate=nan"], "optimizer: learning_rate must be > 0"),
    ],
)
def test_bad_overrides_are_refused(command, begun, arguments, message):
    code, text = command("dpo_glass", *arguments)
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert begun == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dpo_glass", ["--batch-size", 16, "--num-microbatches", 3], "batch_size 16 is not divisible by 24"),
        ("dpo_glass", ["--mesh.data", 3], "mesh data=3, fsdp=1, model=1 does not fill the 8 devices"),
        ("dpo_glass", ["--optimizer.warmup-steps", 100], "warmup_steps 100 must be below num_steps 60"),
        ("dpo_glass", ["--model.source", "nowhere"], "unknown model source 'nowhere'. Allowed: smollm2"),
        ("dpo_glass", ["--resume", "nowhere"], "nowhere is not the folder of a run: it has no config.json"),
        ("dpo_hh", ["--model.source", "glassllm-en"], "no data file is given; name one with --data.path=pairs.jsonl"),
        ("dpo_hh", ["--smoke", "--data.path", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_line(command, tmp_path, name, arguments, message):
    code, text = command(name, *arguments, "--runs", tmp_path)
    assert isinstance(code, str)  # which Python prints, and exits with 1
    assert message in code
    assert "Traceback" not in text


def configs(value):
    """All that an experiment holds, and itself."""
    if isinstance(value, tuple):
        return [config for item in value for config in configs(item)]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return []
    return [value, *(config for item in vars(value).values() for config in configs(item))]


OTHERS = (  # which no experiment here holds
    distributed.Config(),
    gsm8k.Config(path=""),
    mixture.Config(parts=(mixture.Part(name="a", data=gsm8k.Config(path="")),)),
    plan.Work(model=decoder.Config(**SHAPES["Llama-3.2-1B"]), batch_size=8),
    cosine_length.Config(verifier=len, max_tokens=9),
    format.Config(tags=("a",)),
    learned.Config(source="", normalise=False),
    overlong.Config(max_tokens=9, cache_tokens=3),
)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*registry.names(), "others"])
def test_every_field_refuses_another_kind_by_name(name):
    for config in OTHERS if name == "others" else configs(registry.get(name)):
        checks.kinds(config)
        for field, hint in typing.get_type_hints(type(config)).items():
            if (
                hint is not typing.Any
                and typing.get_origin(hint) is not typing.ClassVar
                and hint is not typing.ClassVar
            ):
                with pytest.raises(ValueError, match=rf": {field} must be .*[,;] got <object object"):
                    checks.kinds(dataclasses.replace(config, **{field: object()}))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "place"),
    [("dpo_glass", "pack"), ("dpo_glass", "model.remat"), ("reward_pairs", "method.annotated_margins")],
)
def test_an_experiment_with_a_value_of_another_kind_is_not_made(name, place):
    field = place.rpartition(".")[2]
    with pytest.raises(ValueError, match=rf": {field} must be True or False, got 'no'"):
        registry.override(registry.get(name), {place: "no"})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo_glass", {"batch_size": "8"}, "experiment: batch_size must be a whole number, got '8'"),
        ("dpo_glass", {"pack": "no"}, "experiment: pack must be True or False, got 'no'"),
        ("dpo_glass", {"model": None}, "experiment: model must be a pjpo.experiment.Model, got None"),
        ("dpo_glass", {"method": None}, "experiment: method must be given, got None"),
        ("dpo_glass", {"data": "pairs"}, "data must be an object of settings, got 'pairs'"),
        ("dpo_glass", {"optimizer": {"learning_rate": "high"}}, "optim: learning_rate must be a number, got 'high'"),
        ("dpo_glass", {"loop": {"num_steps": 0}}, "num_steps must be at least 1, got 0"),
        (
            "dpo_glass",
            {"keep_best_by": 3},
            "experiment: keep_best_by must be a tuple (a text, one of max, min) or None, got 3",
        ),
        ("rdpo_glass", {"num_seeds": None}, "study: num_seeds must be a whole number, got None"),
    ],
)
def test_a_folder_with_settings_of_another_kind_is_refused(command, begun, tmp_path, name, settings, message):
    config = experiment.describe(registry.get(name))
    for section, values in settings.items():
        config[section] = config[section] | values if isinstance(values, dict) else values
    folder = runs.create(tmp_path, name, config)
    code, _ = command(name, "--resume", folder.path)
    file = folder.path / "config.json"
    assert code == f"{file} holds settings of no run: {message}; put back what it held, or start a new run"
    assert begun == []


@pytest.mark.parametrize("bug", [ValueError("of NumPy"), AssertionError("why"), KeyError("name")])
def test_bugs_keep_their_traceback(command, monkeypatch, bug):
    def run(*_, **__):
        raise bug

    monkeypatch.setattr(experiment, "run", run)  # from a file that is not the project's
    with pytest.raises(type(bug)):
        command("dpo_glass")


def test_a_reward_that_may_not_fail_is_told_in_a_line():
    rewards = Rewards(functions=(lambda completions: [None],), weights=(1.0,), names=("mine",), on_error="raise")
    with pytest.raises(SystemExit, match=r"^reward 'mine', row 0, completion 0: gave None$"), registry.told():
        rewards.score(["p"], [["a"]])


def test_an_error_of_the_machine_is_told_in_a_line(command, monkeypatch):
    def run(*_, **__):
        raise OSError(28, "No space left on device", "runs/metrics.jsonl")

    monkeypatch.setattr(experiment, "run", run)
    assert command("dpo_glass")[0] == "[Errno 28] No space left on device: 'runs/metrics.jsonl'"


@pytest.mark.parametrize("name", registry.names())
def test_every_experiment_is_short_and_says_what_to_expect(name):
    text = (registry.FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= (150 if name in STUDIES else 60)
    header = importlib.import_module(f"experiments.{name}").__doc__
    assert f"python -m experiments.{name}" in header
    assert re.search(r"second|minute", header)


def test_override_refuses_a_field_that_is_not_there():
    with pytest.raises(TypeError, match="num_stepz"):
        registry.override(registry.get("dpo_glass"), {"loop.num_stepz": 3})
