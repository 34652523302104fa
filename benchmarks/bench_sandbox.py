"""Execution of untrusted answers: answers a second in the sandbox, against an interpreter started for each.

No answer is executed twice (the sandbox remembers), so every run makes new ones. The peer isolates nothing: it is what
evaluation harnesses of code commonly do.
"""

import atexit
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Case
from cqd_jax.sandbox.isolation import PYTHON_FLAGS, interpreter
from cqd_jax.sandbox.sandbox import Sandbox, probe, usable_cpus
from cqd_jax.tasks.execution import Harness, Job

HARNESS = Harness(
  "call",
  """
def run(payload):
  namespace = {}
  exec(payload["code"], namespace)
  return [namespace["f"](argument) for argument in payload["arguments"]]
""",
)
ARGUMENTS = [[3, 1, 2], [], list(range(50))]


def cases(quick: bool) -> list[Case]:
  """One worker, and one for each CPU; none where nothing isolates."""
  if probe() is not None:
    return []
  count = 20 if quick else 400
  return [answers_case(workers, count) for workers in sorted({1, usable_cpus()})]


def answers_case(workers: int, count: int) -> Case:
  """`count` answers of a line of Python, each called with three lists."""
  numbers = itertools.count()

  def execute(sandbox: Sandbox) -> list[Any]:
    outcomes = sandbox.run([Job("call", payload) for payload in _payloads(numbers, count)])
    return [outcome.value for outcome in outcomes]

  def start() -> tuple[Sandbox]:
    sandbox = Sandbox([HARNESS], workers=workers)
    atexit.register(sandbox.close)
    return (sandbox,)

  alone = max(count // 20, 1)
  return Case(
    name="answers",
    labels={"workers": workers, "answers": count},
    function=execute,
    arguments=start,
    host=True,
    items=count,
    item="answers",
    peer=_one_by_one(numbers, alone) if workers == 1 else None,
    peer_name="an interpreter each" if workers == 1 else "",
    peer_items=alone,
  )


def _payloads(numbers: Iterator[int], count: int) -> list[Any]:
  code = "def f(xs):\n  return sum([x + {} for x in xs if x % 2 == 0])\n"
  return [{"code": code.format(next(numbers)), "arguments": ARGUMENTS} for _ in range(count)]


def _one_by_one(numbers: Iterator[int], count: int) -> Callable[[Sandbox], list[Any]]:
  program = f"import json, sys\n{HARNESS.source}\nprint(json.dumps(run(json.load(sys.stdin))))"
  command = [str(interpreter()), *PYTHON_FLAGS, "-c", program]

  def execute(sandbox: Sandbox) -> list[Any]:
    del sandbox
    given = [json.dumps(payload) for payload in _payloads(numbers, count)]
    return [json.loads(subprocess.run(command, input=text, capture_output=True, text=True).stdout) for text in given]

  return execute
