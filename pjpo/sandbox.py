"""Jinja2 templates from strangers, with the filters and functions that `transformers` gives to chat templates.

jinja2's own sandbox keeps them from Python's internals, from files and from changing what they are given. This one also
ends those that take too long or too much memory. A run pays in steps, of which it has so many, for the nodes that it
evaluates and for the characters and items that it reads and makes. No value may be larger than a limit, what it holds
counted as often as its text would show it. How large the result of a call can be is known before: only the methods and
filters in the first two lists below can be used, and those of the second only where the sizes of their arguments,
multiplied, are within a limit.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import functools
import json
import math
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, Sized, ValuesView
from typing import Any, ClassVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

MAX_STEPS = 2_000_000  # a few seconds; a chat of 1,000 messages takes 200,000 to 500,000
CHARACTERS = 32  # that a step puts together; reading is quicker, at half the price
MAX_LENGTH = 2_000_000  # of a text, or of the text that a list would make: a chat of half a million tokens
MAX_GROWTH = 20_000_000  # the same, of what is not made yet
MAX_BITS = 10_000  # of a number
MAX_DIGITS = 300  # that a number is rounded to; the largest float has as many
MAX_KEYS = 1000  # of a dict that are not texts: numbers can be chosen so that each is compared with all others
MAX_PATTERN = 200  # characters of a date's pattern
MAX_SOURCE = 200_000  # characters of a template; those that TRL carries have 17,000 at most
_PLAIN = """
    capitalize casefold endswith find isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper lower
    lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split splitlines startswith strip
    swapcase title upper copy get items keys values abs attr d default e escape first float int last length list map
    reject rejectattr reverse safe select selectattr trim
"""
_GROWING = """
    center count format format_map index join ljust replace rjust zfill batch dictsort groupby indent max min round
    slice sort string tojson truncate unique
"""
_KINDS = """
    boolean callable defined escaped false float integer iterable mapping none number sameas sequence string true
    undefined
"""
PLAIN = frozenset(_PLAIN.split())  # methods and filters that give no more than they are given
GROWING = frozenset(_GROWING.split())  # those that may give more: each argument can at most multiply it
KINDS = frozenset(_KINDS.split())  # tests that do not look into what they are asked about
STEPWISE = {"map", "reject", "rejectattr", "select", "selectattr"}  # go on while what they give is read
AT_ONCE = {"batch", "dict", "groupby", "join", "max", "min", "slice", "sort", "unique"}  # go to an iterator's end
PAIRWISE = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "trim"}  # each character with each


@dataclasses.dataclass
class _Run:
    """One rendering's state."""

    mark: str
    steps_left: int


_run: contextvars.ContextVar[_Run] = contextvars.ContextVar("run")


@dataclasses.dataclass(frozen=True)
class Template:
    compiled: jinja2.Template
    marks_generation: bool  # has a `{% generation %}` block

    def run(self, mark: str, **variables: Any) -> str:
        """The text, in which what a `{% generation %}` block wrote stands between `mark(` and `mark)`, if `mark`.

        Raises:
            Exception: what the template's expressions raise; `jinja2.TemplateError` where the template itself does.
        """
        before = _run.set(_Run(mark, MAX_STEPS))
        try:
            _size(variables)
            return self.compiled.render(variables)
        finally:
            _run.reset(before)


@functools.lru_cache(maxsize=32)
def compile(source: str) -> Template:
    """
    Raises:
        jinja2.TemplateError: it is no template, or too long.
    """
    _check(len(source) <= MAX_SOURCE, f"it has {len(source):,} characters, allowed: {MAX_SOURCE:,}")
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Extension, jinja2.ext.loopcontrols],
        finalize=_text,
        optimized=False,  # nothing is computed before there is a run to pay for it
    )
    filters = environment.filters | {"tojson": _to_json}
    environment.filters = {name: _guarded(name, filters[name]) for name in filters if name in PLAIN | GROWING}
    environment.filters["format"] = _guarded("%", filters["format"])
    environment.filters |= {"looked": _looked, "copied": functools.partial(_made, "copy"), "replace": _replace}
    environment.tests = {name: _asking(name, test) for name, test in environment.tests.items()}
    allowed = {name: environment.globals[name] for name in ("range", "dict", "cycler", "joiner")}
    environment.globals = allowed | {"namespace": _Namespace}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    tree = environment.parse(source)
    marks_generation = any(node.name == "generated" for node in tree.find_all(nodes.ExtensionAttribute))
    extension = environment.extensions[_Extension.identifier]
    return Template(environment.from_string(_Bound(extension).visit(tree)), marks_generation)


