"""Jinja2 templates from strangers, with the filters and functions that `transformers` gives to chat templates.

The sandbox keeps them from Python's internals, from files and from changing what they are given. Beyond jinja2's own,
this one ends loops and recursions that go on too long, and texts and numbers that grow too large.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Sized
from typing import Any, ClassVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes

MAX_STEPS = 1_000_000  # turns of loops and calls of macros; a chat of 1,000 messages takes thousands
MAX_LENGTH = 10_000_000  # of a text or list that is put together
MAX_BITS = 10_000  # of a number
_RUN = "this run"  # a name that no template can spell


@dataclasses.dataclass(frozen=True)
class Template:
    compiled: jinja2.Template
    marks_generation: bool  # has a `{% generation %}` block

    def run(self, mark: str, **variables: Any) -> str:
        """The text, in which what a `{% generation %}` block wrote stands between `mark(` and `mark)`, if `mark`.

        Raises:
            Exception: what the template's expressions raise; `jinja2.TemplateError` where the template itself does.
        """
        return self.compiled.render(variables | {_RUN: _Run(mark)})


@functools.lru_cache(maxsize=32)
def compile(source: str) -> Template:
    """
    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Extension, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": _to_json, "bounded": _bounded, "argument": _argument, "format": _format}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    tree = environment.parse(source)
    marks_generation = any(node.name == "generated" for node in tree.find_all(nodes.ExtensionAttribute))
    tick = environment.extensions[_Extension.identifier].call_method("tick")
    return Template(environment.from_string(_Bound(tick).visit(tree)), marks_generation)


@dataclasses.dataclass
class _Run:
    """One rendering's state."""

    mark: str
    num_steps: int = 0


class _Extension(jinja2.ext.Extension):
    """`{% generation %}`, and a call that counts steps."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("generated"), [], [], body).set_lineno(line)

    @jinja2.pass_context
    def generated(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        mark = context[_RUN].mark
        return f"{mark}({caller()}{mark})" if mark else caller()

    @jinja2.pass_context
    def tick(self, context: jinja2.runtime.Context) -> bool:
        run = context[_RUN]
        run.num_steps += 1
        if run.num_steps > MAX_STEPS:
            raise jinja2.exceptions.SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        return True


class _Bound(jinja2.visitor.NodeTransformer):
    """Counts turns of loops and calls of macros; measures what is put together, and the arguments that say how much."""

    def __init__(self, tick: nodes.Call):
        self.tick = tick

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.tick))
        if node.test is not None:
            node.test = nodes.And(self.tick, node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.tick))
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Call:
        return _bound_arguments(self.generic_visit(node))

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        return _filter(_bound_arguments(self.generic_visit(node)), "bounded")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        return _filter(self.generic_visit(node), "bounded")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        self.generic_visit(node)
        node.filter = _filter(node.filter, "bounded")
        return node


def _bound_arguments(node: Any) -> Any:
    node.args = [_filter(argument, "argument") for argument in node.args]
    for keyword in node.kwargs:
        keyword.value = _filter(keyword.value, "argument")
    return node


def _filter(node: nodes.Expr | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: jinja2.runtime.Context | None, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, Sized) and isinstance(times, int):
                _check(len(value) * times <= MAX_LENGTH, f"{len(value)} * {times} is longer than {MAX_LENGTH:,}")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right <= MAX_BITS, f"{left} ** {right} is larger than {MAX_BITS:,} bits")
        if operator == "%":
            _check_format(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # jinja2 wraps these two of a text's own methods
        if getattr(method, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(method, "__self__", None))
        return super().call(context, function, *args, **kwargs)


def _check(allowed: bool, message: str) -> None:
    if not allowed:
        raise jinja2.exceptions.SecurityError(message)


def _check_format(pattern: Any) -> None:
    """Widths and precisions say how long a text becomes."""
    wide = isinstance(pattern, str) and re.search(r"\d{7}|%[-+ #0\d]*\.?\*", pattern)
    _check(not wide, f"the format {pattern!r} asks for too much room")


def _bounded(value: Any) -> Any:
    if isinstance(value, Sized):
        _check(len(value) <= MAX_LENGTH, f"it puts together more than {MAX_LENGTH:,} characters or items")
    if isinstance(value, int):
        _check(value.bit_length() <= MAX_BITS, f"it computes a number of more than {MAX_BITS:,} bits")
    return value


def _argument(value: Any) -> Any:
    if isinstance(value, int):
        _check(abs(value) <= MAX_LENGTH, f"the argument {value} is larger than {MAX_LENGTH:,}")
    return value


def _format(pattern: str, *args: Any, **kwargs: Any) -> str:
    _check_format(pattern)
    return pattern % (kwargs or args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """Not jinja2's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
