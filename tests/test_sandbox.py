"""Programs of a model: what they may do, and how they are judged. With all that works here, and with the guard alone.

What keeps them in is tested by attack, in test_sandbox_attacks.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter

import numpy as np
import pytest

from nanochat import sandbox
from nanochat.sandbox import (
    MAX_OUTPUT,
    ExecutionResult,
    SandboxError,
    check_function,
    execute_code,
    isolation_level,
)
from nanochat.sandbox_guard import decode, encode

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs POSIX processes")


@pytest.fixture(params=["all that works here", "guard"])
def level(request, monkeypatch):
    if request.param == "guard":
        monkeypatch.setattr(sandbox, "measures", lambda: ("guard",))
    return request.param


def test_a_program_that_runs_to_its_end_succeeds_and_its_output_comes_back(level):
    result = execute_code("import sys\nprint(6 * 7)\nprint('note', file=sys.stderr)")
    assert result.success and result.stdout == "42\n" and result.stderr == "note\n"
    assert result.error is None and not result.timeout and not result.memory_exceeded


def test_an_exception_is_no_success_and_error_is_its_last_line(level):
    result = execute_code("assert 1 == 2, 'sums differ'")
    assert not result.success and result.error == "AssertionError: sums differ"


@pytest.mark.parametrize("code", ["exit(0)", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_leaving_early_is_no_success(code):
    assert not execute_code(code).success


def test_an_endless_program_is_killed_when_its_time_is_up(level):
    t0 = time.monotonic()
    result = execute_code("while True: pass", timeout=1.0)
    assert result.timeout and not result.success and result.error == "timed out after 1 s"
    assert time.monotonic() - t0 < 3


def test_an_endless_program_that_catches_everything_is_killed_too(level):
    code = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert execute_code(code, timeout=0.7).timeout


def test_memory_is_limited(level):
    result = execute_code("x = bytearray(600 << 20)", memory_bytes=256 << 20)
    assert not result.success and result.memory_exceeded


def test_stdin_is_at_its_end():
    assert execute_code("input()").error == "EOFError: EOF when reading a line"


def test_output_is_capped_and_an_endless_printer_ends():
    result = execute_code("while True: print('y' * 10000)")
    assert len(result.stdout) == MAX_OUTPUT and not result.success


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import posix\nposix.fork()",
        "import os; os.system('true')",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.Popen(['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import os; os.kill(1, 9)",
    ],
)
def test_no_process_can_be_started_or_ended(code):
    result = execute_code(code)
    assert not result.success and "PermissionError" in result.error, result


def test_files_outside_the_working_directory_can_be_neither_written_nor_removed(tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("precious")
    for code in [
        f"open({str(kept)!r}, 'w')",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY)",
        f"import pathlib; pathlib.Path({str(kept)!r}).unlink()",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.rename({str(kept)!r}, 'x')",
        f"open('../../../../../../../..{kept}', 'a')",
    ]:
        result = execute_code(code)
        assert not result.success and "switched off in the sandbox" in result.error, (code, result)
    assert kept.read_text() == "precious"


def test_the_working_directory_is_temporary_and_writable(tmp_path):
    result = execute_code("open('a.txt', 'w').write('hi')\nprint(open('a.txt').read(), __import__('os').listdir())")
    assert result.success and result.stdout == "hi ['a.txt']\n"
    assert "a.txt" not in {p.name for p in tmp_path.iterdir()}


def test_a_file_cannot_fill_the_disk():
    result = execute_code("f = open('big', 'wb', buffering=0)\nwhile True: f.write(bytes(1 << 20))")
    assert "File too large" in result.error


def test_our_environment_does_not_reach_the_program(monkeypatch, level):
    monkeypatch.setenv("A_SECRET", "hunter2")
    result = execute_code("import os\nprint(sorted(os.environ), os.environ.get('OMP_NUM_THREADS'))")
    assert result.success and "A_SECRET" not in result.stdout and "PATH" in result.stdout
    assert result.stdout.endswith(" 1\n")


@pytest.mark.parametrize("module", ["ctypes", "resource", "psutil", "tkinter"])
def test_modules_that_reach_below_python_are_blocked(module):
    assert "ModuleNotFoundError" in execute_code(f"import {module}").error


def test_sockets_are_refused(level):
    assert "switched off" in execute_code("import socket; socket.socket()").error


def test_the_level_names_what_holds_and_what_is_lacking(monkeypatch):
    monkeypatch.setattr(sandbox, "measures", lambda: tuple(sandbox.MEASURES))
    assert isolation_level() == (
        "namespaces (private file tree, no network, no other process), unprivileged user, Landlock, seccomp; "
        "own process, limits, guard"
    )
    monkeypatch.setattr(sandbox, "measures", lambda: ("guard", "landlock"))
    assert isolation_level().startswith("Landlock; own process, limits, guard; not here: namespaces")
    monkeypatch.setattr(sandbox, "measures", lambda: ("guard",))
    assert isolation_level().startswith("no kernel isolation; own process, limits, guard")
    assert "\n" not in isolation_level()


@pytest.fixture
def probed_anew():
    sandbox.measures.cache_clear()
    yield
    sandbox.measures.cache_clear()


@pytest.mark.parametrize("missing", ["namespaces", "nobody", "landlock", "seccomp"])
def test_a_measure_that_fails_here_is_left_out_and_the_others_stay(probed_anew, monkeypatch, missing):
    def execute(code, entry_point, tests, timeout, memory_bytes, chosen):
        if missing in chosen:
            raise SandboxError("not on this kernel")
        return ExecutionResult(success=True, stdout="", stderr="")

    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    monkeypatch.setattr(sandbox, "_execute", execute)
    assert sandbox.measures() == tuple(m for m in sandbox.MEASURES if m != missing)


def test_a_measure_that_was_there_and_fails_now_is_an_error_of_the_sandbox_not_of_the_program(monkeypatch):
    monkeypatch.setattr(sandbox, "measures", lambda: ("guard",))
    monkeypatch.setattr(sandbox, "INSIDE", "raise OSError('unshare: Operation not permitted')")
    with pytest.raises(SandboxError, match="could not start: OSError: unshare: Operation not permitted"):
        execute_code("print(1)")


def test_a_program_that_could_not_be_confined_is_not_run(monkeypatch):
    monkeypatch.setattr(sandbox, "measures", lambda: ("guard",))
    broken = "sandbox_guard.switch_off = lambda: 1 / 0; sandbox_guard.main()"
    monkeypatch.setattr(sandbox, "INSIDE", sandbox.INSIDE.replace("sandbox_guard.main()", broken))
    with pytest.raises(SandboxError, match="could not be confined: ZeroDivisionError: division by zero"):
        execute_code("print(1)")


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_the_filter_of_system_calls_is_whole_on_both_architectures():
    from nanochat import sandbox_kernel as kernel

    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    for machine, (column, audit_arch) in kernel.ARCHITECTURES.items():
        program = kernel.seccomp_program(machine)
        assert len(program) < 4096  # BPF_MAXINSNS
        listed = {numbers[column] for numbers in kernel.SYSCALLS.values()}
        by_argument = {numbers[column]: values for numbers, values in kernel.SYSCALLS_BY_ARGUMENT.values()}
        for number in range(600):
            verdict = run_filter(program, audit_arch, number, 0)
            assert verdict == (allow if number in listed or 0 in by_argument.get(number, ()) else refuse), number
        for number, values in by_argument.items():
            for value in {*values, *range(40), 0x5412, 0x5452, 1024, 1031}:
                assert (run_filter(program, audit_arch, number, value) == allow) == (value in values)
        assert run_filter(program, audit_arch, 0x40000000, 0) == refuse  # x32's numbers
        assert run_filter(program, audit_arch ^ 1, 0, 0) == kill  # another architecture's calls


def run_filter(program, arch, number, argument):
    """A plain interpreter of the three instructions that the filter uses."""
    memory = {0: number, 4: arch, 24: argument}
    at = register = 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20:
            register = memory[k]
        elif code == 0x15:
            at += if_true if register == k else if_false
        else:
            return k


TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9, 'negative'\n"


def test_a_function_is_tested_from_outside_its_process(level):
    assert check_function("def f(x): return x * x", "f", TEST).success
    wrong = check_function("def f(x): return x * abs(x)", "f", TEST)
    assert not wrong.success and wrong.error == "AssertionError: negative"
    noisy = check_function("def f(x):\n    print('at', x)\n    return x * x", "f", TEST)
    assert noisy.success and noisy.stdout == "at 2\nat -3\n"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("def f(x): raise ValueError('no')", "ValueError: no"),
        ("def g(x): return x", "NameError: name 'f' is not defined"),
        ("def f(x): return x +", "SyntaxError: invalid syntax"),
        ("def f(x): return lambda: x", "TypeError: a function is no plain data"),
        ("f = 3", "NameError: name 'f' is not defined"),
        ("", "NameError: name 'f' is not defined"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("def f(x): return f(x)", "RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_why_a_function_failed_is_one_line(program, error):
    result = check_function(program, "f", TEST)
    assert not result.success and result.error == error


def test_tests_may_use_what_the_prompt_defines_and_the_function_by_its_name():
    prompt = "def double(x):\n    return 2 * x\n\ndef f(x):\n    'to write'\n"
    test = "def check(candidate):\n    assert candidate(3) == double(3) == f(3)"
    assert check_function("def f(x): return x + x", "f", test, prompt).success
    assert not check_function("def double(x): return x\ndef f(x): return x", "f", test, prompt).success


@pytest.mark.parametrize(
    ("test", "fault"),
    [
        ("def check(candidate", "the tests cannot be run: SyntaxError"),
        ("import no_such_module", "the tests cannot be run: ModuleNotFoundError"),
        ("x = 1", "the tests cannot be run: KeyError: 'check'"),
        ("def check(candidate):\n    candidate(lambda: 1)", "hands over what cannot travel: a function"),
    ],
)
def test_tests_that_cannot_be_run_are_named_and_are_no_verdict(test, fault):
    with pytest.raises(SandboxError, match=fault):
        check_function("def f(x): return x", "f", test)


def test_an_answer_that_keeps_the_test_busy_ends_with_the_time():
    test = "def check(candidate):\n    for i in range(candidate(1)): pass"
    assert check_function("def f(x): return 10**15", "f", test, timeout=0.7).error == "timed out after 0.7 s"


def test_a_reason_is_one_short_line():
    result = check_function("def f(x): raise ValueError('a\\nb' + 'c' * 10**6)", "f", TEST)
    assert result.error == "ValueError: a"
    assert len(check_function("def f(x): raise ValueError('c' * 10**6)", "f", TEST).error) == 500


def test_the_time_limit_holds_over_all_calls(level):
    result = check_function("def f(x):\n    while True: pass", "f", TEST, timeout=0.7)
    assert result.timeout and result.error == "timed out after 0.7 s"


VALUES = [
    None, True, 0, -(10**400), 2**4000, 1.5, float("inf"), 1j, "é\n", "\ud800", b"\x00", [], (1, [2]), {1, 2},
    frozenset({(1, 2)}), {"a": [1], (1, 2): None, 1.0: {}}, ["int", "ff"], ["dict"],
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(VALUES)))
def test_plain_data_travels_unchanged(index):
    value = VALUES[index]
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value and type(back) is type(value)


def test_what_equals_plain_data_travels_as_that():
    class Sly(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    assert decode(json.loads(json.dumps(encode(Counter("aab"))))) == {"a": 2, "b": 1}
    assert type(decode(json.loads(json.dumps(encode(Sly("no")))))) is str
    assert [encode(v) for v in (np.int64(3), np.float64(0.5), np.bool_(True))] == [3, 0.5, True]
    for value in (object(), print, iter([])):
        with pytest.raises(TypeError, match="is no plain data"):
            encode(value)


@pytest.mark.parametrize(
    "line", ['{"value": 1}', '["int"]', '["code", "x"]', '["dict", [1]]', '["set", ["list"]]', "[]"]
)
def test_an_answer_in_no_known_form_is_refused(line):
    with pytest.raises((ValueError, TypeError, IndexError)):
        decode(json.loads(line))


def test_a_program_with_odd_characters_or_a_syntax_error_is_a_result_not_a_crash():
    assert execute_code("print('é\\ud800'.encode('utf-8', 'replace'))").success
    assert "SyntaxError" in execute_code("def f(:").error
    assert not execute_code("\ud800").success
