"""Any module may be the first that a program imports; what importing costs, and what installing brings."""

import importlib.metadata
import pathlib
import resource
import subprocess
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
FILES = [file.relative_to(ROOT).with_suffix("") for file in sorted(ROOT.glob("pjpo/**/*.py"))]
MODULES = [".".join(file.parts).removesuffix(".__init__") for file in FILES if file.name != "__main__"]
EACH = """
import importlib, sys
for module in sys.argv[1:]:
    for known in [name for name in sys.modules if name.partition(".")[0] == "pjpo"]:
        del sys.modules[known]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        assert error.name.partition(".")[0] != "pjpo", error  # the package of an extra may be missing
    except ImportError as error:
        sys.exit(f"{module} cannot be imported first: {error}")
"""


def test_every_module_can_be_imported_first():
    assert "pjpo.models.policy" in MODULES
    done = subprocess.run([sys.executable, "-c", EACH, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_are_attributes_of_their_package():
    program = """if True:
        import sys, pjpo
        assert not [name for name in sys.modules if name.startswith("pjpo.")]
        assert pjpo.methods.dpo.Config().beta == 0.1
        assert callable(pjpo.models.load)
        assert not hasattr(pjpo, "method")
        pjpo.methods.dop
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'pjpo.methods' has no attribute 'dop'"


def test_importing_takes_less_than_two_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import pjpo"], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def closure(requirement, seen):
    """The packages that pip installs for it, added to `seen` with the extras that were asked of them."""
    asked = {(canonicalize_name(requirement.name), extra) for extra in ("", *requirement.extras)}
    for name, extra in asked - seen:
        seen.add((name, extra))
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                closure(needed, seen)
    return {name for name, _ in seen}


def test_a_default_install_is_of_80_packages_at_most():
    packages = closure(Requirement("pjpo"), set())
    assert {"pjpo", "jax", "jaxlib", "flax", "grain", "tokenizers"} <= packages
    assert not {"pytest", "torch", "tensorflow", "transformers", "vadersentiment"} & packages
    assert len(packages) <= 80, sorted(packages)
