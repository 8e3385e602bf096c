"""What Linux itself can forbid a program, through ctypes: namespaces with a tree of their own, Landlock, seccomp.

Imported inside the sandbox only (see sandbox_guard.py), before the program runs. Each function raises OSError
where the kernel or its administrator says no; sandbox.py tries them once and leaves out what is not there.
System call numbers and structures: include/uapi of the kernel; man 2 unshare, pivot_root, landlock, seccomp.
"""

import ctypes
import os
import struct

_libc = ctypes.CDLL(None, use_errno=True)

NOBODY = 65534  # the user that root becomes
WORK = "/sandbox"  # the working directory in a private tree
WORK_BYTES, WORK_FILES = 64 << 20, 1024  # of all its files together; it lives in memory and dies with the program

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

# What a Python program that computes needs; all else is refused, also what kernels to come will add. Missing on
# purpose: clone (no process, no thread), execve, socket, kill, ptrace, mount, prctl, prlimit64, memfd_create ...
# name: (x86-64, AArch64); None where an architecture has no such call.
SYSCALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, None),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "sendfile": (40, 71),
    "exit": (60, 93),
    "uname": (63, 160),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "truncate": (76, 45),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "mkdir": (83, None),
    "rmdir": (84, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "sigaltstack": (131, 132),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "rseq": (334, 293),
    "faccessat2": (439, 439),
}
# Calls with many faces: only these values of their second argument. fcntl could else ask for signals to be sent
# to any process (F_SETOWN), ioctl could type into a terminal.
SYSCALLS_BY_ARGUMENT = {
    "ioctl": ((16, 29), (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)),  # TCGETS TIOCGWINSZ FIONREAD FIONCLEX FIOCLEX
    "fcntl": ((72, 25), (0, 1, 2, 3, 4, 5, 6, 7, 1030)),  # F_DUPFD to F_SETLKW, F_DUPFD_CLOEXEC
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
PIVOT_ROOT = (155, 41)
MOUNT_SETATTR = 442  # the same everywhere, as are Landlock's 444 to 446


def _check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(what, number, *args):
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), what)


def _prctl(what, option, *args):
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*args, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *wide), what)


def _architecture():
    found = ARCHITECTURES.get(os.uname().machine)
    if found is None or struct.calcsize("P") != 8:
        raise OSError(f"no table of system calls for {os.uname().machine}")
    return found


# -- namespaces and a tree of one's own ---------------------------------------------------------------------------


def unshare():
    """New mount, pid, net, ipc and uts namespaces; for a user other than root a user namespace gives the right."""
    flags = 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # CLONE_NEWNS NEWPID NEWNET NEWIPC NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and _libc.unshare(flags) == 0:
        return
    _check(_libc.unshare(flags | 0x10000000), "unshare")  # CLONE_NEWUSER
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def _mount(source, target, kind, flags, options=None):
    encoded = [None if a is None else os.fsencode(a) for a in (source, target, kind)]
    option_bytes = None if options is None else options.encode()
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), option_bytes), f"mount {target}")


