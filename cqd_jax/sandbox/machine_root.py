"""The root file system and the users of a machine. Runs inside bubblewrap: only the standard library.

Every file of the root may be changed, and nothing stays: /usr is an overlay whose changes, as all else, are in memory.
"""

import contextlib
import ctypes
import os
import resource
import struct
from typing import Any

STAGE = "/machine"
ROOT = f"{STAGE}/root"

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = (
  0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
  1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
MNT_DETACH = 2
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR, PIVOT_ROOT = 428, 429, 442, {"x86_64": 155, "aarch64": 41}
OPEN_TREE_CLONE, AT_EMPTY_PATH, AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH, MOUNT_ATTR_IDMAP = 1, 0x1000, -100, 4, 0x100000

SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
NO_NODE = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sysrq-trigger", "/proc/kmsg")
READ_ONLY = ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/acpi", "/proc/scsi")

RANDOM = ("/dev/random", "/dev/urandom")
"""Until a machine is settled, what it finds here begins alike each time."""

LIBC = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Any) -> int:
  """Calls a function of the C library; raises OSError where it fails."""
  result = int(getattr(LIBC, function)(*arguments))
  if result < 0:
    code = ctypes.get_errno()
    raise OSError(code, f"{function}{arguments}: {os.strerror(code)}")
  return result


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
  """As the system call; an empty `kind` is none."""
  call("mount", source.encode(), target.encode(), kind.encode() or None, flags, options.encode())


class Users:
  """The machine's users, a user namespace: its root is `base` outside, user n is `base` + n.

  Attributes:
    descriptor: of the namespace.
    base: None for a machine that has a single user: its root is the caller.
    beneath: whether the caller is in a user namespace of its own already, an ordinary user.
  """

  def __init__(self, base: int | None, count: int, processes: int, *, beneath: bool):
    self.base, self.beneath = base, beneath
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
      try:
        # The limit that holds when the namespace is made is that of all its users together.
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        if base is not None:
          os.setgroups([])
          os.setresgid(base, base, base)
          os.setresuid(base, base, base)
        call("unshare", CLONE_NEWUSER)
        os.write(ready[1], b"1")
        os.close(go[1])
        os.read(go[0], 1)
      finally:
        os._exit(0)
    os.close(ready[1])
    if not os.read(ready[0], 1):
      raise OSError("no user namespace can be made inside bubblewrap's")
    for kind, own in (("uid", os.getuid()), ("gid", os.getgid())):
      first, number = (own, 1) if base is None else (base, count)
      with open(f"/proc/{child}/{kind}_map", "w") as file:
        file.write(f"0 {first} {number}")
    self.descriptor = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    for descriptor in (ready[0], *go):
      os.close(descriptor)
    os.waitpid(child, 0)

  def own(self, path: str, user: int = 0, group: int = 0) -> None:
    """Makes a file that of a user of the machine, where it has several."""
    if self.base is not None:
      os.chown(path, self.base + user, self.base + group, follow_symlinks=False)


