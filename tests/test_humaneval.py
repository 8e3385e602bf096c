"""HumanEval against itself: its own solutions pass, and the same with one wrong return fail."""

from __future__ import annotations

import ast
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat.sandbox import SandboxError
from tasks.humaneval import HumanEval

HUB = Path(__file__).parents[2] / "shared" / "hub"

# A value of the same type that is not the same.
WRONG = """
def wrong(value):
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value + 1
    if isinstance(value, str): return value + '!'
    if isinstance(value, (list, tuple)): return value + type(value)([0])
    if isinstance(value, dict): return {**value, '!': 0}
    return 0

"""


@pytest.fixture
def task(monkeypatch, tmp_path):
    if not HUB.is_dir():
        pytest.skip("no real data: ../shared/hub is absent")
    if sys.platform == "win32":
        pytest.skip("the sandbox needs POSIX processes")
    monkeypatch.setenv("NANOCHAT_HUB_DIR", str(HUB))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return HumanEval()


def solution(conversation) -> str:
    return conversation["messages"][1]["content"]


def with_last_return(source: str, entry_point: str, wrapper: str) -> str:
    """The program with the value of its function's last return passed through `wrong`, as `wrapper` defines it."""
    tree = ast.parse(source)
    node = returns(tree, entry_point)[-1]
    node.value = ast.Call(ast.Name("wrong", ast.Load()), [node.value or ast.Constant(None)], [])
    return wrapper + ast.unparse(ast.fix_missing_locations(tree))


def returns(tree: ast.Module, entry_point: str) -> list[ast.Return]:
    """In the order of the text; not those of functions within the function."""
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point)
    found, left = [], list(function.body)
    while left:
        node = left.pop(0)
        if isinstance(node, ast.Return):
            found.append(node)
        elif not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            left[:0] = ast.iter_child_nodes(node)
    return found


def verdicts(task: HumanEval, wrapper: str | None, step: int = 1) -> list[bool]:
    """Of every `step`-th canonical solution: as it is, or with its last return wrapped."""

    def verdict(i: int) -> bool:
        source = solution(task[i])
        return task.evaluate(
            task[i], source if wrapper is None else with_last_return(source, task[i]["entry_point"], wrapper)
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(verdict, range(0, len(task), step)))


def test_all_canonical_solutions_pass(task):
    assert verdicts(task, None) == [True] * 164


def test_all_canonical_solutions_with_one_wrong_return_fail(task):
    assert verdicts(task, WRONG) == [False] * 164


def test_the_mutants_are_wrong_in_their_value_alone(task):
    assert verdicts(task, "def wrong(value): return value\n\n", step=8) == [True] * 21


def test_tests_that_cannot_be_run_are_no_verdict(task):
    broken = {**task[0], "test": "def check(candidate): return import"}
    with pytest.raises(SandboxError, match="the tests cannot be run: SyntaxError"):
        task.evaluate(broken, solution(task[0]))


@pytest.mark.parametrize(
    "answer", ["", "no idea", "import sys\nsys.exit(0)", "```python\n```", "def check(c): pass", "\ud800"]
)
def test_what_is_no_solution_fails(task, answer):
    assert not task.evaluate(task[0], answer)
