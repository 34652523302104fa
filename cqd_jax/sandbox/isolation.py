"""How an untrusted program is shut in on this machine: bubblewrap's command line, the filter of system calls, users."""

import itertools
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

INSTALL = "apt-get install bubblewrap / dnf install bubblewrap / pacman -S bubblewrap"

FIRST_SPARE_UID = 1 << 30
"""Users from here up belong to nobody, where all of the 32 bits are mapped."""

_starts = itertools.count()

# Numbers of Linux system calls that an answer has no use for and that reach past its own process: other processes'
# memory, keys and queues that outlive it, memory that no limit counts, large and young parts of the kernel.
_CALLS = {
  "x86_64": {"arch": 0xC000003E, "mmap": 9, "socket": 41, "clone": 56, "unshare": 272},
  "aarch64": {"arch": 0xC00000B7, "mmap": 222, "socket": 198, "clone": 220, "unshare": 97},
}
_DENIED = {
  "x86_64": {
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240,
    "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_create": 319,
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "open_by_handle_at": 304, "fanotify_init": 300,
  },
  "aarch64": {
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
    "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180,
    "add_key": 217, "request_key": 218, "keyctl": 219, "memfd_create": 279,
    "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "open_by_handle_at": 265, "fanotify_init": 262,
  },
}  # fmt: skip
_DENIED_EVERYWHERE = {
  "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438, "memfd_secret": 447,
}  # fmt: skip
_CLONE3 = 435
_CLONE_NEWUSER = 0x10000000
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_MAP_SHARED = 1
_NO_FILE = 0xFFFFFFFF
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENT = 0, 4, 16
_AT_ARGUMENT_3, _AT_ARGUMENT_4 = 40, 48


