"""Model files from strangers, damaged or made to harm: a named error, soon, in little memory, and no code is run."""

import functools
import json
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from safetensors.numpy import save_file

from pjpo import chat, sandbox
from pjpo.models import load
from tests.bounded import SECONDS, bounded
from tests.models import tiny_llama

ROOM = 2**28  # bytes for a template; what is refused here would take all there are
CONFIG = tiny_llama.CONFIG | {"vocab_size": len(tiny_llama.vocabulary()), "num_hidden_layers": 1}
FEW = hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))  # always the same
MANY = hypothesis.settings(FEW, max_examples=3000, derandomize=False, database=None)

UINT8, UINT32, FLOAT32, STRING, ARRAY = 0, 4, 6, 8, 9  # types of GGUF's values


def problem(function, *arguments, **settings):
    """What it says where it refuses; None where it does not."""
    with bounded():
        try:
            function(*arguments, **settings)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
    return None


def loads_or_says_why(path):
    """Whichever it is; what is said names the file."""
    said = problem(load, path)
    assert said is None or (str(path) in said and len(said) < 2000 and said.encode()), said


def refused(path, message="."):
    with bounded(), pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).encode()  # it can be printed


def text(value):
    return struct.pack("<Q", len(value)) + value


def array(kind, values, length=None):
    return struct.pack("<IQ", kind, len(values) if length is None else length) + b"".join(values)


def uint32(value):
    return struct.pack("<I", value)


def gguf_fields():
    """Name -> (type, content), as llama.cpp's converter writes them."""
    tokens = tiny_llama.vocabulary()
    numbers = {
        "block_count": 1,
        "context_length": 32,
        "embedding_length": 12,
        "feed_forward_length": 20,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 6,
        "attention.value_length": 6,
    }
    return {
        "general.architecture": (STRING, text(b"llama")),
        **{f"llama.{name}": (UINT32, uint32(value)) for name, value in numbers.items()},
        "llama.attention.layer_norm_rms_epsilon": (FLOAT32, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.model": (STRING, text(b"gpt2")),
        "tokenizer.ggml.pre": (STRING, text(b"smollm")),
        "tokenizer.ggml.tokens": (ARRAY, array(STRING, [text(token.encode()) for token in tokens])),
        "tokenizer.ggml.token_type": (ARRAY, array(UINT32, [uint32(3 if t[0] == "<" else 1) for t in tokens])),
        "tokenizer.ggml.merges": (ARRAY, array(STRING, [text(b"h e")])),
        "tokenizer.ggml.eos_token_id": (UINT32, uint32(1)),
    }


def gguf_tensors():
    """Name -> (shape, type, content)."""
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    found = {}
    for name, value in tiny_llama.tensors(CONFIG).items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name.removeprefix("model.")] = (value.shape, 0, value.tobytes())
    return found


