"""The import graph that docs/ARCHITECTURE.md promises: scripts -> tasks -> nanochat -> rustbpe, no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("nanochat", "tasks", "scripts")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All but what only a type checker reads."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from nodes(child)


def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at its top or inside a function."""
    files = {module_name(p): p for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # "from nanochat import chat" names a module, "from nanochat.chat import x" a thing inside it
                found |= {
                    full if (full := f"{node.module}.{alias.name}") in files else node.module for alias in node.names
                }
        graph[name] = (found & files.keys()) - {name}
    return graph


def test_there_are_no_circles():
    list(TopologicalSorter(imports()).static_order())


def test_a_stage_never_imports_a_stage_and_the_library_never_looks_up():
    for name, targets in imports().items():
        room = name.split(".")[0]
        allowed = {"nanochat": {"nanochat"}, "tasks": {"tasks", "nanochat"}, "scripts": {"tasks", "nanochat"}}[room]
        assert {t.split(".")[0] for t in targets} <= allowed, name


def test_the_environment_is_read_in_two_places_alone():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            if path.name not in ("environment.py", "runtime.py", "sandbox.py", "sandbox_guard.py"):
                assert "os.environ" not in path.read_text(encoding="utf-8"), path