def system_call_filter(machine: str, *, own_system: bool = False) -> bytes:
  """Returns the seccomp program (classic BPF, 8 bytes an instruction) for `platform.machine()`.

  It refuses (EPERM) what `_DENIED` names, sockets other than Unix ones, and new user namespaces, in which a process
  would have capabilities again; memory shared with a file, since what is written there leaves the file's times as they
  were; `clone3`, whose flags a filter cannot see, "does not exist" (ENOSYS), so libraries
  fall back to `clone`. Calls by another architecture's table kill the process.

  Args:
    machine: the architecture.
    own_system: for programs that have a file system and a network of their own, and use them as ordinary programs do:
      memory may be shared with files; sockets of the internet exist (others "are not supported", so that programs that
      would use them only where they are there go on without).

  Raises:
    KeyError: if the machine is neither x86_64 nor aarch64.
  """
  calls = _CALLS[machine]
  # (operation, steps ahead if it holds, steps ahead if not, operand)
  program = [
    (_LOAD, 0, 0, _AT_ARCH),
    (_EQUAL, 1, 0, calls["arch"]),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, _AT_NUMBER),
    (_AT_LEAST, 0, 1, 0x40000000),  # the x32 table; on aarch64 no such number exists
    (_RETURN, 0, 0, _KILL),
  ]
  errors = dict.fromkeys([*_DENIED[machine].values(), *_DENIED_EVERYWHERE.values()], _EPERM)
  for number, error in (errors | {_CLONE3: _ENOSYS}).items():
    program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | error)]
  for number in (calls["clone"], calls["unshare"]):
    program += [
      (_EQUAL, 0, 4, number),
      (_LOAD, 0, 0, _AT_ARGUMENT),
      (_ANY_BIT, 0, 1, _CLONE_NEWUSER),
      (_RETURN, 0, 0, _REFUSE | _EPERM),
      (_RETURN, 0, 0, _ALLOW),
    ]
  if not own_system:
    program += [
      (_EQUAL, 0, 6, calls["mmap"]),
      (_LOAD, 0, 0, _AT_ARGUMENT_3),
      (_ANY_BIT, 0, 3, _MAP_SHARED),
      (_LOAD, 0, 0, _AT_ARGUMENT_4),
      (_EQUAL, 1, 0, _NO_FILE),
      (_RETURN, 0, 0, _REFUSE | _EPERM),
      (_RETURN, 0, 0, _ALLOW),
    ]
  families = (_AF_UNIX, _AF_INET, _AF_INET6) if own_system else (_AF_UNIX,)
  program += [
    (_EQUAL, 0, 2 + len(families), calls["socket"]),
    (_LOAD, 0, 0, _AT_ARGUMENT),
    *((_EQUAL, len(families) - place, 0, family) for place, family in enumerate(families)),
    (_RETURN, 0, 0, _REFUSE | (_EAFNOSUPPORT if own_system else _EPERM)),
    (_RETURN, 0, 0, _ALLOW),
  ]
  return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def spare_uid(uid_map: str) -> int | None:
  """Returns a user id that belongs to nobody and that no other worker has, or None where none is to be had.

  A limit on processes counts all the processes of a user, hence one user a worker.

  Args:
    uid_map: the text of /proc/self/uid_map: in a container, few ids may exist beside 0.
  """
  ranges = [tuple(map(int, line.split())) for line in uid_map.splitlines()]
  end = max((first + length for first, _, length in ranges), default=0)
  number = os.getpid() * 256 + next(_starts) % 256  # process ids have 22 bits at most
  if end > 2 * FIRST_SPARE_UID:
    return FIRST_SPARE_UID + number
  return end - 1 - number % (end // 2) if end > 1000 else None


FIRST_SPARE_RANGE = 1 << 31
RANGE = 1 << 16
"""Users of a system of its own: as many as such systems are used to."""


def spare_range(uid_map: str) -> tuple[int, int] | None:
  """Returns the first and the number of user ids that belong to nobody, for a system with users of its own.

  Where all of the 32 bits are mapped, no two systems that live at a time have the same. Elsewhere they share the upper
  half of what there is. None where that is next to nothing.

  Args:
    uid_map: as of `spare_uid`.
  """
  ranges = [tuple(map(int, line.split())) for line in uid_map.splitlines()]
  end = max((first + length for first, _, length in ranges), default=0)
  if end > FIRST_SPARE_RANGE + (FIRST_SPARE_RANGE >> 1):
    places = (end - FIRST_SPARE_RANGE) // RANGE - 1
    return FIRST_SPARE_RANGE + (os.getpid() * 256 + next(_starts)) % places * RANGE, RANGE
  return (end // 2, min(end - end // 2, RANGE)) if end > 4000 else None


def interpreter() -> Path:
  """Returns the Python that runs the worker: the one below any virtual environment."""
  named = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
  return named if named.exists() else Path(sys.executable).resolve()


def bubblewrap_command(program: Path, *, own_user_namespace: bool, further: Sequence[str] = ()) -> list[str]:
  """Returns the command that runs the Python file `program` shut in, with the powers to shut in others further.

  Inside: an empty read-only root with /usr, the interpreter's own prefix and a few files of /etc, all read-only; null
  and random devices; no /proc, no home, no network, a clean environment. The program has the capabilities of root in
  its namespaces.

  Args:
    own_user_namespace: for an ordinary user, whose program then is "nobody" with capabilities in a user namespace.
      Else the program runs as the real root, and must make its children another user.
    further: arguments of bubblewrap for what else is to be seen inside.
  """
  user = ["--unshare-user", "--uid", "65534", "--gid", "65534"] if own_user_namespace else []
  separate = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
  environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
  return [
    # Raised for all that follow, so that the kernel, when memory ends, ends an answer and not the caller.
    *("/bin/sh", "-c", 'echo 1000 >/proc/self/oom_score_adj; exec "$0" "$@"'),
    *(shutil.which("bwrap") or "bwrap", *user, "--cap-add", "ALL", *separate),
    *("--die-with-parent", "--new-session", "--hostname", "sandbox" , "--clearenv"),
    *(word for name, value in environment.items() for word in ("--setenv", name, value)),
    *_mounts(program),
    *further,
    *("--remount-ro", "/"),
    *("--chdir", "/", str(interpreter()), *PYTHON_FLAGS, WORKER),
  ]  # fmt: skip


PYTHON_FLAGS = ("-s", "-S", "-P", "-B")
"""No user's or site's packages, none beside the program, no bytecode files; -I would ignore PYTHONHASHSEED."""

WORKER = "/worker.py"


def _mounts(program: Path) -> Iterator[str]:
  yield from ("--ro-bind", "/usr", "/usr")
  for name in ("bin", "sbin", "lib", "lib32", "lib64"):
    path = Path("/", name)
    if path.is_symlink():
      yield from ("--symlink", os.readlink(path), str(path))
    elif path.is_dir():
      yield from ("--ro-bind", str(path), str(path))
  for file in ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives", "/etc/localtime"):
    yield from ("--ro-bind-try", file, file)
  if not Path(sys.base_prefix).is_relative_to("/usr"):
    for folder in reversed(Path(sys.base_prefix, "bin").parents[:-1]):
      yield from ("--dir", str(folder))  # or it would be as closed as a home that it stands for
    for name in ("bin", "lib", "lib64"):
      # At the same path, since the interpreter finds its libraries by it; folders on the way hold nothing else.
      yield from ("--ro-bind-try", *[str(Path(sys.base_prefix, name))] * 2)
  yield from ("--dir", "/tmp", "--dir", "/dev")
  for name in ("null", "zero", "random", "urandom"):
    yield from ("--dev-bind", *[f"/dev/{name}"] * 2)
  yield from ("--ro-bind", str(program), WORKER)
