"""Programs of a model: what they may do, and how they are ended. Each claim holds with and without namespaces."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from nanochat import sandbox
from nanochat.sandbox import MAX_OUTPUT, execute_code, isolation_level

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs POSIX processes")


@pytest.fixture(params=["namespaces", "plain"])
def level(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(sandbox, "_prefix", lambda: ())
    elif not sandbox._prefix():
        pytest.skip("this machine allows no user namespaces")
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


def test_namespaces_have_no_network_and_the_level_is_named():
    if not sandbox._prefix():
        assert "no kernel namespaces" in isolation_level()
        pytest.skip("this machine allows no user namespaces")
    assert "no network" in isolation_level()
    # an unguarded interpreter in the same namespaces: only the loopback device, and that is down
    probe = "import socket; print([name for _, name in socket.if_nameindex()])"
    shown = subprocess.run([*sandbox._prefix(), sys.executable, "-c", probe], capture_output=True, text=True)
    assert shown.stdout == "['lo']\n"


def test_a_program_with_odd_characters_or_a_syntax_error_is_a_result_not_a_crash():
    assert execute_code("print('é\\ud800'.encode('utf-8', 'replace'))").success
    assert "SyntaxError" in execute_code("def f(:").error
    assert not execute_code("\ud800").success
