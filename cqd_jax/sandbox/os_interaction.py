"""What executes the task "os_interaction": a machine of its own for each dialogue."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from cqd_jax.sandbox.docker_machine import DockerMachine, why_no_docker
from cqd_jax.sandbox.machine import Machine, MachineDied, MachineLimits, find_mode
from cqd_jax.sandbox.sandbox import SandboxUnavailable
from cqd_jax.sandbox.shell_session import SEED, Done, Running, Session, run_script
from cqd_jax.tasks.execution import Execute, Job, Outcome, Service
from cqd_jax.tasks.os_interaction.dialogue import OsInteraction, read_instruction
from cqd_jax.tasks.os_interaction.samples import read_samples, share_out
from cqd_jax.tasks.task import Split

NAME = "os_interaction"
VERSION = 1
"""Of the meaning of outcomes: scores of another version are not taken for those of this one."""

LIVE = 512
LIVE_BYTES = 24 << 20
"""Machines that may wait for the next command of their dialogue, and what memory one needs; others are made again."""

COMPILERS = {"c++": "g++", "c": "gcc"}
COMPILE = 'printf %s "$1" | "$2" -x "$3" -o "$4" -'

Driver = Literal["bubblewrap", "docker"]


@runtime_checkable
class AnyMachine(Protocol):
  """What `Machine` and `DockerMachine` have in common."""

  python: str

  def spawn(self, argv: Sequence[str], *, apart: bool = False) -> Running:
    """Starts a program."""

  def settle(self) -> None:
    """Says that the machine is set up."""

  def changed(self) -> str:
    """The path of a file that checks are carried out by and that was changed."""

  def abort(self) -> None:
    """Kills it, while another thread may be using it; it has to be closed nonetheless."""

  def close(self) -> None:
    """Ends the machine."""


def os_interaction(
  *,
  sizes: Mapping[Split, int],
  seed: int = 0,
  data: str,
  rounds: int = 8,
  instruction: str = "",
  driver: Driver = "bubblewrap",
  image: str = "ubuntu",
  command_seconds: float = 10.0,
) -> OsInteraction:
  """The task "os_interaction" on the published samples.

  Args:
    sizes: samples per split.
    seed: by which they are drawn.
    data: the published folder; it holds `data` and `scripts`.
    rounds: answers that the model may give; 5 in the paper.
    instruction: a text file with an instruction of your own.
    driver: what makes the machines: bubblewrap or docker.
    image: of docker.
    command_seconds: a command that takes longer is ended.

  Raises:
    ValueError: naming the setting, or the file and field of the data, that cannot be used.
  """
  limits = MachineLimits(command_seconds=command_seconds)
  samples = read_samples(Path(data).expanduser())
  splits = share_out(samples, sizes, seed, data)
  if driver == "bubblewrap":
    _check_languages({language: s.name for own in splits.values() for s in own for language in s.languages})
  service = machines(driver=driver, image=image, limits=limits)
  return OsInteraction(splits, service, rounds=rounds, instruction=read_instruction(instruction), in_order=samples)


def _check_languages(languages: Mapping[str, str]) -> None:
  for language, compiler in COMPILERS.items():
    if language in languages and shutil.which(compiler) is None:
      raise ValueError(f"data: {languages[language]} has a script in {language}, and {compiler} is not installed")


def machines(*, driver: Driver = "bubblewrap", image: str = "ubuntu", limits: MachineLimits | None = None) -> Service:
  """The service that gives each dialogue a machine of its own."""
  own = limits or MachineLimits()
  made_by = f"docker {image}" if driver == "docker" else driver
  fingerprint = f"{NAME}-{VERSION} {made_by} {json.dumps(dataclasses.asdict(own))}"
  return Service(NAME, fingerprint, functools.partial(_start, driver, image, own))


@contextlib.contextmanager
def _start(driver: Driver, image: str, limits: MachineLimits, workers: int, unsafe: bool) -> Iterator[Execute]:
  """Opens what executes jobs.

  Raises:
    SandboxUnavailable: if nothing here makes machines. `unsafe` changes nothing: the answers of this task ruin systems.
  """
  del unsafe
  with Player(_maker(driver, image, limits), limits, workers) as player:
    yield player


def _maker(driver: Driver, image: str, limits: MachineLimits) -> Callable[[], AnyMachine]:
  if driver == "docker":
    if reason := why_no_docker():
      raise SandboxUnavailable(f"{NAME}: docker makes no machines here: {reason}")
    return lambda: DockerMachine(image, limits)
  mode, reason = find_mode()
  if mode is None:
    raise SandboxUnavailable(f"{NAME}: nothing makes machines here: {reason}")
  return lambda: Machine(mode, limits)


class Played:
  """A dialogue as far as it was played in its machine."""

  def __init__(self, machine: AnyMachine, limits: MachineLimits):
    self.machine, self._limits = machine, limits
    self._session = Session(machine.spawn, limits.command_seconds, limits.output_bytes)

  def set_up(self, init: Sequence[Sequence[str]], start: str) -> None:
    """What comes before the dialogue. Whether it goes well is not asked, as published."""
    self._session.run("")
    for language, code in init:
      self._script(language, f"RANDOM={SEED}\n{code}" if language == "bash" else code, ())
    if start:
      self._session.run(start)
    self.machine.settle()

  def say(self, command: str) -> dict[str, Any]:
    """Executes a command; what it printed."""
    output, late = self._session.run(command)
    note = f"[ended: it took more than {self._limits.command_seconds:g} s]" if late else ""
    return {"output": "\n".join(filter(None, (output.rstrip("\n") if late else output, note)))}

  def check(self, answer: str, checks: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Executes checks, up to the first that fails: their exit codes, and the tail of what they printed."""
    codes: list[int | None] = []
    parameters, changed = [answer], self.machine.changed()
    for language, code in () if changed else checks:
      done = self._script(language, code, parameters)
      codes.append(done.code)
      parameters.append(done.output)
      if done.code != 0:
        break
    return {"codes": codes, "outputs": [output[-500:] for output in parameters[1:]], "changed": changed}

  def close(self) -> None:
    """Ends the machine."""
    self._session.close()
    self.machine.close()

  def _script(self, language: str, code: str, parameters: Sequence[str]) -> Done:
    if language == "bash":
      return self._run(["/bin/bash", "-c", code, *(("--", *parameters) if parameters else ())])
    if language == "python":  # what was compiled before is not believed
      return self._run([self.machine.python, "-B", "-X", "pycache_prefix=/dev/null", "-c", code, *parameters])
    program = "/run/compiled"
    done = self._run(["/bin/bash", "-c", COMPILE, "--", code, COMPILERS[language], language, program])
    return self._run([program, *parameters]) if done.code == 0 else done

  def _run(self, argv: Sequence[str]) -> Done:
    return run_script(
      functools.partial(self.machine.spawn, apart=True), argv, self._limits.script_seconds, self._limits.output_bytes
    )


