"""The /tmp that jobs find in the sandbox. Sent to the worker as text: only the standard library.

A new file system for every job would cost milliseconds once it has files in it. So one that a job left as it found it
serves the next. That is judged here, where no job reaches, and only when nothing that a job started is alive.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

TMP = "/tmp"
INODES = 16384
MS_NOSUID, MS_NODEV, MS_NOATIME = 2, 4, 1024
MNT_DETACH = 2
CLOCK_REALTIME_COARSE = 5

LIBC = ctypes.CDLL(None, use_errno=True)

Furnish = Callable[[], None]


def _call(function: str, *arguments: Any) -> None:
  if getattr(LIBC, function)(*arguments) != 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{function}: {os.strerror(code)}")


def _look(path: str) -> tuple[int, ...]:
  """What shows any change to a file. Every change sets the time of it (`st_ctime`), which no owner can set back.

  There are two exceptions: writing through memory shared with the file, which the filter of system calls refuses, and
  reserving space. The rest counts while the clock of changes has not ticked yet.
  """
  s = os.lstat(path)
  times = s.st_ctime_ns, s.st_mtime_ns, s.st_atime_ns
  return *times, s.st_ino, s.st_mode, s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_blocks


class Tmp:
  """The /tmp of one job after another: memory of limited size that holds what a harness furnishes, or nothing.

  Args:
    size: bytes that all files may have.
    user: id of the user, and of the group, whose files the furniture becomes; the caller's own if None.
  """

  def __init__(self, size: int, user: int | None):
    self.options = f"size={size},nr_inodes={INODES},mode=1777".encode()
    self.user = user
    self.mount()
    self.prompt = self._times_are_fine()

  def mount(self) -> None:
    """Lays a new, empty file system over /tmp."""
    # no times of access: they would tell a job what the one before read
    _call("mount", b"tmpfs", TMP.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOATIME, self.options)
    self._remember(None)

  def unmount(self) -> None:
    """Takes it away with all that it holds."""
    # even if files are still open: sockets that hold each other keep them so for a while after their processes
    _call("umount2", TMP.encode(), MNT_DETACH)

  def lay(self, furnish: Furnish | None) -> None:
    """Makes sure that it holds what `furnish`, called there as the jobs' user, leaves, and nothing else."""
    if furnish is self.furnished:
      return
    if self.furnished:
      self.unmount()
      self.mount()
    if furnish:
      with self._as_user():
        os.chdir(TMP)
        try:
          furnish()
        finally:
          os.chdir("/")
      self._remember(furnish)
      self._let_time_pass()

  def clear(self) -> None:
    """Makes it empty unless it is exactly as it was laid."""
    if not self._is_untouched():
      self.unmount()
      self.mount()

  def _remember(self, furnished: Furnish | None) -> None:
    self.furnished = furnished
    self.paths = list(_walk(TMP)) if furnished else []
    self.state = self._survey()

  def _survey(self) -> tuple[Any, ...]:
    return _look(TMP), os.listxattr(TMP), os.listdir(TMP), [_look(path) for path in self.paths]

  def _is_untouched(self) -> bool:
    try:
      return self._survey() == self.state
    except OSError:  # something is gone, or closed to us
      return False

  def _let_time_pass(self) -> None:
    """Returns when a change must get a later time than what there is; the kernel's clock may tick every 10 ms only."""
    newest = max(look[0] for look in self.state[3]) if self.paths else 0
    while not self.prompt and time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= newest:
      time.sleep(0.0005)

  def _times_are_fine(self) -> bool:
    """Whether each change gets a time of its own where the one before was looked at (Linux 6.13 and later)."""
    times = []
    for _ in range(10):
      os.chmod(TMP, 0o1777)
      times.append(os.stat(TMP).st_ctime_ns)
    self._remember(None)
    return len(set(times)) == len(times)

  @contextlib.contextmanager
  def _as_user(self) -> Iterator[None]:
    if self.user is None:
      yield
      return
    group, user = os.getegid(), os.geteuid()
    os.setegid(self.user)
    os.seteuid(self.user)
    try:
      yield
    finally:
      os.seteuid(user)
      os.setegid(group)


def _walk(folder: str) -> Iterator[str]:
  for entry in os.scandir(folder):
    yield entry.path
    if entry.is_dir(follow_symlinks=False):
      yield from _walk(entry.path)
