"""Named hyperparameter sets: `python -m experiments` lists them, `python -m experiments.<name>` runs one."""

import sys

from experiments import registry

# `python -m experiments.<name>` imports this package before it looks for the module: the place to help with a typing
# mistake, which Python itself answers with "No module named".
_asked = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv[:-1] else ""
if _asked.startswith("experiments.") and sys.argv[0] == "-m":
    try:
        registry.check_name(_asked.removeprefix("experiments."), registry.commands())
    except ValueError as error:
        raise SystemExit(str(error)) from None
