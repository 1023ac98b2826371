"""Chat templates against what `transformers` made of published ones; masks; and templates that misbehave."""

import datetime
import json
import pathlib

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pjpo import sandbox
from pjpo.tokenizer import Tokenizer

REFERENCE = json.loads((pathlib.Path(__file__).parent / "data_files" / "chat_reference.json").read_text("utf-8"))
SPECIAL = REFERENCE["special_tokens"]
USER, ASSISTANT = {"role": "user", "content": "hé <b>"}, {"role": "assistant", "content": "né"}


@pytest.fixture
def frozen(monkeypatch):
    """The clock that the reference was made by."""

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(sandbox.datetime, "datetime", Frozen)


def byte_tokenizer(template):
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL.values()))
    return Tokenizer(backend, eos_id=None, chat_template=template, special_tokens=SPECIAL)


@pytest.mark.parametrize("conversation", REFERENCE["conversations"])
@pytest.mark.parametrize("name", REFERENCE["published"])
def test_published_templates_render_as_in_transformers(name, conversation, frozen):
    entry = REFERENCE["published"][name]
    expected, given = entry["rendered"][conversation], REFERENCE["conversations"][conversation]
    tokenizer = byte_tokenizer(entry["template"])
    if "text" in expected:
        assert tokenizer.render_chat(**given) == expected["text"]
    else:
        with pytest.raises(ValueError, match="refuses messages with the roles") as refusal:
            tokenizer.render_chat(**given)
        assert str(refusal.value).endswith(expected["error"].partition(": ")[2])


@pytest.mark.parametrize("name", REFERENCE["marked"])
def test_assistant_masks_are_those_of_transformers(name):
    entry = REFERENCE["marked"][name]
    messages = [*REFERENCE["conversations"]["turns, then the assistant"]["messages"]]
    messages.append(messages[1])
    ids, mask = byte_tokenizer(entry["template"]).encode_chat(messages)
    assert byte_tokenizer(None).decode(ids, skip_special=False) == entry["text"]
    assert "".join(str(int(m)) for m in mask) == entry["assistant"]
    assert 0 < sum(mask) < len(mask)


def test_masks_need_a_template_that_tells():
    with pytest.raises(ValueError, match=r"has no \{% generation %\} block.*put .* around what the assistant says"):
        byte_tokenizer("{{ messages }}").encode_chat([USER])


