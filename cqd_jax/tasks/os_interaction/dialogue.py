"""The dialogue of a model with a shell, and what decides whether it has succeeded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cqd_jax.tasks.episode import Message
from cqd_jax.tasks.execution import JSON, Job, Outcome, Service
from cqd_jax.tasks.os_interaction.actions import observation, parse_action
from cqd_jax.tasks.os_interaction.samples import Sample, Script
from cqd_jax.tasks.task import Example, Split

INSTRUCTION = """\
You work in a shell of a Linux (Ubuntu) system to which I give you access. I will give you a problem: either something \
that is to be done in the system, or a question about it. Solve it step by step. In each turn, first think about what \
to do next, then take exactly one of three actions.

1. To run commands in bash, write

Think: why you run them.

Act: bash

```bash
# the commands
```

2. When all that was to be done is done, write

Think: why it is done.

Act: finish

3. When you know the answer to a question, write

Think: how you know it.

Act: answer(the answer, and nothing else, between these parentheses)

I show you what the commands print; of a long output only the beginning. Commands must not wait for input.

"""

DEMONSTRATION = (
  Message("user", "Here is my problem:\n\nHow many users of this system can log in with bash?"),
  Message(
    "assistant",
    "Think: The shell of each user stands at the end of its line in /etc/passwd.\n\n"
    "Act: bash\n\n```bash\ngrep -c '/bash$' /etc/passwd\n```",
  ),
  Message("user", "The output of the OS:\n\n2\n"),
  Message("assistant", "Think: Two lines end so.\n\nAct: answer(2)"),
)

NO_ANSWER = "None"
"""What checks get in the place of an answer where the model only says that it has finished."""


class OsInteraction:
  """The task "os_interaction": the published samples as an `Episode`.

  A sample succeeds if the answer matches, or if all of its checks end with 0. It fails if an answer names no action, or
  if the rounds are used up. All commands so far go to the service each time; it may keep the shell that has executed
  all but the last.

  Attributes:
    max_turns: answers that the model may give.
    instruction: the user's own, or "".
  """

  name = "os_interaction"

  def __init__(
    self,
    samples: Mapping[Split, Sequence[Sample]],
    service: Service,
    *,
    rounds: int = 8,
    instruction: str = "",
    in_order: Sequence[Sample] = (),
  ):
    """The arguments are as of `os_interaction`, but `instruction` is the text itself; `in_order` are all samples."""
    if rounds < 1:
      raise ValueError(f"rounds: expected rounds >= 1, got {rounds}")
    self._samples = {split: tuple(own) for split, own in samples.items()}
    self.harness = service
    self.max_turns = rounds
    self.instruction = instruction
    self._in_order = tuple(in_order) or tuple(sample for own in self._samples.values() for sample in own)
    self._known = {sample.name: sample for own in (*self._samples.values(), self._in_order) for sample in own}

  def examples(self, split: Split) -> list[Example]:
    """The samples of a split."""
    return list(map(_example, self._samples[split]))

  def samples(self) -> list[Example]:
    """All samples: the groups, their files by name and the samples of each, in this order."""
    return list(map(_example, self._in_order))

  def opening(self, example: Example) -> tuple[Message, ...]:
    """The instruction, a demonstration, the problem; the user's own instruction brings no demonstration."""
    problem = f"my problem:\n\n{example.prompt}"
    if self.instruction:
      return (Message("user", f"{self.instruction}\n\nHere is {problem}"),)
    first, *others = DEMONSTRATION
    begun = Message("user", INSTRUCTION + first.content)
    return (begun, *others, Message("user", f"Now another system, and a new problem. Here is {problem}"))

  def job(self, example: Example, answers: Sequence[str]) -> Job | None:
    """The commands so far; once the model has finished and there are checks, those too."""
    sample = self._known[example.expected["name"]]
    action = parse_action(answers[-1])
    payload: dict[str, JSON] = {
      "init": [list(script) for script in sample.init],
      "start": sample.start,
      "commands": [own.content for own in map(parse_action, answers) if own.kind == "bash"],
    }
    if action.kind == "bash":
      return Job(self.harness.name, payload) if len(answers) < self.max_turns else None
    if action.kind == "none" or not sample.checks:
      return None
    payload["answer"] = action.content if action.kind == "answer" else NO_ANSWER
    payload["checks"] = [list(script) for script in sample.steps]
    return Job(self.harness.name, payload)

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> Message | float:
    """What the commands printed, or whether the sample succeeded."""
    sample = self._known[example.expected["name"]]
    action = parse_action(answers[-1])
    if action.kind == "bash" and len(answers) < self.max_turns:
      output = outcome.value.get("output") if isinstance(outcome.value, dict) else None
      return Message("user", observation(output)) if isinstance(output, str) else 0.0
    if action.kind == "answer" and sample.match:
      return float(sample.match.fits(action.content))
    if action.kind in ("answer", "finish") and sample.checks:
      return float(all_passed(outcome, len(sample.checks)))
    return 0.0

  def action(self, example: Example, answers: Sequence[str]) -> str:
    """The commands of the latest turn, where they are executed."""
    del example
    action = parse_action(answers[-1])
    return action.content if action.kind == "bash" and len(answers) < self.max_turns else ""


def all_passed(outcome: Outcome, count: int) -> bool:
  """Whether all of `count` checks ended with 0, and nothing that they are carried out by was changed."""
  value = outcome.value if outcome.status == "ok" and isinstance(outcome.value, dict) else {}
  codes = value.get("codes")
  return isinstance(codes, list) and [repr(code) for code in codes] == ["0"] * count and value.get("changed") == ""


def read_instruction(path: str) -> str:
  """The user's own instruction, or "" for none. Raises ValueError where it cannot be read or is empty."""
  if not path:
    return ""
  try:
    text = Path(path).read_text(encoding="utf-8").strip()
  except (OSError, ValueError) as error:
    raise ValueError(f"instruction: expected a text file, got {path!r} ({error})") from error
  if not text:
    raise ValueError(f"instruction: expected some text in {path!r}, found none")
  return text


def _example(sample: Sample) -> Example:
  return Example(sample.description, _gold(sample), _expected(sample))


def _gold(sample: Sample) -> str:
  return sample.example.code if sample.example else (sample.match and sample.match.answer) or ""


def _expected(sample: Sample) -> JSON:
  """What grading depends on, in JSON: part of the task's fingerprint too."""

  def plain(scripts: Sequence[Script]) -> list[list[str]]:
    return [list(script) for script in scripts]

  match = list(sample.match) if sample.match else None
  return {"name": sample.name, "init": plain(sample.init), "start": sample.start, "match": match} | {
    "checks": plain(sample.steps)
  }
