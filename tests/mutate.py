"""Are the tests able to fail? Breaks the numerical core in one place at a time, and runs the tests of that file.

    python -m tests.mutate                            # every file in TESTS; two or three hours on one core
    python -m tests.mutate pjpo/logps.py --from 40    # one file, from that line on
    python -m tests.mutate pjpo/logps.py --list       # says what would be broken

A mutant that no test notices is printed, unless docs/mutants.md lists it with the reason why it computes the same.
Exits with 1 where one is left. Files on disk are never touched: a child process, forked after the slow imports, gets
the changed source in place of the file.

Why not a library: mutmut leaves out decorated functions, which here are the jitted ones and the gradients written by
hand, and cosmic-ray starts a process for each mutant, of which 5 seconds go into importing JAX.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.machinery
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import hypothesis
import pytest

PHASES = hypothesis.Phase.explicit, hypothesis.Phase.generate  # one that fails is enough; it need not be the simplest
ROOT = pathlib.Path(__file__).parents[1]
LISTED = ROOT / "docs" / "mutants.md"
TESTS = {  # what pytest is given, the quickest and likeliest to fail first
    "pjpo/types.py": ["tests/test_types.py"],
    "pjpo/metrics.py": ["tests/test_metrics.py"],
    "pjpo/per_source.py": ["tests/test_per_source.py"],
    "pjpo/logps.py": ["tests/test_logps.py"],
    "pjpo/optim.py": ["tests/test_optim.py"],
    "pjpo/advantages.py": ["tests/test_advantages.py"],
    "pjpo/kl.py": ["tests/test_kl.py"],
    "pjpo/surrogate.py": ["tests/test_surrogate.py"],
    "pjpo/best_of.py": ["tests/test_best_of.py"],
    "pjpo/packing.py": ["tests/test_packing.py"],
    "pjpo/products.py": ["tests/test_products.py"],
    "pjpo/mismatched.py": ["tests/test_mismatched.py"],
    "pjpo/token_mdp.py": ["tests/test_token_mdp.py"],
    "pjpo/chat.py": ["tests/test_chat.py"],
    "pjpo/sampling.py": ["tests/test_sampling.py"],
    "pjpo/models/streams.py": ["tests/models/test_policy.py"],
    "pjpo/models/attention.py": ["tests/models/test_policy.py", "tests/test_sampling.py"],
    "pjpo/models/filled.py": ["tests/models/test_filled.py", "tests/test_sampling.py"],
    "pjpo/models/whole.py": ["tests/models/test_filled.py", "tests/test_sampling.py"],
    "pjpo/models/rope.py": ["tests/models/test_policy.py", "tests/models/test_families.py"],
    "pjpo/data/encode.py": ["tests/data/test_encode.py"],
    "pjpo/data/buckets.py": ["tests/data/test_buckets.py"],
    "pjpo/data/examples.py": ["tests/data/test_examples.py"],
    "pjpo/evals/ranking.py": ["tests/evals/test_ranking.py"],
    "pjpo/evals/panel.py": ["tests/evals/test_panel.py", "tests/evals/test_held_out.py"],
    "pjpo/evals/sentiment.py": ["tests/evals/test_sentiment.py"],
}
TESTS |= {
    f"pjpo/methods/{path.stem}.py": [f"tests/methods/test_{name}.py" for name in (path.stem, "defaults", "contract")]
    for path in sorted(ROOT.glob("pjpo/methods/[a-z]*.py"))
}

SWAPS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = [
    ("min", "max"),
    ("minimum", "maximum"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("sum", "mean"),
    ("zeros", "ones"),
]
NAMES = {old: new for pair in NAMES for old, new in (pair, pair[::-1])} | {"ceil": "floor", "cumsum": "sort"}


class Mutant(NamedTuple):
    line: int
    before: str  # the line, or lines, without indentation
    after: str
    source: str  # of the whole file


def mutants(source: str) -> list[Mutant]:
    """Every way in which one place of the file can be broken, in the order of the file."""
    rows = source.splitlines(keepends=True)
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row.encode()))
    data, found = source.encode(), []
    for node, new in _changes(ast.parse(source)):
        first, last = (starts[line - 1] for line in (node.lineno, node.end_lineno))
        text = f"({ast.unparse(new)})".encode()
        changed = data[: first + node.col_offset] + text + data[last + node.end_col_offset :]
        until = starts[node.end_lineno]
        lines = data[first:until], changed[first : until + len(changed) - len(data)]
        before, after = (" ".join(part.decode().split()) for part in lines)
        found.append(Mutant(node.lineno, before, after, changed.decode()))
    return sorted(found, key=lambda mutant: mutant.line)


def _changes(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, ast.expr | ast.stmt]]:
    """(part, what to put in its place). Messages, docstrings, annotations and decorators stay."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                waiting += [x for x in (child if isinstance(child, list) else [child]) if isinstance(x, ast.AST)]
        conditions = getattr(node, "ifs", [node.test] if isinstance(node, ast.If | ast.While) else [])
        yield from ((test, ast.UnaryOp(ast.Not(), test)) for test in conditions if not _is_negated_below(test))
        if isinstance(node, ast.expr | ast.stmt):
            yield from ((node, new) for new in _replacements(node))


