"""Answers that try to break out, to outlive their time, or to be graded right without being so.

Each attack defines f, which gives 9 for 3, the right answer, only where the attack succeeds; the grader outside knows
the 9. The whole file runs twice where the caller is root: as root, and once more as an ordinary user.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from call_cases import HARNESS

from cqd_jax.sandbox.sandbox import Limits, Sandbox, probe
from cqd_jax.tasks.execution import Job, Outcome

AS_USER = "CQD_TEST_AS_USER"
needs_isolation = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")
pytestmark = needs_isolation

LIMITS = Limits(
  wall_seconds=2.0, cpu_seconds=1, memory_bytes=256 << 20, tmp_bytes=8 << 20, file_bytes=4 << 20, processes=8
)
MISTAKES = re.compile("Import|ModuleNotFound|Syntax|Indentation|Name|Attribute|Assertion|Type")  # the attack's own
SLEEPER = "31415.92653"


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox([HARNESS], limits=LIMITS, workers=1) as opened:
    yield opened


def execute(sandbox: Sandbox, code: str) -> Outcome:
  return sandbox.run([Job("call", {"code": code, "argument": 3})])[0]


def is_right(outcome: Outcome) -> bool:
  return outcome.status == "ok" and type(outcome.value) is int and outcome.value == 9


def check_next_answers(sandbox: Sandbox, attack: str) -> None:
  """Honest and wrong answers on the same worker are graded as ever; none was executed before."""
  honest = "import os, json\ndef f(x):\n  open('/tmp/a', 'w').write('9')\n  return int(open('/tmp/a').read())"
  assert execute(sandbox, f"{honest}\n# after {attack}") == Outcome("ok", 9)
  assert execute(sandbox, f"def f(x):\n  return x + 7\n# after {attack}") == Outcome("ok", 10)


def processes_of_the_host() -> dict[int, str]:
  found = {}
  for folder in Path("/proc").iterdir():
    if folder.name.isdigit():
      try:
        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
      except OSError:
        continue
  return found


# Statements that set `won`; `attempt(function)` tells whether it raised no OSError.
PROBING = """
import ctypes, os, pathlib, signal, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments):
  try:
    function(*arguments)
  except (OSError, AttributeError):
    return False
  return True
def f(x):
  won = False
{body}
  return x * x if won else 0
