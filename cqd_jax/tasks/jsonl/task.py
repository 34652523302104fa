"""Questions of the user's own, a line each, with the answer and a rule: no Python class, and nothing is executed.

```
{"prompt": "What is 6 times 7?", "answer": 42}
{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 times 7?"}], "answer": 49}
```
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqd_jax.tasks.episode import Message
from cqd_jax.tasks.execution import Outcome
from cqd_jax.tasks.jsonl.rules import RULES, Rule, check_expected, rule_named, score_by
from cqd_jax.tasks.lines import Record, read_records
from cqd_jax.tasks.splits import divide_by_seed, in_several_splits, limited_by_seed
from cqd_jax.tasks.task import Example, Split

WORDS: Mapping[str, Split] = {
  "train": "train",
  "training": "train",
  "validation": "validation",
  "valid": "validation",
  "val": "validation",
  "dev": "validation",
  "test": "test",
}
"""What a field may call the splits."""

MOST_NAMED = 5
"""So many duplicates are named in the warning."""


class Questions:
  """An episode of one turn that executes nothing; see `jsonl` for its settings.

  Attributes:
    name: of the task.
    rule: what compares an answer with the expected one.
  """

  harness = None
  max_turns = 1

  def __init__(self, name: str, rule: Rule, samples: Sequence[Example], splits: Mapping[Split, Sequence[Example]]):
    self.name = name
    self.rule = rule
    self._samples, self._splits = samples, splits

  def examples(self, split: Split) -> Sequence[Example]:
    """The questions of a split."""
    return self._splits[split]

  def samples(self) -> Sequence[Example]:
    """All questions of the file, in its order."""
    return self._samples

  def opening(self, example: Example) -> tuple[Message, ...]:
    """The line's messages."""
    return tuple(Message(role, content) for role, content in example.expected["messages"])

  def job(self, example: Example, answers: Sequence[str]) -> None:
    """Nothing."""

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> float:
    """What the rule says."""
    del outcome
    return score_by(self.rule, answers[-1], example.expected["answer"])


def jsonl(
  *, sizes: Mapping[Split, int], seed: int, data: str, rule: str, name: str = "", split_by: str = ""
) -> Questions:
  """Questions of your own from a file, without a Python class and without a sandbox.

  Args:
    sizes: samples per split.
    seed: of the splits, or of the subsets of those that a field names.
    data: the file; each line has `prompt` (or `messages`) and `answer`.
    rule: exact, contains, numeric (the last number), regex (found within a second), or package.module:function, which
      gets the model's text and the answer and returns True, False or a number.
    name: of the task; empty: that of the file.
    split_by: the field that says train, validation (valid, val, dev) or test; empty: they are drawn by seed.

  Raises:
    ValueError: naming the file and the line, or the setting.
  """
  path = Path(data).expanduser()
  judge = rule_named(rule)
  records = read_records(path)
  samples = [_example(record, rule) for record in records]
  places = _places(records, sizes, seed, str(path), split_by)
  if found := in_several_splits(
    {split: [(samples[place].prompt, records[place].where) for place in own] for split, own in places.items()}
  ):
    named = "; ".join(" and ".join(f"{where} ({split})" for split, where in each) for each in found[:MOST_NAMED])
    more = f"; and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    warnings.warn(f"{path}: {len(found)} prompts are in several splits: {named}{more}", stacklevel=2)
  splits = {split: [samples[place] for place in own] for split, own in places.items()}
  return Questions(name or path.stem, judge, samples, splits)


def _places(
  records: Sequence[Record], sizes: Mapping[Split, int], seed: int, source: str, field: str
) -> Mapping[Split, Sequence[int]]:
  """The places of the samples of each split."""
  if not field:
    return divide_by_seed(range(len(records)), sizes, seed, source)
  named: dict[Split, list[int]] = {"train": [], "validation": [], "test": []}
  for place, record in enumerate(records):
    word = record.text(field).strip().lower()
    if word not in WORDS:
      raise ValueError(f"{record.where}: {field}: expected one of {', '.join(WORDS)}, got {word!r:.60}")
    named[WORDS[word]].append(place)
  return limited_by_seed(named, sizes, seed, source)


def _example(record: Record, rule: str) -> Example:
  """A line; raises ValueError naming it and the field."""
  if "answer" not in record.fields:
    raise ValueError(f"{record.where}: answer: expected one, got none (there are {', '.join(record.fields)})")
  answer = record.fields["answer"]
  check_expected(rule, answer, record.where)
  messages = _messages(record)
  is_text = rule in RULES and rule != "regex"  # what another rule takes for right is not known
  gold = str(answer) if is_text or (rule != "regex" and type(answer) is str) else ""
  return Example(messages[-1][1], gold, {"answer": answer, "messages": messages})


def _messages(record: Record) -> list[list[str]]:
  """Roles and contents of the dialogue with which a line begins."""
  if ("prompt" in record.fields) == ("messages" in record.fields):
    raise ValueError(f"{record.where}: expected either prompt or messages (there are {', '.join(record.fields)})")
  if "prompt" in record.fields:
    return [["user", record.text("prompt")]]
  given: Any = record.fields["messages"]
  if not isinstance(given, list) or not given or not all(map(_is_message, given)):
    raise ValueError(
      f"{record.where}: messages: expected a list of role (system, user, assistant) and content, got {given!r:.60}"
    )
  if given[-1]["role"] == "assistant":
    raise ValueError(f"{record.where}: messages: expected the last one not to be the assistant's")
  return [[message["role"], message["content"]] for message in given]


def _is_message(given: Any) -> bool:
  return (
    isinstance(given, dict)
    and given.keys() == {"role", "content"}
    and given["role"] in ("system", "user", "assistant")
    and isinstance(given["content"], str)
  )
