"""Scripted models that play MBPP through the same path as a real one, and the score that each must get."""

import json

import jax.numpy as jnp
import pytest

from cqd_jax.genotypes.space import dense_space
from cqd_jax.sandbox.on_demand import SandboxOnDemand
from cqd_jax.sandbox.sandbox import Limits, probe
from cqd_jax.tasks import TextProblem
from cqd_jax.tasks.mbpp import mbpp

pytestmark = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")

SCORES = {
  "gold": 1.0,
  "gold in prose": 1.0,
  "half": 0.5,
  "empty": 0.0,
  "malformed": 0.0,
  "always wrong": 0.0,
  "looping": 0.0,
  "adversarial": 0.0,
}


class Policies:
  """Answers as each policy does; the individuals are the policies' numbers."""

  fingerprint = "policies"

  def __init__(self, gold):
    self._gold = gold

  def generate(self, individuals, requests):
    names = [list(SCORES)[int(number)] for number in individuals.genotypes[:, 0]]
    return [
      [self._answer(name, request.messages[-1].content, place) for place, request in enumerate(own)]
      for name, own in zip(names, requests, strict=True)
    ]

  def _answer(self, policy, prompt, place):
    gold = self._gold[prompt]
    return {
      "gold": gold,
      "gold in prose": f"Certainly! This should do:\n\n{gold}\n\nLet me know if it does not.\n```python\nprint(1)\n```",
      "half": gold if place % 2 else "",
      "empty": "",
      "malformed": "```python\ndef (x) return[",
      "always wrong": "def f(x):\n  return None",
      "looping": "def f(x):\n  while True: x",
      "adversarial": "import os\nclass A:\n  def __eq__(self, other): return True\ndef f(x): return A()\n",
    }[policy]


@pytest.mark.parametrize("prompt", ["chat", "few_shot"])
def test_each_policy_gets_its_score(tmp_path, prompt):
  lines = [
    {"text": f"Write a function f to add {n}.", "code": f"def f(x): return x + {n}", "task_id": number}
    | {"test_list": [f"assert f(1) == {n + 1}"], "test_setup_code": "", "challenge_test_list": []}
    for n, number in enumerate([2, 3, 4, 11, 12, 13, 14, 15, 16, 511, 601])
  ]
  path = tmp_path / "mbpp.jsonl"
  path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  task = mbpp(sizes={"train": 1, "validation": 1, "test": 6}, seed=0, data=str(path), prompt=prompt, seconds=1)
  gold = {example.prompt: example.answer for example in task.samples()}
  numbers = jnp.arange(len(SCORES), dtype=jnp.float32)[:, None]
  space = dense_space(jnp.zeros(1), numbers)
  with SandboxOnDemand([task.harness], workers=2, limits=Limits(wall_seconds=10.0)) as execute:
    problem = TextProblem([task], Policies(gold), execute, max_new_tokens=8)
    scored = problem.score("test", space.experts, space).with_scores()
    (by_task,) = problem.play("test", space.experts[1:2], space)
  assert ("executed", "def f(x): return x + 3") in by_task[0][0].transcript(0, 0).turns  # of gold in prose
  assert scored.scores[:, 0].tolist() == list(SCORES.values())
  assert [len(own) for own in scored.verified] == [round(6 * score) for score in SCORES.values()]