def write_gguf(path, fields=None, tensors=None, *, num_fields=None, num_tensors=None, offset=0):
    """By the format's own description; the counts and the tensors' places may be lies."""
    fields, tensors = gguf_fields() | (fields or {}), gguf_tensors() | (tensors or {})
    counts = len(tensors) if num_tensors is None else num_tensors, len(fields) if num_fields is None else num_fields
    head, body = b"GGUF" + struct.pack("<IQQ", 3, *counts), b""
    for name, (kind, content) in fields.items():
        head += text(name.encode()) + uint32(kind) + content
    for name, (shape, kind, content) in tensors.items():
        head += text(name.encode()) + uint32(len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += uint32(kind) + struct.pack("<Q", len(body) + offset)
        body += content + bytes(-len(content) % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder and a GGUF file that load."""
    root = tmp_path_factory.mktemp("whole")
    (root / "folder").mkdir()
    tiny_llama.write_folder(root / "folder", CONFIG)
    (root / "folder" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    (root / "folder" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    write_gguf(root / "tiny.gguf")
    shutil.copytree(root / "folder", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    weights = tiny_llama.tensors(CONFIG)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(weights)}
    for shard in SHARDS:
        held = {name: value for name, value in weights.items() if weight_map[name] == shard}
        save_file(held, root / "sharded" / shard)
    (root / "sharded" / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for name in ("folder", "sharded", "tiny.gguf"):
        load(root / name)
    return root


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole / "folder", tmp_path / "folder")


@strategies.composite
def damage(draw, content):
    """Bytes of it changed, taken out or put in at a few places; half of these in the first part, which says sizes."""
    content = bytearray(content)
    for _ in range(draw(strategies.integers(1, 4))):
        place = draw(strategies.integers(0, min(len(content), draw(strategies.sampled_from([64, 512, 2**30])) - 1)))
        many = draw(strategies.integers(0, 8))
        content[place : place + many] = draw(strategies.binary(max_size=8) | strategies.just(b"\xff" * many))
    return bytes(content[: draw(strategies.integers(0, len(content)))] if draw(strategies.booleans()) else content)


def fuzzed(test):
    """The test of one example as a test of few, and as a slow one of many, other ones each time."""

    @functools.wraps(test)
    def run(whole, examples):
        @examples
        @hypothesis.given(strategies.data())
        def each(data):
            test(whole, data)

        each()

    del run.__wrapped__  # pytest would ask for its arguments
    many = pytest.param(MANY, id="many", marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [pytest.param(FEW, id="few"), many])(run)


@fuzzed
def test_damaged_gguf(whole, data):
    path = whole / "damaged.gguf"
    path.write_bytes(data.draw(damage((whole / "tiny.gguf").read_bytes())))
    loads_or_says_why(path)


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
INDEX, SHARDS = "model.safetensors.index.json", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PLACES = [*(("folder", name) for name in FILES), *(("sharded", name) for name in (INDEX, INDEX, SHARDS[0]))]


def damaged_copy(whole, data, files, change):
    """Of a folder, with one of its files changed."""
    folder, name = data.draw(strategies.sampled_from(files))
    copy = shutil.copytree(whole / folder, whole / f"damaged_{folder}", dirs_exist_ok=True)
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    return copy


@fuzzed
def test_damaged_folder(whole, data):
    loads_or_says_why(damaged_copy(whole, data, PLACES, lambda content: data.draw(damage(content))))


ODD = strategies.recursive(
    strategies.sampled_from(
        [None, True, "", "../x", -1, 0, 2**40, 2**70, 1e308, -0.5, float("nan"), "é\ud800", [], {}]
    ),
    lambda inner: strategies.lists(inner, max_size=2) | strategies.dictionaries(strategies.text(max_size=2), inner),
    max_leaves=3,
)


@strategies.composite
def another_value(draw, tree):
    """The JSON tree with one of its values replaced, or left out."""
    if not isinstance(tree, dict | list) or not tree or draw(strategies.integers(0, 5)) == 0:
        return draw(ODD)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = draw(strategies.sampled_from(keys))
    changed = tree.copy()
    if draw(strategies.integers(0, 5)) == 0:
        del changed[key]
    else:
        changed[key] = draw(another_value(tree[key]))
    return changed


@fuzzed
def test_json_that_says_something_else(whole, data):
    def change(content):
        return json.dumps(data.draw(another_value(json.loads(content)))).encode()

    loads_or_says_why(damaged_copy(whole, data, [place for place in PLACES if place[1].endswith(".json")], change))


HUGE = 2**60


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({}, {"num_fields": HUGE}),
        ({}, {"num_tensors": HUGE}),
        ({}, {"offset": HUGE}),
        ({"zeros": (ARRAY, array(UINT8, [], HUGE))}, {}),
        ({"texts": (ARRAY, array(STRING, [], HUGE))}, {}),
        ({"nested": (ARRAY, array(ARRAY, [array(ARRAY, [])], 2) * 5000)}, {}),
        ({"text": (STRING, struct.pack("<Q", HUGE))}, {}),
        ({"general.alignment": (UINT32, uint32(0))}, {}),
        ({"llama.block_count": (UINT32, uint32(2**32 - 1))}, {}),
        ({"llama.embedding_length": (UINT32, uint32(2**32 - 1))}, {}),
        ({"llama.attention.head_count": (UINT32, uint32(0))}, {}),
        ({"llama.attention.head_count": (STRING, text(b"four"))}, {}),
        ({"tokenizer.ggml.eos_token_id": (STRING, text(b"end"))}, {}),
        ({"tokenizer.ggml.merges": (ARRAY, array(STRING, [text(b"one")]))}, {}),
        ({"tokenizer.ggml.tokens": (ARRAY, array(STRING, []))}, {}),
        ({}, {"tensors": {"blk.0.attn_q.weight": ((2**40, 2**40), 0, b"")}}),
        ({}, {"tensors": {"blk.0.attn_q.weight": ((24, 12), 99, b"")}}),
    ],
)
def test_gguf_that_lies(tmp_path, fields, others):
    refused(write_gguf(tmp_path / "liar.gguf", fields, **others))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**15},
        {"hidden_size": 10**15},
        {"head_dim": "six"},
        {"num_attention_heads": 0},
        {"max_position_embeddings": [32]},
        {"rope_theta": 1e308},
        {"rope_theta": -1.0},
        {"rms_norm_eps": 1e39},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": 10**400},
    ],
)
def test_a_config_that_lies(folder, change):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    refused(folder)


def test_a_header_that_lies(folder):
    path = folder / "model.safetensors"
    for size in (HUGE, 2**63, 10**8):
        path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
        refused(folder, "damaged or cut short")


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/passwd", "deeper/../../secret.safetensors", "config.json", "", ".", ".."),
        *("a" * 300 + ".safetensors", "\ud800.safetensors", "a\0b.safetensors", "a\n.safetensors", 3, None, ["a"]),
    ],
)
def test_an_index_cannot_lead_out_of_the_folder(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "secret.safetensors")
    names = tiny_llama.tensors(CONFIG)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    refused(folder, r"index\.json names .{1,100}; allowed: files of its own folder, without a path, NAME\.safetensors$")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": None}}])
def test_an_index_of_another_kind(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loads_or_says_why(folder)


class Harm:
    """What unpickling it does."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_a_pickle_is_never_opened(folder):
    """Not in the place of weights, not beside them, not inside an archive."""
    harm = pickle.dumps(Harm())
    (folder / "pytorch_model.bin").write_bytes(harm)
    load(folder)
    for name in FILES:
        shutil.copytree(folder, folder.parent / name)
        (folder.parent / name / name).write_bytes(harm)
        refused(folder.parent / name, name)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors"):
        load(folder)


def test_an_archive_with_a_pickle_is_refused(tmp_path, monkeypatch):
    from pjpo.models import glassllm

    np.savez(tmp_path / "en.npz", E=np.array([Harm()], object), __config__="{}")
    with pytest.raises(ValueError, match=r"en\.npz .*damaged"):
        glassllm.read(tmp_path / "en.npz")


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% set x = messages.append(1) %}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{{ 10 ** 10 ** 9 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ messages[5]['content'] + 1 }}",
    "{% if %}",
    "{{ '%0999999999d' % 1 }}",
    "{{ 'a'.center(10**9) }}",
    "{{ '{:>999999999}'.format(1) }}",
    # Whatever makes a text, or reads one, from little.
    "{{ ('a'*999999).translate({97: 'b'*999999}) }}",
    "{{ 'a\t'.expandtabs(10**9) }}",
    "{{ ('a'*999999)|replace('a', 'b'*999999) }}",
    "{{ ('a'*999999).join(['']*999999) }}",
    "{{ '%s' % (['a'*999999]*999) }}",
    "{{ '%s' % ([[['a'*999]*999]*999]) }}",
    "{{ (['a'*999999]*99999)|string|length }}",
    "{{ (['a'*999999]*99999)|tojson|length }}",
    "{{ (['a'*999999]*99999)|join }}",
    "{{ ['a'*999999]*99999 }}",
    "{{ ([['a'*999]*999]*999)|map('string')|list|length }}",
    "{{ ['a']|map('center', 10**9)|list }}",
    "{{ ('{0}'*9999).format('a'*999999) }}",
    "{{ '{:{w}}'.format(1, w='999999999') }}",
    "{{ ('%(a)s'*9999)|format(a='a'*999999) }}",
    "{{ [1]|batch(10**9, 1)|list|length }}",
    "{{ [[[[1]*99999]]]|tojson(indent=9999) }}",
    "{{ ('a'*999999)|indent('b'*999999) }}",
    "{{ ('中'*1999999)|list|length }}",
    "{{ lipsum(n=10**6) }}",
    "{{ ('a.b@c '*99999)|urlize }}",
    "{{ ('<'*999999)|striptags }}",
    "{{ (('<a>'*99999)|safe).striptags() }}",
    "{{ ([[1]]*99999)|sum(start=[]) }}",
    "{% set a = 'a'*999999 %}{{ " + "a ~ " * 9999 + "'' }}",
    "{% set a = 'a'*999999 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "{% set x %}{% for i in range(99999) %}{{ 'a'*9999 }}{% endfor %}{% endset %}",
    "{% set x %}{% for i in range(99999) %}" + "{{ '' }}" * 9999 + "{% endfor %}{% endset %}",
    "{% for i in range(99999) %}" + "{% set a = 1 %}" * 9999 + "{% endfor %}",
    "{% set a = 'a'*999999 %}{% for i in range(99999) %}" + "{% set b = a[1:] %}" * 999 + "{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + ['中'*99999] %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = n.x + [('中 '*9999).split()] %}{% endfor %}",
    "{% macro f(n) %}{% set a = 'a'*999999 ~ n %}{{ f(n+1) }}{% endmacro %}{{ f(1) }}",
    # Lists of lists of lists, each twice in the next: a text of them, comparing or hashing them would take for ever.
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=(1,)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    # Long texts and lists that are read again and again.
    "{% set a, b = [1]*99999, [1]*99999 %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "{% set a = 'a'*999999 %}{% for i in range(99999) %}{% if 'b' in a %}{% endif %}{{ a.count('b') }}{% endfor %}",
    "{% set a = (1,)*99999 %}{% for i in range(99999) %}{{ {}[a] }}{{ {}.get(a) }}{% endfor %}",
    "{% set n = namespace(n=0) %}{% block b %}{% set n.n = n.n + 1 %}{% if n.n < 90 %}{{ self.b() }}{{ self.b() }}"
    "{% endif %}{% set n.n = n.n - 1 %}{% endblock %}",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "{% for i in (1,) %}" * 99 + "{% endfor %}" * 99,
    "{{ a }}" * 99999,
)
REFUSED = (
    # Work that is not paid for where it is written.
    "{% set x = 1|round(3999999, 'ceil') %}",
    "{% set x = 1|round(precision=-3999999) %}",
    "{% set x = ['a']*9999 %}{% for i in range(999) %}{% if x is lower %}{% endif %}{% endfor %}",
    "{% set x = 'a'*99999 %}{% for i in range(20) %}{% set y = x|select('upper')|first %}{% endfor %}",
    "{% for i in range(20) %}{% set y = range(99999)|select('divisibleby', 7777777)|list %}{% endfor %}",
    "{% set x = [0]*9999 %}{% for i in range(999) %}{% if x|select|first %}{% endif %}{% endfor %}",
    "{% for i in range(999) %}{% if 'a' in range(99999) %}{% endif %}{% endfor %}",
    "{% for i in range(999) %}{% if range(99999).count('a') %}{% endif %}{% endfor %}",
    "{{ ('a'*199999).strip('b'*199999 ~ 'a') }}",
    "{{ ('a'*199999).rfind('a'*50000 ~ 'b' ~ 'a'*50000) }}",
    "{{ ('{0}'*70000).format('') }}",
    # Numbers with one hash: each is compared with all others.
    "{{ range(0, (2**61-1)*20000, 2**61-1)|unique|list|length }}",
    "{% set x = dict(range(0, (2**61-1)*20000, 2**61-1)|batch(2)) %}",
    "{% set x = namespace(range(4000)|batch(2)) %}",
    # Room that is asked for in other places than in a size.
    "{{ ('{0:9999}'*60000).format(1)|length }}",
    "{{ ('%(a)9999d'*60000) % {'a': 1} }}",
    "{{ ('{0!a}'*20000).format('\U0001f600'*990)|length }}",
    "{{ '{a[}]:{b}}'.format(a={'}': 'x'}, b='499999999')|length }}",
    "{{ '{a[}]:{b}}'.format(a={'}': 'x'}, b='99999999999')|length }}",
    "{{ '%l%%*d' % (499999999, 1) }}",
    "{{ '%499999999d' is odd }}",
    "{{ '%499999999d' is divisibleby(3) }}",
    "{{ ('a'*20000)|replace(new='b'*50000, old='a')|length }}",
    "{{ [1]|slice(9000000)|list|length }}",
    "{{ [1]|batch(9000000, 1)|list|length }}",
    "{{ strftime_now('%99999999Y' ~ 'a'*500000)|length }}",
    "{{ strftime_now('%_99999999Y')|length }}",
    "{{ strftime_now('%c'*9999)|length }}",
    "{{ range(99999)|join('a'*19999)|length }}",
    "{{ (['a']*2000)|map('upper')|join('b'*199999)|length }}",
    "{{ ('b'*199999).join((['a']*2000)|map('upper'))|length }}",
    "{{ ('{0}'*1000).format([2**4900]*10000)|length }}",
    "{{ range(0, 2**4900*19999, 2**4900)|list|length }}",
    # What is no text at all.
    "{{ '%c' % 55296 }}",
)


