"""DBBench as an episode: the model works on a database by SQL, then answers."""

from collections.abc import Mapping, Sequence

from cqd_jax.tasks.dbbench.answers import final_answer, is_right, observed, operation
from cqd_jax.tasks.dbbench.samples import Sample
from cqd_jax.tasks.episode import Message
from cqd_jax.tasks.execution import JSON, Harness, Job, Outcome, Service
from cqd_jax.tasks.splits import divide_by_seed
from cqd_jax.tasks.task import Example, Split

INSTRUCTION = """\
You are given a question about one table of a MySQL database, and you work on that database by SQL until you know the \
answer or have made the change that is asked for.
In each turn, first think aloud about the question and your plan, then do exactly one of two things.

To operate on the database, write

Action: Operation
```sql
SELECT column FROM table WHERE condition;
```

with a single statement on a single line and nothing else in the block. The first such block of your turn is executed; \
MySQL's response comes back as it is, and a long one is cut off.

To finish, write

Action: Answer
Final Answer: ["ANSWER1", "ANSWER2", ...]

Finish only when you are sure: the values have to match the expected ones exactly. Where the question asks for a \
change of the table, the table is checked after your last operation, and the final answer may be anything. A turn in \
neither form counts as a failure."""

ACKNOWLEDGED = "Ok."
"""The model's own first turn, in the published dialogue."""


class DBBench:
  """The database task of AgentBench (Liu et al. 2023, arXiv:2308.03688).

  Questions of kind INSERT, UPDATE and DELETE are graded by the table that the operations leave, whatever is answered;
  all others by the answer. Each dialogue works on a database of its own, which every job makes again from the sample
  and the operations so far.

  Deviations from the published program: there, all samples share one server, where those of the same table name
  overwrite and drop each other's table; an answer that is no list literal is compared with its leading blank; answers
  are evaluated as Python.

  Attributes:
    name: of the task.
    harness: what executes operations: the payload is {"table", "columns", "rows", "statements", "hash"}, the value
      {"observation": text of the last statement's result, "hash": of the table, if asked for}.
    operations: most operations that are executed in a dialogue.
  """

  def __init__(
    self,
    samples: Sequence[Sample],
    harness: Harness | Service,
    *,
    sizes: Mapping[Split, int],
    seed: int,
    name: str = "dbbench",
    operations: int = 5,
    instruction: str = INSTRUCTION,
  ):
    """Shares out the samples.

    Args:
      samples: all of them.
      harness: see the class.
      sizes: samples of each split.
      seed: by which they are drawn.
      name: of the task.
      operations: most operations that are executed in a dialogue, at least 1.
      instruction: what the model is told before the question.

    Raises:
      ValueError: if there are too few samples, or no operations.
    """
    if operations < 1:
      raise ValueError(f"operations: expected operations >= 1, got {operations}")
    self.name, self.harness = name, harness
    self.operations, self.instruction = operations, instruction
    self.max_turns = operations + 1
    self._all = tuple(map(example_of, samples))
    self._splits = divide_by_seed(self._all, sizes, seed, name)

  def examples(self, split: Split) -> Sequence[Example]:
    """The samples of a split."""
    return self._splits[split]

  def samples(self) -> Sequence[Example]:
    """All samples in the order of the file."""
    return self._all

  def opening(self, example: Example) -> tuple[Message, ...]:
    """The instruction, an "Ok.", the question: the published dialogue."""
    return (Message("user", self.instruction), Message("assistant", ACKNOWLEDGED), Message("user", example.prompt))

  def job(self, example: Example, answers: Sequence[str]) -> Job | None:
    """All operations so far; after the last turn of a modification, for the hash of the table."""
    statements, ended = self._progress(answers)
    if ended and not example.expected["modifies"]:
      return None
    payload: JSON = {**example.expected["table"], "statements": statements, "hash": ended}
    return Job(self.harness.name, payload)

  def reply(self, example: Example, answers: Sequence[str], outcome: Outcome) -> Message | float:
    """What the database said, or the score."""
    _, ended = self._progress(answers)
    value = outcome.value if outcome.status == "ok" and isinstance(outcome.value, dict) else {}
    if not ended:
      said = value.get("observation")
      return Message("user", observed(said if isinstance(said, str) else _in_words(outcome)))
    if example.expected["modifies"]:
      return float(value.get("hash") == example.expected["answer_md5"])
    answer = final_answer(answers[-1])
    return float(answer is not None and is_right(answer, example.expected["label"]))

  def action(self, example: Example, answers: Sequence[str]) -> str:
    """The statement that is executed after the latest turn."""
    del example
    statements, ended = self._progress(answers)
    return "" if ended else statements[-1]

  def _progress(self, answers: Sequence[str]) -> tuple[list[str], bool]:
    """The statements of all operations, and whether the latest turn was the last one."""
    asked = [operation(answer) for answer in answers]
    statements = [statement for statement in asked if statement is not None][: self.operations]
    return statements, asked[-1] is None or len(answers) > self.operations


def example_of(sample: Sample) -> Example:
  """A sample as an example; its answer is a gold one in the form of a final answer, or the statement to execute."""
  table = sample.table
  expected: JSON = {
    "index": sample.index,
    "kind": sample.kind,
    "modifies": sample.modifies,
    "label": list(sample.label),
    "answer_md5": sample.answer_md5,
    "table": {"table": table.name, "columns": list(table.columns), "rows": [list(row) for row in table.rows]},
  }
  answer = sample.label[0] if sample.modifies and sample.label else str(list(sample.label))
  return Example(sample.question, answer, expected)


def gold_turns(example: Example) -> tuple[str, ...]:
  """The turns of a model that knows the answer."""
  if not example.expected["modifies"]:
    return (f"Action: Answer\nFinal Answer: {example.answer}",)
  return (f"Action: Operation\n```sql\n{example.answer}\n```", 'Action: Answer\nFinal Answer: ["done"]')


def _in_words(outcome: Outcome) -> str:
  """For a model whose operation ended with all of what executed it."""
  reason = {"timeout": "it took too long", "killed": "it took too much memory", "overflow": "its result was too large"}
  return f"Error: the operation was ended: {reason.get(outcome.status, 'it failed')}"
