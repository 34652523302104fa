"""Rounds of dialogues: what a batch of candidates takes besides decoding and executing.

The engine and what executes are scripted and cost nothing, so that what is left is the bookkeeping: requests, jobs,
verdicts, counts and transcripts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case
from cqd_jax.genotypes.space import Candidates, Space, dense_space
from cqd_jax.tasks import Answer, Example, Harness, Job, Message, Outcome, Request, Service, Split, TextProblem

ROUNDS, PROMPT, ANSWER, OBSERVATION = 5, 4000, 600, 800
"""Rounds of a dialogue, and characters as dialogues of agents have them."""


class Scripted:
  """Answers of one length, each dialogue's its own."""

  fingerprint = "scripted"

  def respond(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[Answer]]:
    """See `CountingEngine`."""
    return [
      [Answer(f"{p} {index} {len(request.messages)}".ljust(ANSWER), 1000, 100) for index, request in enumerate(own)]
      for p, own in enumerate(requests)
    ]

  def generate(self, individuals: Candidates, requests: Sequence[Sequence[Request]]) -> list[list[str]]:
    """See `Engine`."""
    return [[answer.text for answer in own] for own in self.respond(individuals, requests)]


class Rounds:
  """A dialogue that goes through all rounds; what is executed are all answers so far."""

  harness: Harness | Service = Harness("rounds", "run = str")
  max_turns = ROUNDS

  def __init__(self, name: str, count: int):
    self.name = name
    self.count = count

  def examples(self, split: Split) -> list[Example]:
    """`count` of them."""
    return [Example(f"{self.name} {split} {number}".ljust(PROMPT), "") for number in range(self.count)]

  def opening(self, example: Example) -> tuple[Message, ...]:
    """The prompt."""
    return (Message("user", example.prompt),)

  def job(self, example: Example, answers: Sequence[str]) -> Job:
    """All answers so far."""
    return Job("rounds", [example.prompt[:40], list(answers)])

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> Message | float:
    """An observation, until the last round."""
    return 1.0 if len(answers) == ROUNDS else Message("user", str(outcome.value).ljust(OBSERVATION))


def execute(jobs: Sequence[Job]) -> list[Outcome]:
  """At no cost."""
  return [Outcome("ok", "done") for _ in jobs]


def cases(quick: bool) -> list[Case]:
  """8 candidates on 24 dialogues of three tasks."""
  candidates, dialogues = (2, 3) if quick else (8, 24)
  tasks = [Rounds(name, dialogues // 3) for name in ("one", "two", "three")]
  problem = TextProblem(tasks, Scripted(), execute, max_new_tokens=512, transcripts={"validation": 2})

  def start() -> tuple[Any, Space]:
    experts = {"w": jnp.zeros((candidates, 1))}
    return experts, dense_space({"w": jnp.zeros(1)}, experts)

  def score(experts: Any, space: Space) -> np.ndarray:
    values: np.ndarray = problem.score("validation", jax.tree.map(jnp.asarray, experts), space).values
    return values

  return [
    Case(
      name="rounds",
      labels={"candidates": candidates, "dialogues": dialogues, "rounds": ROUNDS},
      function=score,
      arguments=start,
      host=True,
      items=ROUNDS,
      item="rounds",
    )
  ]
