"""Two thousand answers of all kinds on two workers: each is graded as it would be alone."""

import random

import pytest
from call_cases import HARNESS

from cqd_jax.sandbox.sandbox import Limits, Sandbox, probe
from cqd_jax.tasks.execution import Job

pytestmark = [pytest.mark.soak, pytest.mark.skipif(probe() is not None, reason=f"{probe()}")]

KINDS = {
  # by kind: code, status, and the value of a right answer as a function of the argument
  "right": ("def f(x):\n  return x * x", "ok", lambda x: x * x),
  "wrong": ("def f(x):\n  return x + 1", "ok", lambda x: x + 1),
  "large": ("def f(x):\n  return 'a' * 200_000", "ok", lambda x: "a" * 200_000),
  "too large": ("def f(x):\n  return 'a' * (2 << 20)", "overflow", None),
  "error": ("def f(x):\n  raise KeyError(x)", "error", None),
  "no code": ("def f(x) return", "error", None),
  "exit": ("import os\ndef f(x):\n  os._exit(0)", "killed", None),
  "files": ("def f(x):\n  open('/tmp/a', 'w').write(str(x))\n  return int(open('/tmp/a').read())", "ok", lambda x: x),
  "forged": ("import os\ndef f(x):\n  for n in range(3, 64):\n    try: os.write(n, bytes(64))\n    except OSError:\n"
             "      pass\n  return 1", "error", None),
  "child": ("import os\ndef f(x):\n  if os.fork() == 0:\n    while True: pass\n  return x", "ok", lambda x: x),
  "loop": ("def f(x):\n  while True: pass", "timeout", None),
}  # fmt: skip


def test_two_thousand_mixed_answers():
  draw = random.Random(0)
  rare = {"loop", "too large", "large"}
  kinds = [draw.choice(list(KINDS)) for _ in range(2000)]
  kinds = [kind if kind not in rare or draw.random() < 0.2 else "right" for kind in kinds]
  jobs = [
    Job("call", {"code": f"{KINDS[kind][0]}\n# {number}", "argument": number}) for number, kind in enumerate(kinds)
  ]
  with Sandbox([HARNESS], limits=Limits(cpu_seconds=1), workers=2) as sandbox:
    outcomes = sandbox.run(jobs)
  for number, (kind, outcome) in enumerate(zip(kinds, outcomes, strict=True)):
    _, status, value = KINDS[kind]
    assert outcome.status == status, (number, kind, outcome.detail)
    assert outcome.value == (None if value is None else value(number)), (number, kind)
