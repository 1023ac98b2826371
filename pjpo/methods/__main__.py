"""The table of methods, from the files' own headers: `python -m pjpo.methods`."""

import ast
from pathlib import Path


def rows() -> list[tuple[str, str]]:
    """(module, first line of its header) of every method."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    headers = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files)
    return [
        (path.stem, header.split("\n\n")[0].replace("\n", " ")) for path, header in zip(files, headers, strict=True)
    ]


if __name__ == "__main__":
    print("| method | what it is |\n| --- | --- |")
    for name, header in rows():
        print(f"| `{name}` | {header} |")
