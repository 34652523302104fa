"""MBPP: short Python functions by description, graded by the tests that come with them (Austin et al. 2021).

The data is the user's: the full file of the benchmark (`text`, `code`, `test_setup_code`, `test_list`,
`challenge_test_list`) or the sanitized one (`prompt`, `code`, `test_imports`, `test_list`), as JSON Lines or an array.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from cqd_jax.tasks.execution import MOST_CPU_SECONDS, Harness, Job, Outcome
from cqd_jax.tasks.lines import Record, read_records
from cqd_jax.tasks.mbpp import expected, values
from cqd_jax.tasks.mbpp.checks import Check, checks_of, functions_of
from cqd_jax.tasks.mbpp.extract import extract_code
from cqd_jax.tasks.splits import divide_by_seed, limited_by_seed
from cqd_jax.tasks.task import Example, Split

PUBLISHED: Mapping[Split, range] = {
  "test": range(11, 511),
  "validation": range(511, 601),
  "train": range(601, 975),
}
"""The task_ids of the benchmark's own splits; 1 to 10 are for the prompt with examples."""

FOR_PROMPTS = range(1, 11)


@dataclasses.dataclass(frozen=True)
class Question:
  """A problem of the file.

  Attributes:
    number: its task_id; None where the file has none.
    text: what is asked.
    code: the published solution.
    before: imports of the tests, executed before an answer.
    after: executed after an answer and before the tests.
    tests: that are shown to the model.
    hidden: further tests.
    functions: that an answer has to define.
  """

  number: int | None
  text: str
  code: str
  before: str
  after: str
  tests: tuple[str, ...]
  hidden: tuple[str, ...]
  functions: tuple[str, ...]


class Form(NamedTuple):
  """How a question is put, and how its published solution is written as an answer."""

  prompt: Callable[[Question], str]
  gold: Callable[[Question], str]


class Mbpp:
  """The benchmark as a task; see `mbpp` for its settings.

  Attributes:
    name: of the task.
    harness: what executes answers.
    extract: what takes the code out of an answer.
    checks: what divides a test, and judges the values.
  """

  name = "mbpp"

  def __init__(
    self,
    questions: Sequence[Question],
    splits: Mapping[Split, Sequence[Question]],
    form: Form,
    seconds: int,
  ):
    source = resources.files(__package__).joinpath("harness_mbpp.py").read_text(encoding="utf-8")
    self.harness = Harness(f"mbpp_{seconds}_seconds", source, cpu_seconds=seconds)
    self.extract, self.checks = extract_code, checks_of
    self.judged_by = (expected.value_of, values.decode)
    self._questions, self._splits, self._form = questions, splits, form

  def examples(self, split: Split) -> list[Example]:
    """The questions of a split."""
    return [self._example(question) for question in self._splits[split]]

  def samples(self) -> list[Example]:
    """All questions of the file, in its order."""
    return [self._example(question) for question in self._questions]

  def _example(self, question: Question) -> Example:
    return Example(self._form.prompt(question), self._form.gold(question), dataclasses.asdict(question))

  def action(self, example: Example, answer: str) -> str:
    """The code that is found in an answer, for a person who reads it."""
    return self.extract(answer, example.expected["functions"])

  def job(self, example: Example, answer: str) -> Job:
    """The code of the answer, and what to evaluate beside it; nothing of what is expected."""
    asked = example.expected
    payload = {
      "before": asked["before"],
      "code": self.action(example, answer),
      "after": asked["after"],
      "checks": [[check.statements, list(check.expressions)] for check in self._checks(example)],
    }
    return Job(self.harness.name, payload)

  def passed(self, example: Example, outcome: Outcome) -> bool:
    """Whether every value is the expected one."""
    checks, sent = self._checks(example), outcome.value
    if outcome.status != "ok" or type(sent) is not list or len(sent) != len(checks):
      return False
    return all(check.passed(each) for check, each in zip(checks, sent, strict=True))

  def _checks(self, example: Example) -> list[Check]:
    asked = example.expected
    return [check for test in (*asked["tests"], *asked["hidden"]) for check in self.checks(test, asked["functions"])]


