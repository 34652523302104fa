"""Machines of their own, by Docker, where there is one: the same as `cqd_jax.sandbox.machine` makes by bubblewrap."""

import contextlib
import itertools
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from cqd_jax.sandbox.machine import START_SECONDS, MachineDied, MachineLimits
from cqd_jax.sandbox.machine_host import GRADERS
from cqd_jax.sandbox.pool import start_process

CLIENT_SECONDS = 20.0


def why_no_docker() -> str | None:
  """Why Docker cannot be used here; None where it can."""
  if shutil.which("docker") is None:
    return "there is no program docker"
  command = ["docker", "version", "--format", "{{.Server.Version}}"]
  try:
    done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
  except (OSError, subprocess.TimeoutExpired) as error:
    return f"docker does not answer ({error})"
  if done.returncode == 0 and done.stdout.strip():
    return None
  said = (done.stderr or done.stdout).strip().splitlines()
  return f"docker has no server: {said[-1]}" if said else "docker has no server"


class DockerProgram:
  """A program that runs in a container; see `cqd_jax.sandbox.machine.Program`."""

  wakes: tuple[int, ...] = ()

  def __init__(self, machine: "DockerMachine", number: int, client: "subprocess.Popen[bytes]"):
    self._machine, self._number, self._client = machine, number, client
    assert client.stdin
    assert client.stdout
    self.stdin, self.output = client.stdin.fileno(), client.stdout.fileno()

  def code(self) -> int | None:
    """How it ended; None as long as it has not."""
    return self._client.poll()

  def kill(self) -> None:
    """Ends it and its process group; what is in another stays until the container ends."""
    self._machine.ask("exec", self._machine.name, "/bin/bash", "-c", f"kill -9 -- -$(cat /run/program-{self._number})")
    self._client.kill()

  def end_input(self) -> None:
    """There is no more for it to read. A second call does nothing."""
    with contextlib.suppress(OSError):
      self._client.stdin.close()  # type: ignore[union-attr]

  def close(self) -> None:
    """Lets go of it; what it started goes on."""
    self.end_input()
    self._client.stdout.close()  # type: ignore[union-attr]
    if self._client.poll() is None:
      self._client.kill()
    self._client.wait()


class DockerMachine:
  """A container; not to be shared by threads. It ends with this process, whose pipe its process 1 reads.

  Docker bounds memory, processes and CPU time; how much is written to the disk it does not.
  """

  python = "python3"

  def __init__(self, image: str, limits: MachineLimits):
    """Starts it.

    Raises:
      MachineDied: with what docker said, if it does not start.
    """
    self.name = f"cqd-{uuid.uuid4().hex}"
    self._numbers = itertools.count()
    options = (
      *("--rm", "--interactive", "--name", self.name, "--hostname", "machine", "--network", "none"),
      *("--pids-limit", str(limits.processes), "--memory", str(limits.memory_bytes)),
      *("--memory-swap", str(limits.memory_bytes), "--ulimit", f"cpu={limits.cpu_seconds}"),
      *("--ulimit", f"fsize={limits.disk_bytes}", "--ulimit", "core=0"),
    )
    command = ["docker", "run", *options, image, "/bin/bash", "-c", "echo ready; read -r"]
    self._process = start_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert self._process.stdout
    if self._process.stdout.readline().strip() != b"ready":
      said = self._process.communicate()[1].decode(errors="replace").strip()
      raise MachineDied(f"docker run {image}: {said}")

  def spawn(self, argv: Sequence[str], *, apart: bool = False) -> DockerProgram:
    """Starts a program as the container's root, in its /; as Docker sets them up, none is apart from the others."""
    del apart
    number = next(self._numbers)
    begin = ["/bin/bash", "-c", f'echo $$ >/run/program-{number}; exec "$@"', "--"]
    command = ["docker", "exec", "--interactive", "--workdir", "/", self.name, *begin, *argv]
    client = start_process(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    return DockerProgram(self, number, client)

  def settle(self) -> None:
    """Says that it is set up, which here makes no difference."""

  def changed(self) -> str:
    """The path of a file that checks are carried out by and that was changed; "" if there is none."""
    paths = [line.partition(" ")[2] for line in self.ask("diff", self.name).splitlines()]
    folders = {str(folder) for path in paths for folder in Path(path).parents}
    for path in sorted(set(paths) - folders):
      if GRADERS.fullmatch(path.lstrip("/")) and "/__pycache__/" not in path:
        return path
    return ""

  def ask(self, *words: str) -> str:
    """What a command of docker prints; "" where it fails."""
    try:
      done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=CLIENT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
      return ""
    return done.stdout if done.returncode == 0 else ""

  def abort(self) -> None:
    """Kills it, while another thread may be using it; it has to be closed nonetheless."""
    self.ask("kill", self.name)

  def close(self) -> None:
    """Ends it. A second call does nothing."""
    if self._process.poll() is None:
      self.ask("kill", self.name)
    with contextlib.suppress(OSError):
      self._process.stdin.close()  # type: ignore[union-attr]
    try:
      self._process.wait(timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    for stream in (self._process.stdout, self._process.stderr):
      if stream:
        stream.close()
