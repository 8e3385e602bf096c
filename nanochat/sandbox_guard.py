"""The inside of the sandbox: limits itself, switches off what is dangerous, runs one program.

sandbox.py starts it by path, in an interpreter of its own:
`python -I -B sandbox_guard.py PROGRAM MEMORY_BYTES CPU_SECONDS FILE_BYTES`.
Exit code 0 only when the program ran to its end; 3 when it ran out of memory; 1 otherwise, the traceback on
stderr. A program that ends itself early (sys.exit, os._exit) has not run to its end.
"""

import builtins
import os
import shutil
import subprocess
import sys
import traceback

OUT_OF_MEMORY = 3

OS_FUNCTIONS = (
    "_exit abort chdir chmod chown chroot execv execve fchdir fchmod fchown fork forkpty getcwd kill killpg "
    "lchflags lchmod lchown posix_spawn posix_spawnp putenv remove removedirs rename renames replace rmdir "
    "setgid setns setpgid setsid setuid system truncate unlink unshare"
).split()
SHUTIL_FUNCTIONS = ("rmtree", "move", "chown")
BLOCKED_MODULES = "ipdb joblib resource psutil tkinter ctypes _ctypes _posixsubprocess".split()
# Audit events (PEP 578) are raised below any Python name, and a hook cannot be taken away again. By prefix.
BLOCKED_EVENTS = tuple(
    (
        "ctypes. os.exec os.fork os.kill os.posix_spawn os.spawn os.system pty.spawn subprocess.Popen "
        "shutil.rmtree shutil.move shutil.chown os.remove os.rename os.rmdir os.truncate os.chmod os.chown "
        "os.link os.symlink socket.__new__ socket.bind socket.connect socket.getaddrinfo socket.gethostby"
    ).split()
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(memory_bytes, cpu_seconds, file_bytes):
    """Hard limits that the kernel keeps. One that this system does not know or take is left out."""
    import resource

    wanted = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_DATA": memory_bytes,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": file_bytes,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,  # no further process or thread; the kernel does not hold root to it
    }
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # macOS refuses RLIMIT_AS


def refuse(name):
    def refused(*args, **kwargs):
        raise PermissionError(f"{name} is switched off in the sandbox")

    return refused


def switch_off():
    """Take away what no exercise needs: processes, deletion, ownership, leaving the working directory."""
    posix = sys.modules["posix"]
    for name in OS_FUNCTIONS:
        for module in (os, posix):
            if hasattr(module, name):
                setattr(module, name, refuse(f"os.{name}"))
    for name in SHUTIL_FUNCTIONS:
        setattr(shutil, name, refuse(f"shutil.{name}"))
    subprocess.Popen = refuse("subprocess.Popen")  # type: ignore[misc]
    for name in ("exit", "quit", "help"):
        setattr(builtins, name, refuse(name))
    for name in BLOCKED_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]


def watch(root):
    """An audit hook: no processes, no sockets, and writing only below `root`."""
    inside = root + os.sep

    def hook(event, args):
        if event.startswith(BLOCKED_EVENTS):
            raise PermissionError(f"{event} is switched off in the sandbox")
        if event == "open" and isinstance(args[2], int) and args[2] & WRITE_FLAGS:
            path = args[0] if isinstance(args[0], (str, bytes)) else None  # else a descriptor already open
            if path is not None and os.fsdecode(path) != os.devnull:
                if not os.path.realpath(os.path.join(root, os.fsdecode(path))).startswith(inside):
                    raise PermissionError(f"writing {path!r} is switched off in the sandbox")

    sys.addaudithook(hook)


def main():
    program, *limits = sys.argv[1:]
    root, leave = os.path.realpath(os.getcwd()), os._exit
    with open(program, encoding="utf-8") as f:
        source = f.read()
    del sys.argv[1:]
    limit(*map(int, limits))
    switch_off()
    watch(root)
    code = 1
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except MemoryError:
        code = OUT_OF_MEMORY
        sys.stderr.write("MemoryError\n")
    except BaseException:  # SystemExit too: whatever stops the program early, it has not succeeded
        traceback.print_exc()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        leave(code)  # without the program's own exit handlers


if __name__ == "__main__":
    main()