RENDER = """
import json, resource, sys, time
from pjpo import chat, sandbox

templates, messages, sandbox.MAX_STEPS, room = json.load(sys.stdin)
given = json.dumps(messages)
[size] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")]
resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + room,) * 2)
for template in templates:
    start = time.process_time()
    try:
        shown, said = chat.render(template, messages, add_generation_prompt=True)[:99999], ""
    except ValueError as error:
        shown, said = "", str(error)
    print(json.dumps([shown, said, time.process_time() - start, json.dumps(messages) == given]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("num_steps", [50_000, pytest.param(None, marks=pytest.mark.slow)])
def test_a_template_reaches_nothing(num_steps):
    """Neither Python's internals nor files nor the messages themselves, and not all the time and memory there is.

    Memory has a limit of the system's, which no allocation escapes: one beyond it is a MemoryError.
    """
    templates = ESCAPES + REFUSED
    given = [templates, [{"role": "user", "content": "hello"}], num_steps or sandbox.MAX_STEPS, ROOM]
    command = [sys.executable, "-c", RENDER]
    run = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=True, timeout=600)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    for template, (shown, said, seconds, same) in zip(templates, results, strict=True):
        assert not any(word in shown for word in ("class", "builtins", "root:", "uid=", "function")), template
        assert said.startswith("the chat template ") or (not said and template not in REFUSED), template
        assert len(said) < 3000, template
        assert "MemoryError" not in said, template
        assert seconds < SECONDS, template
        assert same, template


PUBLISHED = json.loads((pathlib.Path(__file__).parents[1] / "data_files" / "chat_reference.json").read_text("utf-8"))
PIECES = (
    *(
        "{% for i in range(99999) %}",
        "{% endfor %}",
        "{% set messages = messages * 99 %}",
        "{% macro f(x) %}",
        "{{",
        "}}",
    ),
    *(" ~ messages", " * 99999", "|join(messages|string)", "|tojson(indent=9)", "|list", "|map('string')", "|sort"),
    *("'%s'*99 % ", ".format(messages)", "[1:]", " == messages", "[messages, messages]", ".replace('', 'ab')", "loop"),
)


@fuzzed
def test_damaged_templates(whole, data):
    """Published ones with bytes changed and pieces of other templates put in, most of them still templates."""
    source = data.draw(strategies.sampled_from(sorted(PUBLISHED["published"])))
    source = PUBLISHED["published"][source]["template"]
    for piece in data.draw(strategies.lists(strategies.sampled_from(PIECES), max_size=3)):
        place = data.draw(strategies.integers(0, len(source)))
        source = source[:place] + piece + source[place:]
    if data.draw(strategies.booleans()):
        source = data.draw(damage(source.encode())).decode(errors="replace")
    conversation = PUBLISHED["conversations"][data.draw(strategies.sampled_from(sorted(PUBLISHED["conversations"])))]
    variables = PUBLISHED["special_tokens"] | {name: v for name, v in conversation.items() if name != "messages"}
    said = problem(chat.render, source, conversation["messages"], **variables)
    assert said is None or (said.startswith("the chat template ") and len(said) < 3000), said
