"""The program that makes a machine out of a corner of this one: a root file system, users, processes of its own.

It runs inside bubblewrap, with the powers of root there, and needs only the standard library. What it starts is shut in
once more: a root of which every file may be changed and nothing stays (an overlay over /usr, the rest in memory), a
process namespace in which this program is not seen, a user namespace whose root has no power over mounts, and a filter
of system calls. Its stdin is a socket of packets to the caller (`cqd_jax.sandbox.machine`), each of them JSON:

  {"spawn": n, "argv": [...], "env": {...}, "apart": BOOL}   with two descriptors: what it reads, where it writes
  {"kill": n}                                 the program and what descends from it
  {"settle": n}                               from now on, random bytes are random
  {"inspect": n}                              has a file been changed that checks are carried out by? its path

and to the caller {"ready": true}, {"ended": n, "code": c}, {"answered": n, "text": TEXT}, {"dead": WHY}.
"""

# `socket` on top of `_socket` is a hundred enumerations, which take a while.
import _socket
import array
import contextlib
import ctypes
import fcntl
import json
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from cqd_jax.sandbox.machine_root import (
  CLONE_NEWIPC,
  CLONE_NEWNS,
  CLONE_NEWPID,
  CLONE_NEWUSER,
  CLONE_NEWUTS,
  MNT_DETACH,
  MS_NODEV,
  MS_NOEXEC,
  MS_NOSUID,
  MS_PRIVATE,
  MS_REC,
  PIVOT_ROOT,
  RANDOM,
  ROOT,
  STAGE,
  SYSTEM,
  Users,
  build_root,
  call,
  mount,
  shut_proc,
)

PACKET_BYTES = 1 << 18

PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 22, 24, 47, 4, 2

KEPT_CAPABILITIES = {0, 1, 3, 4, 5, 6, 7, 10, 18, 29, 31}
"""Of the machine's root: over files' owners and modes, users and groups, signals, low ports, chroot, audit, setfcap."""

ONE_MORE = 23
"""A capability (over priorities) of programs that the others shall not trace: one cannot trace who has more."""

BUSY_SECONDS, IDLE_SECONDS = 0.1, 1.0
"""How often the memory of all that runs is looked at."""

GRADERS = re.compile(
  r"usr/(bin/(bash|sh|dash|python3[.\d]*)|lib64/ld-.*|lib/(ld-.*|python3.*)|local/(bin/python3.*|lib/python3.*)"
  r"|lib/[^/]*-linux-gnu[^/]*/(ld-linux.*|lib(c|m|dl|tinfo|pthread|python3)[-.].*))"
)
"""What a check is carried out by. A program that changed it is not to be believed."""


class Guest:
  """How a process becomes one of the machine's."""

  def __init__(self, settings: dict[str, Any], users: Users):
    self.limits: dict[str, int] = settings["limits"]
    self.users = users
    self.program = bytes.fromhex(settings["seccomp"])
    self.first = -1  # a descriptor of the machine's process 1

  def enter(self, argv: list[str], environment: dict[str, str], reads: int, writes: int, apart: bool = False) -> None:
    """In a child, once it sees the machine's file system: becomes its root and executes a program. Never returns."""
    try:
      for descriptor in (0, 1, 2):
        fcntl.fcntl(descriptor, fcntl.F_SETFD, 0)
      os.dup2(reads, 0)
      os.dup2(writes, 1)
      os.dup2(writes, 2)
      for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and with it what it starts
        signal.signal(number, signal.SIG_DFL)
      os.nice(5)
      self._limit()
      self._become_root(KEPT_CAPABILITIES | {ONE_MORE} if apart else KEPT_CAPABILITIES)
      os.closerange(3, 1 << 12)
      os.execve(argv[0], argv, environment)
    except BaseException as error:
      os.write(2, f"{argv[0]}: {error}\n".encode(errors="replace"))
    finally:
      os._exit(127)

  def join(self) -> None:
    """In a child: sees what process 1 sees."""
    os.setsid()
    call("setns", self.first, CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC)
    os.chdir("/")

  def _limit(self) -> None:
    for name, value in (
      ("AS", self.limits["memory_bytes"]),
      ("NPROC", self.limits["processes"]),
      ("FSIZE", self.limits["disk_bytes"]),
      ("CPU", self.limits["cpu_seconds"]),
      ("NOFILE", 1024),
      ("CORE", 0),
      ("MEMLOCK", 0),
      ("MSGQUEUE", 0),
    ):
      resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

  def _become_root(self, kept: set[int]) -> None:
    call("setns", self.users.descriptor, CLONE_NEWUSER)
    if self.users.base is not None:
      os.setgroups([])
      os.setresgid(0, 0, 0)
      os.setresuid(0, 0, 0)
    zero = ctypes.c_ulong(0)
    call("prctl", PR_CAP_AMBIENT, ctypes.c_ulong(PR_CAP_AMBIENT_CLEAR_ALL), zero, zero, zero)
    with contextlib.suppress(OSError):  # raised past the last capability that the kernel knows
      for capability in range(64):
        if capability not in kept:
          call("prctl", PR_CAPBSET_DROP, ctypes.c_ulong(capability), zero, zero, zero)

    class Program(ctypes.Structure):
      _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    header = Program(len(self.program) // 8, self.program)
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(header), zero, zero)


