"""Language models trained from preferences and rewards, in JAX: one layout, every method, each claim checked."""

import importlib
from collections.abc import Callable
from types import ModuleType


def modules_of(package: str) -> Callable[[str], ModuleType]:
    """A package's `__getattr__`: its modules as attributes, each imported when it is first asked for."""

    def module(name: str) -> ModuleType:
        path = f"{package}.{name}"
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:  # something that the module itself needs
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None

    return module


__getattr__ = modules_of(__name__)