class Player:
  """Plays jobs, `workers` at a time, each in a machine of its own.

  A machine whose dialogue may go on is kept; without it the next job plays all from the beginning, to the same end.
  """

  def __init__(self, make: Callable[[], AnyMachine], limits: MachineLimits, workers: int):
    self._make, self._limits = make, limits
    self._room = _room()
    self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix=NAME)
    self._live: dict[str, Played] = {}
    self._open: set[Played] = set()
    self._lock = threading.Lock()

  def __enter__(self) -> "Player":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)
    if kind:  # nobody waits for the commands that still run
      for played in list(self._open):
        played.machine.abort()
    self._threads.shutdown()
    self._live.clear()
    for played in list(self._open):
      self._end(played)

  def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
    """The outcomes, in the order of the jobs."""
    wanted = {_key(job, _before(job)) for job in jobs}
    with self._lock:
      stale = [self._live.pop(key) for key in list(self._live) if key not in wanted]
    for played in stale:
      self._end(played)
    return list(self._threads.map(self._play, jobs))

  def _play(self, job: Job) -> Outcome:
    try:
      return self._play_once(job)
    except MachineDied as error:
      return Outcome("killed", detail=str(error))

  def _play_once(self, job: Job) -> Outcome:
    payload, before = job.payload, _before(job)
    with self._lock:
      played = self._live.pop(_key(job, before), None)
    rest = payload["commands"][len(before) :]
    is_new = played is None
    played = played or self._begin()
    value: dict[str, Any] = {"output": ""}
    try:
      if is_new:
        played.set_up(payload["init"], payload["start"])
        rest = payload["commands"]
      for command in rest:
        value = played.say(command)
      if "checks" in payload:
        value = played.check(payload["answer"], payload["checks"])
    except BaseException:
      self._end(played)
      raise
    self._keep("" if "checks" in payload else _key(job, payload["commands"]), played)
    return Outcome("ok", value)

  def _begin(self) -> Played:
    """A machine in which nothing was played yet.

    Raises:
      RuntimeError: if none can be made, which is not for the answer to answer for.
    """
    try:
      played = Played(self._make(), self._limits)
    except MachineDied as error:
      raise RuntimeError(f"{NAME}: no machine could be made: {error}") from error
    with self._lock:
      self._open.add(played)
    return played

  def _keep(self, key: str, played: Played) -> None:
    with self._lock:
      if key and key not in self._live and len(self._live) < self._room:
        self._live[key] = played
        return
    self._end(played)

  def _end(self, played: Played) -> None:
    with self._lock:
      self._open.discard(played)
    played.close()


def _room() -> int:
  """How many machines may be kept: they take a quarter of the memory that is free now."""
  found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
  free = int(found[1]) << 10 if found else 1 << 30
  return max(min(free // 4 // LIVE_BYTES, LIVE), 1)


def _before(job: Job) -> Sequence[str]:
  """The commands that were executed before this job, if its dialogue was played so far."""
  commands: Sequence[str] = job.payload["commands"]
  return commands if "checks" in job.payload else commands[:-1]


def _key(job: Job, commands: Sequence[str]) -> str:
  """Of the state of a machine: what was set up, and the commands since."""
  return json.dumps([job.payload["init"], job.payload["start"], list(commands)])