class _Extension(jinja2.ext.Extension):
    """`{% generation %}`, and a call that pays for nodes."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    def generated(self, caller: Callable[[], str]) -> str:
        mark = _run.get().mark
        return f"{mark}({caller()}{mark})" if mark else caller()

    def tick(self, num_nodes: int) -> bool:
        _pay(num_nodes)
        return True


class _Bound(jinja2.visitor.NodeTransformer):
    """Turns of loops and calls of macros and blocks pay for their nodes; what is made without a call is looked at."""

    def __init__(self, extension: _Extension):
        self.extension = extension

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.visit_Macro(node)
        if node.test is not None:
            node.test = nodes.And(self.tick(node.test), node.test)
        return node

    def visit_Macro(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.tick(node)))
        return node

    visit_Block = visit_CallBlock = visit_Macro

    def tick(self, node: nodes.Node) -> nodes.Call:
        num_nodes = sum(1 for _ in node.find_all(nodes.Node))
        return self.extension.call_method("tick", [nodes.Const(num_nodes)])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "looked")
        for other in node.ops:
            other.expr = _filter(other.expr, "looked")
        return node

    def visit_List(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter(node, "looked")

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(node, "copied") if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "join")


def _filter(node: nodes.Expr, name: str) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else nodes.Filter(node, name, [], [], None, None)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

    def call_binop(self, context: jinja2.runtime.Context | None, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right <= MAX_BITS, f"{left} ** {right} is larger than {MAX_BITS:,} bits")
        if operator == "*" and (isinstance(left, Sized) or isinstance(right, Sized)):
            _afford("*", [right, left] if isinstance(left, int) else [left, right])
        if operator == "%" and isinstance(left, str):
            _afford("%", [left, right])
        return _made(operator, super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, jinja2.runtime.Macro):
            return super().call(context, function, *args, **kwargs)
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps two of a text's own methods
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        named = [value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")]  # jinja2's own
        if isinstance(owner, str | bytes | int | float | Mapping | list | tuple | range | Set):
            allowed = name in PLAIN or name in GROWING
            _check(
                allowed, f"it calls the method {name!r} of a {type(owner).__name__}, which is not among those allowed"
            )
            args = tuple(_held(name, value) for value in args)
            _afford(name, [owner, *args, *named])
        else:
            if function in (dict, _Namespace):
                args = tuple(_keys(_held("dict", value)) for value in args)
            for value in (*args, *named):
                _looked(value)
        return _made(name, super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _looked(argument))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What all texts that a template writes are joined by."""
        length, kept = 0, []
        for piece in pieces:
            length += len(piece)
            _check_length(length)
            kept.append(piece)
        _pay(length // CHARACTERS)
        return "".join(kept)


class _Namespace(jinja2.utils.Namespace):
    __repr__ = object.__repr__  # not what is in it, which nobody has looked at


def _check(allowed: bool, message: str) -> None:
    if not allowed:
        raise jinja2.exceptions.SecurityError(message)


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise jinja2.exceptions.SecurityError(f"it puts together more than {MAX_LENGTH:,} characters or items")


def _pay(num_steps: int) -> None:
    run = _run.get()
    run.steps_left -= num_steps
    if run.steps_left < 0:
        raise jinja2.exceptions.SecurityError(f"it takes more than {MAX_STEPS:,} steps")


def _size(value: Any) -> int:
    """Characters and items of it, as often as they would be in its text."""
    size, num_items, waiting = 0, 0, [value]
    while waiting:
        value = waiting.pop()
        num_items += 1
        if isinstance(value, str | bytes):
            size += len(value)
        elif isinstance(value, int):
            size += value.bit_length() // 3
        elif isinstance(value, float):
            size += 24
        elif isinstance(value, range):
            num_items += len(value)
        elif isinstance(value, Mapping):
            waiting += _keys(value)
            waiting += value.values()
        elif isinstance(value, list | tuple | Set | ValuesView):
            waiting += value
        _check_length(size + num_items + len(waiting))
    _pay(1 + num_items // 2)
    return size + num_items


def _looked(value: Any) -> Any:
    """The same value, which will be read; the run pays for it."""
    _pay(_size(value) // CHARACTERS // 2)
    return value


@jinja2.pass_context  # or it would be computed before there is a run
def _text(context: jinja2.runtime.Context, value: Any) -> str:
    """What `{{ value }}` writes."""
    return _made("string", str(_looked(value)))


def _held(name: str, value: Any) -> Any:
    """The items of an iterator, where all of them will be read, or they could not be counted before."""
    return list(value) if isinstance(value, Iterator) and name in AT_ONCE else value


def _stepwise(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _pay(1)
        yield item


def _num_numbers(values: Iterable[Any]) -> int:
    """How many are no texts: each of them may have to be compared with all the others to tell them apart."""
    return sum(not isinstance(value, str) for value in values)


def _keys(values: Any) -> Any:
    """The same: a dict, or pairs that one will be made of."""
    if isinstance(values, Iterable):
        _check(_num_numbers(values) <= MAX_KEYS, f"it makes a dict of more than {MAX_KEYS:,} keys that are no texts")
    return values


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, also where `map` calls it."""
    num_passed = int(hasattr(function, "jinja_pass_arg"))  # of jinja2's own, before what is filtered

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        passed, value, others = args[:num_passed], _held(name, args[num_passed]), args[num_passed + 1 :]
        _afford(name, [value, *others, *kwargs.values()])
        if name == "unique":
            _pay(_num_numbers(value) ** 2 // 200)
        if name in STEPWISE and isinstance(value, Iterable) and value:
            value = _stepwise(value)
        return _made(name, function(*passed, value, *others, **kwargs))

    return guarded


def _asking(name: str, test: Callable[..., bool]) -> Callable[..., bool]:
    """A test, also where `select` calls it."""

    @functools.wraps(test)
    def asking(*args: Any, **kwargs: Any) -> bool:
        _pay(1)
        for value in () if name in KINDS else (*args, *kwargs.values()):
            _looked(value)
        formats = name in ("divisibleby", "even", "odd") and isinstance(args[0], str)  # what `%` does to a text
        _check(not formats, f"it asks whether a text is {name!r}")
        return test(*args, **kwargs)

    return asking


def _afford(name: str, given: list[Any]) -> None:
    """The run pays for what a method or filter reads, and what would make too much of it is refused."""
    shallow = name in PLAIN and not isinstance(given[0], str)  # it does not look into the list
    sizes = [_size(value) for value in given[shallow:]]
    _pay(sum(sizes) // CHARACTERS // 2)
    if name in PLAIN:
        _pay(math.prod(sizes) // 1000 if name in PAIRWISE else 0)
        return
    others = zip(given[1:], sizes[1:], strict=True)
    counts = [abs(value) if isinstance(value, int) and value else n for value, n in others]
    length = sizes[0] * math.prod(counts)
    if name == "round":
        _check(max(counts, default=0) <= MAX_DIGITS, f"it rounds to more than {MAX_DIGITS} digits")
        return
    if name in ("batch", "slice"):  # makes lists, which take more room than characters
        _pay(max(counts, default=0))
    if name == "replace":  # what is replaced may be as long as the whole
        text, old, new = map(str, given[:3])
        length = text.count(old) * len(new)
    if name in ("%", "format", "format_map"):
        length = _format_length(str(given[0]), name, sum(sizes[1:]))
    _check(length <= MAX_GROWTH, f"what {name!r} gives may be longer than {MAX_GROWTH:,}")


def _made(name: str, value: Any) -> Any:
    """What an operation gave; the run pays for it."""
    if isinstance(value, str | list | tuple | Mapping | Set):
        _check_length(len(value))
        _pay(1 + len(value) // CHARACTERS if isinstance(value, str) else len(value))
        if name not in PLAIN:
            _size(value)
    if isinstance(value, int):
        _check(value.bit_length() <= MAX_BITS, f"it computes a number of more than {MAX_BITS:,} bits")
    if isinstance(value, range):
        _check(max(abs(value.start), abs(value.stop)) < 2**63, "it counts in numbers of more than 64 bits")
    return value


def _format_length(pattern: str, name: str, size: int) -> int:
    """What a format may give where its values have so many characters together; a width may not be a value."""
    if name == "%":
        num_fields, asked = pattern.count("%"), pattern  # any number in it may be a width
        computed = any("*" in field for field in re.findall(r"(?s)%[-+ #0]*[*\d]*\.?[*\d]*[hlL]?.", pattern))
    else:
        specs = [spec for _, _, spec, _ in string.Formatter().parse(pattern) if spec is not None]
        num_fields, asked = len(specs), " ".join(specs)
        computed = "{" in asked
    _pay(num_fields)
    widths = re.findall(r"\d+", asked)
    small = not computed and all(len(width) < 8 for width in widths)
    _check(small, f"the format {pattern!r:.200} asks for too much room")
    return sum(map(int, widths)) + num_fields * 10 * (size + 32)  # a character may be shown as ten, a number as 320


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    """Not jinja2's own, whose arguments may come in any order, by name."""
    text, old, new = str(text), str(old), str(new)
    _afford("replace", [text, old, new])
    return _made("replace", text.replace(old, new, -1 if count is None else count))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """Not jinja2's own, which escapes HTML."""
    _size(value)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _Environment.concat([encoder.encode(value)] if indent is None else encoder.iterencode(value))


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    allowed = len(pattern) <= MAX_PATTERN and not re.search(r"%[^%a-zA-Z]*\d", pattern)  # digits would be a width
    _check(allowed, f"the date's pattern {pattern!r:.200} asks for too much room")
    return datetime.datetime.now().strftime(pattern)