def mbpp(
  *,
  sizes: Mapping[Split, int],
  seed: int,
  data: str,
  prompt: Literal["chat", "few_shot"] = "chat",
  shots: tuple[int, ...] = (2, 3, 4),
  challenge: bool = False,
  seconds: int = 3,
) -> Mbpp:
  """MBPP: short Python functions, graded by their tests.

  Args:
    sizes: samples per split. The published splits by task_id (test 11 to 510, validation 511 to 600, train 601 to 974)
      are kept where the file has all of them; else the samples are divided by seed.
    seed: of the subsets.
    data: the file, in the full or the sanitized form.
    prompt: chat asks in words and shows the tests; few_shot is the benchmark's own prompt with solved examples.
    shots: task_id of the examples of few_shot.
    challenge: whether the tests of challenge_test_list count too; they are not shown.
    seconds: of CPU time that an answer may take, all of its tests together.

  Raises:
    ValueError: naming the file and the line, or the setting.
  """
  if not 1 <= seconds <= MOST_CPU_SECONDS:
    raise ValueError(f"seconds: expected 1 to {MOST_CPU_SECONDS}, got {seconds}")
  path = Path(data).expanduser()
  questions = [_question(record, challenge) for record in read_records(path)]
  form = _in_words() if prompt == "chat" else _with_examples(questions, shots, path)
  spoken_for = () if prompt == "chat" else shots
  splits = _divided([each for each in questions if each.number not in spoken_for], sizes, seed, str(path))
  return Mbpp(questions, splits, form, seconds)


def _question(record: Record, challenge: bool) -> Question:
  """A line of either form; raises ValueError naming the line and the field."""
  number = record.fields.get("task_id")
  if number is not None and type(number) is not int:
    raise ValueError(f"{record.where}: task_id: expected a number, got {number!r}")
  shown = record.texts("test_list")
  if not shown:
    raise ValueError(f"{record.where}: test_list: expected at least one test, got none")
  hidden = record.texts("challenge_test_list", ()) if challenge else ()
  code = record.text("code", "").replace("\r\n", "\n")
  return Question(
    number=number,
    text=record.text("text" if "text" in record.fields else "prompt").strip(),
    code=code,
    before="\n".join(record.texts("test_imports", ())),
    after=record.text("test_setup_code", "").replace("\r\n", "\n"),
    tests=shown,
    hidden=hidden,
    functions=_checked({"test_list": shown, "challenge_test_list": hidden}, code, record.where),
  )


def _checked(tests: Mapping[str, Sequence[str]], code: str, where: str) -> tuple[str, ...]:
  """The functions that tests are about; raises ValueError naming the test that is no Python."""
  for name, own in tests.items():
    for place, test in enumerate(own):
      try:
        checks_of(test, functions_of([test], code))
      except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {name}[{place}]: expected Python, got {test[:60]!r} ({error})") from error
  return functions_of([test for own in tests.values() for test in own], code)


def _divided(
  questions: Sequence[Question], sizes: Mapping[Split, int], seed: int, source: str
) -> Mapping[Split, Sequence[Question]]:
  """The published splits, where all questions are of the benchmark and each split has some; else by seed."""
  published = {split: [each for each in questions if each.number in numbers] for split, numbers in PUBLISHED.items()}
  known = sum(map(len, published.values())) + sum(each.number in FOR_PROMPTS for each in questions)
  if known == len(questions) and all(published[split] for split in PUBLISHED if sizes[split]):
    return limited_by_seed(published, sizes, seed, source)
  return divide_by_seed(questions, sizes, seed, source)


def _in_words() -> Form:
  """In words, with the tests; an answer is one fenced block."""
  return Form(
    lambda question: (
      f"Write a Python function for this task:\n\n{question.text}\n\nIt has to pass these tests:\n\n```python\n"
      f"{_shown(question)}\n```\n\nAnswer with the code in one block, and nothing else."
    ),
    lambda question: f"```python\n{question.code}\n```",
  )


def _with_examples(questions: Sequence[Question], shots: Sequence[int], path: Path) -> Form:
  """The benchmark's own prompt, word for word since scores depend on it: solved examples, then the question."""
  by_number = {question.number: question for question in questions}
  if missing := [number for number in shots if number not in by_number]:
    raise ValueError(f"shots: expected task_ids that are in {path}, got {', '.join(map(str, missing))}")
  if not shots:
    raise ValueError("shots: expected at least one task_id, got none")

  def begun(question: Question) -> str:
    return (
      f"You are an expert Python programmer, and here is your task: {question.text} "
      f"Your code should pass these tests:\n\n{_shown(question)}\n[BEGIN]\n"
    )

  def ended(question: Question) -> str:
    return f"{question.code}\n[DONE]"

  solved = [begun(by_number[number]) + ended(by_number[number]) for number in shots]
  return Form(lambda question: "\n\n".join([*solved, begun(question)]), ended)


def _shown(question: Question) -> str:
  return "\n".join(question.tests)