def start_first(guest: Guest, environment: dict[str, str]) -> tuple[int, int]:
  """Starts process 1, which only takes up orphans and ends when this program does; its id, and what keeps it alive."""
  reads, keeps = os.pipe()
  done, doing = os.pipe()
  call("unshare", CLONE_NEWPID)  # of children, from now on
  child = os.fork()
  if child:
    for descriptor in (reads, doing):
      os.close(descriptor)
    failure = os.read(done, 1000)
    os.close(done)
    if failure:
      raise OSError(failure.decode())
    guest.first = os.pidfd_open(child)
    return child, keeps
  try:
    os.setsid()
    call("unshare", CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", f"{ROOT}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    shut_proc()
    call("sethostname", b"machine", 7)
    os.chdir(ROOT)
    call("syscall", PIVOT_ROOT[os.uname().machine], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
  except BaseException as error:
    os.write(doing, f"{type(error).__name__}: {error}".encode())
    os._exit(1)
  os.close(doing)
  guest.enter(["/bin/bash", "-c", "read -r"], environment, reads, os.open("/dev/null", os.O_WRONLY))
  raise AssertionError


def _resident_bytes() -> Iterator[tuple[int, int, int]]:
  """Of each process that is seen here: its id, its parent's and the bytes that it has in memory."""
  for name in os.listdir("/proc"):
    if name.isdigit():
      with contextlib.suppress(OSError, ValueError):
        with open(f"/proc/{name}/stat", "rb") as file:
          fields = file.read().rsplit(b")", 1)[1].split()
        yield int(name), int(fields[1]), int(fields[21]) * resource.getpagesize()


class Machine:
  """Serves the caller until it closes the socket or the machine is dead."""

  def __init__(self, control: _socket.socket, settings: dict[str, Any]):
    self.control = control
    self.limits: dict[str, int] = settings["limits"]
    processes = self.limits["processes"] + settings["beside"]
    users = Users(settings["base"], settings["count"], processes, beneath=settings["beneath"])
    build_root(settings, users)
    self.links = {name: os.readlink(f"{ROOT}/{name}") for name in SYSTEM if os.path.islink(f"{ROOT}/{name}")}
    self.libraries = self.list_of_libraries()
    self.guest = Guest(settings, users)
    self.first, self.keeps = start_first(self.guest, settings["env"])
    self.programs: dict[int, tuple[int, int]] = {}  # by their descriptors: the caller's number, the process
    self.looked = time.monotonic()

  def serve(self) -> None:
    """Returns when there is no more to do."""
    self.say({"ready": True})
    while True:
      poll = select.poll()
      for descriptor in (self.control.fileno(), self.guest.first, *self.programs):
        poll.register(descriptor, select.POLLIN)
      pause = BUSY_SECONDS if self.programs else IDLE_SECONDS
      events = {descriptor for descriptor, _ in poll.poll(pause * 1000)}
      self.look_at_memory(pause)
      if self.guest.first in events:
        return self.say({"dead": "its process 1 has ended"})
      for descriptor in events & set(self.programs):
        self.reap(descriptor)
      if self.control.fileno() in events and not self.obey():
        return

  def say(self, message: dict[str, Any]) -> None:
    """Sends a packet to the caller."""
    self.control.sendall(json.dumps(message).encode())

  def look_at_memory(self, pause: float) -> None:
    """Ends the machine if what runs there has more memory than is allowed."""
    if time.monotonic() - self.looked < pause:
      return
    self.looked = time.monotonic()
    used = sum(size for process, _, size in _resident_bytes() if process != os.getpid())
    if used > self.limits["memory_bytes"]:
      os.kill(self.first, signal.SIGKILL)
      self.say({"dead": f"it used more than {self.limits['memory_bytes'] >> 20} MiB of memory"})
      sys.exit(0)

  def reap(self, descriptor: int) -> None:
    """Reports a program that has ended."""
    number, process = self.programs.pop(descriptor)
    os.close(descriptor)
    self.say({"ended": number, "code": os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])})

  def obey(self) -> bool:
    """Does what the caller says; False if there is no caller any more."""
    packet, beside, *_ = self.control.recvmsg(PACKET_BYTES, _socket.CMSG_SPACE(8))
    if not packet:
      return False
    message = json.loads(packet)
    if "spawn" in message:
      descriptors = array.array("i", beside[0][2])
      self.spawn(message, *descriptors)
      for descriptor in descriptors:
        os.close(descriptor)
    elif "kill" in message:
      self.kill(message["kill"])
    elif "settle" in message:
      self.settle()
      self.say({"answered": message["settle"], "text": ""})
    else:
      self.say({"answered": message["inspect"], "text": self.changed()})
    return True

  def spawn(self, message: dict[str, Any], reads: int, writes: int) -> None:
    """Starts a program in the machine."""
    child = os.fork()
    if not child:
      try:
        self.guest.join()
      except BaseException as error:
        os.write(writes, str(error).encode())
        os._exit(126)
      self.guest.enter(message["argv"], message["env"], reads, writes, message["apart"])
    self.programs[os.pidfd_open(child)] = (message["spawn"], child)

  def settle(self) -> None:
    """Takes away what lay over the devices of random bytes."""
    child = os.fork()
    if not child:
      try:
        self.guest.join()
        for name in RANDOM:
          call("umount2", name.encode(), MNT_DETACH)
      finally:
        os._exit(0)
    os.waitpid(child, 0)

  def kill(self, number: int) -> None:
    """Kills a program, and what descends from it, as often as it takes: one that forks may be ahead of us."""
    roots = {process for own, process in self.programs.values() if own == number}
    for _ in range(5):
      family, parents = set(roots), {process: parent for process, parent, _ in _resident_bytes()}
      while grown := {process for process, parent in parents.items() if parent in family} - family:
        family |= grown
      for process in family & set(parents):
        with contextlib.suppress(ProcessLookupError):
          os.kill(process, signal.SIGKILL)
      if family == roots:
        break

  def list_of_libraries(self) -> tuple[int, ...]:
    """What shows that where programs find their libraries was changed: no owner can set back this time."""
    with contextlib.suppress(OSError):
      found = os.lstat(f"{ROOT}/etc/ld.so.cache")
      return found.st_ino, found.st_ctime_ns
    return ()

  def changed(self) -> str:
    """The first file that a check is carried out by and that is not the host's any more."""
    for name, target in self.links.items():
      if not os.path.islink(f"{ROOT}/{name}") or os.readlink(f"{ROOT}/{name}") != target:
        return f"/{name}"
    if os.path.lexists(f"{ROOT}/etc/ld.so.preload"):
      return "/etc/ld.so.preload"
    if self.list_of_libraries() != self.libraries:
      return "/etc/ld.so.cache"
    for below, path in ((f"{STAGE}/upper/", f"{STAGE}/upper"), (f"{STAGE}/", f"{STAGE}/local")):
      for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
          own = f"{folder}/{name}".removeprefix(below)
          own = own if own.startswith("usr/") else f"usr/{own}"
          if GRADERS.fullmatch(own):
            return f"/{own}"
    return ""


def main() -> None:
  """Makes the machine that the first packet describes; says why, if that cannot be."""
  control = _socket.socket(fileno=os.dup(0))
  null = os.open(os.devnull, os.O_RDWR)
  os.dup2(null, 0)
  os.dup2(null, 1)
  os.umask(0o022)
  packet = control.recv(PACKET_BYTES)
  if not packet:
    return
  try:
    machine = Machine(control, json.loads(packet))
  except Exception as error:
    control.sendall(json.dumps({"dead": f"{type(error).__name__}: {error}"}).encode())
    return
  machine.serve()


if __name__ == "__main__":
  main()
