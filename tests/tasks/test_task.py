import re

import numpy as np
import pytest

from cqd_jax.tasks import task as task_module
from cqd_jax.tasks.execution import Harness, Job, Outcome
from cqd_jax.tasks.task import Example, Task, grade, grade_population


@pytest.fixture
def doubling():
  """The task that the module's docstring shows to users."""
  [source] = re.findall(r"```python\n(.*?)```", task_module.__doc__, re.DOTALL)
  scope = {"Harness": Harness, "Job": Job, "Example": Example}
  exec(source, scope)
  return scope["Doubling"]()


class Recorder:
  """Answers every job with the number of its payload's characters, and keeps what it was asked."""

  name = "lengths"
  harness = Harness("lengths", "run = len")

  def __init__(self, name="lengths"):
    self.name = name
    self.calls = []

  def examples(self, split):
    return [Example(f"{split} {n}", "x" * n, expected=n) for n in range(4)]

  def job(self, example, answer):
    return Job(self.name, answer)

  def passed(self, example, outcome):
    return outcome.value == example.expected

  def execute(self, jobs):
    self.calls.append([job.payload for job in jobs])
    return [Outcome("ok", len(job.payload)) for job in jobs]


def test_the_documented_task_is_a_task_and_grades(doubling, in_process):
  assert isinstance(doubling, Task)
  execute = in_process(doubling.harness)
  examples = doubling.examples("validation")[:6]  # 50 to 55
  answers = [examples[0].answer, "51+51", "104.0", "'106'", "nonsense", "2*54"]
  verdicts = grade(doubling, examples, answers, execute)
  assert verdicts.dtype == bool
  np.testing.assert_array_equal(verdicts, [True, True, False, False, False, False])


def test_documented_splits_are_disjoint(doubling):
  prompts = [example.prompt for split in ("train", "validation", "test") for example in doubling.examples(split)]
  assert len(set(prompts)) == len(prompts) == 90


def test_something_without_the_members_is_no_task():
  assert not isinstance(object(), Task)


def test_population_keeps_the_order_and_executes_equal_jobs_once():
  first, second = Recorder("first"), Recorder("second")
  asked = [first.examples("test")[1:4], second.examples("test")[:3]]  # lengths 1 2 3 and 0 1 2
  answers = [
    [["a", "bb", "c"], ["", "a", "a"]],
    [["a", "a", "ddd"], ["bb", "bb", "bb"]],
  ]
  verdicts = grade_population([first, second], asked, answers, first.execute)
  expected = [
    [[True, True, False], [True, True, False]],
    [[True, False, True], [False, False, True]],
  ]
  np.testing.assert_array_equal(verdicts, expected)
  # one call; "a" of the first task and "a" of the second are different jobs
  assert first.calls == [["a", "bb", "c", "", "a", "ddd", "bb"]]


def test_payloads_that_python_calls_equal_are_different_jobs(doubling):
  seen = []

  class Odd(type(doubling)):
    def job(self, example, answer):
      return Job("doubling", {"1": 1, "1.0": 1.0, "True": True, "[1]": [1]}[answer])

  def execute(jobs):
    seen.extend(job.payload for job in jobs)
    return [Outcome("ok", 0) for _ in jobs]

  grade(Odd(), doubling.examples("test")[:5], ["1", "1.0", "True", "[1]", "1"], execute)
  assert [repr(payload) for payload in seen] == ["1", "1.0", "True", "[1]"]


def test_nothing_to_grade_executes_nothing():
  recorder = Recorder()
  assert grade(recorder, [], [], recorder.execute).shape == (0,)
  assert grade_population([recorder], [recorder.examples("test")], [], recorder.execute).shape == (0, 1, 4)
  assert recorder.calls == []


def test_wrong_nesting_is_named():
  recorder = Recorder()
  asked = recorder.examples("test")
  with pytest.raises(ValueError, match=r"answers\[0\]: expected 4 answers to lengths, got 3"):
    grade(recorder, asked, ["", "a", "b"], recorder.execute)
  with pytest.raises(ValueError, match=r"examples: expected one list for each of 2 tasks, got 1"):
    grade_population([recorder, recorder], [asked], [], recorder.execute)
  with pytest.raises(ValueError, match=r"examples: expected 4 of every task, got 3 of lengths"):
    grade_population([recorder, recorder], [asked, asked[:3]], [], recorder.execute)
  with pytest.raises(ValueError, match=r"answers\[1\]: expected one list for each of 1 tasks, got 0"):
    grade_population([recorder], [asked], [[["", "a", "b", "c"]], []], recorder.execute)
  assert recorder.calls == []


def test_a_lost_outcome_is_an_error_and_not_a_shift():
  recorder = Recorder()
  with pytest.raises(ValueError, match="execute: expected 4 outcomes, got 3"):
    grade(recorder, recorder.examples("test"), ["", "a", "bb", "ccc"], lambda jobs: recorder.execute(jobs)[1:])


def test_examples_hash_whatever_is_expected():
  assert len({Example("p", "a", expected=[1]), Example("p", "a", expected=[1]), Example("q", "a")}) == 2