def test_masks_hold_whatever_the_template_does_with_the_text():
    template = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ m.role | upper }}:"
        "{% if m.role == 'assistant' %}{{ say(m) | trim }}{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    ids, mask = tokenizer.encode_chat([USER, ASSISTANT])
    assert tokenizer.decode(ids) == "USER:ASSISTANT:né"
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "né"  # both bytes of the é
    assert tokenizer.render_chat([USER, ASSISTANT]) == "USER:ASSISTANT:né"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "with the roles user, assistant: no user$"),
        ("{{ messages[0].content + 1 }}", "roles user, assistant: TypeError: "),
        ("{{ messages[7].content }}", "roles user, assistant: .*has no element 7|no attribute"),
        ("{% if %}", "the chat template cannot be read: Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% include '/etc/passwd' %}", "the chat template refuses"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}", "1,000 steps"),
        ("{% for i in range(900) %}{% for j in range(900) if j < 0 %}{% endfor %}{% endfor %}", "1,000 steps"),
        ("{% for i in range(900) %}{% for j in range(900) %}{% endfor %}{% endfor %}", "1,000 steps"),
        ("{{ range(10 ** 6) }}", "Range too big"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'a' | center(10 ** 9) }}", "what 'center' gives may be longer than 20,000,000"),
        ("{{ 'a'.rjust(width=10 ** 9) }}", "what 'rjust' gives may be longer than 20,000,000"),
        ("{{ '%999999999d' % 1 }}", "'%999999999d' asks for too much room"),
        ("{{ '%999999999d' | format(1) }}", "'%999999999d' asks for too much room"),
        ("{{ '%-.*f' % (10 ** 9, 1) }}", "asks for too much room"),
        ("{{ 'a'.encode() }}", "it calls the method 'encode' of a str, which is not among those allowed"),
        ("{{ 'a' | urlize }}", "the chat template cannot be read: No filter named 'urlize'"),
        (" " * 200_001, "the chat template cannot be read: it has 200,001 characters, allowed: 200,000"),
        ("{{ '{:999999999}'.format(1) }}", "asks for too much room"),
        ("{{ 'a' * 10 ** 9 }}", "what '[*]' gives may be longer than 20,000,000"),
        ("{{ 10 ** 100000 }}", r"larger than 10,000 bits"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "more than 2,000,000 char",
        ),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "more than 2,000,000 char",
        ),
        ("{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "10,000 bits"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
            "{% set n.x = y %}{% endfor %}",
            "more than 2,000,000 char",
        ),
        ("{{ 1 | round(301) }}", "rounds to more than 300 digits"),
        ("{{ '%d' is odd }}", "it asks whether a text is 'odd'"),
        ("{{ range(2 ** 63, 2 ** 63 + 1) }}", "counts in numbers of more than 64 bits"),
        ("{{ dict(range(4000) | batch(2)) }}", "a dict of more than 1,000 keys that are no texts"),
        ("{{ strftime_now('%-9Y') }}", "the date's pattern '%-9Y' asks for too much room"),
        ("{% for i in range(9) %}{% if (['a'] * 400) is lower %}{% endif %}{% endfor %}", "1,000 steps"),
        ("{{ ([0] * 2000) | select | first }}", "1,000 steps"),
        ("{{ [1] | slice(2000) }}", "1,000 steps"),
        ("{{ range(700) | unique | list | length }}", "1,000 steps"),
        ("{{ '%c' % 55296 }}hi", "roles user, assistant: UnicodeEncodeError: .*surrogates not allowed"),
        (None, "no chat template"),
    ],
)
def test_templates_that_refuse_or_misbehave(template, message, monkeypatch):
    if message and "steps" in message:
        monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    with pytest.raises(ValueError, match=message):
        byte_tokenizer(template).render_chat([USER, ASSISTANT])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '%s: %05.1f' % (messages[0].role, 1.25) }}", "user: 001.2"),
        ("{{ '%(a)s' | format(a='b') }}", "b"),
        ("{{ '{:>3}|{}'.format(1, 'x') }}", "  1|x"),
        ("{{ 2 ** 10 * 'a' | length % 7 }}", str(2**10 * 1 % 7)),
        ("{% filter upper %}{{ messages | map(attribute='role') | join(', ') }}{% endfilter %}", "USER, ASSISTANT"),
        ("{% set x | trim %} a {% endset %}{{ x ~ 1 }}", "a1"),
        ('{{ \'{{"role": "{0}"}}\'.format(messages[0].role) }}', '{"role": "user"}'),
        ("{{ messages[1:] | length }}{{ 'abc'[1:] }}{{ (1, 2) + (3,) }}{{ {'a': [1]} }}", "1bc(1, 2, 3){'a': [1]}"),
        ("{{ [{'a': 1}] | tojson(indent=1) }}", '[\n {\n  "a": 1\n }\n]'),
        ("{{ messages | selectattr('role', 'in', ['user']) | map(attribute='role') | list }}", "['user']"),
        ("{{ ['b', 'a'] | sort | map('upper') | join(', ') }}{{ 'a\nb' | indent(2) }}", "A, Ba\n  b"),
        ("{{ 1700000000 | string }}{{ 1700000000 | tojson }}{{ 1700000000.5 | round(1) }}", "1700000000" * 3 + ".5"),
        ("{{ '100%% **%s** %d' % ('a', 1700000000) }}", "100% **a** 1700000000"),
        ("{% for i in (1,) %}{% set x = 'a' * 99999 %}{{ 'b'.rjust(999) | length }}{% endfor %}", "999"),
        ("{{ '{} {}'.format('a' * 5000, 'b' * 5000) | length }}", "10001"),
        ("{{ 'aXbX' | replace(new='', old='X', count=1) }}", "abX"),
        ("{{ none | select | list }}{{ nope | map('upper') | list }}", "[][]"),
        ("{{ messages | map(attribute='role') | unique | join }}", "userassistant"),
        ("{{ messages | reverse | map(attribute='role') | join }}{{ 'ab' | reverse }}", "assistantuserba"),
        ("{{ [1, 'a', none] | select('string') | list }}{{ 4 is divisibleby(num=2) }}", "['a']True"),
        ("{{ 'urlize' is filter }}{{ 'upper' is filter }}{{ 'a' is in 'ab' }}", "FalseTrueTrue"),
        ("{{ ('ab' * 2).replace('b', '-', 1) }}{{ 'aa' | replace('a', 'b') }}{{ 3 // 2 - 1.5 / 3 }}", "a-abbb0.5"),
    ],
)
def test_the_sandbox_leaves_the_rest_of_jinja_as_it_is(template, text):
    assert byte_tokenizer(template).render_chat([USER, ASSISTANT]) == text


def test_an_empty_chat_is_refused():
    with pytest.raises(ValueError, match="at least one message, got none"):
        byte_tokenizer("{{ messages }}").render_chat([])