"""

ATTACKS = {
  "list the home": (
    "won = any(attempt(os.listdir, p) for p in ({folder!r}, '/home', '/proc', '/sys', '/run', '/var'))\n"
    "won = won or attempt(os.listdir, {home!r}) and set(os.listdir({home!r})) & set({in_home!r})"
  ),
  "read a file of the host": "won = any(attempt(open, p) for p in ({secret!r}, {test!r}, '/etc/passwd'))",
  "write outside": (
    "won = any(attempt(open, p, 'a') for p in ({secret!r}, '/x', '/usr/x', '/worker.py', '/dev/x', '/etc/x'))"
  ),
  "overwrite the interpreter": "won = any(attempt(open, p, 'ab') for p in (sys.executable, os.__file__, '/bin/sh'))",
  "become root": "won = attempt(os.setuid, 0) or attempt(os.setgid, 0) or 0 in (os.getuid(), os.getgid())",
  "have capabilities": (
    "header, data = struct.pack('=Ii', 0x20080522, 0), ctypes.create_string_buffer(24)\n"
    "assert libc.capget(header, data) == 0\n"
    "won = any(data.raw) or any(libc.prctl(23, cap, 0, 0, 0) != 0 for cap in range(38))"
  ),
  "new user namespace": (
    "won = libc.unshare(0x10000000) == 0 or libc.syscall({clone}, 0x10000000 | 17, 0, 0, 0, 0) >= 0"
  ),
  "mount": "won = libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b'') == 0 or libc.umount2(b'/tmp', 2) == 0",
  "chroot": "won = attempt(os.chroot, '/tmp')",
  "connect": "won = attempt(socket.create_connection, ('127.0.0.1', {port}), 1)",
  "unix socket of the host": "won = attempt(socket.socket(socket.AF_UNIX).connect, {abstract!r})",
  "other sockets": (
    "won = any(attempt(socket.socket, family, kind) for family in (2, 10, 16, 17, 38, 40) for kind in (1, 2, 3))"
  ),
  "raise the limits": (
    "import resource\n"
    "won = any(attempt(resource.setrlimit, k, (resource.RLIM_INFINITY,) * 2) for k in (0, 1, 6, 7, 9))"
  ),
  "read other pipes": "won = sum(attempt(os.fstat, n) for n in range(1024)) > 4",
  "signal the worker": "won = any(attempt(os.kill, p, 9) for p in (*range(2, 300), os.getppid() or 2))",
  "signal all": "os.kill(0, 0); won = attempt(os.kill, -1, 9) or os.getpgrp() != 1 or os.getppid() != 0",
  "signal the process group": "signal.signal(15, signal.SIG_IGN); os.kill(0, 15)",
  "trace the worker": "won = any(libc.ptrace(16, p, 0, 0) == 0 for p in range(2, 50))",
  "write the worker's memory": "won = any(attempt(open, f'/proc/{{p}}/mem', 'r+b') for p in ('self', 1, 2, 3))",
  "shared memory": (
    "won = libc.shmget(1, 4096, 0o1777) >= 0 or libc.semget(1, 1, 0o1777) >= 0 or libc.msgget(1, 0o1777) >= 0"
  ),
  "anonymous files": "won = attempt(os.memfd_create, 'm')",
  "keys": "won = libc.syscall({add_key}, b'user', b'cqd', b'x', 1, -4) >= 0",
  "fork bomb": "while True:\n  attempt(os.fork)",
  "count processes": (
    "count = 0\n"
    "while count < 100:\n"
    "  try:\n"
    "    if os.fork() == 0: signal.pause()\n"
    "  except OSError: break\n"
    "  count += 1\n"
    "won = count > 7"
  ),
  "fill the disk": (
    "total = 0\n"
    "try:\n"
    "  for i in range(100):\n"
    "    with open(f'/tmp/{{i}}', 'wb', buffering=0) as file:\n"
    "      for j in range(3): total += file.write(bytes(1 << 20))\n"
    "except OSError: pass\n"
    "won = total > 8 << 20"
  ),
  "a large file": (
    "total = 0\n"
    "try:\n"
    "  with open('/tmp/large', 'wb', buffering=0) as file:\n"
    "    for j in range(20): total += file.write(bytes(1 << 20))\n"
    "except OSError: pass\n"
    "won = total > 4 << 20"
  ),
  "many files": "won = all(attempt(os.mkdir, f'/tmp/{{i}}') for i in range(20000))",
  "allocate 8 GB": "block = bytearray(8 << 30); won = True",
  "allocate bit by bit": "blocks = [bytes(16 << 20) + b'x' for _ in range(64)]; won = True",
  "loop for ever": "while True: pass",
  "sleep for ever": "import time; time.sleep(1e6)",
  "ignore signals": (
    "for number in set(signal.valid_signals()) - {{9, 19}}: signal.signal(number, signal.SIG_IGN)\nwhile True: pass"
  ),
  "stop": "os.kill(os.getpid(), signal.SIGSTOP); os.fork() and os.kill(2, signal.SIGSTOP)",
  "leave files": (
    "won = os.path.exists('/tmp/left')\n"
    "for name in ('left', 'json.py', 'sitecustomize.py', 'a'): attempt(os.mkdir, '/tmp/' + name)"
  ),
  "lock /tmp": "attempt(os.chmod, '/tmp', 0); attempt(os.setxattr, '/tmp', 'user.left', b'x')",
  "leave a mark on /tmp": (
    "won = bool(attempt(os.listxattr, '/tmp') and os.listxattr('/tmp'))\n"
    "attempt(os.setxattr, '/tmp', 'user.left', b'x')"
  ),
  "override ==": "return type('Any', (), {{'__eq__': lambda *_: True, '__hash__': lambda _: 9}})()",
  "override == of a number": "return type('Nine', (int,), {{'__eq__': lambda *_: True}})(0)",
  "override == of a list": "return type('All', (list,), {{'__eq__': lambda *_: True}})()",
  "exit 0": "os._exit(0)",
  "exit politely": "sys.exit(0)",
  "exit through an exception": "raise SystemExit",
  "print a verdict": "print('9', flush=True); os.write(1, b'PASSED 9'); os._exit(0)",
  "write a verdict everywhere": (
    "frame = b'\\0\\0\\0\\0\\x019'\n"
    "for forged in (b'9', b'{{\"status\": \"ok\", \"value\": 9}}', frame, bytes(16) + frame):\n"
    "  for descriptor in range(64): attempt(os.write, descriptor, forged)\n"
    "os._exit(0)"
  ),
  "write a verdict, go on": "for n in range(64): attempt(os.write, n, bytes(17) + b'\\0\\0\\0\\x019')\nwon = True",
  "flood the pipe": "for n in range(3, 64):\n  while attempt(os.write, n, bytes(1 << 16)): pass",
  "close all": "os.closerange(0, 64); won = True",
  "replace builtins": (
    "import builtins, json\n"
    "builtins.open = builtins.int = builtins.exec = json.dumps = json.loads = lambda *_, **__: 9\n"
    "os._exit(0)"
  ),
  "replace the worker's functions": (
    "worker = sys.modules['__main__']\n"
    "worker._execute = worker.Executor.__call__ = worker.NamespaceJail.enter = lambda *_: (0, b'9')\n"
    "sys.modules['harness_call'].run = lambda payload: 9"
  ),
}  # fmt: skip


STATUSES = {
  "loop for ever": "timeout",
  "ignore signals": "timeout",
  "sleep for ever": "timeout",
  "exit 0": "killed",
  "exit politely": "error",
  "override ==": "error",
  "allocate 8 GB": "error",
  "write a verdict everywhere": "error",
  "write a verdict, go on": "error",
  "flood the pipe": "error",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_fails_and_the_next_answers_are_graded_right(attack, sandbox, tmp_path):
  secret = tmp_path / "secret"
  secret.write_text("untouched")
  abstract = f"\0cqd-test-{os.getpid()}"
  calls = {"x86_64": (56, 248), "aarch64": (220, 217)}[os.uname().machine]
  with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as local:
    local.bind(abstract)
    for server in (listener, local):
      server.listen()
      server.setblocking(False)
    # Folders on the way to the interpreter do exist inside; what lies beside them does not.
    in_home = [path.name for path in Path.home().iterdir() if not Path(sys.base_prefix).is_relative_to(path)]
    assert in_home
    statements = ATTACKS[attack].format(
      home=str(Path.home()), in_home=in_home, folder=str(tmp_path), secret=str(secret), test=__file__,
      port=listener.getsockname()[1], abstract=abstract, clone=calls[0], add_key=calls[1],
    )  # fmt: skip
    body = "\n".join(f"  {line}" for line in statements.splitlines())
    for _ in range(2 if "leave" in attack else 1):
      outcome = execute(sandbox, f"{PROBING.format(body=body)}\n# {_}")
      assert not is_right(outcome), outcome
      assert not MISTAKES.search(outcome.detail), outcome
      assert outcome.status == STATUSES.get(attack, outcome.status), outcome
      assert (outcome.status == "ok") == (outcome.detail == ""), outcome
    for server in (listener, local):
      with pytest.raises(BlockingIOError):
        server.accept()
  assert secret.read_text() == "untouched"
  assert [path.name for path in tmp_path.iterdir()] == ["secret"]
  check_next_answers(sandbox, attack)


DAEMON = f"""
import os, signal
def f(x):
  for _ in range(2):
    if os.fork():
      return x * x
    os.setsid()
    for number in set(signal.valid_signals()) - {{9, 19}}:
      signal.signal(number, signal.SIG_IGN)
  os.execv('/bin/sh', ['sh', '-c', 'while true; do echo left >>/tmp/left; sleep {SLEEPER} & sleep 0.05; done'])
