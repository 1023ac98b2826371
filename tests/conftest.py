"""What every test runs under: eight CPU devices, strict rank promotion, annotations checked while they run."""

import os
import pathlib
import signal

from tests.quick import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # both are read once, when jax is imported
# Flags that are set already come last, and win.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()

import jaxtyping

# Shapes and dtypes in annotations become assertions, but not where they cannot be: in pytrees, which a transformation
# fills with anything, and for arguments with a sum as an axis ("Q+2"), which jaxtyping evaluates in return types only.
UNCHECKED = {"types.py", "metrics.py", "step.py", "attention.py"}
ROOT = pathlib.Path(__file__).parents[1]
FILES = [file.relative_to(ROOT) for file in ROOT.glob("pjpo/**/*.py") if file.name not in {"__init__.py", *UNCHECKED}]
jaxtyping.install_import_hook([".".join(file.with_suffix("").parts) for file in FILES], "beartype.beartype")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] + [B, N] is a mistake until someone writes the axis

import hypothesis

hypothesis.settings.register_profile("pjpo", deadline=None, derandomize=True)  # the first example compiles
hypothesis.settings.load_profile("pjpo")

import pytest

# Of two processes each takes the next file: the longest first, so that both end together.
LONGEST = (
    *("test_experiment.py", "test_distributed.py", "test_step.py", "test_policy.py"),
    *("test_contract.py", "test_sampling.py", "test_smoke.py", "test_plan.py", "test_online.py"),
)


@pytest.fixture
def compiled():
    """The names of the functions that are compiled while a test runs: "jit(_logps)"."""
    names = []

    def note(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.fixture
def interruptible():
    """Ctrl-C raises, here and in programs that are started, as in a terminal; a shell's background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def unchecked():
    """Annotations are not checked, as for a user: a value that one of them forbids must meet a message that helps."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a Llama of one layer, for programs that are started as a user starts them."""
    from tests.models import tiny_llama  # here, after what is set above

    return tiny_llama.write_folder(tmp_path_factory.mktemp("llama"), tiny_llama.CONFIG | {"num_hidden_layers": 1})