def _identity_mapped(path: str, target: str, users: Users) -> None:
  """Mounts `path` where its owners are the machine's users of the same numbers."""
  tree = call("syscall", OPEN_TREE, AT_FDCWD, path.encode(), OPEN_TREE_CLONE)
  try:
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_IDMAP, 0, 0, users.descriptor)
    call("syscall", MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes))
    call("syscall", MOVE_MOUNT, tree, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
  finally:
    os.close(tree)


def _copy_folders(lower: str, upper: str, users: Users, depth: int = 3) -> None:
  """Makes the folders of `lower` the machine's root's own, so that it can at least put files into them."""
  for entry in os.scandir(lower):
    if entry.is_dir(follow_symlinks=False):
      folder = f"{upper}/{entry.name}"
      os.mkdir(folder, 0o755)
      users.own(folder)
      if depth > 1:
        with contextlib.suppress(PermissionError):
          _copy_folders(entry.path, folder, users, depth - 1)


def _lay_over(name: str, users: Users, closed: list[str]) -> None:
  """Mounts the host's /`name` in the machine's root, under a layer that takes all changes."""
  lower, upper, work = (f"{STAGE}/{kind}/{name}" for kind in ("lower", "upper", "work"))
  for folder in (lower, upper, work, f"{ROOT}/{name}"):
    os.makedirs(folder)
    users.own(folder)
  try:
    if users.beneath:
      raise OSError("an ordinary user maps nobody's files")
    _identity_mapped(f"/{name}", lower, users)
  except OSError:
    lower = f"/{name}"
    _copy_folders(lower, upper, users)
    for path in closed:
      if path.startswith(f"/{name}/"):
        os.makedirs(f"{STAGE}/upper{path}", exist_ok=True)
        os.setxattr(f"{STAGE}/upper{path}", "user.overlay.opaque", b"y")  # as if there were nothing in it
  options = f"lowerdir={lower},upperdir={upper},workdir={work}"
  mount("overlay", f"{ROOT}/{name}", "overlay", MS_NODEV, options + (",userxattr" if users.beneath else ""))


def build_root(settings: dict[str, Any], users: Users) -> None:
  """Makes the root file system in `ROOT`; all that can be written lies in memory of limited size."""
  limits = settings["limits"]
  options = f"size={limits['disk_bytes']},nr_inodes={limits['files']},mode=755"
  mount("tmpfs", STAGE, "tmpfs", MS_NODEV, options)
  os.mkdir(ROOT, 0o755)
  users.own(ROOT)
  for name in SYSTEM:
    if os.path.islink(f"/{name}"):
      os.symlink(os.readlink(f"/{name}"), f"{ROOT}/{name}")
    elif os.path.isdir(f"/{name}"):
      _lay_over(name, users, settings["closed"])
  if os.path.exists("/usr/bin/python3"):  # else it may be in /usr/local, whose other content is the host's own affair
    os.mkdir(f"{STAGE}/local", 0o755)
    mount(f"{STAGE}/local", f"{ROOT}/usr/local", "", MS_BIND)
  _furnish(settings, users)
  os.makedirs(f"{ROOT}/dev/shm")
  for name in ("null", "zero", "full", "random", "urandom"):
    with open(f"{ROOT}/dev/{name}", "w"):
      pass
    mount(f"/dev/{name}", f"{ROOT}/dev/{name}", "", MS_BIND)
  with open(f"{STAGE}/alike", "wb") as file:
    file.write(_alike())
  os.chmod(f"{STAGE}/alike", 0o444)
  for name in RANDOM:
    mount(f"{STAGE}/alike", f"{ROOT}{name}", "", MS_BIND)
  for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
    os.symlink(f"/proc/self/{target}", f"{ROOT}/dev/{name}")
    users.own(f"{ROOT}/dev/{name}")
  os.chmod(f"{ROOT}/dev/shm", 0o1777)
  mount(ROOT, ROOT, "", MS_BIND | MS_REC)


def _alike() -> bytes:
  """A megabyte of what looks random, by a linear congruential generator; it repeats itself after 16 KiB."""
  state, words = 2023, []
  for _ in range(4096):
    state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    words.append(state >> 32)
  return struct.pack("=4096I", *words) * 64


def _copy(source: str, target: str) -> None:
  """Copies a folder with all that is in it. (`shutil` takes longer to import than all of this to do.)"""
  os.mkdir(target, 0o755)
  for entry in os.scandir(source):
    path = f"{target}/{entry.name}"
    if entry.is_symlink():
      os.symlink(os.readlink(entry.path), path)
    elif entry.is_dir():
      _copy(entry.path, path)
    else:
      with open(entry.path, "rb") as read, open(path, "wb") as written:
        written.write(read.read())


def _furnish(settings: dict[str, Any], users: Users) -> None:
  """Puts folders and files into the root that are the machine's own, and a few of the host's."""
  _copy("/etc", f"{ROOT}/etc")
  for path, mode in settings["folders"].items():
    os.makedirs(ROOT + path, exist_ok=True)
    os.chmod(ROOT + path, mode)
  os.symlink("/run", f"{ROOT}/var/run")
  for path, (mode, text) in settings["files"].items():
    os.makedirs(os.path.dirname(ROOT + path), exist_ok=True)
    with open(ROOT + path, "w") as file:
      file.write(text)
    os.chmod(ROOT + path, mode)
  for top in (ROOT, f"{ROOT}/usr/local"):
    for folder, folders, names in os.walk(top):
      for name in (*folders, *names):
        users.own(f"{folder}/{name}")
      folders[:] = [name for name in folders if top != ROOT or name not in SYSTEM]
  for path, (user, group) in settings["owners"].items():
    users.own(ROOT + path, user, group)


def shut_proc() -> None:
  """Closes what of /proc is about the host, or would change it."""
  for path in NO_NODE:
    if os.path.exists(ROOT + path):
      mount("/dev/null", ROOT + path, "", MS_BIND)
  if os.path.isdir(f"{ROOT}/proc/tty/driver"):  # closed to the machine's root, who is used to look everywhere
    mount(f"{ROOT}/sys", f"{ROOT}/proc/tty/driver", "", MS_BIND)
  for path in READ_ONLY:
    if os.path.isdir(ROOT + path):
      mount(ROOT + path, ROOT + path, "", MS_BIND | MS_REC)
      mount("", ROOT + path, "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