def private_tree(mount_point, readable, uid, gid):
    """Replace the file system by one with the `readable` paths (not writable) and an empty working directory.

    The old tree is no longer reachable by any path, nor is /proc there. Needs unshare(), in the child.

    Args:
        mount_point: an empty directory.
        uid, gid: who shall own the working directory.
    """
    nosuid, nodev, private, bind = 2, 4, 0x44000, 0x5000  # MS_PRIVATE | MS_REC, MS_BIND | MS_REC
    _mount(None, "/", None, private)
    _mount("tmpfs", mount_point, "tmpfs", nosuid | nodev, "size=1m,mode=755")
    umask = os.umask(0o022)
    for path in (*readable, *DEVICES):
        source, target = os.path.realpath(path), mount_point + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        elif os.path.exists(source):
            open(target, "w").close()
        else:
            continue
        _mount(source, target, None, bind)
    os.makedirs(mount_point + WORK, exist_ok=True)
    os.umask(umask)
    attributes = struct.pack("QQQQ", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, on all of it
    at_fdcwd, recursive = -100, 0x8000
    _syscall("mount_setattr", MOUNT_SETATTR, at_fdcwd, os.fsencode(mount_point), recursive, attributes, len(attributes))
    options = f"size={WORK_BYTES},nr_inodes={WORK_FILES},mode=700,uid={uid},gid={gid}"
    _mount("tmpfs", mount_point + WORK, "tmpfs", nosuid | nodev, options)
    os.chdir(mount_point)
    _syscall("pivot_root", PIVOT_ROOT[_architecture()[0]], b".", b".")
    _check(_libc.umount2(b".", 2), "umount")  # MNT_DETACH: the old root, stacked on the new one
    os.chdir(WORK)


# -- who we are -----------------------------------------------------------------------------------------------------


def become_nobody():
    """From root to a user who owns nothing."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_privileges():
    """No capabilities, none to come, closed to debuggers, and dead when the parent is."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    _check(_libc.capset(header, bytes(24)), "capset")
    _prctl("no_new_privs", 38, 1)
    _prctl("dumpable", 4, 0)
    die_with_parent()


def die_with_parent():
    _prctl("pdeathsig", 1, 9)


# -- Landlock -------------------------------------------------------------------------------------------------------

READ = 1 << 2 | 1 << 3  # files, directories
WRITE = 1 << 1 | 1 << 14  # write to, truncate
CHANGE = WRITE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8  # remove and make directories and files
FILE_RIGHTS = 1 << 1 | 1 << 2 | 1 << 14


def landlock_abi():
    return _syscall("landlock", 444, None, 0, 1)


def landlock(readable, work):
    """Only `readable` may be read and `work` changed; no TCP, no abstract socket and no signal beyond ourselves
    where the kernel knows how (ABI 4 and 6)."""
    abi = landlock_abi()
    handled = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    attributes = struct.pack("QQQ", handled, 0b11, 0b11)[:size]  # TCP bind, connect; abstract sockets, signals
    ruleset = _syscall("landlock_create_ruleset", 444, attributes, size, 0)
    try:
        rights_of = dict.fromkeys(readable, READ) | dict.fromkeys(DEVICES, READ | WRITE) | {work: READ | CHANGE}
        for path, access in rights_of.items():
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                rights = access & handled & (-1 if os.path.isdir(path) else FILE_RIGHTS)
                _syscall("landlock_add_rule", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            finally:
                os.close(fd)
        _syscall("landlock_restrict_self", 446, ruleset, 0)
    finally:
        os.close(ruleset)


# -- seccomp --------------------------------------------------------------------------------------------------------


def seccomp_program(machine):
    """The filter for an architecture, as instructions (code, jump if true, jump if false, k) of classic BPF."""
    column, audit_arch = ARCHITECTURES[machine]
    load, equal, end = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: with EPERM, which Python turns into an exception
    # seccomp_data: number at 0, architecture at 4, arguments of 8 bytes from 16 (the low half first)
    program = [(load, 0, 0, 4), (equal, 1, 0, audit_arch), (end, 0, 0, kill), (load, 0, 0, 0)]
    for number in (numbers[column] for numbers in SYSCALLS.values()):
        if number is not None:
            program += [(equal, 0, 1, number), (end, 0, 0, allow)]
    for numbers, values in SYSCALLS_BY_ARGUMENT.values():
        block = [(load, 0, 0, 24)]
        for value in values:
            block += [(equal, 0, 1, value), (end, 0, 0, allow)]
        block += [(end, 0, 0, refuse)]
        program += [(equal, 0, len(block), numbers[column]), *block]
    return [*program, (end, 0, 0, refuse)]


def seccomp():
    """From here on only the listed system calls; the others fail with EPERM. For good, and for all children."""
    _architecture()
    program = seccomp_program(os.uname().machine)
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _prctl("seccomp", 22, 2, header)
