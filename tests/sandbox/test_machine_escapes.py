"""Programs that try to break out of their machine, to harm the host, or to outlive their time.

Each attack prints WON only where it succeeds. The whole file runs twice where the caller is root: as root, and once
more as an ordinary user.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cqd_jax.sandbox import subordinate
from cqd_jax.sandbox.machine import Machine, MachineDied, MachineLimits, find_mode
from cqd_jax.sandbox.shell_session import Session, run_script

AS_USER = "CQD_TEST_AS_USER"
MODE, REASON = find_mode()
needs_machines = pytest.mark.skipif(MODE is None, reason=REASON)
pytestmark = needs_machines

LIMITS = MachineLimits(
  command_seconds=3.0, cpu_seconds=2, memory_bytes=256 << 20, disk_bytes=16 << 20, files=4096, processes=24
)
SLEEPER = "16180.33988"

# What follows a name in Python tries one thing.
PYTHON = """
import ctypes, os, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
  try:
    function(*arguments)
  except OSError:
    return False
  return True
def call(*arguments):
  return libc.syscall(*arguments) >= 0
won = False
{body}
print("WON" if won else "lost")
"""

IN_BASH = {
  "read the host's files": "for p in {secret} {test} {home}; do ls $p && echo WON; done",
  "find a home": "[ $(ls /home /root | grep -c .) -gt 3 ] && echo WON",
  "find the host's passwords": "grep -v '^[a-z-]*:[*!]' /etc/shadow && echo WON",
  "read the host's environment": "cat /proc/*/environ | tr '\\0' '\\n' | grep {variable} && echo WON",
  "see the host's processes": "[ $(ls -d /proc/[0-9]* | wc -l) -gt 12 ] && echo WON",
  "see what shuts it in": "grep -l worker[.]py /proc/*/cmdline && echo WON",
  "reach the host's root by a process": "for p in /proc/[0-9]*; do ls $p/root{secret} && echo WON; done",
  "climb out of the root": "cd /; ls ../../../../..{secret} && echo WON; mkdir -p /x; chroot /x /bin/true && echo WON",
  "mount": "mount -t tmpfs none /mnt && echo WON; mount --bind / /mnt && echo WON; umount -l /proc && echo WON",
  "mount a disk": "for d in vda sda nvme0n1; do mknod /tmp/$d b 254 0; mount /tmp/$d /mnt && echo WON; done",
  "make a device": "mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem && echo WON",
  "write to the kernel": (
    "for p in kernel/core_pattern kernel/hostname vm/drop_caches; do (echo 1 >/proc/sys/$p) && echo WON; done"
  ),
  "open the kernel's files": "[ -s /proc/sysrq-trigger ] && echo WON; head -c 1 /proc/kcore | grep . && echo WON",
  "remount": "mount -o remount,rw /proc/sys && echo WON; mount -t proc proc /mnt && echo WON",
  "unshare": "for n in U m p n u i C; do unshare -$n true && echo WON; done",
  "enter a namespace": "nsenter -t 1 -m -u -i -n -p true && echo WON; nsenter -t $PPID -m true && echo WON",
  "raise the limits": "ulimit -u unlimited && echo WON; ulimit -v unlimited && echo WON; ulimit -t 9999 && echo WON",
  "be spared when memory ends": "echo -1000 >/proc/self/oom_score_adj && echo WON",
  "end the first process": "kill -9 1; kill -9 -1; sleep 0.1; echo alive",
  "count processes": "for i in $(seq 100); do sleep 2 & done; [ $(jobs -p | wc -l) -gt 23 ] && echo WON",
  "fill the disk": "head -c 64M /dev/zero >/root/x; [ $(stat -c %s /root/x) -gt 17000000 ] && echo WON",
  "fill another disk": (
    "head -c 30M /dev/zero >/usr/x; head -c 30M /dev/zero >/dev/shm/x; head -c 30M /dev/zero >/tmp/x;"
    " [ $(cat /usr/x /dev/shm/x /tmp/x | wc -c) -gt 17000000 ] && echo WON"
  ),
  "make files without end": "cd /tmp; for i in $(seq 6000); do :>$i; done; [ $(ls | wc -l) -gt 4000 ] && echo WON",
  "set an owner's bit": "cp /bin/bash /tmp/b; chmod 4755 /tmp/b; /tmp/b -pc 'cat {secret}' && echo WON",
  "write to what is read only": "(echo x >{secret}) && echo WON; (echo x >/usr/cqd-was-here) ; rm -rf /usr/share/dict",
  "load a module": "insmod /x.ko && echo WON; modprobe loop && echo WON",
  "restart": "reboot -f && echo WON; poweroff -f && echo WON",
  "set the clock": "date -s '2001-01-01' && echo WON",
  "read what the kernel says": "dmesg | grep . && echo WON",
  "reach the network": "(exec 3<>/dev/tcp/127.0.0.1/{port}) && echo WON",
}  # fmt: skip

IN_PYTHON = {
  "trace the first process": "won = any(libc.ptrace(16, n, 0, 0) == 0 for n in (1, os.getppid()))",
  "new user namespace": "won = libc.unshare(0x10000000) == 0 or call({clone}, 0x10000000 | 17, 0, 0, 0, 0)",
  "connect": "won = attempt(socket.create_connection, ('127.0.0.1', {port}), 1)",
  "unix socket of the host": "won = attempt(socket.socket(socket.AF_UNIX).connect, {abstract!r})",
  "other sockets": "won = any(attempt(socket.socket, f, k) for f in (16, 17, 38, 40) for k in (1, 2, 3))",
  "raw sockets": "won = attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)",
  "shared memory": "won = libc.shmget(1, 4096, 0o1777) >= 0 or libc.semget(1, 1, 0o1777) >= 0",
  "anonymous files": "won = attempt(os.memfd_create, 'm')",
  "keys": "won = call({add_key}, b'user', b'cqd', b'x', 1, -4)",
  "rings": "won = call(425, 8, bytes(120)) or call(441, 0, 0, 0, 0, 0)",
  "allocate 8 GB": "block = bytearray(8 << 30); won = True",
  "have capabilities over mounts": "won = libc.prctl(23, 21, 0, 0, 0) == 1 or libc.prctl(23, 19, 0, 0, 0) == 1",
  "change the host's name": "won = libc.sethostname(b'won', 3) == 0",
  "signal the group of the caller": "won = any(attempt(os.killpg, n, 0) for n in range(2, os.getpgrp()))",
  "inherited descriptors": "won = any(attempt(os.fstat, n) for n in range(3, 1024))",
}


@pytest.fixture
def host(tmp_path, monkeypatch):
  """What an attack may try to reach, and what is looked at after it."""
  secret = tmp_path / "secret"
  secret.write_text("untouched")
  monkeypatch.setenv("CQD_TEST_VARIABLE", "told to nobody")
  abstract = f"\0cqd-machine-{os.getpid()}"
  clone, add_key = {"x86_64": (56, 248), "aarch64": (220, 217)}[os.uname().machine]
  with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
    local.bind(abstract)
    for server in (listener, local):
      server.listen()
      server.setblocking(False)
    yield {
      "secret": secret, "test": __file__, "home": tmp_path.parent, "variable": "CQD_TEST_VARIABLE",
      "abstract": abstract, "port": listener.getsockname()[1], "clone": clone, "add_key": add_key,
    }  # fmt: skip
    for server in (listener, local):
      with pytest.raises(BlockingIOError):
        server.accept()
  assert secret.read_text() == "untouched"
  assert [path.name for path in tmp_path.iterdir()] == ["secret"]
  assert not Path("/usr/cqd-was-here").exists()


@contextlib.contextmanager
def opened(limits=LIMITS):
  machine = Machine(MODE, limits)
  try:
    yield machine
  finally:
    machine.close()


def said(machine, code, limits=LIMITS):
  session = Session(machine.spawn, limits.command_seconds, limits.output_bytes)
  with contextlib.closing(session):
    return session.run(code).output


MISTAKES = ("SyntaxError", "NameError", "syntax error", "TypeError", "unexpected EOF")  # the attack's own


@pytest.fixture(scope="module")
def shared():
  """A machine for attacks that leave it alive."""
  with contextlib.ExitStack() as stack:
    kept = []

    def get():
      if kept and said(kept[0], "echo well").strip() != "well":
        kept.clear()
      if not kept:
        kept.append(stack.enter_context(opened()))
      return kept[0]

    yield get


SPENDS = {
  "count processes",
  "fill the disk",
  "fill another disk",
  "make files without end",
  "write to what is read only",
}


@pytest.mark.parametrize("attack", [*IN_BASH, *IN_PYTHON])
def test_attack_fails(attack, host, shared):
  if attack in IN_BASH:
    code = IN_BASH[attack].format(**host)
  else:
    code = "python3 - <<'END'\n" + PYTHON.replace("{body}", IN_PYTHON[attack].format(**host)) + "END"
  with opened() if attack in SPENDS else contextlib.nullcontext() as fresh:
    output = said(fresh or shared(), code)
  assert "WON" not in output, output
  assert not any(mistake in output for mistake in MISTAKES), output
  assert attack in IN_BASH or "lost" in output or "MemoryError" in output, output


def holders(word):
  found = []
  for folder in Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if word in (folder / "cmdline").read_text():
        found.append(folder.name)
  return found


def wait_until(holds):
  deadline = time.monotonic() + 5
  while not holds() and time.monotonic() < deadline:
    time.sleep(0.02)
  return holds()


BOMBS = {
  "fork bomb": ":() { : | : & }; :",
  "fork bomb in the background": "(f() { f | f & }; f) & sleep 0.5",
  "sleepers": f"for i in 1 2 3; do (trap '' TERM INT HUP; setsid sleep {SLEEPER} >/dev/null 2>&1 &) done",
  "busy ones": "for i in $(seq 15); do (while :; do :; done) & done",
  "memory bit by bit": "for i in 1 2 3 4 5 6; do (head -c 60M /dev/zero | tail; sleep 9) & done; wait",
  "a flood": "yes $(seq 100)",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_with_its_machine_and_others_go_on(bomb):
  began = time.monotonic()
  with opened() as other:
    with opened() as machine, contextlib.suppress(MachineDied):
      said(machine, BOMBS[bomb])
      if bomb == "sleepers":
        assert wait_until(lambda: len(holders(SLEEPER)) == 3)
    assert said(other, "echo well") == "well\n"
  assert holders(SLEEPER) == []
  assert time.monotonic() - began < 30


def test_too_much_memory_ends_the_machine():
  hungry = "for i in $(seq 8); do python3 -c 'b = bytearray(60 << 20); import time; time.sleep(9)' & done; wait"
  with opened() as machine, pytest.raises(MachineDied, match="it used more than 256 MiB of memory"):
    Session(machine.spawn, 5.0, 100).run(hungry)


@pytest.mark.parametrize("apart", [True, False])
def test_who_is_apart_cannot_be_written_to(apart):
  tracer = "for p in /proc/[0-9]*; do grep -q boundar[y] $p/cmdline && (: <>$p/mem) && echo WON; done; echo looked"
  with opened() as machine:
    program = machine.spawn(["/bin/bash", "-c", "echo began; sleep 9; : boundary"], apart=apart)
    assert os.read(program.output, 100) == b"began\n"
    output = said(machine, tracer)
    program.close()
  assert output.endswith("looked\n")
  assert ("WON" in output) != apart, output


def test_a_fresh_machine_has_what_is_expected_of_a_system():
  with opened() as machine:
    assert said(machine, "id -u; id -un; pwd; echo $HOME; hostname") == "0\nroot\n/\n/root\nmachine\n"
    assert said(machine, "touch /x /usr/x /usr/local/bin/x /etc/x /var/x /root/x; echo $?") == "0\n"
    assert said(machine, "find / -name nothing; getent passwd root | cut -d: -f7") == "/bin/bash\n"
    assert said(machine, "apt-get install -y bash && apt install nothing-such") == (
      "bash is already the newest version.\nE: Unable to locate package nothing-such\n"
    )
    assert machine.changed() == ""
    done = run_script(machine.spawn, ["/bin/bash", "-c", "cat; echo $1; exit 4", "--", "a b"], 3.0, 100)
    assert done == (4, "a b\n")
    assert run_script(machine.spawn, ["/bin/bash", "-c", "sleep 9"], 0.3, 100) == (None, "")
    assert run_script(machine.spawn, ["/bin/none"], 3.0, 100).code == 127
    for length, code in ((200_000, 127), (300_000, 126)):
      assert run_script(machine.spawn, ["/bin/bash", "-c", "x" * length], 3.0, 100).code == code


@pytest.mark.skipif(MODE == "user", reason="this user has no subordinate ids: a machine has one user")
def test_a_machine_has_users():
  with opened() as machine:
    code = "useradd -m ann; su - ann -c 'id -un; cd; pwd; touch mine; cat /etc/shadow'; stat -c %U:%G ~ann/mine"
    assert said(machine, code) == "ann\n/home/ann\ncat: /etc/shadow: Permission denied\nann:ann\n"
    assert said(machine, "chown 70000 /tmp 2>&1 | grep -c Invalid") == "1\n"


@pytest.mark.skipif(MODE != "root", reason="to an ordinary user's machine, the host's files are nobody's")
def test_the_host_s_files_may_be_changed():
  with opened() as machine:
    if said(machine, "stat -c %u /usr/bin/find") != "0\n":
      pytest.skip("the file system of /usr cannot be mapped to other users here")
    assert said(machine, "chmod u+s /usr/bin/find; stat -c '%A %U' /usr/bin/find") == "-rwsr-xr-x root\n"
    assert said(machine, "rm /usr/bin/find; type find").startswith("/bin/bash: line")
  assert not os.stat("/usr/bin/find").st_mode & 0o4000


@pytest.mark.parametrize(
  ("name", "value"),
  [("command_seconds", 0.0), ("memory_bytes", 1 << 20), ("processes", 2), ("files", 10), ("disk_bytes", 1 << 50)],
)
def test_limits_out_of_range_are_named(name, value):
  with pytest.raises(ValueError, match=f"{name}: expected "):
    MachineLimits(**{name: value})


def test_subordinate_ids_are_those_of_this_user(tmp_path, monkeypatch):
  monkeypatch.setattr(subordinate.shutil, "which", lambda name: f"/usr/bin/{name}")
  assert subordinate.subordinate_ids("uid", tmp_path) is None  # no such file
  own = os.getuid()
  (tmp_path / "subuid").write_text(f"other:1:99999\n{own}:100:10\n{own}:200000:65536\n")
  assert subordinate.subordinate_ids("uid", tmp_path) == (200000, 65536)
  (tmp_path / "subgid").write_text(f"{own + 1}:100000:65536\n")
  assert subordinate.subordinate_ids("gid", tmp_path) is None
  monkeypatch.setattr(subordinate.shutil, "which", lambda name: None)
  assert subordinate.subordinate_ids("uid", tmp_path) is None


@pytest.mark.soak
def test_same_as_an_ordinary_user():
  if AS_USER in os.environ or os.geteuid() != 0:
    assert os.geteuid() != 0  # this very run is that of an ordinary user
    return
  # The interpreter, this environment and the checkout may lie in a home that only root can enter.
  seen = [path for path in {sys.base_prefix, sys.prefix, str(Path(__file__).parents[2])} if Path(path).is_dir()]
  become = (
    "import os, sys; os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
  )
  command = [
    *("bwrap", "--cap-add", "ALL", "--die-with-parent", "--bind", "/", "/", "--dev-bind", "/dev", "/dev"),
    *("--tmpfs", str(Path.home()), "--chmod", "755", str(Path.home()), "--tmpfs", "/tmp", "--chmod", "1777", "/tmp"),
    *(word for path in sorted(seen) for folder in reversed(Path(path).parents) for word in ("--dir", str(folder))),
    *(word for path in sorted(seen) for word in ("--ro-bind", path, path)),
    *("--setenv", AS_USER, "1", "--setenv", "HOME", "/tmp", "--chdir", str(Path(__file__).parents[2])),
    *(sys.executable, "-B", "-c", become, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__),
    str(Path(__file__).with_name("test_os_machines.py")),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
