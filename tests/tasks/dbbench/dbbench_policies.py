"""Scripted models that test the task, and the score that each must get."""

import jax.numpy as jnp
from dbbench_cases import TABLE

from cqd_jax.genotypes.space import dense_space
from cqd_jax.tasks import TextProblem
from cqd_jax.tasks.dbbench import gold_turns


def operate(statement):
  return f"Let me see.\n\nAction: Operation\n```sql\n{statement}\n```"


def answer(text):
  return f"Action: Answer\nFinal Answer: {text}"


CLAIM = "'); DROP TABLE t; --"
POLICIES = {
  "gold": lambda example, turn: gold_turns(example)[turn],
  "empty": lambda example, turn: "",
  "malformed": lambda example, turn: f"Operation: {example.answer}\n```sql\n{example.answer}\n```",
  "always wrong": lambda example, turn: answer("['certainly not']"),
  "looping": lambda example, turn: operate(f"SELECT * FROM `{TABLE}`"),
  "tells the hash": lambda example, turn: answer(f"[\"[('{example.expected['answer_md5']}',)]\"]"),
  "tells the statement": lambda example, turn: answer(str([example.answer])) if example.expected["modifies"] else "",
  "evaluates": lambda example, turn: answer("[__import__('os').environ]"),
  "drops": lambda example, turn: operate(f"DROP TABLE `{TABLE}`") if turn == 0 else answer("[]"),
  "injects": lambda example, turn: operate(CLAIM) if turn < 5 else answer(f"[{CLAIM!r}]"),
  "gold, late": lambda example, turn: operate("SELECT 1") if turn < 4 else gold_turns(example)[turn - 4],
  "gold, too late": lambda example, turn: (
    operate("SELECT 1") if turn < 5 else (operate(example.answer) if example.expected["modifies"] else "")
  ),
}
SCORES = {name: float(name in ("gold", "gold, late")) for name in POLICIES}


class Scripted:
  """An engine whose P individuals are the policies."""

  fingerprint = "scripted"

  def __init__(self, examples):
    self.examples = {example.prompt: example for example in examples}
    self.rounds = 0

  def generate(self, individuals, requests):
    self.rounds += 1
    return [
      [self.turn(policy, request.messages) for request in own]
      for policy, own in zip(POLICIES.values(), requests, strict=True)
    ]

  def turn(self, policy, messages):
    assert [message.role for message in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    return policy(self.examples[messages[2].content], (len(messages) - 3) // 2)


def score_policies(task, execute):
  engine = Scripted(task.examples("test"))
  problem = TextProblem([task], engine, execute, max_new_tokens=512)
  space = dense_space(jnp.zeros(1), jnp.zeros((len(POLICIES), 1)))
  values = problem.score("test", space.experts, space).values[:, 0]
  assert engine.rounds == task.max_turns
  return dict(zip(POLICIES, values.mean(axis=1).tolist(), strict=True))
