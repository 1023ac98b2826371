"""List the experiments, a line each."""

import sys

from experiments import registry

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] not in ("-h", "--help"):
        try:
            registry.check_name(sys.argv[1], registry.commands())
        except ValueError as error:
            raise SystemExit(str(error)) from None
        raise SystemExit(f"run it with: python -m experiments.{' '.join(sys.argv[1:])}")
    print("Run one with: python -m experiments.<name> [--smoke] [--help]\n")
    for name in registry.commands():
        print(f"  {name:20} {registry.about(name)}")