def _is_negated_below(test: ast.expr) -> bool:
    """A replacement of a part of the condition comes to the same as its negation."""
    negations = ast.Is | ast.IsNot | ast.Eq | ast.NotEq | ast.In | ast.NotIn
    is_compared = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], negations)
    return is_compared or isinstance(test, ast.UnaryOp)


def _replacements(node: ast.expr | ast.stmt) -> Iterator[ast.expr | ast.stmt]:
    match node:
        case ast.Compare(left, ops, rights):
            for place, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:place], SWAPS[type(op)](), *ops[place + 1 :]], rights)
        case ast.BinOp(left, op, right) if type(op) in SWAPS:
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in SWAPS:
            yield ast.AugAssign(target, SWAPS[type(op)](), value)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.Call(ast.Attribute(_, "where"), [condition, one, other]):
            yield ast.Call(node.func, [condition, other, one], node.keywords)
        case ast.Call(ast.Attribute(_, "stop_gradient"), [first]):
            yield first
        case ast.Attribute(value, name) if name in NAMES:
            yield ast.Attribute(value, NAMES[name])
        case ast.Name(name, ast.Load()) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.IfExp(test, one, other):
            yield ast.IfExp(test, other, one)


class Noticed:
    """Names of tests that failed, the latest first, in a file: a mutant's neighbour is run against these first."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.touch()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        places = {name: place for place, name in enumerate(self.path.read_text().splitlines())}
        items.sort(key=lambda item: places.get(item.nodeid, len(places)))

    def pytest_runtest_logreport(self, report):
        if report.failed:
            others = [name for name in self.path.read_text().splitlines() if name != report.nodeid]
            self.path.write_text("\n".join([report.nodeid, *others]))


def run(path: pathlib.Path, source: str, tests: list[str], limit: float, log: pathlib.Path) -> bool:
    """Whether the tests pass within so many seconds, in a fork of this process that reads `source` from `path`."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        _put_in_place(path, source)
        os.chdir(ROOT)
        imported = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # before the fork
        os._exit(
            pytest.main(
                ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", imported, *tests],
                [Noticed(log.with_name("noticed"))],
            )
        )
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _put_in_place(path: pathlib.Path, source: str) -> None:
    read = importlib.machinery.SourceFileLoader.get_data

    def get_data(self, name):
        if name == str(path):
            return source.encode()
        if name.endswith(".pyc") and pathlib.Path(name).name.startswith(f"{path.stem}."):
            raise OSError("compiled from the source that was replaced")
        return read(self, name)

    importlib.machinery.SourceFileLoader.get_data = get_data
    sys.dont_write_bytecode = True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE", help=", ".join(TESTS))
    parser.add_argument("--from", type=int, default=1, dest="first", help="leave out the lines before")
    parser.add_argument("--to", type=int, default=sys.maxsize, dest="last", help="leave out the lines after")
    parser.add_argument("-k", default="", help="run only these tests, as pytest has it")
    parser.add_argument("--list", action="store_true", help="say what would be broken, and run nothing")
    options = parser.parse_args()
    if unknown := [file for file in options.files if file not in TESTS]:
        parser.error(f"no tests are known for {', '.join(unknown)}; known: {', '.join(TESTS)}")
    cache = tempfile.TemporaryDirectory(prefix="mutants")
    os.environ |= {  # what a mutant leaves as it is, is compiled once
        "JAX_COMPILATION_CACHE_DIR": cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    sys.path.insert(0, str(ROOT))
    slow = ["tests.conftest", "flax.linen", "optax", "scipy.special"]  # JAX with the first
    if all(file.startswith("pjpo/methods/") for file in options.files):
        slow += ["pjpo.step", "pjpo.models.load"]  # which import no method
    for module in slow:
        importlib.import_module(module)
    hypothesis.settings.register_profile("mutants", parent=hypothesis.settings(), phases=PHASES)
    hypothesis.settings.load_profile("mutants")

    listed = LISTED.read_text() if LISTED.exists() else ""
    log, left, number = pathlib.Path(cache.name) / "log", 0, 0
    for file in options.files:
        path, started = ROOT / file, time.monotonic()
        own = path.stem if "methods" in file else ""  # of what every method promises, its own part
        source, tests = path.read_text(), [*TESTS[file], "-k", options.k or own]
        if not options.list and not run(path, source, tests, 600, log):
            raise SystemExit(f"{file}: its tests fail as it is:\n{log.read_text()}")
        limit = 10 + 3 * (time.monotonic() - started)  # seconds
        for mutant in mutants(source):
            shown = f"{file}:{mutant.line}: `{mutant.before}` -> `{mutant.after}`"
            number += 1
            if not options.first <= mutant.line <= options.last or options.list:
                print(shown) if options.list else None
                continue
            if run(path, mutant.source, tests, limit, log):
                known = f"- `{mutant.before}`\n  `{mutant.after}`\n" in listed
                left += not known
                print(f"{'listed' if known else 'ALIVE '} {shown}", flush=True)
    print(f"{number} mutants in {len(options.files)} files, {left} alive that are not in {LISTED.relative_to(ROOT)}")
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main())