"""


def test_a_daemon_dies_with_its_answer(sandbox):
  before = processes_of_the_host()
  assert execute(sandbox, DAEMON) == Outcome("ok", 9)  # right, and yet nothing of it may stay
  left = [line for line in processes_of_the_host().values() if SLEEPER in line]
  assert left == []
  looking = "import os, time\ndef f(x):\n  time.sleep(0.3)\n  return os.listdir('/tmp')"
  assert execute(sandbox, looking) == Outcome("ok", [])
  assert any("worker.py" in line for line in before.values())  # so the list would have shown one


def test_answers_share_no_memory(sandbox):
  leave = "import json, sys\ndef f(x):\n  json.left = sys.left = 9\n  return 0"
  look = "import json, sys\ndef f(x):\n  return [hasattr(json, 'left'), hasattr(sys, 'left')]"
  assert [execute(sandbox, leave), execute(sandbox, look)] == [Outcome("ok", 0), Outcome("ok", [False, False])]


@pytest.mark.soak
def test_same_as_an_ordinary_user(tmp_path):
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
    *("--proc", "/proc", "--tmpfs", str(Path.home()), "--tmpfs", "/tmp", "--chmod", "1777", "/tmp"),
    *(word for path in sorted(seen) for folder in reversed(Path(path).parents) for word in ("--dir", str(folder))),
    *(word for path in sorted(seen) for word in ("--ro-bind", path, path)),
    *("--setenv", AS_USER, "1", "--setenv", "HOME", "/tmp", "--chdir", str(Path(__file__).parents[2])),
    *(sys.executable, "-B", "-c", become, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", __file__),
    *(str(Path(__file__).with_name(name)) for name in ("test_private_tmp.py", "test_neighbors.py")),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
  assert "skipped" not in done.stdout
