"""A small set of samples of every kind in the published form, and models that are scripts."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp

from cqd_jax.genotypes.space import dense_space, population_of_one
from cqd_jax.tasks import Request, TextProblem

SAME_NUMBER = "from sys import argv\nexit(int(argv[1]) != int(argv[2]))\n"
ADDED = "#include <cstdlib>\nint main(int, char** argv) { return std::atoi(argv[1]) == 5 ? 0 : 1; }\n"

SAMPLES = {
  "1": [
    {
      "description": "How many lines of /usr/orders.log say Sell?",
      "create": {"init": {"file": "init/orders.sh"}},
      "evaluation": {
        "check": [None, {"language": "python", "file": "check/same.py"}],
        "example": {"code": "grep -c Sell /usr/orders.log"},
      },
    },
    {
      "description": "Execute ~/secret and tell what it prints.",
      "start": (
        "useradd -m -s /bin/bash ann && cd /home/ann && echo 'echo plum' >secret && chmod 000 secret"
        " && chown ann secret && su - ann"
      ),
      "evaluation": {"match": "plum", "example": "chmod 700 secret && ~/secret"},
    },
  ],
  "2": [
    {
      "description": "Let /notes be read by bob, not by eve.",
      "create": {"init": ["echo hi >/notes; chmod 600 /notes", {"code": "for n in bob eve; do useradd -m $n; done"}]},
      "evaluation": {
        "check": [
          {"code": "su bob -c 'cat /notes'"},
          {"code": "! su eve -c 'cat /notes'"},
        ],
        "example": "groupadd readers && usermod -a -G readers bob && chgrp readers /notes && chmod 640 /notes",
      },
    },
    {
      "description": "Make a command `double` that prints twice its argument.",
      "evaluation": {
        "check": {"code": '[ "$(double 21)" = 42 ] && [ "$(double -1)" = -2 ]'},
        "example": "printf '#!/bin/sh\\necho $((2 * $1))\\n' >/usr/local/bin/double; chmod +x /usr/local/bin/double",
      },
    },
    {
      "description": "A program writes to /var/beats every moment. Stop it.",
      "create": {"init": "(while :; do date >>/var/beats; sleep 0.05; done) >/dev/null 2>&1 &"},
      "evaluation": {
        "check": {"code": "a=$(stat -c %s /var/beats); sleep 0.3; [ $a = $(stat -c %s /var/beats) ]"},
        "example": "pkill -f 'while :' || kill $(ps -eo pid,args | awk '/while :/ && !/awk/ {print $1}')",
      },
    },
    {
      "description": "What is 2 + 3?",
      "evaluation": {"check": {"language": "c++", "code": ADDED}, "example": "echo $((2 + 3))"},
    },
  ],
}
ORDERS = "for i in {1..50}; do a=(Buy Sell); echo ${a[RANDOM % 2]} $RANDOM; done >/usr/orders.log\n"

# What only a system of several users can have.
NEED_USERS = {"Execute ~/secret and tell what it prints.", "Let /notes be read by bob, not by eve."}


def write_samples(folder: Path, samples: dict[str, list[dict[str, object]]]) -> Path:
  """Puts samples into a folder as they are published."""
  for group, own in samples.items():
    for name in (f"data/{group}", f"scripts/{group}/init", f"scripts/{group}/check"):
      (folder / name).mkdir(parents=True)
    (folder / "data" / group / "own.json").write_text(json.dumps(own))
    (folder / "scripts" / group / "init" / "orders.sh").write_text(ORDERS)
    (folder / "scripts" / group / "check" / "same.py").write_text(SAME_NUMBER)
  return folder


class Scripted:
  """An engine whose answers a function finds from the sample's problem and what the model was told since."""

  fingerprint = "scripted"

  def __init__(self, policy: Callable[[str, Sequence[str]], str]):
    self.policy = policy

  def generate(self, individuals, requests: Sequence[Sequence[Request]]) -> list[list[str]]:
    return [[self._answer(request) for request in own] for own in requests]

  def _answer(self, request: Request) -> str:
    told = [message.content for message in request.messages if message.role == "user"]
    begun = next(place for place in reversed(range(len(told))) if "problem:\n\n" in told[place])
    return self.policy(told[begun].split("problem:\n\n")[-1], told[begun + 1 :])


def acts(code: str) -> str:
  return f"Think: so.\n\nAct: bash\n\n```bash\n{code}\n```"


def gold(examples: dict[str, str]) -> Callable[[str, Sequence[str]], str]:
  """Executes the published example, and answers what it prints."""

  def policy(problem: str, told: Sequence[str]) -> str:
    if not told:
      return acts(examples[problem])
    printed = told[0].removeprefix("The output of the OS:\n\n").strip()
    return "Act: finish" if "\n" in printed or "is empty" in printed else f"Think: so.\n\nAct: answer({printed})"

  return policy


def scores(task, execute, policy, split="train"):
  """The score of each sample, through the path of a real model."""
  problem = TextProblem([task], Scripted(policy), execute, max_new_tokens=8)
  model = {"w": jnp.zeros(2)}
  return problem.score(split, population_of_one(model), dense_space(model, population_of_one(model))).values[0, 0]
