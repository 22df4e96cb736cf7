"""What a module of this repository imports, read from the source: function-level imports count too.

python -c "from tests.support.imports import imported; print(imported('tasks/stage.py'))"
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST_PARTY = ("flows", "tasks", "models")


def modules(folder: str) -> list[str]:
    """Paths of the Python files below a package folder."""
    found = (REPOSITORY / folder).rglob("*.py")
    return sorted(p.relative_to(REPOSITORY).as_posix() for p in found)


@cache
def imported(path: str) -> frozenset[str]:
    """Dotted names that the file imports anywhere; `from a import b` gives both `a` and `a.b`."""
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return frozenset(name for node in ast.walk(tree) for name in _names(node, path))


def _names(node: ast.AST, path: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = path.removesuffix(".py").split("/")
        base = ".".join(package[: len(package) - node.level]) if node.level else ""
        module = ".".join(filter(None, [base, node.module or ""]))
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)


def files_of(name: str) -> Iterator[str]:
    """The files that importing a first-party dotted name runs: its packages and the module itself."""
    parts = name.split(".")
    if parts[0] not in FIRST_PARTY:
        return
    for length in range(1, len(parts) + 1):
        stem = "/".join(parts[:length])
        for candidate in (f"{stem}/__init__.py", f"{stem}.py"):
            if (REPOSITORY / candidate).is_file():
                yield candidate


def closure(path: str, exempt: frozenset[str] = frozenset()) -> set[str]:
    """Every first-party file that importing `path` can run, itself included; not through `exempt` ones."""
    reached, waiting = set(), [path]
    while waiting:
        here = waiting.pop()
        if here in reached or here in exempt:
            continue
        reached.add(here)
        waiting += [file for name in imported(here) for file in files_of(name)]
    return reached


def has_code(path: str) -> bool:
    """Whether a file holds more than a docstring."""
    body = ast.parse((REPOSITORY / path).read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)
